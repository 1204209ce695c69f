"""The path of a segment: from the ids a model emitted to an SVG path.

Ids are decoded one by one to words: a command letter, a "-" that negates the next number, or an
integer in a viewbox of 960 by 960. The result is in unit coordinates of the segment's box.
Source: Moondream 3 specification, section 11.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from md3cli.model.prompts import Tokenizer

COMMANDS = frozenset("MmLlHhVvCcSsQqTtAaZz")
VIEWBOX = 960
LAST_CONTROL_ID = 20  # ids up to here are never path text


@dataclass(frozen=True, slots=True)
class SegmentPath:
    """`svg_path` is empty where `error` says why the words make no path."""

    svg_path: str
    words: tuple[str, ...]
    error: str | None = None


def parse_path(ids: Sequence[int], tokenizer: Tokenizer) -> SegmentPath:
    """The path of the ids between a segment's box and its end; control ids are skipped."""
    decoded = (tokenizer.decode([id]).strip() for id in ids if id > LAST_CONTROL_ID)
    words = tuple(word for word in decoded if word)
    try:
        return SegmentPath(_join(words), words)
    except (ValueError, OverflowError) as error:
        return SegmentPath("", words, str(error))


def _join(words: Sequence[str]) -> str:
    """Words as path data. ValueError: a word that is no number, or stands where none may."""
    pieces: list[str] = []
    at = 0
    while at < len(words):
        if words[at] not in COMMANDS:
            raise ValueError(f"unexpected path token {words[at]!r}")
        pieces.append(words[at])
        at += 1
        numbers: list[int] = []
        while at < len(words) and words[at] not in COMMANDS:
            sign = 1
            if words[at] == "-":
                sign, at = -1, at + 1
                if at == len(words):
                    raise ValueError("unexpected path token '-'")
            numbers.append(sign * int(words[at]))
            at += 1
        pieces += map(_scaled, numbers[: len(numbers) // 2 * 2])  # taken in pairs, an odd last one is dropped
    return " ".join(pieces)


def _scaled(number: int) -> str:
    return f"{number / VIEWBOX:.3f}".rstrip("0").rstrip(".")
