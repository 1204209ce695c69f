"""Pictures that stand inside Parquet files, found again: a record's name begins with the row.

A cell cannot be read by itself, so pictures are read where they are looked for, in the order of the records, and one at
a time is kept: a record of the same picture often follows. Stands apart from `pictures.py`, its only importer, which
knows files and tars and needs no pyarrow.
"""

from __future__ import annotations

import hashlib
import os
import re
from bisect import bisect_right
from itertools import accumulate, islice
from pathlib import Path
from typing import NamedTuple

from md3cli.errors import ImageError, InputError
from md3cli.records import ImageItem
from md3cli.source.manifest import open_input
from md3cli.source.parquet import CellReader, picture_columns

PARQUET = ".parquet"
_NAME = re.compile(r"([0-9]{7,18})(-.*)?", re.DOTALL)
MOST_FILES, MOST_TRIES = 1000, 3  # of a folder, looked through for the file of a lone manifest; for so many records


class _File(NamedTuple):
    """The columns of a file that hold pictures, each with its reader, and the rows before and in each row group."""

    path: str
    readers: dict[str, CellReader]
    ends: list[int]


class Cells:
    """Reads the pictures of Parquet files; used by one thread."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._file: _File | None = None
        self._last: tuple[str, str, bytes] | None = None
        self._lone: dict[Path, str | None] = {}  # the file whose rows the records of a run are
        self._num_tries = 0

    def read(self, path: str, name: str, sha256: str | None) -> bytes | None:
        """Return the picture in the row that `name` names; of several columns the one with the digest `sha256`."""
        if self._last is not None and self._last[:2] == (path, name):
            return self._last[2]
        named, file = _NAME.fullmatch(name), self._opened(path)
        if named is None or file is None or not 0 <= (row := int(named[1]) - 1) < (file.ends or [0])[-1]:
            return None
        group = bisect_right(file.ends, row)
        offset = row - (file.ends[group - 1] if group else 0)
        found = [content for column in file.readers if (content := self._cell(file, column, group, offset)) is not None]
        content = next((content for content in found if _digest(content) == sha256), found[0] if found else None)
        self._last = (path, name, content) if content is not None else self._last
        return content

    def lone(self, folder: Path, name: str, sha256: str | None) -> tuple[str, bytes] | None:
        """Return the picture of a run whose INPUT was one file in `folder`, and that file's path.

        Names do not say which file it was; the digest `sha256` does.
        """
        if _NAME.fullmatch(name) is None or sha256 is None:
            return None
        known = self._lone.get(folder)
        if known is None and self._num_tries >= MOST_TRIES:
            return None
        self._num_tries += known is None
        for path in [known] if known is not None else _files_in(folder):
            content = self.read(path, name, sha256)
            if content is not None and _digest(content) == sha256:
                self._lone[folder] = path
                return path, content
        return None

    def _opened(self, path: str) -> _File | None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._file is not None and self._file.path == path:
            return self._file
        self.close()
        try:
            with open_input(path) as file, pq.ParquetFile(file, pre_buffer=False) as parquet:
                metadata, columns = parquet.metadata, picture_columns(parquet.schema_arrow)
                sizes = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
                ends = list(accumulate(sizes))
        except (InputError, pa.ArrowException, OSError, MemoryError, ValueError):
            return None
        self._file = _File(path, {column: CellReader(open_input) for column in columns}, ends)
        return self._file

    def _cell(self, file: _File, column: str, group: int, offset: int) -> bytes | None:
        item = ImageItem("", file.path, offset=offset, row_group=group, column=column)
        try:
            return file.readers[column].read(item, self._limit_bytes)
        except ImageError:
            return None

    def close(self) -> None:
        """Let go of the file."""
        for reader in self._file.readers.values() if self._file is not None else ():
            reader.close()
        self._file = None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _files_in(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            found = (entry.path for entry in entries if entry.name.lower().endswith(PARQUET) and entry.is_file())
            return sorted(islice(found, MOST_FILES))
    except OSError:
        return []
