"""Parquet manifests, row by row, and pictures inside Parquet files. Only this file imports pyarrow's reader.

The footer is never believed: `read_table` on one that claims 10^12 rows asks for 2 TiB. So row groups are read in small
batches, and yield what is really there. Nor is the file's size believed: a text that comes a thousand times stands
there once, so it is kept once (`_much_repeated`). A damaged row group costs one row.

A row says where its picture stands (`EmbeddedImage`): in a struct as Hugging Face `datasets` write it, or in a column
of bytes as img2dataset does. A cell cannot be read
by itself, only its row group from the start: one thread reads the cells in the order of the rows, a few at a time, and
goes back to the start only for an earlier row.
"""

from __future__ import annotations

import base64
import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, NamedTuple

from md3cli.errors import ImageError, InputError, NoImageColumnError, UsageError
from md3cli.records import ImageItem, printable
from md3cli.source.columns import clash_of, image_column, likely_images, renamed_columns
from md3cli.source.requests import EmbeddedImage, refuse_doubles

CELLS_AT_A_TIME = 8
_BUFFER_BYTES = 1 << 20


class _Place(NamedTuple):
    path: str
    row_group: int
    column: str


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
        """Return the bytes of the picture in a cell.

        Raises:
            ImageError: the file cannot be opened, is damaged, or has no picture there.
        """
        import pyarrow as pa

        assert item.row_group is not None
        place = _Place(item.path, item.row_group, item.column)
        try:
            if place != self._place or item.offset < self._next_row:
                self._start(place)
            cell = self._cell(item.offset)
        except InputError as error:
            self.close()
            raise ImageError("io", str(error)) from error
        except (pa.ArrowException, OSError, MemoryError, ValueError) as error:
            self.close()
            raise ImageError("decode", f"the Parquet file is damaged: {_brief(error)[:100]}") from error
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
        pictures = _pictures_in(self._parquet.schema_arrow, place.column)
        batches = self._parquet.iter_batches(
            CELLS_AT_A_TIME, row_groups=[place.row_group], columns=[pictures], use_threads=False
        )
        columns = (batch.column(place.column) for batch in batches)
        in_structs = pictures != place.column
        self._cells = (cell for column in columns for cell in (column.flatten()[0] if in_structs else column))
        self._place, self._next_row = place, 0

    def _cell(self, row: int) -> Any:
        """Return the cell at `row`; None where the row group ends before it."""
        for cell in self._cells:
            self._next_row += 1
            if self._next_row > row:
                return cell
        return None


def cell_name(row: int, path: str | None) -> str:
    """Return the name of the picture of row `row` (from 1); `datasets` keeps base names only, which may come twice."""
    base = (path or "").replace("\\", "/").rpartition("/")[2].replace("\0", "")
    return f"{row:07d}-{base}" if base else f"{row:07d}"


BATCH_ROWS = 256
BATCH_BYTES = 1 << 26  # fewer rows at a time where, on average, so many hold more
CELL_LIMIT_CHARS = 1 << 24  # as a line of the other manifests
BOMB_BYTES, BOMB_RATIO = 1 << 28, 1000  # what a column of a row group may unpack to, unless it packs less well
_REPEATED_BYTES = 1 << 20  # of a column's row group, from which on its texts are kept once
# Bad UTF-8, a date past the year 9999, a time zone that nobody knows.
_UNREADABLE_VALUES = (ValueError, ArithmeticError, RecursionError, LookupError)


def parquet_rows(file: IO[bytes], name: str, renamed: Mapping[str, str]) -> Iterator[dict[str, Any] | str]:
    """Yield each row as columns of JSON values, or as the text of the problem that kept it from being read.

    Columns are called as `renamed` (NAME -> COLUMN) says.

    Raises:
        InputError: on the first step, when it is not Parquet or has no column `image` of text or pictures; `name` is
            how it is called.
        UsageError: on the first step, when it has a column of a new name already.
    """
    import pyarrow as pa  # 0.2 s that other inputs need not wait for
    import pyarrow.parquet as pq

    unreadable = (pa.ArrowException, OSError, MemoryError, ValueError)
    try:
        parquet = pq.ParquetFile(file, pre_buffer=False)
        image = image_column(renamed)
        pictures = _pictures_in(parquet.schema_arrow, image)
        if repeated := _much_repeated(parquet.metadata, pictures):
            parquet = pq.ParquetFile(
                file, pre_buffer=False, metadata=parquet.metadata, read_dictionary=sorted(repeated)
            )
        schema = parquet.schema_arrow
    except unreadable as error:
        raise InputError(f"cannot read the manifest {name} as Parquet: {_brief(error)}") from error
    _check_schema(schema, name, image)
    if clash := clash_of(schema.names, renamed):
        raise UsageError(f"{clash} (in {name})")
    num_rows = 0
    for group in range(parquet.num_row_groups):
        cells = _EmbeddedCells(parquet, group, image) if pictures else None
        columns = cells.columns_to_read(schema.names) if cells is not None else None
        try:
            chunks = _chunks_read(parquet.metadata.row_group(group), pictures)
            _refuse_bomb(chunks)
            num_at_a_time = _rows_at_a_time(chunks, parquet.metadata.row_group(group).num_rows)
            for batch in parquet.iter_batches(num_at_a_time, row_groups=[group], columns=columns, use_threads=False):
                for row in _batch_rows(batch, cells, num_rows, image):
                    yield row if isinstance(row, str) else renamed_columns(row, renamed)
                num_rows += batch.num_rows
        except unreadable as error:
            yield f"row group {group + 1} cannot be read from here on: {_brief(error)}"


def _much_repeated(metadata: Any, pictures: str) -> set[str]:
    """Return the columns whose few texts may come again and again: 200 KB of them can be gigabytes when repeated."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    columns = (group.column(k) for group in groups for k in range(group.num_columns))
    return {
        column.path_in_schema
        for column in columns
        if column.physical_type == "BYTE_ARRAY"
        and column.has_dictionary_page
        and column.total_uncompressed_size > _REPEATED_BYTES
        and column.path_in_schema != pictures
    }


def _chunks_read(group: Any, pictures: str) -> list[Any]:
    """Return the columns of a row group but for its pictures."""
    chunks = map(group.column, range(group.num_columns))
    return [chunk for chunk in chunks if chunk.path_in_schema != pictures]


def _refuse_bomb(chunks: list[Any]) -> None:
    """Look at what columns unpack to: pyarrow unpacks whole pages, which may be all of it.

    Raises:
        ValueError: some column packs so much into so little as no list does.
    """
    for chunk in chunks:
        size, packed = chunk.total_uncompressed_size, chunk.total_compressed_size
        if size > BOMB_BYTES and size > BOMB_RATIO * packed:
            raise ValueError(f"column '{chunk.path_in_schema}' would unpack {packed:,} bytes to {size:,}")


def _rows_at_a_time(chunks: list[Any], num_rows: int) -> int:
    """Return how many rows of a row group to read at once, as the file says its size, which may be a lie."""
    size: int = sum(chunk.total_uncompressed_size for chunk in chunks)
    return max(1, min(BATCH_ROWS, BATCH_BYTES * num_rows // max(1, size)))


def _pictures_in(schema: Any, image: str) -> str:
    """Return the path of the bytes of pictures in the column `image`; empty where it holds paths, or is not there."""
    import pyarrow.types as kinds

    if schema.get_field_index(image) < 0:
        return ""
    kind, path = schema.field(image).type, image
    if kinds.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind, path = kind.field("bytes").type, f"{image}.bytes"
    return path if kinds.is_binary(kind) or kinds.is_large_binary(kind) else ""


def picture_columns(schema: Any) -> list[str]:
    """Return the columns of a schema that hold pictures, or other bytes."""
    return [column for column in schema.names if _pictures_in(schema, column)]


def _check_schema(schema: Any, name: str, image: str) -> None:
    """Refuse a schema without a column `image` of paths or pictures."""
    import pyarrow.types as kinds

    refuse_doubles(schema.names, name)
    if image not in schema.names:
        known = picture_columns(schema)
        raise NoImageColumnError(
            f"the manifest {name} has no column '{printable(image)}'; it has: "
            f"{printable(', '.join(schema.names))[:200]}; --map image=NAME says which one has the images"
            f"{likely_images(schema.names, known)}",
            schema.names,
        )
    kind = schema.field(image).type
    kind = kind.value_type if kinds.is_dictionary(kind) else kind
    is_text = kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)
    if not (is_text or kinds.is_null(kind) or _pictures_in(schema, image)):
        raise InputError(
            f"the column '{printable(image)}' of {name} holds {printable(str(kind))[:100]}; "
            "it must hold paths as text, or pictures as bytes or as a struct of bytes and path"
        )


class _EmbeddedCells:
    """The pictures of one row group, named without being read."""

    def __init__(self, parquet: Any, group: int, image: str) -> None:
        self._group, self._image = group, image
        self._next_offset = 0
        columns = [parquet.metadata.row_group(group).column(k) for k in range(parquet.metadata.num_columns)]
        self._pictures = _pictures_in(parquet.schema_arrow, image)
        kind = parquet.schema_arrow.field(image).type
        self._has_paths = self._pictures != image and kind.get_field_index("path") >= 0
        # `datasets` that only refer to files: every `bytes` is null, which the statistics say. A flat column may
        # have the same path as the one inside the struct: then both must be empty.
        self._is_empty = all(_is_all_null(column) for column in columns if column.path_in_schema == self._pictures)

    def columns_to_read(self, names: list[str]) -> list[str]:
        """Return the names of all columns but the pictures' bytes, unless there is nothing else to count rows by."""
        others = [name for name in names if name != self._image]
        others += [f"{self._image}.path"] if self._has_paths else []
        return others or [self._pictures]

    def next_value(self, cell: Any, row: int) -> EmbeddedImage | str | None:
        """Return what stands for the picture of row `row` (from 1), the next one of this group."""
        offset, self._next_offset = self._next_offset, self._next_offset + 1
        if cell is not None and not cell.is_valid:
            return None
        path = cell["path"].as_py() if cell is not None and self._has_paths else None
        path = path if isinstance(path, str) else None
        if self._is_empty:
            return path
        return EmbeddedImage(cell_name(row, path), self._group, offset, self._image, path)


def _is_all_null(column: Any) -> bool:
    """Return whether the statistics of a column of a row group say that it holds nothing."""
    statistics = column.statistics
    has_null_count = statistics is not None and statistics.has_null_count
    return has_null_count and statistics.null_count >= column.num_values > 0


def _batch_rows(
    batch: Any, cells: _EmbeddedCells | None, num_before: int, image_name: str
) -> Iterator[dict[str, Any] | str]:
    names = batch.schema.names
    for i in range(batch.num_rows):
        try:
            values = {name: batch.column(k)[i] for k, name in enumerate(names)}
            image = {image_name: cells.next_value(values.pop(image_name, None), num_before + i + 1)} if cells else {}
            yield image | {name: _bounded(name, json_able(value.as_py())) for name, value in values.items()}
        except _UNREADABLE_VALUES as error:
            yield _brief(error)


def _bounded(name: str, value: Any) -> Any:
    """Return `value` of the column `name`; raises ValueError for a text that is too long."""
    if isinstance(value, str) and len(value) > CELL_LIMIT_CHARS:
        raise ValueError(f"column '{name}' is longer than {CELL_LIMIT_CHARS >> 20} Mi characters")
    return value


def _brief(error: BaseException) -> str:
    return printable(str(error).partition("\n")[0]) or type(error).__name__


def json_able(value: Any) -> Any:
    """Return a Parquet value as JSON: bytes as base64, NaN and infinities as null, dates and decimals as text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {str(key): json_able(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_able(item) for item in value]
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
