"""Parquet manifests, row by row. The only file that imports pyarrow's reader.

The footer is never believed: `read_table` on one that claims 10^12 rows asks for 2 TiB, so row groups
are read in small batches and yield what is really there. A damaged row group costs one row.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from typing import IO, Any

from md3cli.errors import InputError
from md3cli.records import printable

BATCH_ROWS = 256


def parquet_rows(file: IO[bytes], name: str) -> Iterator[dict[str, Any] | str]:
    """Each row as JSON-able columns, or as the text of the problem that kept it from being read.

    Raises:
        InputError: on the first step, when it is not Parquet or has no text column `image`; `name` is how it is called.
    """
    import pyarrow as pa  # 0.2 s that other inputs need not wait for
    import pyarrow.parquet as pq

    unreadable = (pa.ArrowException, OSError, MemoryError, ValueError)
    try:
        parquet = pq.ParquetFile(file, pre_buffer=False)
        schema = parquet.schema_arrow
    except unreadable as error:
        raise InputError(f"cannot read the manifest {name} as Parquet: {_brief(error)}") from error
    _check_schema(schema, name)
    for group in range(parquet.num_row_groups):
        try:
            for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[group], use_threads=False):
                yield from _batch_rows(batch)
        except unreadable as error:
            yield f"row group {group + 1} is damaged from here on: {_brief(error)}"


def _check_schema(schema: Any, name: str) -> None:
    import pyarrow.types as kinds

    if schema.names.count("image") != 1:
        raise InputError(
            f"the manifest {name} has no column 'image'; it has: {printable(', '.join(schema.names))[:200]}"
        )
    kind = schema.field("image").type
    kind = kind.value_type if kinds.is_dictionary(kind) else kind
    if not (kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind) or kinds.is_null(kind)):
        raise InputError(f"the column 'image' of {name} holds {printable(str(kind))[:100]}; it must hold paths as text")


def _batch_rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    for i in range(batch.num_rows):
        try:
            yield {name: json_able(batch.column(k)[i].as_py()) for k, name in enumerate(batch.schema.names)}
        except (ValueError, ArithmeticError, RecursionError) as error:  # bad UTF-8, a date past the year 9999
            yield _brief(error)


def _brief(error: BaseException) -> str:
    return printable(str(error).partition("\n")[0]) or type(error).__name__


def json_able(value: Any) -> Any:
    """A Parquet value as JSON: bytes as base64, NaN and infinities as null, dates and decimals as text."""
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
