"""What the page's script reads of the pictures: an index of all of them, and a card for each.

The index (names, ids, labels, scores, words to search for) is in the browser as a whole; a card (thumbnail, shapes,
texts) is read when its picture comes into view. Both are JSON that is safe where it stands, in the page or in a script
file beside it. A piece is bounded by its number of pictures; nothing here knows files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from md3cli.refine.quality import QUALITIES
from md3cli.report.items import Entry, Item, Passage, Shape
from md3cli.report.page import legible

INDEX_SIZE = 5000  # pictures in a piece of the index: 1 MB
CARDS_SIZE = 20  # cards in a piece, 0.4 MB: a page sorted by score reads a piece for each picture that comes into view
WORDS_LIMIT = 1000  # characters of an answer, a caption or a message that the search knows
STATUSES, VERDICTS = ("ok", "empty", "failed"), (None, "right", "wrong")


@dataclass(slots=True)
class IndexPiece:
    """Columns about some pictures that follow each other; `words` are what tasks, prompts and labels count in.

    By picture: `images` (exact names), `records` (how many). By record: `ids` to `objects` (how many); a bit of
    `qualities` for each of `QUALITIES`; `parts`, by the record's place here, have the label of what it is about. By
    object: `labels` (-1: the score is that of a choice taken) and `scores`.
    """

    images: list[str | None] = field(default_factory=list)
    images_b64: dict[int, str] = field(default_factory=dict)  # by place in `images`
    records: list[int] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    tasks: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    verdicts: list[int] = field(default_factory=list)
    qualities: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    objects: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)
    parts: dict[int, int] = field(default_factory=dict)
    _numbers: dict[str, int] = field(default_factory=dict)

    def add(self, item: Item) -> None:
        """Note one picture with its records."""
        if name_b64 := item.first.get("image_b64"):
            self.images_b64[len(self.images)] = name_b64
        self.images.append(item.first["image"])
        self.records.append(len(item.entries))
        for entry in item.entries:
            self._add_record(entry)

    def _add_record(self, entry: Entry) -> None:
        prompt = entry.record.get("prompt")
        if entry.part is not None:
            self.parts[len(self.ids)] = self._number(legible(entry.part.label))
        self.ids.append(str(entry.record.get("id")))
        self.tasks.append(self._number(entry.task))
        self.prompts.append(-1 if prompt is None else self._number(str(prompt)))
        self.statuses.append(STATUSES.index(entry.status))
        self.verdicts.append(VERDICTS.index(entry.verdict))
        self.qualities.append(sum(1 << QUALITIES.index(quality) for quality in entry.qualities))
        self.texts.append(words_of(entry))
        labels = [self._number(legible(shape.label)) for shape in entry.shapes]
        scores = [shape.score for shape in entry.shapes] if entry.shapes else entry.scores
        self.labels += labels or [-1] * len(scores)
        self.scores += scores
        self.objects.append(len(scores))

    def _number(self, word: str) -> int:
        if word not in self._numbers:
            self._numbers[word] = len(self.words)
            self.words.append(word)
        return self._numbers[word]

    def document(self) -> dict[str, Any]:
        """Return the piece as the script reads it."""
        names = (name for name in self.__slots__ if not name.startswith("_"))
        return {name: getattr(self, name) for name in names if name != "parts" or self.parts}


def words_of(entry: Entry) -> str:
    """Return what the search finds a record by, besides the names, prompts and labels of the columns."""
    parts = (entry.text, entry.note, *(passage.text for passage in entry.reasoning))
    return "\n".join(part for part in parts if part)[:WORDS_LIMIT]


def card_of(item: Item) -> dict[str, Any]:
    """Return what is drawn and written of a picture; every text is legible, and a key without a value is left out."""
    size = f"{item.width}×{item.height}" if item.width else None
    card = {
        "name": legible(item.name),
        "size": size,
        "frame": [round(side, 2) for side in item.frame],
        "thumbnail": item.thumbnail,
        "missing": None if item.missing is None else legible(item.missing),
        "records": [_record_on_card(entry) for entry in item.entries],
    }
    return _without_nothing(card)


def _record_on_card(entry: Entry) -> dict[str, Any]:
    record = {
        "task": legible(entry.task),
        "prompt": legible(entry.prompt),
        "part": None if entry.part is None else {"name": legible(entry.part.name), "rect": entry.part.rect},
        "status": entry.status,
        "verdict": entry.verdict,
        "qualities": entry.qualities or None,
        "text": None if entry.text is None else legible(entry.text),
        "note": None if entry.note is None else legible(entry.note),
        "choices": [[legible(name), score] for name, score in entry.choices.items()] or None,
        "reasoning": [_passage(passage) for passage in entry.reasoning] or None,
        "shapes": [_shape(shape) for shape in entry.shapes] or None,
        "missed": [_shape(shape) for shape in entry.missed] or None,
    }
    return _without_nothing(record)


def _passage(passage: Passage) -> dict[str, Any]:
    return {"text": legible(passage.text), "points": passage.points}


def _shape(shape: Shape) -> dict[str, Any]:
    drawn = {
        "label": legible(shape.label),
        "score": shape.score,
        "at": shape.name_at,
        "end": shape.is_name_before or None,
        "rect": shape.rect,
        "point": shape.point,
        "path": shape.path,
        "verdict": shape.verdict,
    }
    return _without_nothing(drawn)


def _without_nothing(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if value is not None}


def in_pieces(items: Iterable[Item], write: Callable[[str, int, str, int], None]) -> Iterator[Item]:
    """Yield the items, each when its card is made; `write(kind, number, JSON, pictures)` gets index and cards."""
    index, cards = IndexPiece(), list[dict[str, Any]]()
    num_index = num_cards = 0
    for item in items:
        index.add(item)
        cards.append(card_of(item))
        yield item
        if len(cards) == CARDS_SIZE:
            write("cards", num_cards, safe_json(cards), len(cards))
            cards, num_cards = [], num_cards + 1
        if len(index.images) == INDEX_SIZE:
            write("index", num_index, safe_json(index.document()), len(index.images))
            index, num_index = IndexPiece(), num_index + 1
    if cards:
        write("cards", num_cards, safe_json(cards), len(cards))
    if index.images:
        write("index", num_index, safe_json(index.document()), len(index.images))


def safe_json(document: object) -> str:
    """Return JSON in ASCII that can neither end a script element nor a raw template string."""
    text = json.dumps(document, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for char in "<>&`$":  # five times through C: 30 times as fast as str.translate, which looks at every character
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def script_of(stamp: str, name: str, text: str) -> str:
    """Return a script file that hands `text` (of `safe_json`) to the page whose `stamp` it has.

    It is one call with one raw string, which the page parses as JSON: whatever the data, nothing of it is code.
    """
    return f'md3("{stamp}","{name}",String.raw`{text}`);\n'


def joined_json(head: Mapping[str, Any], lists: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """Yield, piece by piece, the JSON of `head` with further keys whose lists hold what `safe_json` returned."""
    yield safe_json(head).removesuffix("}")
    for key, texts in lists.items():
        yield f',"{key}":['
        for place, text in enumerate(texts):
            yield f",{text}" if place else text
        yield "]"
    yield "}"
