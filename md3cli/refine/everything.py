"""Names of things in what a model says: a list in any form, or a caption.

`names_in` is pure, and what it returns is data: few, short, printable names, whatever the text is. The rules are those
of English; other languages are taken apart at their commas alone. Knows nothing of models and requests.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from md3cli.errors import UsageError
from md3cli.records import RecordDict, are_printable, is_printable, printable
from md3cli.refine.labels import read_text, shown_text
from md3cli.refine.singular import singular, without_s, words_of

NAME_LIMIT_CHARS = 40
MOST_NAMES = 20
VOCABULARY_LIMIT = 10_000  # names
_TEXT_LIMIT_CHARS = 20_000  # no answer has a tenth of it


# ---- names of a vocabulary

_TOKEN = re.compile(
    r"[\u3040-\u309f\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u309f\u3400-\u9fff\uf900-\ufaff]+|[^\w\s-]|\n"
)
_Tokens = tuple[str, ...]


def _tokens(text: str) -> _Tokens:
    """Return words, and signs, which no name reaches across; a character of a language without blanks is a word."""
    return tuple(_TOKEN.findall(text.casefold()))


def _forms(words: _Tokens) -> tuple[_Tokens, _Tokens, _Tokens]:
    """Return words as they are, one of each kind, and without the s of "glasses": the more exact first."""
    return words, tuple(map(singular, words)), tuple(map(without_s, words))


@dataclass(frozen=True)
class Vocabulary:
    """The only names that may come out, as they were written; `by_words` finds one by its words in any number."""

    names: tuple[str, ...]
    by_words: dict[_Tokens, str]
    longest: int  # words

    @classmethod
    @functools.lru_cache(maxsize=4)
    def of(cls, names: tuple[str, ...]) -> Vocabulary:
        """Return the vocabulary of names that `read_vocabulary` has found to be good ones."""
        forms = [_forms(_tokens(name)) for name in names]
        by_words: dict[_Tokens, str] = {}
        for step in range(3):
            for name, form in zip(names, forms, strict=True):
                by_words.setdefault(form[step], name)
        return cls(names, by_words, max(map(len, by_words)))

    def mentioned(self, text: str) -> Iterator[str]:
        """Yield the names that a text mentions, in order; of two at one place the longer, and none behind "no"."""
        words = _tokens(text)
        forms = _forms(words)
        at = 0
        while at < len(words):
            for length in range(min(self.longest, len(words) - at), 0, -1):
                name = next((n for form in forms if (n := self.by_words.get(form[at : at + length])) is not None), None)
                if name is not None:
                    if at == 0 or words[at - 1] not in _NONE:
                        yield name
                    at += length - 1
                    break
            at += 1


def read_vocabulary(path: Path) -> tuple[str, ...]:
    """Return the names of a file, one a line; blank lines and lines that begin with `#` are none.

    Raises:
        UsageError: it cannot be read in full, has no name or more than VOCABULARY_LIMIT, or a name comes twice (in
            another case or number, too), is longer than NAME_LIMIT_CHARS, or is not printable.
    """
    where = f"--vocabulary {printable(str(path))}"
    known: dict[_Tokens, int] = {}
    names = []
    for number, line in enumerate(read_text(path, "--vocabulary").split("\n"), 1):
        name = " ".join(line.split())
        if not name or name.startswith("#"):
            continue
        here = f"{where}, line {number:,}"
        if len(name) > NAME_LIMIT_CHARS:
            raise UsageError(f"{here}: {shown_text(name)!r} has more than {NAME_LIMIT_CHARS} characters; shorten it")
        if not are_printable(name) or not any(map(str.isalnum, name)):
            raise UsageError(f"{here}: {shown_text(name)!r} is no name that can be printed; write a name a line")
        first = known.setdefault(_forms(_tokens(name))[1], number)
        if first != number:
            raise UsageError(f"{here}: {shown_text(name)!r} stands in line {first:,} already; leave one out")
        names.append(name)
        if len(names) > VOCABULARY_LIMIT:
            raise UsageError(f"{where} has more than {VOCABULARY_LIMIT:,} names")
    if not names:
        raise UsageError(f"{where} has no name; write one a line")
    return tuple(names)


# ---- names without a vocabulary

_NONE = words_of("no not without")
_DROPPED = words_of("""
    a an the this that these those one two three four five six seven eight nine ten eleven twelve dozen dozens
    hundreds some several many few multiple various numerous other another more also both each every single his her
    its their my our your of maybe possibly around approximately about exactly plus etc it they he she there here
    which who what""")
_AMOUNTS = words_of("couple pair pairs group groups lot lots number set bunch row rows")  # where "of" is next
_BREAKS = words_of("""
    and or with without in on at by near under above below behind beside between over from to into onto next against
    along across through around inside outside as while for off is are was were be being been has have had can could
    may might will would appears appear seems seem looks look shows show showing shown depicts depict depicting
    features feature featuring contains contain containing includes include including see seen visible stands stand
    standing sits sit sitting lies lie lying wears wear wearing holds hold holding walks walking rides riding runs
    running looking hanging parked placed surrounded filled covered resting leaning flying eating drinking playing
    driving carrying reading talking smiling sleeping growing scattered arranged located stacked mounted attached
    facing using taken i you we there's it's here's that's working waiting posing""")
_NO_THINGS = words_of("""
    image picture photo photograph scene background foreground left right top bottom side middle center centre front
    back corner view object objects item items thing things none nothing n/a list answer following red yellow green
    cyan blue purple black white pink brown grey gray dark bright large small big little tall old young new empty
    visible clear""")
_MARKER = re.compile(r"^[ \t]*(?:\(?\d{1,4}[.):]|[-*•+–])[ \t]+")
_SEPARATORS = re.compile(r"\s\d{1,4}[.)]\s|[,;.!?()\[\]{}\"“”„«»<>|/\\&=、，。；！？「」]|\s[-–—]+\s|\.\.+")
_ENDS_OF_NAMES = (",", ";", ".", "\n", "、", "，", "。")
_NAME_KEYS = ("label", "name", "object", "item", "class")
_NUMBER = re.compile(r"x?[\d.]+x?")
_ING_THINGS = words_of("""
    building painting railing ceiling clothing string awning earring stocking bedding lighting drawing crossing
    landing wedding flooring roofing pudding carving molding moulding siding dumpling duckling sapling swing sling""")


def names_in(text: str, vocabulary: Vocabulary | None = None, most: int = MOST_NAMES) -> tuple[str, ...]:
    """Return the names of things in a text, at most `most`, in the order of their first mention, none twice.

    Names have at most NAME_LIMIT_CHARS printable characters; longer ones are left out. With a vocabulary its names come
    out as they are written there, wherever the text mentions them. Without one, a text is taken apart: JSON into its
    texts, a list into its lines, lines at commas, and what remains at prepositions, verbs and the like; articles,
    numbers and words of quantity go, and the last word becomes a singular. "There are two red cars on a street." has
    "red car" and "street". A line "Car: it is red" of a list is named by what stands before the colon.
    """
    found: dict[str, None] = {}
    text = "".join(c if c == "\n" or is_printable(c) else " " for c in text[:_TEXT_LIMIT_CHARS])
    for name in vocabulary.mentioned(text) if vocabulary is not None else _plain_names(text):
        if len(found) >= most:
            break
        if len(name) <= NAME_LIMIT_CHARS:
            found[name] = None
    return tuple(found)


def listed_in(record: RecordDict, vocabulary: Vocabulary | None = None, most: int = MOST_NAMES) -> tuple[str, ...]:
    """Return the names in the text of a caption or an answer; none of one that failed, nor one that was cut off."""
    text = record.get("caption") if record.get("task") == "caption" else record.get("answer")
    if record.get("error") is not None or not isinstance(text, str):
        return ()
    if record.get("finish_reason") == "length":
        text = text[: max(map(text.rfind, _ENDS_OF_NAMES)) + 1]
    return names_in(text, vocabulary, most)


def _plain_names(text: str) -> Iterator[str]:
    texts = _texts_of_json(text)
    for line in text.split("\n") if texts is None else texts:
        for part in _parts(line, is_listed=texts is not None):
            yield from _things(part)


def _texts_of_json(text: str) -> list[str] | None:
    """Return the names in a JSON list or object; None where the text is no such thing."""
    text = re.sub(r"^```\w*|```$", "", text.strip()).strip()
    if not text.startswith(("[", "{")):
        return None
    try:
        return list(_strings(json.loads(text)))
    except (ValueError, RecursionError):
        return None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)
    elif isinstance(value, dict):
        name = next((value[key] for key in _NAME_KEYS if isinstance(value.get(key), str)), None)
        if name is not None:
            yield name
            return
        for key, each in value.items():
            if isinstance(each, int | float):
                yield from [key] if each else []
            else:
                yield from _strings(each)


def _parts(line: str, *, is_listed: bool) -> Iterator[str]:
    """Take a line apart at its signs; of a line with a colon one side is the name."""
    bare = _MARKER.sub("", re.sub(r"[*_`#~]+", lambda found: " " if found[0] == "_" else "", line), count=1)
    is_item = is_listed or bare != line
    before, colon, behind = (*re.split(r"(:|：|\s[-–—]+\s)", bare, maxsplit=1), "", "")[:3]
    if colon in (":", "：") and not is_item and (not behind.strip() or any(map(str.isalpha, behind))):
        before = behind  # "Objects:" begins a list; it may go on in this line
    bare = before
    yield from filter(None, map(str.strip, _SEPARATORS.split(bare)))


def _things(part: str) -> Iterator[str]:
    """Yield the things of a part of a sentence."""
    words: list[str] = []
    for word in [*part.lower().replace("\u2019", "'").split(), "and"]:
        if word not in _BREAKS:
            words.append(word)
            continue
        name = _named(words)
        if name:
            yield name
        words = [word] if word in _NONE else []


def _named(words: Sequence[str]) -> str | None:
    """Return the name that words are: without what counts and points, the last in the singular."""
    if words and words[0] in _NONE:
        return None
    while words and (_counts(words[0]) or (words[0] in _AMOUNTS | _NO_THINGS and "of" in words[1:2])):
        words = words[1:]
    while words and _NUMBER.fullmatch(words[-1]):
        words = words[:-1]
    bare = [word for word in (word.strip("'’-+*%$€#@^~`…") for word in words) if word]
    if all(word in _NO_THINGS or _counts(word) for word in bare):
        return None
    heads = [n for n, word in enumerate(bare, 1) if n == len(bare) or bare[n] == "of"]
    name = " ".join(singular(word) if n in heads else word for n, word in enumerate(bare, 1))
    is_no_thing = (len(name) == 1 and name.isascii()) or not any(map(str.isalpha, name))
    is_verb = len(bare) == 1 and name.endswith("ing") and len(name) > 5 and name not in _ING_THINGS
    return None if is_no_thing or is_verb else name


def _counts(word: str) -> bool:
    return word in _DROPPED or _NUMBER.fullmatch(word) is not None
