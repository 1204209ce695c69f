"""Records about a part of a picture, in words: what a text is about, and how it is called. Pure functions.

A record about a part names it in `region`: the box, what it is called, and the object it is of. What such a record
found lies in the whole picture, so that it is read as any other; what it says in words is of the part alone, and must
not be taken for what is said of the picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from md3cli.records import RecordDict, Task, is_annotation_id

TEXTS: Mapping[str, str] = {Task.CAPTION: "caption", Task.QUERY: "answer"}  # task -> the key of its text


class PartText(NamedTuple):
    """What was asked about a part of a picture, and what was said."""

    question: str
    text: str


def is_of_part(record: Mapping[str, Any]) -> bool:
    """Return whether a record is about a part of its picture."""
    return record.get("region") is not None


def says_of_part(record: Mapping[str, Any]) -> bool:
    """Return whether a record asks for words about a part of its picture: they are not about the whole."""
    return record.get("task") in TEXTS and record.get("region") is not None


def part_text(record: RecordDict) -> PartText | None:
    """Return what a record says in words about a part; None for all else.

    A caption's question is `caption`, and `caption short` or `caption long` where that was asked.
    """
    if not says_of_part(record) or (text := record.get(TEXTS[record["task"]])) is None:
        return None
    if record["task"] == Task.QUERY:
        return PartText(str(record.get("prompt") or "answer"), str(text))
    length = record.get("length") or "normal"
    return PartText("caption" if length == "normal" else f"caption {length}", str(text))


def part_label(region: Mapping[str, Any]) -> str:
    """Return what a part is called: no format has a label without a letter."""
    return str(region["label"]) or "object"


def part_name(region: Mapping[str, Any]) -> str:
    """Return what people call a part: `car 1` is the first object of a record, `car #7` is annotation 7 of a file."""
    of = str(region["of"])
    return f"{part_label(region)} {f'#{of}' if is_annotation_id(of) else int(region['index']) + 1}"
