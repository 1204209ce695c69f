"""Rows of CSV and TSV manifests in any state: an error in one costs that row and no other."""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from md3cli.errors import InputError
from md3cli.records import printable

Line = tuple[int, bytes | None]  # its number; its bytes without the line end, or None where it is too long

_NUMBERS = frozenset({"max_tokens", "max_objects", "temperature", "top_p", "seed"})
_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class CsvRow(NamedTuple):
    """One row: `columns` by name, or None with the `problem` that kept it from being read."""

    number: int  # of its first line
    columns: dict[str, Any] | None
    problem: str = ""


def csv_rows(lines: Iterator[Line], name: str, delimiter: str, *, too_long: str) -> Iterator[CsvRow]:
    """The rows below the header of the manifest `name`; `too_long` is the problem of a line without bytes.

    Raises:
        InputError: there is no header with a column `image`.
    """
    rows = _all_cells(_CsvLines(lines, too_long), delimiter)
    header = _header(next(rows, None), name)
    for number, cells, problem in rows:
        try:
            yield CsvRow(number, None, problem) if problem else CsvRow(number, _columns(header, cells))
        except ValueError as error:
            yield CsvRow(number, None, str(error))


class _CsvLines:
    """Text lines for `csv.reader` that can be taken back to the one behind the start of a broken row.

    An unclosed quote swallows all lines up to the reader's field limit; rewound, it costs its own
    line only. Bytes that are not UTF-8 come as surrogates, found again in the finished row.
    """

    def __init__(self, lines: Iterator[Line], too_long: str) -> None:
        self._lines, self._too_long = lines, too_long
        self._again: deque[Line] = deque()
        self._taken: list[Line] = []

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self._taken.append(line)
        _, data = line
        if data is None:
            raise csv.Error(self._too_long)
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


def _columns(header: Sequence[str], cells: Sequence[str]) -> dict[str, Any]:
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
