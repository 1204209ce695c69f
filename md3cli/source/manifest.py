"""Manifests: `.csv .tsv .jsonl .parquet .txt` and the lines of stdin, read as rows of columns.

A manifest is of unknown origin and in any state. Each line that cannot be read is one row with a `problem`; only a
file that cannot be opened at all, or has no usable header, is an InputError. That is why CSV is read line by line
here: an error costs its row and no other. It is read as spreadsheets save it: with `;` or tabs between the cells, a
first line `sep=;`, empty columns and empty rows behind the table.

Values come out as JSON types, whatever the format; what columns mean, and where pictures are, is decided elsewhere.
Memory is bounded by the longest line (16 MiB) or some rows of Parquet.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import select
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

from md3cli.errors import InputError, NoImageColumnError, UsageError
from md3cli.records import printable, refuse_constant, unique_keys
from md3cli.remote.address import is_address, shown, suffix_of
from md3cli.source.columns import clash_of, image_column, likely_images, renamed_columns
from md3cli.source.parquet import parquet_rows
from md3cli.source.requests import refuse_doubles, typed_cell
from md3cli.system import NotRegularError, open_regular

_CHUNK_BYTES = 1 << 16
ROW_LIMIT_BYTES = 1 << 24  # of a line, and of a row of CSV
TOO_LONG = f"longer than {ROW_LIMIT_BYTES >> 20} MiB"
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
_TOO_DEEP = f"nested deeper than {DEPTH_LIMIT} levels"
_MOST_OVERLONG_ROWS = 16  # that are gone back behind: each costs a second pass over ROW_LIMIT_BYTES
_LINE_COST_BYTES = 64  # of a line that may have to be taken back
_DELIMITERS = ",;\t"
_SEPARATOR_LINE = re.compile(r"sep=([,;\t|])", re.IGNORECASE)  # Excel's, above the header

Line = tuple[int, bytes | None]  # its number; its bytes without the line end, or None where it is too long


class ManifestRow(NamedTuple):
    """One row: `columns` by name, or None with the `problem` that kept it from being read."""

    number: int
    columns: dict[str, Any] | None
    problem: str = ""
    unit: str = "line"

    @property
    def where(self) -> str:
        return f"{self.unit} {self.number}"


def manifest_rows(path: str, renamed: Mapping[str, str] | None = None) -> Iterator[ManifestRow]:
    """Yield the rows of the manifest at `path`, which its suffix says how to read.

    The manifest's column NAME is called COLUMN where `renamed` has NAME -> COLUMN.

    Raises:
        InputError: on the first step, when it cannot be opened, is no regular file, or has no usable header.
    """
    suffix = suffix_of(path) if is_address(path) else os.path.splitext(path)[1].lower()
    name, renamed = printable(shown(path)), renamed or {}
    with open_input(path) as file:
        if suffix == ".parquet":
            for number, row in enumerate(parquet_rows(file, name, renamed), start=1):
                problem = row if isinstance(row, str) else ""
                yield ManifestRow(number, None if isinstance(row, str) else row, problem, "row")
            return
        _refuse_foreign_text(file, name)
        if suffix == ".txt":
            yield from filter(None, path_rows(file))
        elif suffix == ".jsonl":
            for line in _lines(file):
                yield from _json_row(line, renamed)
        else:
            yield from _csv_rows(_lines(file), name, "\t" if suffix == ".tsv" else ",", renamed)


def _refuse_foreign_text(file: IO[bytes], name: str) -> None:
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


def path_rows(
    file: IO[bytes] | LiveLines, *, has_json: bool = False, renamed: Mapping[str, str] | None = None
) -> Iterator[ManifestRow | None]:
    """Yield a row for each line, which is a path in any encoding; None where the next line has not come yet.

    With `has_json` (stdin) a line may be a JSON object instead, of which `renamed` is as in `manifest_rows`.
    """
    for line in _lines_so_far(file):
        if line is None:
            yield None
            continue
        number, data = line
        if has_json and data is not None and data.lstrip().startswith(b"{"):
            yield from _json_row(line, renamed or {})
        elif data is None:
            yield ManifestRow(number, None, TOO_LONG)
        elif data.strip():
            yield ManifestRow(number, {"image": os.fsdecode(data)})


def open_input(path: str) -> IO[bytes]:
    """Open an INPUT that is read as a whole, here or at an address, without ever blocking on a FIFO.

    Raises:
        InputError: it cannot be opened, or is no regular file.
    """
    if is_address(path):
        from md3cli.source.remote_inputs import open_address

        return open_address(path)
    try:
        return os.fdopen(open_regular(path), "rb")
    except NotRegularError as error:
        advice = "pipe a list of paths to INPUT - instead"
        raise InputError(f"{printable(path)} is not a regular file; {advice}") from error
    except OSError as error:
        raise InputError(f"cannot open {printable(path)}: {error.strerror}; check its permissions") from error


def _lines(file: IO[bytes]) -> Iterator[Line]:
    return filter(None, _lines_so_far(file))


def _lines_so_far(file: IO[bytes] | LiveLines) -> Iterator[Line | None]:
    number, is_too_long = 0, False
    while (data := file.readline(ROW_LIMIT_BYTES)) != b"":
        if data is None:
            yield None
            continue
        number += not is_too_long  # else it is more of the same line
        if number == 1 and not is_too_long:
            if data.startswith(_UTF16_BOMS):  # of stdin, which cannot be looked at before
                raise InputError("the list is UTF-16; save it as UTF-8 and try again")
            data = data.removeprefix(_UTF8_BOM)
        if len(data) < ROW_LIMIT_BYTES and not is_too_long:
            yield number, data.removesuffix(b"\n").removesuffix(b"\r")
            continue
        is_too_long = not data.endswith(b"\n")
        if not is_too_long:
            yield number, None
    if is_too_long:
        yield number, None


class LiveLines:
    """The lines of a file from which nothing was read before, without waiting for one that has not come yet.

    A pipe that stays open for hours (`tail -f list | md3 caption -`) gives a line now and then. Python's `readline`
    would block in between, while pictures are ready to be run. So lines are taken from the descriptor, where there is
    one. With `may_wait` a line is waited for, as with a file on a disk.
    """

    def __init__(self, file: IO[bytes], *, may_wait: bool = True) -> None:
        self.may_wait = may_wait
        self._file = file
        self._fd: int | None = None
        with contextlib.suppress(OSError, io.UnsupportedOperation):  # a file in memory
            self._fd = file.fileno()
        self._buffer = bytearray()
        self._num_searched = 0  # bytes of it that hold no line end
        self._is_ended = False

    def readline(self, limit: int, /) -> bytes | None:
        """Return the next line, cut at `limit` bytes; nothing at the end of all; None where it has not come yet."""
        if self._fd is None:
            return self._file.readline(limit)
        while True:
            end = self._buffer.find(b"\n", self._num_searched, limit) + 1
            if end or self._is_ended or len(self._buffer) >= limit:
                return self._take(end or min(limit, len(self._buffer)))
            self._num_searched = len(self._buffer)
            if not self.may_wait and not self.wait(0):
                return None
            chunk = os.read(self._fd, _CHUNK_BYTES)
            self._buffer += chunk
            self._is_ended = not chunk

    def _take(self, num_bytes: int) -> bytes:
        line = bytes(self._buffer[:num_bytes])
        del self._buffer[:num_bytes]
        self._num_searched = 0
        return line

    def wait(self, timeout_s: float) -> bool:
        """Wait until there is something to read, or the end, at most `timeout_s`; return whether there is."""
        return self._fd is None or bool(select.select([self._fd], [], [], timeout_s)[0])


# -- CSV -----------------------------------------------------------------------------------------


def _csv_rows(lines: Iterator[Line], name: str, delimiter: str, renamed: Mapping[str, str]) -> Iterator[ManifestRow]:
    """Yield the rows that hold anything; where `delimiter` gives no column `image`, others are tried.

    Raises:
        InputError: there is no header with a column `image`, a column comes twice, or the first row fills a column
            that has no name.
    """
    csv.field_size_limit(ROW_LIMIT_BYTES)  # of the process; Python's own, 131,072, is less than a sound cell may have
    text = _CsvLines(lines)
    header, delimiter = _found_header(text, delimiter, name, image_column(renamed))
    header = [renamed.get(column, column) for column in _unclashing(header, renamed, name)]
    is_first = True
    for number, cells, problem in _all_cells(text, delimiter):
        if not problem and not any(map(str.strip, cells)):
            continue
        if is_first and not problem and (unnamed := _unnamed_content(header, cells)):
            raise InputError(f"the manifest {name}: {unnamed}; name it in the first line, or remove it")
        is_first = False
        try:
            yield ManifestRow(number, None, problem) if problem else ManifestRow(number, _columns(header, cells))
        except ValueError as error:
            yield ManifestRow(number, None, str(error))


class _CsvLines:
    """Text lines for `csv.reader` that can be taken back to the one behind the start of a broken row.

    An unclosed quote swallows all lines up to the limit of a row; where they are taken back it costs its own line only.
    Bytes that are not UTF-8 come as surrogates, which `_columns` finds in the finished row.
    """

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self._again: deque[Line] = deque()
        self._taken: list[Line] = []
        self._num_bytes = 0  # of those taken
        self._num_overlong = 0

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self._taken.append(line)
        _, data = line
        if data is None:
            raise csv.Error(TOO_LONG)
        self._num_bytes += len(data) + _LINE_COST_BYTES
        if self._num_bytes > ROW_LIMIT_BYTES:
            self._num_overlong += 1
            raise csv.Error(f"a quoted cell that does not end within {ROW_LIMIT_BYTES >> 20} MiB")
        return data.decode("utf-8", "surrogateescape") + "\n"

    def start_row(self) -> None:
        self._taken.clear()
        self._num_bytes = 0

    def rewind(self, first: int = 1) -> None:
        """Give the row's lines from `first` on again; but not for ever, where row after row has no end."""
        if self._num_overlong <= _MOST_OVERLONG_ROWS:
            self._again.extendleft(reversed(self._taken[first:]))

    @property
    def row_number(self) -> int:
        return self._taken[0][0] if self._taken else 0


_Cells = tuple[int, list[str], str]  # the number of its first line; its cells, or the problem


def _all_cells(lines: _CsvLines, delimiter: str) -> Iterator[_Cells]:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.start_row()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield lines.row_number, [], str(error)
            lines.rewind()
            continue
        if cells:
            yield lines.row_number, cells, ""


def _unclashing(header: list[str], renamed: Mapping[str, str], name: str) -> list[str]:
    if clash := clash_of(header, renamed):
        raise UsageError(f"{clash} (in {name})")
    return header


def _found_header(lines: _CsvLines, delimiter: str, name: str, image: str) -> tuple[list[str], str]:
    """Return the names of the columns, one of them `image`, and what stands between the cells."""
    first = None
    for tried in dict.fromkeys([delimiter, *_DELIMITERS]):
        row = next(_all_cells(lines, tried), None)
        first = first or row
        if row is not None and not row[2] and (found := _SEPARATOR_LINE.fullmatch(tried.join(row[1]))):
            return _header(next(_all_cells(lines, found[1]), None), name, image), found[1]
        if row is None or image in map(str.strip, row[1]):
            return _header(row, name, image), tried
        lines.rewind(first=0)
    return _header(first, name, image), delimiter


def _header(row: _Cells | None, name: str, image: str) -> list[str]:
    if row is None:
        raise InputError(f"the manifest {name} is empty; its first line names the columns (image, prompt, ...)")
    _, cells, problem = row
    header = [cell.strip() for cell in cells]
    if problem or image not in header:
        found = problem or f"its first line is: {printable(', '.join(header))[:200]}"
        raise NoImageColumnError(
            f"the manifest {name} has no column '{printable(image)}' ({found}); name the columns in its first line, "
            f"or say which one has the images: --map image=NAME{'' if problem else likely_images(header)}",
            header,
        )
    refuse_doubles(filter(None, header), name)
    return header


def _unnamed_content(header: Sequence[str], cells: Sequence[str]) -> str:
    """Return what is wrong where a column without a name holds something; empty where none does."""
    for place, (column, cell) in enumerate(zip(header, cells, strict=False), start=1):
        if not column and cell.strip():
            return f"column {place} has no name and holds '{printable(cell)[:40]}'"
    return ""


def _columns(header: Sequence[str], cells: Sequence[str]) -> dict[str, Any]:
    """Return the cells by the names of their columns; empty cells may follow the last column."""
    if len(cells) < len(header) or any(map(str.strip, cells[len(header) :])):
        raise ValueError(f"{len(cells)} columns where the header has {len(header)}")
    if unnamed := _unnamed_content(header, cells):
        raise ValueError(unnamed)
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        raise ValueError("not valid UTF-8") from None
    return {column: typed_cell(column, cell) for column, cell in zip(header, cells, strict=False) if column}


# -- JSON Lines ----------------------------------------------------------------------------------


def _json_row(line: Line, renamed: Mapping[str, str]) -> Iterator[ManifestRow]:
    """Yield the row of a line; nothing for a blank one."""
    number, data = line
    if data is None:
        yield ManifestRow(number, None, TOO_LONG)
    elif data.strip():
        try:
            yield ManifestRow(number, renamed_columns(_json_columns(data), renamed))
        except UnicodeDecodeError:
            yield ManifestRow(number, None, "not valid UTF-8")
        except json.JSONDecodeError as error:
            yield ManifestRow(number, None, f"{error.msg} at column {error.colno}")
        except ValueError as error:
            yield ManifestRow(number, None, str(error))
        except RecursionError:
            yield ManifestRow(number, None, _TOO_DEEP)


def _json_columns(data: bytes) -> dict[str, Any]:
    """Return the object that a line holds.

    Raises:
        ValueError, RecursionError: it cannot be read, or could not be written again as it is.
    """
    columns = _json_value(data, refuse_constant)
    if not isinstance(columns, dict):
        raise ValueError("not a JSON object")
    return columns


def json_value(data: bytes) -> Any:
    """Return the JSON value that a file holds, with null for NaN and infinities, which many programs write.

    Raises:
        ValueError: it cannot be read, is nested deeper than DEPTH_LIMIT, or could not be written again as it is.
    """
    try:
        return _json_value(data.removeprefix(_UTF8_BOM), lambda name: None)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def _json_value(data: bytes, constant: Callable[[str], None]) -> Any:
    value = json.loads(data.decode(), parse_constant=constant, object_pairs_hook=unique_keys)
    if data.count(b"[") + data.count(b"{") > DEPTH_LIMIT and depth_of(value) > DEPTH_LIMIT:
        raise ValueError(_TOO_DEEP)
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character") from None
    return value


def depth_of(value: Any) -> int:
    """Return how deep lists and objects are nested, counted level by level, so that nothing recurses."""
    depth, level = 0, [value]
    while level:
        depth += 1
        nested = [item for item in level if isinstance(item, dict | list)]
        level = [child for item in nested for child in (item.values() if isinstance(item, dict) else item)]
    return depth - 1
