"""Braces in INPUT as bash and WebDataset expand them: `{00000..00031}`, `{a,b}`, `{0..9..3}`, one in another. Pure.

Knows nothing of files. What stands for itself in bash stands for itself here: `{x}`, `{}`, a brace without its other
half. How many paths a pattern names is known before the first one is made.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from itertools import chain, product
from typing import NamedTuple

from md3cli.errors import InputError
from md3cli.records import printable

MOST_PATHS = 1 << 18  # the largest set of shards known, LAION-5B, has 231,350
MOST_LEVELS = 16  # of braces in braces
_NUMBER = r"-?[0-9]{1,100}"
_NUMBERS = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(?:\.\.({_NUMBER}))?")
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])")


class _Pool(NamedTuple):
    """What may stand at one place: how many texts, and the texts, which are made when they are asked for, once."""

    size: int
    texts: Iterable[str]


def has_braces(text: str) -> bool:
    """Return whether braces in `text` stand for anything but themselves; any number of them is looked at once."""
    pairs = _pairs(text)
    return any(_alternatives(text, start, pairs) or _range(text[start + 1 : end]) for start, end in pairs.items())


def expanded(text: str) -> Iterator[str]:
    """Yield the paths that `text` names, the last braces counting fastest.

    Raises:
        InputError: on the first step, when there are more than MOST_PATHS, or too many braces in braces.
    """
    parts = _parts(text, 0, len(text), _pairs(text), 0)
    if (count := _count(parts)) > MOST_PATHS:
        shown = f"{count:,}" if count < 1e15 else "more than 10^15"
        raise InputError(
            f"{printable(text)[:200]} names {shown} paths, more than {MOST_PATHS:,}; give a pattern instead, "
            "which takes what is there: '*.tar'"
        )
    yield from _texts(parts)


def _pairs(text: str) -> dict[int, int]:
    """Return where the braces open that are closed, and where."""
    pairs, opened = dict[int, int](), list[int]()
    for place, char in enumerate(text):
        if char == "{":
            opened.append(place)
        elif char == "}" and opened:
            pairs[opened.pop()] = place
    return pairs


def _parts(text: str, start: int, end: int, pairs: dict[int, int], level: int) -> list[_Pool]:
    """Return what `text[start:end]` is made of."""
    if level > MOST_LEVELS:
        raise InputError(f"{printable(text)[:200]} has more than {MOST_LEVELS} braces in braces")
    parts, place, begin = list[_Pool](), start, start
    while place < end:
        close = pairs.get(place)
        pool = None if close is None else _pool(text, place, pairs, level)
        if close is None or pool is None:
            place += 1
            continue
        parts += [_Pool(1, (text[begin:place],)), pool]
        place = begin = close + 1
    return [*parts, _Pool(1, (text[begin:end],))]


def _pool(text: str, start: int, pairs: dict[int, int], level: int) -> _Pool | None:
    """Return what the braces that open at `start` stand for; None: themselves."""
    if alternatives := _alternatives(text, start, pairs):
        found = [_parts(text, begin, end, pairs, level + 1) for begin, end in alternatives]
        return _Pool(sum(map(_count, found)), chain.from_iterable(map(_texts, found)))
    return _range(text[start + 1 : pairs[start]])


def _alternatives(text: str, start: int, pairs: dict[int, int]) -> list[tuple[int, int]]:
    """Return where the alternatives of the braces at `start` begin and end; none where there is no comma."""
    found, begin, place = list[tuple[int, int]](), start + 1, start + 1
    while place < pairs[start]:
        if text[place] == ",":
            found.append((begin, place))
            begin = place + 1
        place = pairs.get(place, place) + 1
    return [*found, (begin, pairs[start])] if found else []


def _range(inside: str) -> _Pool | None:
    if letters := _LETTERS.fullmatch(inside):
        first, last = map(ord, letters.groups())
        return _Pool(abs(last - first) + 1, map(chr, _between(first, last, 1)))
    if (numbers := _NUMBERS.fullmatch(inside)) is None:
        return None
    ends = numbers[1], numbers[2]
    first, last, step = int(ends[0]), int(ends[1]), abs(int(numbers[3] or 1)) or 1
    is_padded = any(re.match("-?0[0-9]", end) for end in ends)
    width = max(map(len, ends)) if is_padded else 0
    return _Pool(abs(last - first) // step + 1, (f"{number:0{width}d}" for number in _between(first, last, step)))


def _between(first: int, last: int, step: int) -> range:
    return range(first, last + 1, step) if first <= last else range(first, last - 1, -step)


def _count(parts: list[_Pool]) -> int:
    return math.prod(part.size for part in parts)


def _texts(parts: list[_Pool]) -> Iterator[str]:
    yield from map("".join, product(*(part.texts for part in parts)))
