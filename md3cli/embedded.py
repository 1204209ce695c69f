"""Pictures inside Parquet files (the layout of Hugging Face `datasets`: `image` is a struct of `bytes` and `path`).

A cell cannot be read by itself, only the row group it stands in from its start. So one thread reads the cells in
the order of the rows, a few at a time, and goes back to the start only for a row that lies behind it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from md3cli.errors import ImageError, InputError
from md3cli.records import ImageItem, printable

IMAGE_BYTES, IMAGE_PATH = "image.bytes", "image.path"
CELLS_AT_A_TIME = 8
_BUFFER_BYTES = 1 << 20


class EmbeddedImage(NamedTuple):
    """A picture in a manifest's row: where it stands, and what the row calls it."""

    name: str
    row_group: int
    offset: int


class _Place(NamedTuple):
    path: str
    row_group: int


class CellReader:
    """Reads the pictures of Parquet files; used by one thread.

    Args:
        open_file: opens a path or an address; raises InputError.
    """

    def __init__(self, open_file: Callable[[str], IO[bytes]]) -> None:
        self._open_file = open_file
        self._place: _Place | None = None
        self._cells: Iterator[Any] = iter(())
        self._next_row = 0
        self._file = contextlib.ExitStack()

    def read(self, item: ImageItem, limit_bytes: int) -> bytes:
        """The bytes of a cell.

        Raises:
            ImageError: the file cannot be opened, is damaged, or has no picture there.
        """
        import pyarrow as pa

        assert item.row_group is not None
        place = _Place(item.path, item.row_group)
        try:
            if place != self._place or item.offset < self._next_row:
                self._start(place)
            cell = self._cell(item.offset)
        except InputError as error:
            self.close()
            raise ImageError("io", str(error)) from error
        except (pa.ArrowException, OSError, MemoryError, ValueError) as error:
            self.close()
            raise ImageError("decode", f"the Parquet file is damaged: {_brief(error)}") from error
        if cell is None or not cell.is_valid:
            raise ImageError("not_found", "this row of the Parquet file holds no picture")
        content = cell.as_buffer()
        if content.size > limit_bytes:
            size = f"{content.size:,} bytes, more than the {limit_bytes:,} of --max-file-size"
            raise ImageError("too_large", f"the picture has {size}")
        if not content.size:
            raise ImageError("empty", "the picture is empty (0 bytes)")
        return bytes(content.to_pybytes())

    def close(self) -> None:
        """Let go of the file."""
        self._place, self._cells = None, iter(())
        self._file.close()

    def _start(self, place: _Place) -> None:
        import pyarrow.parquet as pq

        if self._place is None or place.path != self._place.path:
            self.close()
            self._parquet = pq.ParquetFile(
                self._file.enter_context(self._open_file(place.path)), pre_buffer=False, buffer_size=_BUFFER_BYTES
            )
        batches = self._parquet.iter_batches(
            CELLS_AT_A_TIME, row_groups=[place.row_group], columns=[IMAGE_BYTES], use_threads=False
        )
        self._cells = (cell for batch in batches for cell in batch.column("image").flatten()[0])
        self._place, self._next_row = place, 0

    def _cell(self, row: int) -> Any:
        """The cell at `row`; None where the row group ends before it."""
        for cell in self._cells:
            self._next_row += 1
            if self._next_row > row:
                return cell
        return None


def _brief(error: BaseException) -> str:
    return printable(str(error).partition("\n")[0])[:100] or type(error).__name__


def cell_name(row: int, path: str | None) -> str:
    """What the picture of row `row` (from 1) is called: `datasets` keeps base names only, which may come twice."""
    base = (path or "").replace("\\", "/").rpartition("/")[2].replace("\0", "")
    return f"{row:07d}-{base}" if base else f"{row:07d}"
