"""A source row as three columns of the manifest, and back: name, path, and in JSON whatever is not as usual.

`more` is null for a picture that is asked what the run asks of all; else it holds `item` (the other fields of
the picture: a place inside a tar), `requests`, `meta` and `failure`, each where it is not the usual.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from operator import attrgetter
from typing import Any, NamedTuple

from md3cli.records import ImageItem, Request, RowFailure, SourceRow, Task

_ITEM_DEFAULTS: Mapping[str, Any] = {
    field.name: field.default for field in fields(ImageItem) if field.default is not MISSING
}
_other_fields = attrgetter(*_ITEM_DEFAULTS)
_USUAL = tuple(_ITEM_DEFAULTS.values())


class RowColumns(NamedTuple):
    """A row as the manifest holds it."""

    image: str | None
    path: bytes | None
    more: str | None


def columns_of(row: SourceRow, requests: tuple[Request, ...]) -> RowColumns:
    """`row` as columns; `requests` is what the run asks of every picture."""
    item = row.image
    is_usual = row.requests is requests and not row.meta and row.failure is None
    if item is None:
        return RowColumns(None, None, None if is_usual else _more(row, requests))
    is_usual = is_usual and _other_fields(item) == _USUAL
    path = item.path.encode("utf-8", "surrogateescape")
    return RowColumns(item.name, path, None if is_usual else _more(row, requests))


def _more(row: SourceRow, requests: tuple[Request, ...]) -> str | None:
    more: dict[str, Any] = {}
    if row.image is not None:
        values = zip(_ITEM_DEFAULTS.items(), _other_fields(row.image), strict=True)
        more["item"] = {name: value for (name, default), value in values if value != default}
    if row.requests != requests:
        more["requests"] = [asdict(request) for request in row.requests]
    if row.meta:
        more["meta"] = dict(row.meta)
    if row.failure is not None:
        more["failure"] = [row.failure.type, row.failure.message]
    more = {key: value for key, value in more.items() if value}
    return json.dumps(more, separators=(",", ":")) if more else None


def row_of(columns: RowColumns, requests: tuple[Request, ...]) -> SourceRow:
    """The row that `columns_of` was given."""
    more = json.loads(columns.more) if columns.more is not None else {}
    item = None
    if columns.image is not None:
        item = ImageItem(
            columns.image, (columns.path or b"").decode("utf-8", "surrogateescape"), **more.get("item", {})
        )
    asked = tuple(map(request_of, more["requests"])) if "requests" in more else requests
    failure = RowFailure(*more["failure"]) if "failure" in more else None
    return SourceRow(item, asked, more.get("meta", {}), failure)


def request_of(document: Mapping[str, Any]) -> Request:
    """A request from its JSON."""
    tuples = {"spatial_refs": tuple(map(tuple, document["spatial_refs"])), "choices": tuple(document["choices"])}
    return Request(**{**document, "task": Task(document["task"]), **tuples})
