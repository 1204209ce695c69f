"""CSV as every format here writes it: UTF-8, LF, and no cell that a spreadsheet would run.

A text that begins like a formula gets an apostrophe in front, as OWASP advises. Knows nothing of records.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any, BinaryIO, NamedTuple, TextIO

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # full-width ones too


class Table:
    """Rows written to a binary file, which stays its owner's to close."""

    def __init__(self, file: BinaryIO, columns: Iterable[str]) -> None:
        self._text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        self._rows = csv.writer(_LineFeeds(self._text), lineterminator="\r\n")
        self.write(columns)

    def write(self, cells: Iterable[Any]) -> list[Any]:
        """Write one row, and return its cells as they were written."""
        written = list(map(_safe, cells))
        self._rows.writerow(written)
        return written

    def end(self) -> None:
        """Let go of the file, with all rows in it; without this it would be closed with the table."""
        self._text.detach()


class _LineFeeds(NamedTuple):
    """A file whose rows end with LF, for a writer that ends them with CR LF: only such a one quotes both in a cell."""

    file: TextIO

    def write(self, row: str) -> int:
        """Write one row."""
        return self.file.write(row.removesuffix("\r\n") + "\n")


def _safe(value: Any) -> Any:
    """Put an apostrophe before a text that begins like a formula; numbers stay numbers."""
    if isinstance(value, str) and value.startswith(_FORMULA_STARTS):
        return "'" + value
    return value


def without_guard(value: Any) -> Any:
    """Return a cell of md3's table as it was before an apostrophe was put in front of what looked like a formula."""
    return value[1:] if isinstance(value, str) and value[:1] == "'" and value[1:].startswith(_FORMULA_STARTS) else value
