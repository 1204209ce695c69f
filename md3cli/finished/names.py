"""Names of records beside names of a ground truth: the one answer to "are these the same?" for images and labels.

Other tools write the same picture as `a.png`, `./a.png`, `val2017/a.png`, `val2017\\a.png`, `a%20b.png`, or
with its accents in another normal form. Names are compared from strict to loose; a looser way never undoes a
stricter one, and where it would have to choose between two names, neither is taken: they are `ambiguous`.
Knows nothing of files and formats.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from urllib.parse import unquote

from md3cli.errors import InputError
from md3cli.records import printable
from md3cli.source.walk import has_image_suffix

NAMES_SHOWN = 5

_Way = Callable[[list[str], list[str]], Iterator[tuple[str, str]]]  # names and truths to pairs that may be the same


@dataclass(frozen=True, slots=True)
class Matches:
    """`found` maps names of the records to names of the ground truth; `ambiguous` names fit several or share one."""

    found: dict[str, str] = field(default_factory=dict)
    ambiguous: tuple[str, ...] = ()


def match_images(asked: Iterable[str], known: Iterable[str]) -> Matches:
    """Match picture names one to one: as they are, by the same path, by a folder more or less, by the last part.

    A ground truth whose pictures are not at hand (YOLO's label files) calls them without suffix. The last part alone
    ("train/a.png", "val/a.png") counts only where nothing else matched.

    Raises:
        InputError: there are names, and not one is in the ground truth.
    """
    names, truths = list(dict.fromkeys(asked)), list(dict.fromkeys(known))
    found = {name: name for name in set(names).intersection(truths)}
    unclear: dict[str, None] = {}
    paths = (partial(_pairs, key=plain_path), partial(_pairs, key=_decoded_path))
    ways: list[_Way] = [*paths, _same_tail, _same_but_suffix]
    for way in ways:
        _match_clear(way, names, truths, found, unclear)
    if not found:
        _match_clear(partial(_pairs, key=lambda name: _decoded_path(name)[-1:]), names, truths, found, unclear)
    if names and not found:
        why = "each fits several" if unclear else "are both about the same folder?"
        raise InputError(
            f"no image of the records is in the ground truth: {printable(names[0])} there, "
            f"{printable(next(iter(truths), 'nothing'))} here; {why}"
        )
    return Matches({name: found[name] for name in names if name in found}, tuple(n for n in unclear if n not in found))


class ImageNames:
    """Picture names of a ground truth, to be found one at a time: as `match_images`, without a last part alone.

    Where a name could be several, none is found. Memory is a text for each folder of each name.
    """

    def __init__(self, known: Iterable[str]) -> None:
        self._exact = set(known)
        self._whole: dict[tuple[str, ...], str | None] = {}  # None: several
        self._tails: dict[tuple[str, ...], str | None] = {}
        self._bare: set[str] = set()
        for truth in self._exact:
            path = _decoded_path(truth)
            self._whole[path] = None if path in self._whole else truth
            for start in range(1, len(path)):
                self._tails[path[start:]] = None if path[start:] in self._tails else truth
            if not has_image_suffix(truth):
                self._bare.add(truth)

    def find(self, name: str) -> str | None:
        """Return the name in the ground truth for the picture that is called `name` here."""
        if name in self._exact:
            return name
        path = _decoded_path(name)
        found = self._of_path(path)
        if found is None and self._bare and path:
            found = self._of_path((*path[:-1], _without_suffix(path[-1])))
            return found if found in self._bare else None
        return found

    def _of_path(self, path: tuple[str, ...]) -> str | None:
        if path in self._whole:
            return self._whole[path]
        ways = [self._tails.get(path), *(self._whole.get(path[start:]) for start in range(1, len(path)))]
        found = {truth for truth in ways if truth is not None}
        return found.pop() if len(found) == 1 else None


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


def _decoded_path(name: str) -> tuple[str, ...]:
    return plain_path(unquote(name))


def ambiguity_notes(what: str, matches: Matches) -> Iterator[str]:
    """Yield what was not matched because it could be several, in a sentence; `what` is the noun."""
    if matches.ambiguous:
        shown = some_of(matches.ambiguous)
        yield f"{len(matches.ambiguous):,} {what}s could each be several of the ground truth's: {shown}"


def some_of(names: Sequence[str]) -> str:
    """Return the first names, made printable, for a sentence."""
    shown = ", ".join(printable(name) for name in names[:NAMES_SHOWN])
    return shown + (", …" if len(names) > NAMES_SHOWN else "")


def _match_clear(
    way: _Way,
    names: list[str],
    truths: list[str],
    found: dict[str, str],
    unclear: dict[str, None],
) -> None:
    """Add to `found` the pairs of `way` in which both names stand once; note the others in `unclear`."""
    taken = set(found.values())
    free = [name for name in names if name not in found and name not in unclear]
    pairs = list(dict.fromkeys(way(free, [truth for truth in truths if truth not in taken])))
    num_left, num_right = Counter(name for name, _ in pairs), Counter(truth for _, truth in pairs)
    for name, truth in pairs:
        if num_left[name] == num_right[truth] == 1:
            found[name] = truth
        else:
            unclear[name] = None


def _same_but_suffix(names: list[str], truths: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (name, truth) where the truth has no suffix of pictures and is, or ends, the name without its own."""
    bare = [truth for truth in truths if not has_image_suffix(truth)]
    by_stem: dict[str, list[str]] = {}
    for name in names if bare else ():
        by_stem.setdefault(_without_suffix(name), []).append(name)
    for stem, truth in [*_pairs([*by_stem], bare, key=_decoded_path), *_same_tail([*by_stem], bare)]:
        yield from ((name, truth) for name in by_stem[stem])


def _without_suffix(name: str) -> str:
    return name.rpartition(".")[0] or name


def _pairs(names: list[str], truths: list[str], key: Callable[[str], Hashable]) -> Iterator[tuple[str, str]]:
    by_key: dict[Hashable, list[str]] = {}
    for truth in truths:
        by_key.setdefault(key(truth), []).append(truth)
    # A name that fits hundreds is as unclear as one that fits two.
    yield from ((name, truth) for name in names for truth in by_key.get(key(name), ())[:2])


def _same_tail(names: list[str], truths: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (name, truth) where one ends with the whole of the other, folder by folder."""
    for longer, shorter, is_turned in ((names, truths, False), (truths, names, True)):
        whole: dict[tuple[str, ...], list[str]] = {}
        for name in shorter:
            whole.setdefault(_decoded_path(name), []).append(name)
        for name in longer:
            parts = _decoded_path(name)
            for start in range(1, len(parts)):
                for other in whole.get(parts[start:], ()):
                    yield (other, name) if is_turned else (name, other)
