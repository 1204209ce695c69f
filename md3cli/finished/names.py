"""Names of records -> names of a ground truth: the one answer to "are these the same?" for images and labels.

Other tools write the same picture as `a.png`, `./a.png`, `val2017/a.png`, `val2017\\a.png`, `a%20b.png`, or
with its accents in another normal form. Names are compared from strict to loose; a looser way never undoes a
stricter one, and where it would have to choose between two names, neither is taken: they are `ambiguous`.
Knows nothing of files and formats.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from urllib.parse import unquote

from md3cli.errors import InputError
from md3cli.records import printable

NAMES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Matches:
    """`found`: name of the records -> name of the ground truth; `ambiguous`: names that fit several or share one."""

    found: dict[str, str] = field(default_factory=dict)
    ambiguous: tuple[str, ...] = ()


def match_images(asked: Iterable[str], known: Iterable[str]) -> Matches:
    """Match picture names one to one: as they are, by the same path, by a folder more or less, by the last part.

    The last part alone ("train/a.png", "val/a.png") counts only where nothing else matched.

    Raises:
        InputError: there are names, and not one is in the ground truth.
    """
    names, truths = list(dict.fromkeys(asked)), list(dict.fromkeys(known))
    found = {name: name for name in set(names).intersection(truths)}
    unclear: dict[str, None] = {}
    ways: list[Callable[[list[str], list[str]], Iterator[tuple[str, str]]]] = [
        lambda left, right: _pairs(left, right, plain_path),
        lambda left, right: _pairs(left, right, lambda name: plain_path(unquote(name))),
        _same_tail,
    ]
    for way in ways:
        _match_clear(way, names, truths, found, unclear)
    if not found:
        _match_clear(
            lambda a, b: _pairs(a, b, lambda name: plain_path(unquote(name))[-1:]), names, truths, found, unclear
        )
    if names and not found:
        why = "each fits several" if unclear else "are both about the same folder?"
        raise InputError(
            f"no image of the records is in the ground truth: {printable(names[0])} there, "
            f"{printable(next(iter(truths), 'nothing'))} here; {why}"
        )
    return Matches({name: found[name] for name in names if name in found}, tuple(n for n in unclear if n not in found))


def match_labels(labels: Iterable[str], categories: Iterable[str]) -> Matches:
    """Match labels to categories: as they are, else whatever their case, blanks and normal form.

    Several labels may share a category.
    """
    names, truths = list(dict.fromkeys(labels)), list(dict.fromkeys(categories))
    by_fold: dict[str, list[str]] = {}
    for truth in truths:
        by_fold.setdefault(folded(truth), []).append(truth)
    exact = set(truths)
    fitting = {name: [name] if name in exact else by_fold.get(folded(name), []) for name in names}
    found = {name: fits[0] for name, fits in fitting.items() if len(fits) == 1}
    return Matches(found, tuple(name for name, fits in fitting.items() if len(fits) > 1))


def folded(text: str) -> str:
    """Return `text` as labels and questions are compared: whatever its case, blanks and normal form."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def plain_path(name: str) -> tuple[str, ...]:
    """Return the parts of a path: one kind of slash, one normal form, no `.` and no blanks around."""
    text = unicodedata.normalize("NFC", name.strip()).replace("\\", "/")
    return tuple(part for part in text.partition("://")[2 * ("://" in text)].split("/") if part not in ("", "."))


def ambiguity_notes(what: str, matches: Matches) -> Iterator[str]:
    """Yield what was not matched because it could be several, in a sentence; `what` is the noun."""
    if matches.ambiguous:
        shown = ", ".join(printable(name) for name in matches.ambiguous[:NAMES_SHOWN])
        more = ", …" if len(matches.ambiguous) > NAMES_SHOWN else ""
        yield f"{len(matches.ambiguous):,} {what}s could each be several of the ground truth's: {shown}{more}"


def _match_clear(
    way: Callable[[list[str], list[str]], Iterator[tuple[str, str]]],
    names: list[str],
    truths: list[str],
    found: dict[str, str],
    unclear: dict[str, None],
) -> None:
    """Add to `found` the pairs of `way` in which both names stand once; note the others in `unclear`."""
    taken = set(found.values())
    free = [name for name in names if name not in found and name not in unclear]
    pairs = list(dict.fromkeys(way(free, [truth for truth in truths if truth not in taken])))
    num_left: dict[str, int] = {}
    num_right: dict[str, int] = {}
    for name, truth in pairs:
        num_left[name] = num_left.get(name, 0) + 1
        num_right[truth] = num_right.get(truth, 0) + 1
    for name, truth in pairs:
        if num_left[name] == num_right[truth] == 1:
            found[name] = truth
        else:
            unclear[name] = None


def _pairs(names: list[str], truths: list[str], key: Callable[[str], Hashable]) -> Iterator[tuple[str, str]]:
    by_key: dict[Hashable, list[str]] = {}
    for truth in truths:
        by_key.setdefault(key(truth), []).append(truth)
    # A name that fits hundreds is as unclear as one that fits two.
    yield from ((name, truth) for name in names for truth in by_key.get(key(name), ())[:2])


def _same_tail(names: list[str], truths: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (name, truth) where one ends with the whole of the other, folder by folder."""

    def key(name: str) -> tuple[str, ...]:
        return plain_path(unquote(name))

    for longer, shorter, is_turned in ((names, truths, False), (truths, names, True)):
        whole: dict[tuple[str, ...], list[str]] = {}
        for name in shorter:
            whole.setdefault(key(name), []).append(name)
        for name in longer:
            parts = key(name)
            for start in range(1, len(parts)):
                for other in whole.get(parts[start:], ()):
                    yield (other, name) if is_turned else (name, other)
