"""Rows of CSV and TSV manifests in any state: an error in one costs that row and no other.

They are read as spreadsheets save them: with `;` or tabs between the cells, with a first line `sep=;`, with empty
columns and empty rows behind the table.
"""

from __future__ import annotations

import csv
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from md3cli.errors import InputError
from md3cli.manifest_columns import refuse_doubles
from md3cli.records import printable

Line = tuple[int, bytes | None]  # its number; its bytes without the line end, or None where it is too long

ROW_LIMIT_BYTES = 1 << 24  # as long as a line may be
MOST_OVERLONG_ROWS = 16  # that are gone back behind: each costs a second pass over ROW_LIMIT_BYTES
_LINE_COST_BYTES = 64  # of a line that may have to be taken back
_DELIMITERS = ",;\t"
_SEPARATOR_LINE = re.compile(r"sep=([,;\t|])", re.IGNORECASE)  # Excel's, above the header

_NUMBERS = frozenset({"max_tokens", "max_objects", "temperature", "top_p", "seed"})
_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class CsvRow(NamedTuple):
    """One row: `columns` by name, or None with the `problem` that kept it from being read."""

    number: int  # of its first line
    columns: dict[str, Any] | None
    problem: str = ""


def csv_rows(lines: Iterator[Line], name: str, delimiter: str, *, too_long: str) -> Iterator[CsvRow]:
    """Yield the rows below the header of the manifest `name` that hold anything.

    `delimiter` is what its suffix promises; where the header has no column `image` by it, the others are tried.
    `too_long` is the problem of a line without bytes.

    Raises:
        InputError: there is no header with a column `image`, a column comes twice, or the first row fills a column
            that has no name.
    """
    csv.field_size_limit(ROW_LIMIT_BYTES)  # of the process; Python's own, 131,072, is less than a sound cell may have
    text = _CsvLines(lines, too_long)
    header, delimiter = _found_header(text, delimiter, name)
    is_first = True
    for number, cells, problem in _all_cells(text, delimiter):
        if not problem and not any(map(str.strip, cells)):
            continue
        if is_first and not problem and (unnamed := _unnamed_content(header, cells)):
            raise InputError(f"the manifest {name}: {unnamed}; name it in the first line, or remove it")
        is_first = False
        try:
            yield CsvRow(number, None, problem) if problem else CsvRow(number, _columns(header, cells))
        except ValueError as error:
            yield CsvRow(number, None, str(error))


class _CsvLines:
    """Text lines for `csv.reader` that can be taken back to the one behind the start of a broken row.

    An unclosed quote swallows all lines up to the limit of a row; rewound, it costs its own
    line only. Bytes that are not UTF-8 come as surrogates, found again in the finished row.
    """

    def __init__(self, lines: Iterator[Line], too_long: str) -> None:
        self._lines, self._too_long = lines, too_long
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
            raise csv.Error(self._too_long)
        self._num_bytes += len(data) + _LINE_COST_BYTES
        if self._num_bytes > ROW_LIMIT_BYTES:
            self._num_overlong += 1
            raise csv.Error(f"a quoted cell that does not end within {ROW_LIMIT_BYTES >> 20} MiB")
        return data.decode("utf-8", "surrogateescape") + "\n"

    def start_row(self) -> None:
        """Begin a row at the next line."""
        self._taken.clear()
        self._num_bytes = 0

    def rewind(self, first: int = 1) -> None:
        """Give the row's lines from `first` on again; not for ever, where row after row has no end."""
        if self._num_overlong <= MOST_OVERLONG_ROWS:
            self._again.extendleft(reversed(self._taken[first:]))

    @property
    def row_number(self) -> int:
        """The line at which the row under way started."""
        return self._taken[0][0] if self._taken else 0


class _Cells(NamedTuple):
    number: int  # of its first line
    cells: list[str]
    problem: str = ""


def _all_cells(lines: _CsvLines, delimiter: str) -> Iterator[_Cells]:
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


def _found_header(lines: _CsvLines, delimiter: str, name: str) -> tuple[list[str], str]:
    """The names of the columns, and what stands between the cells."""
    rows = {}
    for tried in dict.fromkeys([delimiter, *_DELIMITERS]):
        row = rows[tried] = next(_all_cells(lines, tried), None)
        if row is not None and not row.problem and (found := _SEPARATOR_LINE.fullmatch(tried.join(row.cells))):
            return _header(next(_all_cells(lines, found[1]), None), name), found[1]
        if row is None or "image" in map(str.strip, row.cells):
            return _header(row, name), tried
        lines.rewind(first=0)
    return _header(rows[delimiter], name), delimiter


def _header(row: _Cells | None, name: str) -> list[str]:
    if row is None:
        raise InputError(f"the manifest {name} is empty; its first line names the columns (image, prompt, ...)")
    header = [cell.strip() for cell in row.cells]
    if row.problem or "image" not in header:
        found = row.problem or f"its first line is: {printable(', '.join(header))[:200]}"
        raise InputError(f"the manifest {name} has no column 'image' ({found}); name the columns in its first line")
    refuse_doubles(filter(None, header), name)
    return header


def _unnamed_content(header: Sequence[str], cells: Sequence[str]) -> str:
    """What is wrong where a column that has no name holds something; empty where none does."""
    for place, (column, cell) in enumerate(zip(header, cells, strict=False), start=1):
        if not column and cell.strip():
            return f"column {place} has no name and holds '{printable(cell)[:40]}'"
    return ""


def _columns(header: Sequence[str], cells: Sequence[str]) -> dict[str, Any]:
    """The cells by the names of their columns; those behind the last column may be there as long as they are empty."""
    if len(cells) < len(header) or any(map(str.strip, cells[len(header) :])):
        raise ValueError(f"{len(cells)} columns where the header has {len(header)}")
    if unnamed := _unnamed_content(header, cells):
        raise ValueError(unnamed)
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        raise ValueError("not valid UTF-8") from None
    return {column: _typed(column, cell) for column, cell in zip(header, cells, strict=False) if column}


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
