"""Makes texts as models write them, in six languages: honest ones, ones that go round, and ones that decline.

Everything is drawn from a seed, and from the words in made_texts.toml.
"""

from __future__ import annotations

import json
import random
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

_TEXTS = {
    language: {
        kind: {name: [entry.strip() for entry in re.split(r"[|\n]", text)] for name, text in entries.items()}
        for kind, entries in kinds.items()
    }
    for language, kinds in tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8")).items()
}
LANGUAGES = tuple(_TEXTS)
WITHOUT_BLANKS = frozenset({"zh", "ja"})
Maker = Callable[[random.Random, str], str]


def filled(draw: random.Random, text: str, language: str) -> str:
    """Return `text` with each `{kind}` replaced by another drawn entry of that kind: a thing, a place, a colour."""
    words = _TEXTS[language]["words"]
    for kind, entries in words.items():
        chosen = iter(draw.sample(entries, min(len(entries), text.count(f"{{{kind}}}"))) * 4)
        while f"{{{kind}}}" in text:
            text = text.replace(f"{{{kind}}}", next(chosen), 1)
    return text[:1].upper() + text[1:]


def _sentences(draw: random.Random, language: str, count: int) -> str:
    blank = "" if language in WITHOUT_BLANKS else " "
    chosen = draw.sample(
        _TEXTS[language]["honest"]["sentence"], min(count, len(_TEXTS[language]["honest"]["sentence"]))
    )
    return blank.join(filled(draw, sentence, language) for sentence in chosen)


def _things(draw: random.Random, language: str, count: int) -> list[str]:
    entries = _TEXTS[language]["words"]["thing"]
    return draw.sample(entries, min(count, len(entries)))


# ---- honest texts


def _caption(draw: random.Random, language: str) -> str:
    return _sentences(draw, language, draw.randint(1, 8))


def _list(draw: random.Random, language: str) -> str:
    things = _things(draw, language, draw.randint(3, 12))
    comma = "、" if language in WITHOUT_BLANKS else ", "
    form = draw.randrange(5)
    if form == 0:
        return comma.join(things)
    if form == 1:
        return "\n".join(f"{n}. {thing}" for n, thing in enumerate(things, 1))
    if form == 2:
        return "\n".join(f"- {thing}: {draw.randint(1, 9)}" for thing in things)
    if form == 3:
        return json.dumps(things, ensure_ascii=False)
    return comma.join(f"{draw.randint(1, 40)} {thing}" for thing in things)


def _drawn(kind: str) -> Maker:
    return lambda draw, language: filled(draw, draw.choice(_TEXTS[language]["honest"][kind]), language)


def _parallel(draw: random.Random, language: str) -> str:
    """Say the same of several things, as an honest description does."""
    blank = "" if language in WITHOUT_BLANKS else " "
    frame, places = draw.choice(_TEXTS[language]["honest"]["frame"]), _TEXTS[language]["words"]["position"]
    chosen = draw.sample(places, draw.randint(2, min(5, len(places))))
    return blank.join(filled(draw, frame.replace("{position}", place), language) for place in chosen)


def _chorus(draw: random.Random, language: str) -> str:
    """Quote a song: verses that differ, with a line that comes after each."""
    chorus = draw.choice(_TEXTS[language]["honest"]["chorus"])
    verses = draw.sample(_TEXTS[language]["honest"]["verse"], 6)
    verses = [filled(draw, verse, language) for verse in verses]
    return "\n".join(line for n in range(0, 6, 2) for line in (*verses[n : n + 2], chorus))


def _table(draw: random.Random, language: str) -> str:
    things = _things(draw, language, draw.randint(3, 8))
    form = draw.randrange(4)
    if form == 0:
        rows = [f"| {thing} | {draw.randint(1, 99)} | {draw.randint(1, 99)} |" for thing in things]
        return "\n".join(["| | A | B |", "|---|---|---|", *rows])
    if form == 1:
        boxes = [{"label": thing, "box": [draw.randint(0, 999) for _ in range(4)]} for thing in things]
        return json.dumps(boxes, ensure_ascii=False)
    if form == 2:
        return "\n".join(f"{thing} {'.' * draw.randint(5, 40)} {draw.randint(1, 300)}" for thing in things)
    return "\n".join(f"{thing:<20}{draw.randint(100, 2000) / 100:.2f} €" for thing in things)


HONEST_KINDS: tuple[Maker, ...] = (
    _caption, _caption, _list, _drawn("answer"), _drawn("answer"), _parallel, _chorus, _table, _drawn("sign"),
    _drawn("near_refusal"),
)  # fmt: skip


def honest_texts(count: int, seed: int) -> list[str]:
    """Return `count` texts, no two alike, of all languages and kinds in turn."""
    return _different(count, seed, lambda draw, n, language: HONEST_KINDS[n % len(HONEST_KINDS)](draw, language))


# ---- texts that go round


def _unit(draw: random.Random, language: str, kind: str) -> tuple[str, int]:
    """Return what a loop repeats, and how often it does at least."""
    things, comma = _things(draw, language, 3), "、" if language in WITHOUT_BLANKS else ", "
    blank = "" if language in WITHOUT_BLANKS else " "
    if kind == "word":
        return draw.choice(_TEXTS[language]["words"]["word"]) + draw.choice((blank, comma)), 12
    if kind == "phrase":
        return things[0] + comma, 6
    if kind == "phrases":
        return comma.join(things[: draw.randint(2, 3)]) + comma, 5
    if kind == "sentence":
        return _sentences(draw, language, 1) + blank, 4
    if kind == "sentences":
        return _sentences(draw, language, 2) + blank, 4
    if kind == "bullet":
        return f"- {things[0]}\n", 6
    assert kind == "json"
    return json.dumps(
        {"label": things[0], "colour": draw.choice(_TEXTS[language]["words"]["word"])}, ensure_ascii=False
    ) + ", ", 5


def _near(draw: random.Random, language: str, times: int) -> str:
    """Repeat a sentence in which a number, an ordinal or one word changes: no two are the same."""
    blank = "" if language in WITHOUT_BLANKS else " "
    form = draw.randrange(3)
    if form == 0:
        thing = _things(draw, language, 1)[0]
        return "\n".join(f"{n}. {thing}" for n in range(1, times + 9))
    if form == 1:
        frame, start = draw.choice(_TEXTS[language]["nearly"]["number"]), draw.randint(1, 5)
        frame = filled(draw, frame, language)
        return blank.join(frame.replace("#", str(n)) for n in range(start, start + times + 9))
    frame = filled(draw, draw.choice(_TEXTS[language]["nearly"]["ordinal"]), language)
    ordinals = _TEXTS[language]["nearly"]["ordinals"]
    return blank.join(frame.replace("#", ordinals[n % len(ordinals)]) for n in range(times + 9))


LOOP_KINDS = ("word", "phrase", "phrases", "sentence", "sentences", "bullet", "json", "near", "near", "phrase")


def _loop(draw: random.Random, n: int, language: str) -> str:
    start = _sentences(draw, language, draw.choice((0, 0, 1, 3, 6)))
    kind, more = LOOP_KINDS[n % len(LOOP_KINDS)], draw.choice((0, 1, 3, 10, 40))
    if kind == "near":
        text = _near(draw, language, more)
    else:
        unit, least = _unit(draw, language, kind)
        text = unit * (least + more) + unit[: draw.randrange(len(unit))]  # the limit of tokens falls anywhere
    return f"{start}\n{text}" if start else text


def looping_texts(count: int, seed: int) -> list[str]:
    """Return `count` texts that go round, no two alike: after an honest start or none, of all languages in turn."""
    return _different(count, seed, _loop)


# ---- texts that decline


def _refusal(draw: random.Random, n: int, language: str) -> str:
    parts = _TEXTS["en" if n % 2 else language]["declining"]  # half of them in English, as models mostly decline
    blank = "" if (language in WITHOUT_BLANKS and not n % 2) else " "
    text = (
        draw.choice(parts["whole"])
        if draw.random() < 0.5
        else draw.choice(parts["opener"]) + blank + draw.choice(parts["body"])
    )
    if draw.random() < 0.5:
        text += blank + draw.choice(parts["after"])
    return text.replace("'", "\u2019") if draw.random() < 0.3 else text


def refusing_texts(count: int, seed: int) -> list[str]:
    """Return `count` texts that decline, no two alike, half of them in English."""
    return _different(count, seed, _refusal)


def _different(count: int, seed: int, make: Callable[[random.Random, int, str], str]) -> list[str]:
    def texts() -> Iterator[str]:
        draw, n = random.Random(seed), 0
        while True:
            yield make(draw, n // len(LANGUAGES), LANGUAGES[n % len(LANGUAGES)])
            n += 1

    found: dict[str, None] = {}
    for text in texts():
        found[text] = None
        if len(found) == count:
            break
    return list(found)
