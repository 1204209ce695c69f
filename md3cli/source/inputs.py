"""INPUTs: what each is, whether it can be entered, what its pictures are called, and whether --root allows them.

A list may spell a name as other systems do: with `\\` between folders (Windows), decomposed where the disk has it
composed (Macs), in quotes, or with a blank behind it. The name as it is written always comes first.

Opens no picture, but follows links to see where they lead.
"""

from __future__ import annotations

import base64
import codecs
import contextlib
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from md3cli.errors import InputError, RowError
from md3cli.records import ImageItem, RowFailure, SourceRow, printable
from md3cli.remote.address import folder_of, is_address, is_within, join, shown, shown_name
from md3cli.remote.hosts import require_extra
from md3cli.source.braces import expanded, has_braces
from md3cli.source.manifest import manifest_rows, open_input
from md3cli.source.requests import EmbeddedImage
from md3cli.source.tar import tar_members
from md3cli.source.walk import ARCHIVES, JSON, MANIFEST_SUFFIXES, SPREADSHEETS, STDIN, TAR, Glob, Kind, is_glob

_INNERMOST_BRACES = re.compile(r"\{[^{}]*(?:\.\.|,)[^{}]*\}")
_HEAD_BYTES = 1024  # of a file, to see what it is
_QUOTES = ('"', "'")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]|\\\\[^\\]")  # C:\ or \\server


class Input(NamedTuple):
    """One INPUT of the command line, or of those that braces name.

    `prefix` is what the names of its pictures start with; `base`, where braces named it, the folder that they are
    relative to. `pictures` is the folder that those of a COCO file are in.
    """

    typed: str
    kind: Kind
    prefix: str
    base: str | None = None
    pictures: str | None = None


def inputs_of(typed: str, is_alone: bool) -> Iterator[Input]:
    """Yield what an INPUT is: one, or all that its braces name.

    The names start with nothing where the INPUT is alone, with the INPUT as typed where there are several, and with
    the whole address where it is remote. The members of a lone tar and the rows of a lone manifest have names of their
    own. Of braces names start with what is behind their folder, as those of a pattern: `shards/{0..7}.tar` and
    `shards/*.tar` give the same.

    Raises:
        InputError: it does not exist (one among several is a picture that is not there), or is compressed.
        MissingExtraError: it is an address, and what fetches it is not installed.
    """
    if is_braced(typed):
        yield from _braced_inputs(typed, is_alone)
        return
    kind = _kind_of(typed, is_alone)
    if is_address(typed) and kind is Kind.FOLDER:
        typed = typed.rstrip("/")
    has_own_names = kind in (Kind.TAR, Kind.MANIFEST, Kind.STDIN, Kind.COCO)
    is_left_out = is_alone and (has_own_names or not is_address(typed))
    yield Input(typed, kind, "" if is_left_out else _start_of_names(typed, kind))


def is_braced(typed: str) -> bool:
    """Return whether braces in INPUT name several; a name that exists is never taken for a pattern."""
    return "{" in typed and has_braces(typed) and (is_address(typed) or not os.path.lexists(typed))


def paths_of(typed: str) -> Iterator[str]:
    """Yield INPUT, or the paths that its braces name.

    Raises:
        InputError: they are too many.
    """
    yield from expanded(typed) if is_braced(typed) else (typed,)


def _braced_inputs(typed: str, is_alone: bool) -> Iterator[Input]:
    components = typed.split("/")
    num_fixed = next(i for i, part in enumerate(components) if "{" in part or is_glob(part))
    base = "/".join(components[:num_fixed]) or ("/" if num_fixed else "")
    missing, remote_tars = list[str](), list[str]()
    for path in expanded(typed):
        if not (is_address(path) or is_glob(path) or os.path.lexists(path)):
            missing.append(path)
            continue
        kind = _kind_of(path, is_alone=False)
        if is_address(path):
            path = path.rstrip("/") if kind is Kind.FOLDER else path
            remote_tars += [path] if kind is Kind.TAR else []  # at which no look was taken
        start = _start_of_names(path, kind)
        is_relative = is_alone and not is_address(typed)
        yield Input(path, kind, below(start.rstrip("/"), base) if is_relative else start, base if is_alone else None)
    if remote_tars:
        from md3cli.source.remote_inputs import not_there

        missing += not_there(remote_tars)
    if missing:
        raise InputError(_missing_words(typed, missing))


def _missing_words(typed: str, missing: Sequence[str]) -> str:
    pattern = shown(typed)
    there = _INNERMOST_BRACES.sub("*", pattern)
    return (
        f"there is no {printable(shown(missing[0]))}: {len(missing):,} of the {sum(1 for _ in expanded(typed)):,} that "
        f"{printable(pattern)} names are missing; a pattern takes those that are there: '{printable(there)}'"
    )


def _start_of_names(typed: str, kind: Kind) -> str:
    return shown(Glob.parse(typed).base if kind is Kind.GLOB else typed)


def below(path: str, folder: str) -> str:
    """Return `path` relative to a `folder` that it begins with; the empty folder is the working folder."""
    head = os.path.join(folder, "")
    return "" if path == folder else path.removeprefix(head)


def _kind_of(typed: str, is_alone: bool) -> Kind:
    if typed == STDIN:
        return Kind.STDIN
    if is_address(typed):
        require_extra(typed)
        from md3cli.source.remote_inputs import kind_of_address

        return kind_of_address(typed, is_alone)
    suffix = os.path.splitext(typed)[1].lower()
    if os.path.isdir(typed):
        return Kind.FOLDER
    if not os.path.lexists(typed):  # a name that exists is never taken for a pattern
        return _kind_of_absent(typed, is_alone or suffix in MANIFEST_SUFFIXES or suffix == JSON)
    if typed.lower().endswith(ARCHIVES):
        raise InputError(f"{printable(typed)} is compressed; unpack it, or make it a plain .tar")
    if suffix in SPREADSHEETS:
        raise InputError(
            f"{printable(typed)} is a spreadsheet; save it as CSV UTF-8 with a column 'image', and give that"
        )
    if suffix == TAR:
        return Kind.TAR
    if suffix == JSON and _is_json(typed):
        return Kind.COCO
    return Kind.MANIFEST if suffix in MANIFEST_SUFFIXES else Kind.FILE


def _is_json(path: str) -> bool:
    """Return whether a file starts as a JSON object or list does; False where that cannot be seen."""
    try:
        with open_input(path) as file:
            return file.read(_HEAD_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b"[")
    except (InputError, OSError):
        return False


def _kind_of_absent(typed: str, is_needed: bool) -> Kind:
    if is_glob(typed):
        return Kind.GLOB
    if is_needed:
        raise InputError(f"there is no {printable(typed)}; check the path (a pattern is quoted: 'photos/**/*.jpg')")
    return Kind.FILE


def check_readable(given: Input, is_alone: bool, renamed: Mapping[str, str]) -> None:
    """Take the first step into INPUT now, before anything slow such as a model is loaded.

    Raises:
        InputError: there is no such step.
    """
    if given.kind is Kind.MANIFEST:
        next(manifest_rows(given.typed, renamed), None)
    elif given.kind is Kind.TAR and is_alone:
        with open_input(given.typed) as file, contextlib.suppress(RowError):
            next(tar_members(file, shown(given.typed)), None)
    elif given.kind in (Kind.FOLDER, Kind.GLOB):
        folder, _ = start_of_walk(given)
        if is_address(folder):
            from md3cli.source.remote_inputs import check_folder

            check_folder(folder)
            return
        try:
            os.scandir(folder).close()
        except OSError as error:
            raise InputError(f"cannot read the folder {printable(folder)}: {error.strerror}") from error


# -- where pictures are --------------------------------------------------------------------------


def image_item(name: str, path: str, offset: int = 0, size: int | None = None) -> ImageItem:
    """Return the picture at `path`, shown as `name`: valid UTF-8, with the exact bytes beside it where it is not."""
    try:
        name.encode()
    except UnicodeEncodeError:  # surrogate escapes
        data = os.fsencode(name)
        text, exact = data.decode("utf-8", "backslashreplace"), base64.b64encode(data).decode()
        return ImageItem(text, path, exact, offset, size)
    return ImageItem(name, path, None, offset, size)


def row_folder(typed: str, root: Path | str | None) -> str:
    """Return what relative paths in a manifest or on stdin are relative to."""
    if root is not None:
        return str(root).rstrip("/") or "/"
    if is_address(typed):
        return folder_of(typed)
    return "" if typed == STDIN else os.path.dirname(typed)


def root_of(given: Input, root: Path | str | None) -> str:
    """Return what the names of the pictures of a lone INPUT are relative to: a folder, a tar, or an address."""
    if given.base is not None and not (root and given.kind in (Kind.MANIFEST, Kind.COCO)):
        folder = given.base
    elif given.kind in (Kind.FOLDER, Kind.TAR):
        folder = given.typed
    elif given.kind is Kind.GLOB:
        folder = Glob.parse(given.typed).base
    elif given.kind is Kind.FILE:
        folder = row_folder(given.typed, None)
    else:
        folder = row_folder(given.typed, root or given.pictures)
    return shown(folder) if is_address(folder) else os.path.realpath(folder or ".")


def start_of_walk(given: Input) -> tuple[str, Glob | None]:
    """Return the folder that a walk of a folder or a glob begins in, and the glob."""
    if given.kind is not Kind.GLOB:
        return given.typed, None
    glob = Glob.parse(given.typed)
    return glob.base or ".", glob


class Confinement(NamedTuple):
    """`--root`: a folder with its links followed, or an address; None allows everything."""

    root: str | None
    typed: str

    @classmethod
    def to(cls, root: Path | str | None) -> Confinement:
        if root is None:
            return cls(None, "")
        typed = str(root)
        return cls(typed if is_address(typed) else os.path.realpath(typed), typed)

    def failure_of(self, path: str) -> RowFailure | None:
        """Return the failure of a path or an address that, links followed, leaves the root."""
        if self.root is None or self._holds(self.root, path):
            return None
        return RowFailure("outside_root", f"outside of --root {printable(shown(self.typed))}")

    def _holds(self, root: str, path: str) -> bool:
        if is_address(path) or is_address(root):
            return is_address(path) and is_address(root) and is_within(path, root)
        real = os.path.realpath(path)
        return real == root or real.startswith(root.rstrip("/") + "/")


def confined(row: SourceRow, folder: Confinement, *, may_fetch: bool) -> SourceRow:
    """Return a row of a Parquet file that lies in a folder, failed where it names a picture outside of the folder.

    A picture in a cell is the file's own, wherever a link to the file leads: the cache of Hugging Face is all links.
    With `may_fetch` the user allowed addresses.
    """
    image = row.image
    if row.failure is not None or image is None or image.row_group is not None:
        return row
    if (may_fetch and is_address(image.path)) or folder.failure_of(image.path) is None:
        return row
    why = f"outside of {printable(shown(folder.typed))}; set --root, or name the Parquet file to trust its paths"
    return replace(row, failure=RowFailure("outside_root", why))


class RowPlaces(NamedTuple):
    """Where the pictures are that the rows of one manifest name.

    `folder` is what relative paths start from, and `prefix` what their names start with; `may_fetch` says whether rows
    may name addresses. The names of pictures inside the manifest itself start with `cells`.
    """

    manifest: str
    cells: str
    folder: str
    prefix: str
    may_fetch: bool

    @classmethod
    def of(cls, given: Input, root: Path | str | None, *, is_alone: bool, may_fetch: bool) -> RowPlaces:
        """Return the places of the rows of INPUT `given`; a remote one may name addresses, for its user named one."""
        folder = row_folder(given.typed, given.pictures if root is None else root)
        prefix = "" if is_alone else shown(folder)
        if given.base is not None:
            prefix = "" if root is not None else below(prefix, shown(given.base))
        return cls(given.typed, given.prefix, folder, prefix, may_fetch or is_address(given.typed))

    def item_of(self, image: str | EmbeddedImage) -> ImageItem:
        """Return the picture that a row's `image` means."""
        if type(image) is EmbeddedImage:
            name = os.path.join(self.cells, image.name)
            item = image_item(name, self.manifest, image.offset)
            return replace(item, row_group=image.row_group, column=image.column)
        assert type(image) is str
        if is_address(image):
            return image_item(shown_name(image), image)
        name = os.path.join(self.prefix, image) if self.prefix else image
        if is_address(self.folder):
            return image_item(name, join(self.folder, image))
        return image_item(name, existing_path(self.folder, image))


# -- spellings -----------------------------------------------------------------------------------


def existing_path(folder: str, name: str) -> str:
    """Return the path of `name` below `folder` (empty: the working folder), in the spelling under which it is there.

    An absolute name stays as it is, and so does one that is there under no spelling.
    """
    path = _in_folder(folder, name)
    if _is_plain(name) or os.path.lexists(path):
        return path
    spelled = (_normalised(_in_folder(folder, other)) for other in _spellings(name))
    return next((found for found in spelled if found is not None), path)


def is_of_windows(name: str) -> bool:
    """Return whether a name starts with a drive or a server of Windows, on a machine that has none."""
    return os.name != "nt" and _DRIVE.match(name.strip().strip("".join(_QUOTES))) is not None


def _in_folder(folder: str, name: str) -> str:
    return (
        name if name.startswith("/") or not folder else f"{folder.rstrip('/')}/{name}"
    )  # the root has a slash already


def _is_plain(name: str) -> bool:
    """Return whether a name can be spelled in one way only, as nearly all can: then no file is looked for."""
    return name.isascii() and "\\" not in name and name[:1] not in ("~", *_QUOTES) and name.strip() == name


def _spellings(name: str) -> Iterator[str]:
    """Yield other spellings of a name, the most likely first."""
    bare = name.strip()
    if len(bare) > 2 and bare[0] == bare[-1] and bare[0] in _QUOTES:
        bare = bare[1:-1]
    for spelled in (name, bare):
        yield spelled
        if "\\" in spelled:
            yield spelled.replace("\\", "/")
    if bare.startswith("~/"):
        yield os.path.expanduser(bare)


def _normalised(path: str) -> str | None:
    """Return `path` with each part composed or decomposed as on the disk; None where there is no such file."""
    if os.path.lexists(path):
        return path
    if path.isascii():
        return None
    found = ""
    for part in re.split("(/)", path):
        forms = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
        there = next((form for form in forms if part in ("", "/") or os.path.lexists(found + form)), None)
        if there is None:
            return None
        found += there
    return found
