"""CSV: one row for each box, mask, point or text; one row too for a record that found nothing or failed.

Boxes are clamped pixels of the upright image (x and y of the top left corner); a point has no width and height. What
records carry along has a column for each key, `meta.KEY`: a text or a number as it is, all else as JSON. Columns
`region.*` say which part of its picture a record is about, as it does: 0-1, unclamped. Texts are guarded against
spreadsheets (table.py); JSON Lines and Parquet hold them as they are.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from md3cli.exporters import ExportOptions, ExportReport
from md3cli.exporters.files import replaced_file
from md3cli.exporters.grouping import (
    CHOICE_PREFIX,
    META_PREFIX,
    PART_COLUMNS,
    choice_scores,
    find_columns,
    part_columns,
)
from md3cli.exporters.objects import boxes, points, segments
from md3cli.exporters.table import Table
from md3cli.records import RecordDict, compact_json, counted
from md3cli.refine.collection import Collection, read

COLUMNS = (
    "image", "width", "height", "task", "prompt", "label", "x", "y", "w", "h", "score",
    "caption", "answer", "svg_path", "finish_reason", "error_type", "error_message", "id",
    "length", "reasoning",
)  # fmt: skip
CELL_LIMIT = 32_767  # characters; Excel cuts what is longer, and Python's reader refuses 131,072

Row = dict[str, Any]


def export(records: Collection, out: Path, options: ExportOptions) -> ExportReport:
    """Write one table of all records; columns of parts, of `meta` and of restricted answers' choices come last."""
    found = find_columns(records, has_meta=True)
    columns = [*COLUMNS, *(PART_COLUMNS if found.has_parts else ())]
    columns += [*(META_PREFIX + key for key in found.meta), *(CHOICE_PREFIX + name for name in found.choices)]
    num_records, num_long, notes = 0, 0, list[str]()
    with replaced_file(out, overwrite=options.overwrite) as file:
        file.write(codecs.BOM_UTF8 if options.has_bom else b"")
        table = Table(file, columns)
        for record in read(records, notes):
            num_records += 1
            for row in _rows(record):
                cells = table.write(row.get(column) for column in columns)
                num_long += sum(isinstance(cell, str) and len(cell) > CELL_LIMIT for cell in cells)
        table.end()
    if num_long:
        cells_are = counted(num_long, "cell is", "cells are")
        notes.append(
            f"{cells_are} longer than the {CELL_LIMIT:,} characters a spreadsheet takes; the file has them whole"
        )
    return ExportReport("csv", out, num_records, notes=(*notes, *found.notes()))


def _rows(record: RecordDict) -> Iterator[Row]:
    error = record.get("error") or {}
    shared: Row = {key: record.get(key) for key in ("image", "width", "height", "task", "prompt", "caption", "answer")}
    shared |= {"finish_reason": record.get("finish_reason"), "id": record.get("id")}
    shared |= {"error_type": error.get("type"), "error_message": error.get("message")}
    shared |= {"length": record.get("length"), "reasoning": (record.get("reasoning") or {}).get("text")}
    shared |= part_columns(record)
    shared |= {META_PREFIX + key: _cell(value) for key, value in (record.get("meta") or {}).items()}
    shared |= {CHOICE_PREFIX + choice: score for choice, score in choice_scores(record).items()}
    if record.get("answer") is not None:
        shared["score"] = choice_scores(record).get(record["answer"])
    found = list(_found(record)) if "width" in record and not error else []
    yield from ({**shared, **row} for row in found or [{}])


def _cell(value: Any) -> Any:
    """Return a value of `meta` as a cell: a text or a number as it is, all else as JSON."""
    is_plain = value is None or isinstance(value, str | float) or type(value) is int
    return value if is_plain else compact_json(value).decode()


def _found(record: RecordDict) -> Iterator[Row]:
    """Yield the record's boxes, masks and points as columns, in pixels rounded to a thousandth."""
    size = (int(record["width"]), int(record["height"]))
    for box in boxes(record, *size):
        yield {"label": box.label, **_corner_and_size(box.x, box.y, box.width, box.height), "score": box.score}
    for segment in segments(record, *size):
        box = segment.box
        position = _corner_and_size(box.x, box.y, box.width, box.height)
        yield {"label": box.label, **position, "score": box.score, "svg_path": segment.svg_path}
    for point in points(record, *size):
        yield {"label": point.label, "x": round(point.x, 3), "y": round(point.y, 3), "score": point.score}


def _corner_and_size(x: float, y: float, width: float, height: float) -> Row:
    return {"x": round(x, 3), "y": round(y, 3), "w": round(width, 3), "h": round(height, 3)}
