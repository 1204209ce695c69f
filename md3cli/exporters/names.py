"""Names of an export's files about pictures: inside OUT, as readers and file systems take them, each given once.

A record's image name is not to be trusted: it may be a URL, be absolute, climb with `..`, or be too long once a
suffix is added. Candidates for its file's name stay inside the output; `StagedFolder.create` takes the first free one.
Flat names are for readers that skip sub-folders, tell files apart by their stems, or choke on other letters.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from itertools import chain, count
from pathlib import PurePosixPath

from md3cli.errors import ExportError
from md3cli.finished.digest import DIGEST_BYTES, DigestSet
from md3cli.records import printable
from md3cli.source.walk import IMAGE_SUFFIXES

NAME_LIMIT_BYTES = 255  # of one path component on every common file system
_PATH_LIMIT_BYTES = 2048  # leaves room for OUT itself below the usual 4096
_DEPTH_LIMIT = 64  # folders are made by recursion, here and in those who read


# What Windows refuses in a name or reads as a drive, a stream or a folder, and control characters.
_ODD = {ord(char): "_" for char in '<>:"|?*\\'} | dict.fromkeys([*range(32), 127], "_")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]) *(\.|$)", re.IGNORECASE)


def relative_name(image: str) -> PurePosixPath:
    """Return `image` as a path below a folder: no scheme, root, `.` or `..`; never empty; portable on Windows."""
    _, _, after_scheme = image.partition("://")
    parts = [part.replace("\0", "_") for part in (after_scheme or image).split("/") if part not in ("", ".", "..")]
    name = PurePosixPath(*parts) if parts else PurePosixPath("image")
    return portable(name) if os.name == "nt" else name


def portable(name: PurePosixPath) -> PurePosixPath:
    """Return `name` as every common file system takes it: odd characters, ends and reserved names replaced."""
    return PurePosixPath(*map(_portable_part, name.parts))


def _portable_part(part: str) -> str:
    plain = part.translate(_ODD)
    bare = plain.rstrip(". ")  # Windows drops these
    plain = bare + "_" * (len(plain) - len(bare))
    return f"_{plain}" if _RESERVED.match(plain) else plain


def is_picture_name(name: str) -> bool:
    """Return whether a file's name ends as a picture's."""
    return suffix_in(name).lower() in IMAGE_SUFFIXES


def beside_pictures(name: PurePosixPath) -> PurePosixPath:
    """Return `name`, portable, in no folder called as a picture: in a bucket `b.jpg` and `b.jpg/c.jpg` both exist."""
    *folders, last = portable(name).parts
    return PurePosixPath(*(f"{folder[:-1]}_" if is_picture_name(folder) else folder for folder in folders), last)


def candidates(image: str, suffix: str, *, keep_suffix: bool = False) -> Iterator[PurePosixPath]:
    """Yield names for a file about `image`, best first: `a/photo.txt`, `a/photo.jpg.txt`, then with a digest.

    With `keep_suffix` the image's own suffix always stays: `a/photo.jpg.txt`. The digest is of
    the whole name, so the last candidates belong to this image alone.
    """
    relative = relative_name(image)
    digest = hashlib.sha256(image.encode("utf-8", "surrogateescape")).hexdigest()
    stem = relative.name.removesuffix(relative.suffix) if relative.suffix else relative.name
    if len(str(relative).encode()) <= _PATH_LIMIT_BYTES and len(relative.parts) <= _DEPTH_LIMIT:
        if not keep_suffix:
            yield relative.with_name(shortened(stem, suffix, digest))
        yield relative.with_name(shortened(relative.name, suffix, digest))
        yield relative.with_name(shortened(f"{shortened(stem, '', digest, 200)}~{digest[:16]}", suffix, digest))
    yield PurePosixPath(f"{digest}{suffix}")


def shortened(stem: str, suffix: str, digest: str, limit_bytes: int = NAME_LIMIT_BYTES) -> str:
    """Return `stem + suffix`, or where that is too long the stem's beginning, a digest and the suffix."""
    encoded = stem.encode("utf-8", "surrogateescape")
    if len(encoded) + len(suffix.encode()) <= limit_bytes:
        return stem + suffix
    tail = f"~{digest[:16]}{suffix}"
    return encoded[: limit_bytes - len(tail.encode())].decode("utf-8", "ignore") + tail


_NOT_PLAIN = re.compile(r"[^A-Za-z0-9._-]+")
_PLAIN_CHARS = 120  # of a flat name; room for a digest, a number and a suffix


def plain(text: str) -> str:
    """Return `text` in the letters `A-Za-z0-9._-`, accents dropped: never empty, hidden, reserved, or too long."""
    bare = text[: 8 * _PLAIN_CHARS]
    if not bare.isascii():
        bare = "".join(char for char in unicodedata.normalize("NFKD", bare) if not unicodedata.combining(char))
    name = _NOT_PLAIN.sub("_", bare)[:_PLAIN_CHARS].rstrip(".")
    name = f"_{name[1:]}" if name.startswith((".", "-")) else name
    return f"_{name}" if not name or _RESERVED.match(name) else name


class Names:
    """The names that one export gives.

    Flat ones are unique without suffix and case, in 21 bytes a name; of others the file system says whether one is
    free. `fitted` makes of a name what the format's readers take.
    """

    def __init__(self, *, is_flat: bool, fitted: Callable[[PurePosixPath], PurePosixPath] = portable) -> None:
        self.is_flat = is_flat
        self._fitted = fitted
        self._taken = DigestSet()

    def of(self, image: str, suffix: str, *, keep_suffix: bool = False) -> Iterator[PurePosixPath]:
        """Yield names for a file about `image` that end in `suffix`, as `candidates`; a flat one is given once."""
        if self.is_flat:
            yield PurePosixPath(self.claimed(stem_of(image)) + suffix)
        else:
            yield from map(self._fitted, candidates(image, suffix, keep_suffix=keep_suffix))

    def about(self, image: str, suffix: str) -> Iterator[PurePosixPath]:
        """Yield names as `of`; of an image that is not called as a picture the whole name stays."""
        return self.of(image, suffix, keep_suffix=not is_picture_name(image))

    def first_free(self, image: str, suffix: str) -> PurePosixPath:
        """Return the first name `about` the image whose path without suffix was not given before, in any case.

        For names that no folder keeps apart.

        Raises:
            ExportError: each of them was given.
        """
        for name in self.about(image, suffix):
            if self.is_flat or self._claim(os.path.splitext(name)[0]):
                return name
        raise ExportError(f"no file name is left for {printable(image)}")

    def claimed(self, text: str) -> str:
        """Return a flat name for `text` that was not given before: its letters, where taken with a digest."""
        short = plain(text)
        if self._claim(short):
            return short
        digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
        told_apart = (f"{short}-{digest[:8]}", f"{short}-{digest[:16]}")
        numbered = (f"{short}-{digest[:8]}-{number}" for number in count(2))  # one name for several pictures
        return next(name for name in chain(told_apart, numbered) if self._claim(name))

    def _claim(self, name: str) -> bool:
        return self._taken.add(hashlib.sha256(name.casefold().encode("utf-8", "surrogatepass")).digest()[:DIGEST_BYTES])


def stem_of(image: str) -> str:
    """Return a picture's name as one text, folders joined by `_`, without the suffix of a picture."""
    _, _, after_scheme = image.partition("://")
    parts = [part for part in (after_scheme or image).split("/") if part not in ("", ".", "..")]
    suffix = suffix_in(image)
    name = "_".join(parts)
    return name.removesuffix(suffix) if suffix.lower() in IMAGE_SUFFIXES else name


def suffix_in(image: str) -> str:
    """Return the suffix in a picture's name, as it stands there; empty where there is none."""
    last = image.rpartition("/")[2]
    dot = last.rfind(".")
    if last.strip(".") and os.name != "nt":
        return last[dot:] if 0 < dot < len(last) - 1 else ""
    return relative_name(image).suffix
