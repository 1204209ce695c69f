"""Manifests: `.csv .tsv .jsonl .parquet .txt` and the lines of stdin, read as rows of columns.

A manifest is of unknown origin and in any state. Each line that cannot be read is one row with a
`problem`; only a file that cannot be opened at all, or has no usable header, is an InputError. Values
come out as JSON types, whatever the format; what the columns mean is decided elsewhere.
Streams: memory is bounded by the longest line (16 MiB) or some rows of Parquet (parquet_manifest.py).
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any, NamedTuple, Protocol

from md3cli.csv_manifest import Line, csv_rows
from md3cli.errors import InputError
from md3cli.parquet_manifest import parquet_rows
from md3cli.records import printable
from md3cli.remote.address import is_address, shown, suffix_of

MANIFEST_SUFFIXES = frozenset({".csv", ".tsv", ".jsonl", ".parquet", ".txt"})
LINE_LIMIT_BYTES = 1 << 24
TOO_LONG = f"longer than {LINE_LIMIT_BYTES >> 20} MiB"
DEPTH_LIMIT = 64  # of nested lists and objects; deeper ones could not be written again

_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_UTF16_START = re.compile(rb"(?:[ -~\r\n]\0){4}|(?:\0[ -~\r\n]){4}")  # text without its byte order mark
_HEAD_BYTES = 1 << 16
_FOREIGN = (  # how files start that are called like a list and are none
    (b"PK\x03\x04", "a spreadsheet or an archive (XLSX, ODS, ZIP), not text; save it as CSV UTF-8"),
    (b"\xd0\xcf\x11\xe0", "an old spreadsheet (XLS), not text; save it as CSV UTF-8"),
    (b"\x1f\x8b", "compressed (gzip), not text; unpack it"),
    (b"PAR1", "Parquet, not text; call it .parquet"),
)


class LineReader(Protocol):
    """A file, or live_lines.LiveLines."""

    def readline(self, limit: int, /) -> bytes | None:
        """The next line, cut at `limit` bytes; empty at the end; None: it has not come yet."""
        ...


class ManifestRow(NamedTuple):
    """One row: `columns` by name, or None with the `problem` that kept it from being read."""

    number: int
    columns: dict[str, Any] | None
    problem: str = ""
    unit: str = "line"

    @property
    def where(self) -> str:
        """What it is called in messages: `line 7`."""
        return f"{self.unit} {self.number}"


def manifest_rows(path: str) -> Iterator[ManifestRow]:
    """The rows of the manifest at `path`, by its suffix.

    Raises:
        InputError: on the first step, when it cannot be opened, is no regular file, or has no usable header.
    """
    suffix = suffix_of(path) if is_address(path) else os.path.splitext(path)[1].lower()
    name = printable(shown(path))
    with open_regular(path) as file:
        if suffix == ".parquet":
            for number, row in enumerate(parquet_rows(file, name), start=1):
                problem = row if isinstance(row, str) else ""
                yield ManifestRow(number, None if isinstance(row, str) else row, problem, "row")
            return
        refuse_foreign_text(file, name)
        if suffix == ".txt":
            yield from filter(None, path_rows(file))
        elif suffix == ".jsonl":
            for line in _lines(file):
                yield from _json_row(line)
        else:
            delimiter = "\t" if suffix == ".tsv" else ","
            yield from (ManifestRow(*row) for row in csv_rows(_lines(file), name, delimiter, too_long=TOO_LONG))


def refuse_foreign_text(file: IO[bytes], name: str) -> None:
    """Look at how a list starts, and go back to its start.

    Raises:
        InputError: it is UTF-16, has the line ends of old Macs, or is no text at all.
    """
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    for start, what in _FOREIGN:
        if head.startswith(start):
            raise InputError(f"the manifest {name} is {what}")
    if head.startswith(_UTF16_BOMS) or _UTF16_START.match(head):
        raise InputError(f"the manifest {name} is UTF-16; save it as UTF-8 and try again")
    if b"\r" in head.rstrip(b"\r") and b"\n" not in head:
        raise InputError(
            f"the lines of the manifest {name} end as on old Macs (CR alone); save it with LF or CRLF and try again"
        )


def path_rows(file: LineReader, *, has_json: bool = False) -> Iterator[ManifestRow | None]:
    """A path a line, in any encoding; with `has_json` (stdin) a line may be a JSON object instead.

    None where the next line has not come yet.
    """
    for line in _lines_so_far(file):
        if line is None:
            yield None
            continue
        number, data = line
        if has_json and data is not None and data.lstrip().startswith(b"{"):
            yield from _json_row(line)
        elif data is None:
            yield ManifestRow(number, None, TOO_LONG)
        elif data.strip():
            yield ManifestRow(number, {"image": os.fsdecode(data)})


def open_regular(path: str) -> IO[bytes]:
    """Open an INPUT that is read as a whole, here or at an address, without ever blocking on a FIFO.

    Raises:
        InputError: it cannot be opened, or is no regular file.
    """
    if is_address(path):
        return _open_address(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(f"cannot open {printable(path)}: {error.strerror}; check its permissions") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InputError(f"{printable(path)} is not a regular file; pipe a list of paths to INPUT - instead")
    return os.fdopen(fd, "rb")


def _open_address(address: str) -> IO[bytes]:
    from md3cli.remote.inputs import open_input

    return open_input(address)


def _lines(file: IO[bytes]) -> Iterator[Line]:
    """The lines of a file on a disk."""
    return filter(None, _lines_so_far(file))


def _lines_so_far(file: LineReader) -> Iterator[Line | None]:
    number, is_too_long = 0, False
    while (data := file.readline(LINE_LIMIT_BYTES)) != b"":
        if data is None:
            yield None
            continue
        number += not is_too_long  # else it is more of the same line
        if number == 1 and not is_too_long:
            if data.startswith(_UTF16_BOMS):  # of stdin, which cannot be looked at before
                raise InputError("the list is UTF-16; save it as UTF-8 and try again")
            data = data.removeprefix(_UTF8_BOM)
        if len(data) < LINE_LIMIT_BYTES and not is_too_long:
            yield number, data.removesuffix(b"\n").removesuffix(b"\r")
            continue
        is_too_long = not data.endswith(b"\n")
        if not is_too_long:
            yield number, None
    if is_too_long:
        yield number, None


# -- JSON Lines ----------------------------------------------------------------------------------


def _json_row(line: Line) -> Iterator[ManifestRow]:
    """The row of a line; nothing for a blank one."""
    number, data = line
    if data is None:
        yield ManifestRow(number, None, TOO_LONG)
    elif data.strip():
        try:
            yield ManifestRow(number, _json_columns(data))
        except UnicodeDecodeError:
            yield ManifestRow(number, None, "not valid UTF-8")
        except json.JSONDecodeError as error:
            yield ManifestRow(number, None, f"{error.msg} at column {error.colno}")
        except ValueError as error:
            yield ManifestRow(number, None, str(error))
        except RecursionError:
            yield ManifestRow(number, None, _TOO_DEEP)


_TOO_DEEP = f"nested deeper than {DEPTH_LIMIT} levels"


def _json_columns(data: bytes) -> dict[str, Any]:
    """The object a line holds.

    Raises:
        ValueError, RecursionError: it cannot be read, or could not be written again as it is.
    """
    columns = json.loads(data.decode(), parse_constant=_refuse_constant, object_pairs_hook=_unique)
    if not isinstance(columns, dict):
        raise ValueError("not a JSON object")
    if data.count(b"[") + data.count(b"{") > DEPTH_LIMIT and _depth(columns) > DEPTH_LIMIT:
        raise ValueError(_TOO_DEEP)
    try:
        json.dumps(columns, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character") from None
    return columns


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of a key that comes twice nobody knows which value is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key '{printable(twice)[:100]}' comes twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _depth(value: Any) -> int:
    """How deep lists and objects are nested; level by level, so that nothing recurses."""
    depth, level = 0, [value]
    while level:
        depth += 1
        nested = [item for item in level if isinstance(item, dict | list)]
        level = [child for item in nested for child in (item.values() if isinstance(item, dict) else item)]
    return depth - 1
