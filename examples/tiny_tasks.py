"""From a picture of the little world to training sequences in Moondream 3's own token stream.

A `TokenStream` is what follows the image prefix: the prompt, then everything the model should emit.
Every position says what is fed in there (a token, a coordinate or a size) and what should be read
from the hidden state it produces (a token and its weight, a coordinate, a size), in the formats of the
Moondream 3 specification, sections 9, 11 and 13.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from tiny_vocabulary import ANSWER, COORD, EOS, GROUND, GROUND_END, SEPARATOR, SIZE, SKILL, THINKING
from tokenizers import Tokenizer
from world import KINDS
from world_draw import Instance, Picture
from world_text import (
    CAPTION_LENGTHS,
    FACTS,
    Question,
    caption,
    count_question,
    existence_question,
    matching,
    names_of,
    path_words,
    plural,
    random_name,
    reference_question,
    relation_question,
    unique_questions,
)

NO_TARGET = -100
DECISION_WEIGHT = 2.0  # another object, or stop
ANSWER_WEIGHT = 3.0  # one token that everything hangs on
PATH_WEIGHT = 0.3  # many tokens, each of little consequence
LONG_CAPTION_WEIGHT = 0.5
PLURAL_SHARE = 0.08  # of detect and point prompts


class TokenStream:
    """One prompt and its continuation; parallel lists, one entry per position.

    `ids` fed in (5 and 6 where a value is fed in their place), `values` the number or the pair fed in
    (NaN for tokens); `targets`/`weights` the next token; `coords` the next coordinate; `sizes` the next pair.
    """

    def __init__(self, *, sees_image: bool = True) -> None:
        self.sees_image = sees_image
        self.ids: list[int] = []
        self.values: list[tuple[float, float]] = []
        self.targets: list[int] = []
        self.weights: list[float] = []
        self.coords: list[float] = []
        self.sizes: list[tuple[float, float]] = []

    def __len__(self) -> int:
        return len(self.ids)

    def _feed(self, token: int, value: tuple[float, float] = (np.nan, np.nan)) -> None:
        self.ids.append(token)
        self.values.append(value)
        self.targets.append(NO_TARGET)
        self.weights.append(0.0)
        self.coords.append(np.nan)
        self.sizes.append((np.nan, np.nan))

    def feed_tokens(self, tokens: Sequence[int]) -> None:
        """Tokens the prompt gives."""
        for token in tokens:
            self._feed(token)

    def feed_point(self, x: float, y: float) -> None:
        """A spatial reference."""
        self._feed(COORD, (x, np.nan))
        self._feed(COORD, (y, np.nan))

    def feed_box(self, box_xyxy: tuple[float, float, float, float]) -> None:
        """A spatial reference: centre, then size."""
        left, top, right, bottom = box_xyxy
        self.feed_point((left + right) / 2, (top + bottom) / 2)
        self._feed(SIZE, (right - left, bottom - top))

    def _expect(self, token: int, weight: float) -> None:
        self.targets[-1], self.weights[-1] = token, weight

    def emit(self, tokens: Sequence[int], weight: float = 1.0) -> None:
        """Tokens the model should choose."""
        for token in tokens:
            self._expect(token, weight)
            self._feed(token)

    def emit_point(self, x: float, y: float, weights: tuple[float, float] = (1.0, 1.0)) -> None:
        """Two coordinates; each is read from the state that chose its token."""
        for value, weight in zip((x, y), weights, strict=True):
            self._expect(COORD, weight)
            self.coords[-1] = value
            self._feed(COORD, (value, np.nan))

    def emit_size(self, width: float, height: float, weight: float = 1.0) -> None:
        """One size, width before height."""
        self._expect(SIZE, weight)
        self.sizes[-1] = (width, height)
        self._feed(SIZE, (width, height))

    def end(self, weight: float = 1.0) -> None:
        """The model should stop here; nothing more is fed."""
        self._expect(EOS, weight)


class TaskWriter:
    """Writes token streams; holds the tokenizer and remembers encoded strings."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.encode = functools.lru_cache(maxsize=65536)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text).ids)

    def _skill(self, skill: str, *, sees_image: bool = True) -> TokenStream:
        stream = TokenStream(sees_image=sees_image)
        if not sees_image:
            stream.feed_tokens([EOS])  # BOS
        stream.feed_tokens([SKILL, *self.encode(skill), SEPARATOR])
        return stream

    def caption(self, picture: Picture, length: str) -> TokenStream:
        stream = self._skill("describe")
        stream.feed_tokens([*self.encode(length), ANSWER])
        weight = LONG_CAPTION_WEIGHT if length == "long" else 1.0
        stream.emit(self.encode(caption(picture, length)), weight)
        stream.end(weight)
        return stream

    def query(self, question: Question, *, sees_image: bool = True) -> TokenStream:
        stream = self._skill("query", sees_image=sees_image)
        if question.point:
            stream.feed_point(*question.point)
        if question.box_xyxy:
            stream.feed_box(question.box_xyxy)
        stream.feed_tokens([*self.encode(question.text), ANSWER])
        stream.emit(self.encode(question.answer), ANSWER_WEIGHT)
        stream.end()
        return stream

    def reasoning(self, question: Question) -> TokenStream:
        """Count by pointing: "1 red circle, 2 red star." with each name grounded, then the number."""
        stream = self._skill("query")
        stream.feed_tokens([*self.encode(question.text), THINKING])
        counted = question.counted or ()
        for number, instance in enumerate(counted, start=1):
            stream.emit(self.encode(f"{', ' if number > 1 else ''}{number}"), DECISION_WEIGHT)
            stream.emit([GROUND])
            stream.emit_point(*instance.point)
            stream.emit([*self.encode(" " + instance.name), GROUND_END])
        stream.emit(self.encode("." if counted else "none."), DECISION_WEIGHT)
        stream.emit([ANSWER])
        stream.emit(self.encode(question.answer))
        stream.end()
        return stream

    def detect(self, name: str, instances: Sequence[Instance], *, is_plural: bool = False) -> TokenStream:
        stream = self._skill("detect")
        stream.feed_tokens([*self.encode(" " + (plural(name) if is_plural else name)), ANSWER])
        for instance in matching(name, instances):
            left, top, right, bottom = instance.box_xyxy
            stream.emit_point((left + right) / 2, (top + bottom) / 2, (DECISION_WEIGHT, 0.0))
            stream.emit_size(right - left, bottom - top, 0.0)
        stream.end(DECISION_WEIGHT)
        return stream

    def point(self, name: str, instances: Sequence[Instance], *, is_plural: bool = False) -> TokenStream:
        stream = self._skill("point")
        stream.feed_tokens([*self.encode(" " + (plural(name) if is_plural else name)), ANSWER])
        for instance in matching(name, instances):
            stream.emit_point(*instance.point, (DECISION_WEIGHT, 0.0))
        stream.end(DECISION_WEIGHT)
        return stream

    def segment(self, picture: Picture, instance: Instance, name: str) -> TokenStream:
        stream = self._skill("segment")
        stream.feed_tokens([*self.encode(name), ANSWER])
        left, top, right, bottom = instance.box_xyxy
        stream.emit_point((left + right) / 2, (top + bottom) / 2)
        stream.emit_size(right - left, bottom - top)
        stream.emit([token for word in path_words(picture, instance) for token in self.encode(word)], PATH_WEIGHT)
        stream.end()
        return stream

    def sample(self, rng: np.random.Generator, picture: Picture) -> list[TokenStream]:
        """A training mix of about a dozen tasks for one picture."""
        streams = [self.caption(picture, "short")]
        if rng.random() < 0.5:
            streams.append(self.caption(picture, CAPTION_LENGTHS[int(rng.integers(1, 3))]))
        for skill in (self.detect, self.detect, self.detect, self.detect, self.point, self.point):
            name = self._object_name(rng, picture)
            streams.append(skill(name, picture.instances, is_plural=rng.random() < PLURAL_SHARE))
        streams.append(self.reasoning(count_question(rng, picture)))
        unique = unique_questions(rng, picture)
        questions = [count_question(rng, picture) for _ in range(3)]
        questions += [existence_question(rng, picture), reference_question(rng, picture)]
        questions += [unique[int(i)] for i in rng.permutation(len(unique))[:3]]
        questions += [found for _ in range(2) if (found := relation_question(rng, picture)) is not None]
        streams += map(self.query, questions)
        if (referent := _single_referent(rng, picture)) is not None:
            streams.append(self.segment(picture, *referent))
        if rng.random() < 0.15:
            fact = Question("fact", *FACTS[int(rng.integers(len(FACTS)))])
            streams.append(self.query(fact, sees_image=False))
        return streams

    def _object_name(self, rng: np.random.Generator, picture: Picture) -> str:
        """Half plain kinds, present or not as chance has it; half any name, present more often than not."""
        if rng.random() < 0.35:
            return str(rng.choice(KINDS))
        return random_name(rng, picture, present=0.75)


def _single_referent(rng: np.random.Generator, picture: Picture) -> tuple[Instance, str] | None:
    """An instance and a name that no other instance answers to; None when every name is shared."""
    pairs = [
        (instance, name)
        for instance in picture.instances
        for name in names_of(instance)
        if len(matching(name, picture.instances)) == 1
    ]
    return pairs[int(rng.integers(len(pairs)))] if pairs else None
