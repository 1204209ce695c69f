"""Parquet: one row for each record, failures included, in one fixed schema.

Coordinates are exact, as the records have them. The file's `huggingface` metadata names the features, so that
`datasets` knows them; with `embed_images` the `image` column holds the pictures' bytes and `datasets` decodes them. Row
groups are bounded in rows and bytes, and the file appears by rename: one cut short could not be read at all.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from md3cli.errors import ExportError, ImageError
from md3cli.exporters import ExportOptions, ExportReport
from md3cli.exporters.files import replaced_file
from md3cli.exporters.grouping import (
    CHOICE_PREFIX,
    PART_COLUMNS,
    TableColumns,
    choice_scores,
    find_columns,
    part_columns,
)
from md3cli.exporters.pictures import FoundPicture, Pictures, pillow_opens
from md3cli.records import RecordDict
from md3cli.refine.collection import Collection, read

_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF")  # what plain Pillow decodes, with no plugin of ours
GROUP_ROWS = 4096
GROUP_BYTES = 64 * 2**20  # of embedded pictures

_BOX = [(key, pa.float64()) for key in ("x_min", "y_min", "x_max", "y_max")]
_LABEL, _SCORE = ("label", pa.string()), ("score", pa.float32())
_GROUNDING = [("start_idx", pa.int32()), ("end_idx", pa.int32()), ("points", pa.list_(pa.list_(pa.float64())))]
_REASONING = [("text", pa.string()), ("grounding", pa.list_(pa.struct(_GROUNDING))), ("finish_reason", pa.string())]
_SEGMENT = [_LABEL, ("svg_path", pa.string()), ("bbox", pa.struct(_BOX)), _SCORE, ("parse_error", pa.string())]

_COLUMNS: list[tuple[str, pa.DataType]] = [
    ("id", pa.string()),
    ("image", pa.string()),
    ("image_b64", pa.string()),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("task", pa.string()),
    ("prompt", pa.string()),
    ("length", pa.string()),
    ("caption", pa.string()),
    ("answer", pa.string()),
    ("reasoning", pa.struct(_REASONING)),
    ("objects", pa.list_(pa.struct([_LABEL, *_BOX, _SCORE]))),
    ("points", pa.list_(pa.struct([_LABEL, ("x", pa.float64()), ("y", pa.float64()), _SCORE]))),
    ("segments", pa.list_(pa.struct(_SEGMENT))),
    ("sha256", pa.string()),
    ("finish_reason", pa.string()),
    ("prompt_tokens", pa.int32()),
    ("output_tokens", pa.int32()),
    ("model", pa.string()),
    ("meta", pa.string()),
    ("error_type", pa.string()),
    ("error_message", pa.string()),
    ("error_retry", pa.bool_()),
]
_PART_KINDS = (*(kind for _, kind in _BOX), pa.string(), pa.string(), pa.int32())
# Columns that only a file with such records has; `size` may be `auto`.
_PART = [*zip(PART_COLUMNS, _PART_KINDS, strict=True)]
_TILES = [("tiles.size", pa.string()), ("tiles.overlap", pa.float64()), ("tiles.count", pa.int32())]
_PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def schema_of(found: TableColumns, *, embed_images: bool) -> pa.Schema:
    """Return the file's schema, with the columns that only these records have.

    Those are of parts of pictures, of tiles, and of each choice of restricted answers, with its score.
    """
    columns = [(name, _PICTURE if embed_images and name == "image" else kind) for name, kind in _COLUMNS]
    columns += [*(_PART if found.has_parts else ()), *(_TILES if found.has_tiles else ())]
    columns += [(CHOICE_PREFIX + choice, pa.float32()) for choice in found.choices]
    features = {name: _feature(kind) for name, kind in columns}
    if embed_images:
        features["image"] = {"_type": "Image"}
    return pa.schema(columns, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _feature(kind: pa.DataType) -> Any:
    """Return an Arrow type as `datasets` writes it in its metadata."""
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    name = {"float": "float32", "double": "float64"}.get(str(kind), str(kind))
    return {"dtype": name, "_type": "Value"}


def export(records: Collection, out: Path, options: ExportOptions) -> ExportReport:
    """Write one file of all records."""
    pictures = Pictures(records, options)
    if options.embed_images:
        pictures.require_root("--embed-images")
    columns = find_columns(records, has_meta=False)
    schema = schema_of(columns, embed_images=options.embed_images)
    reading_notes = list[str]()
    rows = _Rows(schema, columns.choices, pictures if options.embed_images else None)
    with (
        replaced_file(out, overwrite=options.overwrite) as file,
        pq.ParquetWriter(file, schema, compression="zstd", write_page_index=True) as writer,
    ):
        for batch in rows.batches(read(records, reading_notes)):
            writer.write_batch(batch)
    notes = (f"{rows.num_missing} pictures could not be read; their `image` is null",) if rows.num_missing else ()
    notes = (*reading_notes, *notes, *pictures.file_notes(), *columns.notes())
    return ExportReport("parquet", out, rows.num_records, notes=notes)


class _Rows:
    """The rows of a file, made of records in batches of bounded size."""

    def __init__(self, schema: pa.Schema, choices: list[str], pictures: Pictures | None) -> None:
        self._schema = schema
        self._choices = choices
        self._pictures = pictures
        self.num_records = 0
        self.num_missing = 0

    def batches(self, records: Iterator[RecordDict]) -> Iterator[pa.RecordBatch]:
        rows: list[dict[str, Any]] = []
        num_bytes = 0
        for record in records:
            row = self._row(record)
            rows.append(row)
            num_bytes += len(row["image"]["bytes"] or b"") if self._pictures and row["image"] else 0
            if len(rows) >= GROUP_ROWS or num_bytes >= GROUP_BYTES:
                yield self._batch(rows)
                rows, num_bytes = [], 0
        if rows:
            yield self._batch(rows)

    def _batch(self, rows: list[dict[str, Any]]) -> pa.RecordBatch:
        try:
            return pa.RecordBatch.from_pylist(rows, schema=self._schema)
        except (pa.ArrowException, OverflowError) as error:
            last = self.num_records
            raise ExportError(
                f"records {last - len(rows) + 1} to {last}: one has a value of another kind than its column ({error})"
            ) from error

    def _row(self, record: RecordDict) -> dict[str, Any]:
        self.num_records += 1
        tokens, error, scores = record.get("tokens") or {}, record.get("error") or {}, choice_scores(record)
        row = {name: record.get(name) for name, _ in _COLUMNS}
        row |= {"prompt_tokens": tokens.get("prompt"), "output_tokens": tokens.get("output")}
        row |= {f"error_{key}": error.get(key) for key in ("type", "message", "retry")}
        row |= {CHOICE_PREFIX + choice: scores.get(choice) for choice in self._choices}
        row |= part_columns(record)
        row |= {
            f"tiles.{key}": str(value) if key == "size" else value for key, value in (record.get("tiles") or {}).items()
        }
        row["meta"] = json.dumps(record.get("meta") or {}, ensure_ascii=False, allow_nan=False)
        if self._pictures is not None:
            row["image"] = self._picture(record, self._pictures)
        return row

    def _picture(self, record: RecordDict, pictures: Pictures) -> dict[str, Any] | None:
        name = record.get("image")
        if name is None:
            return None
        item = pictures.find(record)
        content = None if item is None else _readable_bytes(item, pictures)
        self.num_missing += content is None
        # Null as a whole: a reader opens a path without bytes, and stops where it is not there.
        return None if content is None else {"bytes": content, "path": name}


def _readable_bytes(found: FoundPicture, pictures: Pictures) -> bytes | None:
    """Return a picture's file, as PNG where only md3 reads it: one that `datasets` cannot decode would end its loop."""
    try:
        image = pictures.read(found)  # within the limits, and of a kind that is allowed
        content = pictures.read_bytes(found)
    except ImageError:
        return None
    if pillow_opens(content, _FORMATS):
        return content
    png = io.BytesIO()
    image.save(png, "PNG")
    return png.getvalue()
