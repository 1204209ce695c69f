"""Manifests: `.csv .tsv .jsonl .parquet .txt` and the lines of stdin, read as rows of columns.

A manifest is of unknown origin and in any state. Each line that cannot be read is one row with a
`problem`; only a file that cannot be opened at all, or has no usable header, is an InputError. Values
come out as JSON types, whatever the format; what the columns mean is decided elsewhere.
Streams: memory is bounded by the longest line (16 MiB) or 256 rows of Parquet.
"""

from __future__ import annotations

import csv
import json
import os
import stat
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, NamedTuple, Protocol

from md3cli.errors import InputError
from md3cli.parquet_manifest import parquet_rows
from md3cli.records import printable
from md3cli.remote.address import is_address, shown, suffix_of

MANIFEST_SUFFIXES = frozenset({".csv", ".tsv", ".jsonl", ".parquet", ".txt"})
LINE_LIMIT_BYTES = 1 << 24
DEPTH_LIMIT = 64  # of nested lists and objects; deeper ones could not be written again

_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_NUMBERS = frozenset({"max_tokens", "max_objects", "temperature", "top_p", "seed"})
_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


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


_Line = tuple[int, bytes | None]  # its number; its bytes without the line end, or None where it is too long


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
        elif suffix == ".txt":
            yield from filter(None, path_rows(file))
        elif suffix == ".jsonl":
            for line in _lines(file):
                yield from _json_row(line)
        else:
            yield from _csv_rows(file, name, "\t" if suffix == ".tsv" else ",")


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
            yield _too_long(number)
        elif data:
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


def _lines(file: IO[bytes]) -> Iterator[_Line]:
    """The lines of a file on a disk."""
    return filter(None, _lines_so_far(file))


def _lines_so_far(file: LineReader) -> Iterator[_Line | None]:
    number, is_too_long = 0, False
    while (data := file.readline(LINE_LIMIT_BYTES)) != b"":
        if data is None:
            yield None
            continue
        number += not is_too_long  # else it is more of the same line
        if number == 1 and not is_too_long:
            if data.startswith(_UTF16_BOMS):
                raise InputError("the manifest is UTF-16; save it as UTF-8 and try again")
            data = data.removeprefix(_UTF8_BOM)
        if len(data) < LINE_LIMIT_BYTES and not is_too_long:
            yield number, data.removesuffix(b"\n").removesuffix(b"\r")
            continue
        is_too_long = not data.endswith(b"\n")
        if not is_too_long:
            yield number, None
    if is_too_long:
        yield number, None


def _too_long(number: int) -> ManifestRow:
    return ManifestRow(number, None, f"longer than {LINE_LIMIT_BYTES >> 20} MiB")


# -- JSON Lines ----------------------------------------------------------------------------------


def _json_row(line: _Line) -> Iterator[ManifestRow]:
    """The row of a line; nothing for a blank one."""
    number, data = line
    if data is None:
        yield _too_long(number)
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
    columns = json.loads(data.decode(), parse_constant=_refuse_constant)
    if not isinstance(columns, dict):
        raise ValueError("not a JSON object")
    if data.count(b"[") + data.count(b"{") > DEPTH_LIMIT and _depth(columns) > DEPTH_LIMIT:
        raise ValueError(_TOO_DEEP)
    try:
        json.dumps(columns, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character") from None
    return columns


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


# -- CSV -----------------------------------------------------------------------------------------


class _CsvLines:
    """Text lines for `csv.reader` that can be taken back to the one behind the start of a broken row.

    An unclosed quote swallows all lines up to the reader's field limit; rewound, it costs its own
    line only. Bytes that are not UTF-8 come as surrogates, found again in the finished row.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._lines = _lines(file)
        self._again: deque[_Line] = deque()
        self._taken: list[_Line] = []

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self._taken.append(line)
        number, data = line
        if data is None:
            raise csv.Error(_too_long(number).problem)
        return data.decode("utf-8", "surrogateescape") + "\n"

    def start_row(self) -> None:
        self._taken.clear()

    def rewind(self) -> None:
        self._again.extendleft(reversed(self._taken[1:]))

    @property
    def row_number(self) -> int:
        """The line at which the row under way started."""
        return self._taken[0][0] if self._taken else 0


class _Cells(NamedTuple):
    number: int  # of its first line
    cells: list[str]
    problem: str = ""


def _csv_cells(file: IO[bytes], delimiter: str) -> Iterator[_Cells]:
    lines = _CsvLines(file)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.start_row()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield _Cells(lines.row_number, [], str(error))
            lines.rewind()
            continue
        if cells:
            yield _Cells(lines.row_number, cells)


def _csv_rows(file: IO[bytes], name: str, delimiter: str) -> Iterator[ManifestRow]:
    rows = _csv_cells(file, delimiter)
    header = _header(next(rows, None), name)
    for number, cells, problem in rows:
        try:
            yield ManifestRow(number, None, problem) if problem else ManifestRow(number, _csv_columns(header, cells))
        except ValueError as error:
            yield ManifestRow(number, None, str(error))


def _header(row: _Cells | None, name: str) -> list[str]:
    if row is None:
        raise InputError(f"the manifest {name} is empty; its first line names the columns (image, prompt, ...)")
    header = [cell.strip() for cell in row.cells]
    if row.problem or "image" not in header:
        found = row.problem or f"its first line is: {printable(', '.join(header))[:200]}"
        raise InputError(f"the manifest {name} has no column 'image' ({found}); name the columns in its first line")
    if len(set(header)) < len(header):
        double = next(column for column in header if header.count(column) > 1)
        raise InputError(f"the manifest {name} names the column '{printable(double)}' twice; rename one")
    return header


def _csv_columns(header: Sequence[str], cells: Sequence[str]) -> dict[str, Any]:
    if len(cells) != len(header):
        raise ValueError(f"{len(cells)} columns where the header has {len(header)}")
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        raise ValueError("not valid UTF-8") from None
    return {column: _typed(column, cell) for column, cell in zip(header, cells, strict=True)}


def _typed(column: str, cell: str) -> Any:
    """A cell of a column with a type as that type where it can be read so; an empty one is null."""
    text = cell.strip()
    if column in _NUMBERS:
        return _number(text) if text else None
    if column == "reasoning":
        return _FLAGS.get(text.lower(), cell) if text else None
    if column == "spatial_refs":
        return _json_value(text) if text else None
    return cell


def _number(text: str) -> int | float | str:
    parsers: tuple[Callable[[str], int | float], ...] = (int, float)
    for parse in parsers:
        try:
            return parse(text)
        except ValueError:
            continue
    return text


def _json_value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
