"""Where the pictures of finished records are.

A record names its picture relative to INPUT; `run.json` beside the records says where INPUT was (a folder, perhaps of
Parquet files that hold the pictures, or a tar), `--root` overrules it. Records of several runs have a root each; of
files of one name the one with the record's SHA-256 is taken. Records and run.json may come from a stranger, and some
formats carry whole files. So a name that leads out of the root is not followed, a name inside a tar is looked up in
that tar only, and a file is carried only if it is a picture. A root that nobody typed and that this user's md3 did not
write is a claim: below it a file counts as a record's picture only if its bytes have the record's SHA-256. Pictures are
opened only through `md3cli.images.crops`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from md3cli.errors import ExportError, ImageError, InputError, RowError, UsageError
from md3cli.exporters import ExportOptions
from md3cli.exporters.cells import PARQUET, Cells
from md3cli.exporters.grouping import ImageGroup
from md3cli.files import copy_file
from md3cli.finished.digest import DigestSet, digest_of
from md3cli.finished.run_json import KnownRoot
from md3cli.records import ImageItem, RecordDict, printable
from md3cli.refine.collection import Collection
from md3cli.source.inputs import existing_path
from md3cli.source.tar import tar_members

if TYPE_CHECKING:
    from PIL.Image import Image

# In the name of a member, or of a cell: what is before is the file's own.
_INSIDE = re.compile(r"\.(?:tar|parquet)(/)", re.IGNORECASE)


class OtherPictureError(ImageError):
    """The file is there, and its bytes are not the ones that the model saw."""


@dataclass(slots=True, unsafe_hash=True)
class FoundPicture(ImageItem):
    """A picture of a record; its bytes must have the digest `sha256`, where that is not None.

    `content` has the bytes where they had to be read to find it: of a cell of a Parquet file. `size_wh` is the upright
    picture's size in pixels as the record says it.
    """

    sha256: str | None = None
    size_wh: tuple[object, object] | None = field(default=None, compare=False)
    content: bytes | None = field(default=None, repr=False, hash=False, compare=False)


def pillow_opens(
    content: bytes,
    formats: tuple[str, ...] | None = None,
    *,
    is_whole: bool = True,
    not_opened: frozenset[tuple[str, str]] = frozenset(),
) -> bool:
    """Return whether plain Pillow opens a file as one of its `formats`, and where `is_whole` decodes it to its end.

    So does `datasets`, which turns it upright, too. A file that does not decode, or whose EXIF cannot be written again,
    stops the loop over the set there. Pairs of a format and a mode in `not_opened` do not count.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content), formats=formats) as image:
            if (image.format, image.mode) in not_opened:
                return False
            if is_whole:
                image.load()  # stricter than ours: a JPEG without its end marker is refused
                ImageOps.exif_transpose(image)  # this, too: of 5,800 files with changed EXIF it refused 3 %
    except Exception:  # noqa: BLE001 - decoders raise OSError, ValueError, SyntaxError, RuntimeError, struct.error, ...
        return False
    return True


def exif_turns(content: bytes) -> bool:
    """Return whether a file's EXIF says that the picture is not upright as it lies; so too where it cannot be read."""
    from PIL import ExifTags, Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            return bool(image.getexif().get(ExifTags.Base.Orientation, 1) != 1)
    except Exception:  # noqa: BLE001 - EXIF is hostile input
        return True


@dataclass(frozen=True, slots=True)
class Root:
    """Where pictures whose names begin with `prefix` are: a folder or a tar.

    `is_trusted`: the user typed it, or this user's md3 wrote it.
    """

    path: Path
    is_trusted: bool
    prefix: str = ""


def roots_of(records: Collection, typed: Path | None) -> list[Root]:
    """Return the roots of a collection that are there: as `typed`, else as each run says."""
    found: dict[Root, None] = {}
    for source, info in zip(records.sources, records.infos(), strict=True):
        known = info.roots if typed is None else [KnownRoot(typed, True, prefix) for prefix in info.prefixes]
        for root in known:
            if os.path.exists(root.path):
                found[Root(Path(os.path.realpath(root.path)), root.is_own, source.prefix + root.prefix)] = None
    return list(found)


def backgrounds_of(records: Collection) -> tuple[str, ...]:
    """Return what the runs laid transparent pictures on, each once; `none` dropped alpha."""
    found: dict[str, None] = {}
    for document in (info.document for info in records.infos()):
        identity, selected = document.get("identity"), document.get("backgrounds")  # the latter: `md3 select` wrote it
        of_run = [identity.get("background")] if isinstance(identity, dict) else []
        known = [*of_run, *(selected if isinstance(selected, list) else [])]
        found |= dict.fromkeys(colour for colour in known if isinstance(colour, str))
    return tuple(found)


def as_seen(records: Collection, options: ExportOptions) -> ExportOptions:
    """Return options under which transparent pictures lie on what is typed, else on what the model saw them on.

    Raises:
        UsageError: nothing is typed, and the runs looked at pictures on different ones.
    """
    known = backgrounds_of(records)
    if options.background is None and len(known) > 1:
        colours = ", ".join(map(printable, known))
        raise UsageError(f"the runs laid transparent pictures on {colours}; say on which they lie now: --background")
    return options if options.background is not None else replace(options, background=next(iter(known), None))


class Pictures:
    """The pictures of one export: found, opened, and counted where they are not there.

    `root` is the folder or tar of the first run, None where nothing says it or it is gone; `is_trusted` as there.
    """

    def __init__(self, records: Collection, options: ExportOptions) -> None:
        self._options = options
        self.roots = roots_of(records, options.root)
        self.root = self.roots[0].path if self.roots else None
        self.is_trusted = all(root.is_trusted for root in self.roots)
        self._open_tar: tuple[Path, dict[str, list[ImageItem]]] | None = None  # records of one tar stand together
        self._cells = Cells(options.max_file_size)
        self.num_found = 0
        self.num_missing = 0
        self._first_missing = ""
        self._resized, self._first_resized, self._counting = DigestSet(), "", threading.Lock()
        self.is_unlinked = False  # a copy was made where a link was asked for

    def require_root(self, format: str) -> None:
        """Raise where this export cannot know where the pictures are."""
        if self.root is None:
            raise UsageError(f"{format} needs the pictures, and run.json does not say where they are; add --root DIR")

    def require_trusted(self, what: str) -> None:
        """Raise where nobody but run.json says where the pictures are, and it is not of this user's md3."""
        if not self.is_trusted:
            claimed = printable(str(self.root))
            raise UsageError(
                f"{what} needs --root DIR here: run.json says {claimed}, but your own md3 did not write it, so it "
                "may be a stranger's; if it is right, type it"
            )

    def find(self, record: RecordDict, *, has_twins: bool = False) -> FoundPicture | None:
        """Find the picture of a record, one of twins by its digest; None, and counted, where it is not there."""
        root, item = self._look_up(record)
        self.num_found += item is not None
        self.num_missing += item is None
        if item is None or root is None:
            self._first_missing = self._first_missing or str(record["image"])
            return None
        sha256 = record.get("sha256") if root.is_trusted else str(record.get("sha256"))
        sha256 = sha256 if has_twins or not root.is_trusted else None
        content = item.content if isinstance(item, FoundPicture) else None
        size_wh = record.get("width"), record.get("height")
        return FoundPicture(
            item.name, item.path, item.name_b64, item.offset, item.size, sha256=sha256, size_wh=size_wh, content=content
        )

    def note_unreadable(self, name: str) -> None:
        """Count a picture that was found and cannot be read after all."""
        self.num_found -= 1
        self.num_missing += 1
        self._first_missing = self._first_missing or name

    def refuse_inside(self, out: Path, group: ImageGroup) -> None:
        """Raise if replacing `out` would delete the image's picture."""
        for root in self.roots:
            path = os.path.normpath(root.path / group.name.removeprefix(root.prefix))
            if Path(path).is_relative_to(os.path.realpath(out)):
                raise UsageError(f"{printable(str(out))} holds the pictures themselves; name another -o")

    def read(self, picture: FoundPicture) -> Image:
        """Read the upright RGB picture.

        Raises:
            ImageError: it cannot be read any more, or is not the record's.
        """
        from md3cli.images.crops import ImageLimits, read_image

        limits = ImageLimits(self._options.max_pixels, self._options.max_file_size)
        image, sha256 = read_image(picture, limits, self._options.background, data=picture.content)
        _check_digest(picture, sha256)
        self._note_size(picture, image.size)
        return image

    def read_bytes(self, picture: FoundPicture) -> bytes:
        """Read the file as it is, for formats that carry pictures.

        Raises:
            ImageError: it is too large, cannot be read, is no picture, or is not the record's.
        """
        from md3cli.images.crops import read_bytes
        from md3cli.images.pixels import check_kind

        data = picture.content or read_bytes(picture, self._options.max_file_size)
        _check_digest(picture, hashlib.sha256(data).hexdigest() if picture.sha256 is not None else "")
        self._note_size(picture, check_kind(data))
        return data

    def copy(self, picture: FoundPicture, target: Path) -> None:
        """Make `target` a copy of the picture's file, or the same file with `--link`.

        Raises:
            OSError: it cannot be read or written.
        """
        if not copy_file(picture.path, target, is_linked=self._options.is_linked):
            self.is_unlinked = self._options.is_linked  # a plain assignment: several threads copy

    def notes(self) -> tuple[str, ...]:
        """Return sentences about links that are copies, and pictures that are not there.

        Raises:
            ExportError: not one is there, so the root must be wrong.
        """
        if not self.num_missing:
            return (*self.file_notes(),)
        where, example = printable(str(self.root)), printable(self._first_missing)
        claim = (
            "" if self.is_trusted else " (only run.json says so, and your own md3 did not write it: sha256 must agree)"
        )
        if not self.num_found:
            raise ExportError(
                f"none of {self.num_missing} pictures is below {where}{claim} (first: {example}); set --root DIR"
            )
        missing = f"{self.num_missing} pictures cannot be read below {where}{claim}, they are left out"
        return (*self.file_notes(), f"{missing} (first: {example})")

    def file_notes(self) -> Iterator[str]:
        """Yield how many pictures are others than the model saw, and that they were copied in spite of `--link`."""
        if self._resized:
            count = f"{len(self._resized):,} {'picture has' if len(self._resized) == 1 else 'pictures have'}"
            yield (
                f"{count} another size in pixels now than the records say, so what was found does not fit (first: "
                f"{printable(self._first_resized)}); annotate again, or set --root DIR"
            )
        if self.is_unlinked:
            yield "pictures were copied, not linked: OUT is on another disk, or on one that has no hard links"

    def _note_size(self, picture: FoundPicture, size_wh: tuple[int, int]) -> None:
        """Count a picture, once, whose size is not the record's; one that lies turned has its sides exchanged."""
        known = picture.size_wh
        if known is None or None in known or size_wh in (known, known[::-1]):
            return
        place = f"{picture.path}:{picture.offset}:{picture.name}"
        with self._counting:  # several threads read
            self._first_resized = self._first_resized or picture.name
            self._resized.add(digest_of(place))

    def _look_up(self, record: RecordDict) -> tuple[Root | None, ImageItem | None]:
        """Return the record's picture and the root it was found below; of several the one with its digest."""
        found = [(root, item) for root in self.roots if (item := self._below(root, record)) is not None]
        if len(found) > 1:
            found.sort(key=lambda root_item: self._digest(root_item[1]) != record.get("sha256"))
        return found[0] if found else (None, None)

    def _below(self, root: Root, record: RecordDict) -> ImageItem | None:
        name, name_b64 = str(record["image"]), record.get("image_b64")
        if "\0" in name or not name.startswith(root.prefix):
            return None
        try:
            exact = os.fsdecode(base64.b64decode(name_b64, validate=True)) if name_b64 else name
        except ValueError:
            return None
        exact = exact.removeprefix(root.prefix)
        if root.path.is_file():
            return self._member(root.path, exact, record)
        for cut in _INSIDE.finditer(exact):
            file = self._inside(root.path, exact[: cut.start(1)])
            if file is not None and os.path.isfile(file):  # a member's name leads to no other file, whatever it says
                return self._member(Path(file), exact[cut.end() :], record)
        path = self._inside(root.path, existing_path(str(root.path), exact))  # the record keeps a list's own spelling
        if path is not None and os.path.isfile(path):
            return ImageItem(name, path, name_b64)
        found = self._cells.lone(root.path, exact, record.get("sha256"))
        return None if found is None else _of_cell(name, *found)

    def _inside(self, root: Path, name: str) -> str | None:
        """Return the path of `name` below the root; None where it leads out of there."""
        # A link inside the root is the user's own doing; a name that climbs out need not be.
        path = os.path.normpath(root / name)
        return path if not self._options.is_confined or Path(path).is_relative_to(root) else None

    def _member(self, tar: Path, name: str, record: RecordDict) -> ImageItem | None:
        """Find a picture inside a tar by its name there; of several of one name the one with the record's digest."""
        if tar.suffix.lower() == PARQUET:
            content = self._cells.read(str(tar), name, record.get("sha256"))
            return None if content is None else _of_cell(name, str(tar), content)
        if self._open_tar is None or self._open_tar[0] != tar:
            self._open_tar = (tar, _members(tar))
        found = self._open_tar[1].get(name, [])
        if len(found) < 2:
            return found[0] if found else None
        return next((item for item in found if self._digest(item) == record.get("sha256")), None)

    def _digest(self, item: ImageItem) -> str | None:
        from md3cli.images.crops import read_bytes

        content = item.content if isinstance(item, FoundPicture) else None
        try:
            return hashlib.sha256(content or read_bytes(item, self._options.max_file_size)).hexdigest()
        except ImageError:
            return None


def _of_cell(name: str, path: str, content: bytes) -> FoundPicture:
    return FoundPicture(name, path, size=len(content), content=content)


def _check_digest(picture: FoundPicture, sha256: str) -> None:
    if picture.sha256 is not None and sha256 != picture.sha256:
        raise OtherPictureError("io", "the file there is not the record's picture (its sha256 differs)")


def _members(tar: Path) -> dict[str, list[ImageItem]]:
    """Return the files of a tar by name; the one table here that grows with the pictures (300 bytes each)."""
    found: dict[str, list[ImageItem]] = {}
    try:
        with tar.open("rb") as file:
            for member in tar_members(file, str(tar)):
                if member.isreg() and not member.issparse():
                    name = member.name.removeprefix("./")
                    item = ImageItem(name, str(tar), offset=member.offset_data, size=member.size)
                    found.setdefault(name, []).append(item)
    except (InputError, RowError, OSError):
        return found  # as far as it goes
    return found
