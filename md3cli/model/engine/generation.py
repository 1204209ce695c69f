"""A row of the batch on the host's side: a job in flight, the decisions it collects, and what they say at the end.

A `Generation` is one job in flight; what the network computes with is `state.Rows`. `build_answer` says a finished one
in the words of a record: the result keys of its task, scores and a segment's path included. Nothing here touches a
tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from md3cli.errors import RequestError
from md3cli.images.crops import PreparedImage
from md3cli.model.engine.prompts import Prompt, Prompts, Tokenizer
from md3cli.model.engine.state import Event, Finish, Mode
from md3cli.model.network.config import ModelConfig
from md3cli.model.network.moondream import SIZE_OCTAVES
from md3cli.records import Answer, Job, Task

FINISH_REASONS = {Finish.STOP: "stop", Finish.LENGTH: "length"}
COMMANDS = frozenset("MmLlHhVvCcSsQqTtAaZz")
VIEWBOX = 960
LAST_CONTROL_ID = 20  # ids up to here are never path text
SCORE_MIN, SCORE_MAX = 0.001, 0.999


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A picture already turned into embeddings [P, D] (on the CPU); `sha256` names it."""

    embeddings: Any
    width: int
    height: int
    sha256: str


AnyImage = PreparedImage | EncodedImage


@dataclass(slots=True)
class Decisions:
    """The ids of one phase in order, and the coordinates and sizes that stand behind some of them."""

    token_ids: list[int] = field(default_factory=list)
    coords: list[float] = field(default_factory=list)
    sizes: list[tuple[float, float]] = field(default_factory=list)
    finish_reason: str = "stop"
    is_closed: bool = False  # of reasoning: the answer comes next


def first_mode(task: Task | None, reasons: bool) -> Mode:
    """Return the kind of the first decision behind a prompt; a text that opens no task is a query's."""
    if task in (Task.DETECT, Task.POINT):
        return Mode.X
    if task is Task.SEGMENT:
        return Mode.SEGMENT
    return Mode.REASON if reasons else Mode.TEXT


@dataclass(slots=True)
class Generation:
    """One job in flight."""

    job: Job
    prompt: Prompt
    config: ModelConfig
    start: int  # position of the prompt's first id: behind the picture's prefix, or 0
    reasoning: Decisions | None = None
    answer: Decisions = field(default_factory=Decisions)
    choices: tuple[tuple[int, ...], ...] = ()  # ids of the only answers allowed
    masses: list[list[float]] = field(default_factory=list)  # per object: continue, x, y[, width, height]
    choice_scores: list[float] = field(default_factory=list)
    is_done: bool = False

    @classmethod
    def of(cls, job: Job, prompts: Prompts, config: ModelConfig, max_context: int) -> Generation:
        """Build the prompt of a job, and look at its length before anything is computed.

        Raises:
            RequestError: no prompt can be made of the request, or it does not fit the context.
        """
        generation = cls(
            job,
            prompts.build(job.request, has_image=job.image is not None),
            config,
            start=config.prefix_len if job.image is not None else 0,
            choices=prompts.encode_choices(job.request),
        )
        length = generation.prompt_end + max(map(len, generation.choices), default=0)
        if length > max_context:
            raise RequestError(
                f"the prompt needs {length} positions and the context holds {max_context}; "
                "shorten it or raise --max-context"
            )
        return generation

    def restart(self) -> None:
        """Forget every decision: the row starts again from its prompt."""
        self.reasoning, self.answer, self.is_done = None, Decisions(), False
        self.masses, self.choice_scores = [], []

    @property
    def image_key(self) -> str | None:
        """The key that generations about the same picture share; None without a picture."""
        return self.job.image.sha256 if self.job.image is not None else None

    @property
    def prompt_end(self) -> int:
        """Position behind the prompt's last id."""
        return self.start + len(self.prompt.ids)

    @property
    def start_mode(self) -> Mode:
        """The kind of the first decision."""
        return first_mode(self.job.request.task, self.reasons)

    @property
    def is_choosing(self) -> bool:
        """True once nothing but the choice between given answers is left."""
        has_reasoned = self.reasoning is not None and self.reasoning.is_closed
        return bool(self.choices) and not self.is_done and (has_reasoned or not self.reasons)

    def choose(self, scores: list[float], *, has_room: bool) -> None:
        """End with the most probable of the given answers, or with none where the context is full."""
        self.is_done = True
        if not has_room:
            self.answer.finish_reason = "length"
            return
        self.choice_scores = scores
        best = max(range(len(scores)), key=scores.__getitem__)
        self.answer.token_ids = list(self.choices[best])

    @property
    def reasons(self) -> bool:
        """True for a query that thinks before it answers."""
        return self.job.request.task is Task.QUERY and self.job.request.reasoning

    @property
    def limit(self) -> int:
        """Budget of the phase: objects for detect and point, tokens otherwise."""
        request = self.job.request
        return request.max_objects if request.task in (Task.DETECT, Task.POINT) else request.max_tokens

    @property
    def most_decisions(self) -> int | None:
        """The decisions after which the row is over for certain; None where nothing bounds them but the context."""
        if self.choices and not self.reasons:
            return 1
        return self.limit if self.start_mode in (Mode.TEXT, Mode.SEGMENT) else None

    def absorb(self, event: Event) -> None:
        """Take in one decision of this generation's row; the last one ends the generation."""
        mode, token, finish = Mode(int(event.mode)), int(event.token), Finish(int(event.finish))
        if mode is Mode.REASON:
            self._absorb_reasoning(event, token)
        elif mode is Mode.X:
            if finish is not Finish.STOP:
                self.masses.append([event.continue_mass])
                self._add_coord(self.answer, event, scored=True)
        elif mode is Mode.Y:
            self._add_coord(self.answer, event, scored=True)
        elif mode is Mode.SIZE:
            self._add_size(self.answer, event, scored=True)
        elif finish is not Finish.STOP:
            self._absorb_token(event, token, mode)
        if finish is not Finish.NO:
            self.is_done = True
            self.answer.finish_reason = FINISH_REASONS[finish]
            if mode is Mode.REASON and self.reasoning is not None and finish is Finish.LENGTH:
                self.reasoning.finish_reason = "length"  # the context is full; there was no room for an answer

    def _absorb_reasoning(self, event: Event, token: int) -> None:
        if self.reasoning is None:
            self.reasoning = Decisions()
        ids, request = self.config.tokenizer, self.job.request
        if token == ids.answer_id:
            spent = len(self.reasoning.token_ids) >= request.max_tokens
            self.reasoning.finish_reason = "length" if spent else "stop"
            self.reasoning.is_closed = True
        elif token == ids.coord_id:
            self._add_coord(self.reasoning, event, scored=False)
        else:
            self.reasoning.token_ids.append(token)

    def _absorb_token(self, event: Event, token: int, mode: Mode) -> None:
        ids = self.config.tokenizer
        if mode is Mode.SEGMENT and token == ids.coord_id:
            if not self.masses:
                self.masses.append([event.continue_mass])
            # The box alone is scored: its centre and its size come first.
            self._add_coord(self.answer, event, scored=len(self.answer.coords) < 2)
        elif mode is Mode.SEGMENT and token == ids.size_id:
            self._add_size(self.answer, event, scored=not self.answer.sizes and bool(self.masses))
        else:
            self.answer.token_ids.append(token)

    def _add_coord(self, decisions: Decisions, event: Event, *, scored: bool) -> None:
        decisions.token_ids.append(self.config.tokenizer.coord_id)
        decisions.coords.append(int(event.coord_bin) / self.config.region.coord_out_dim)
        if scored:
            self.masses[-1].append(event.coord_mass)

    def _add_size(self, decisions: Decisions, event: Event, *, scored: bool) -> None:
        decisions.token_ids.append(self.config.tokenizer.size_id)
        last_bin = self.config.region.size_out_dim // 2 - 1
        width, height = (
            2.0 ** (int(b) / last_bin * SIZE_OCTAVES - SIZE_OCTAVES) for b in (event.width_bin, event.height_bin)
        )
        decisions.sizes.append((width, height))
        if scored:
            self.masses[-1] += [event.width_mass, event.height_mass]


# -- what a generation says ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SegmentPath:
    """The path of a segment; `svg_path` is empty where `error` says why the words make no path."""

    svg_path: str
    words: tuple[str, ...]
    error: str | None = None


def parse_path(ids: Sequence[int], tokenizer: Tokenizer) -> SegmentPath:
    """Read the path out of the ids between a segment's box and its end; control ids are skipped.

    Ids are decoded one by one to words: a command letter, a "-" that negates the next number, or an integer in a
    viewbox of 960 by 960. The result is in unit coordinates of the segment's box.
    Source: Moondream 3 specification, section 11.
    """
    decoded = (tokenizer.decode([id]).strip() for id in ids if id > LAST_CONTROL_ID)
    words = tuple(word for word in decoded if word)
    try:
        return SegmentPath(_join(words), words)
    except (ValueError, OverflowError) as error:
        return SegmentPath("", words, str(error))


def _join(words: Sequence[str]) -> str:
    """Join words to path data.

    Raises:
        ValueError: a word is no number, or stands where no number may.
    """
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


def build_answer(generation: Generation, tokenizer: Tokenizer) -> Answer:
    """Say a finished generation in the words of a record.

    Raises:
        RequestError: of type `model`, the vocabulary cannot put the ids into words.
    """
    request = generation.job.request
    results = {
        Task.CAPTION: _caption,
        Task.QUERY: _query,
        Task.DETECT: _detect,
        Task.POINT: _point,
        Task.SEGMENT: _segment,
    }
    phases = [p for p in (generation.reasoning, generation.answer) if p is not None]
    return Answer(
        key=generation.job.key,
        result=results[request.task](generation, tokenizer),
        finish_reason=generation.answer.finish_reason,
        prompt_tokens=generation.prompt_end,
        output_tokens=sum(len(p.token_ids) for p in phases),
    )


def score(masses: Sequence[float]) -> float:
    """Return how sure the model was of an object, as records show it.

    P(an object here rather than the end) × the geometric mean of the softmax mass near each chosen
    bin: x and y, for boxes width and height too (`moondream.near_mass`).
    """
    continue_mass, *parts = masses
    return rounded_score(continue_mass * math.prod(parts) ** (1 / len(parts)))


def rounded_score(probability: float) -> float:
    """Return a probability as records show it: 3 decimals, 0.001 to 0.999."""
    return round(min(max(probability, SCORE_MIN), SCORE_MAX), 3)


def _caption(generation: Generation, tokenizer: Tokenizer) -> dict[str, Any]:
    return {"caption": tokenizer.decode(generation.answer.token_ids)}


def _query(generation: Generation, tokenizer: Tokenizer) -> dict[str, Any]:
    result: dict[str, Any] = {"answer": tokenizer.decode(generation.answer.token_ids)}
    if generation.choice_scores:
        choices, scores = generation.job.request.choices, generation.choice_scores
        result["answer"] = choices[max(range(len(scores)), key=scores.__getitem__)]
        result["choices"] = {choice: rounded_score(score) for choice, score in zip(choices, scores, strict=True)}
    if generation.reasoning is not None:
        result["reasoning"] = reasoning_result(generation, tokenizer)
    return result


def reasoning_result(generation: Generation, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the record's `reasoning` of a generation that has finished thinking."""
    assert generation.reasoning is not None
    result = grounded_text(generation.reasoning, generation.config, tokenizer)
    result["finish_reason"] = generation.reasoning.finish_reason
    return result


def grounded_text(reasoning: Decisions, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return text and grounding of a reasoning phase: ground ids open chunks, coordinates belong to theirs.

    `start_idx` and `end_idx` count characters of the text; each chunk is decoded on its own.
    """
    boundaries = (config.tokenizer.start_ground_points_id, config.tokenizer.end_ground_id)
    chunks: list[tuple[list[int], list[float]]] = [([], [])]
    coords = iter(reasoning.coords)
    for token in reasoning.token_ids:
        if token in boundaries:
            chunks.append(([], []))
        chunks[-1][0].append(token)
        if token == config.tokenizer.coord_id:
            chunks[-1][1].append(next(coords))
    text, grounding = "", []
    for ids, values in chunks:
        piece = tokenizer.decode(ids)
        points = [[x, y] for x, y in zip(values[0::2], values[1::2], strict=False)]
        if points:
            grounding.append({"start_idx": len(text), "end_idx": len(text) + len(piece), "points": points})
        text += piece
    return {"text": text, "grounding": grounding}


def _box(x: float, y: float, size_wh: tuple[float, float]) -> dict[str, float]:
    width, height = size_wh
    return {"x_min": x - width / 2, "y_min": y - height / 2, "x_max": x + width / 2, "y_max": y + height / 2}


def _detect(generation: Generation, tokenizer: Tokenizer) -> dict[str, Any]:
    answer, label = generation.answer, generation.job.request.prompt
    # An object that the context cut short has no size and is left out.
    found = zip(answer.coords[0::2], answer.coords[1::2], answer.sizes, generation.masses, strict=False)
    return {"objects": [{"label": label, **_box(x, y, wh), "score": score(masses)} for x, y, wh, masses in found]}


def _point(generation: Generation, tokenizer: Tokenizer) -> dict[str, Any]:
    coords, label = generation.answer.coords, generation.job.request.prompt
    found = zip(coords[0::2], coords[1::2], generation.masses, strict=False)
    return {"points": [{"label": label, "x": x, "y": y, "score": score(masses)} for x, y, masses in found]}


def _segment(generation: Generation, tokenizer: Tokenizer) -> dict[str, Any]:
    answer = generation.answer
    if len(answer.coords) < 2 or not answer.sizes:
        return {"segments": []}
    ids = generation.config.tokenizer
    path = parse_path([t for t in answer.token_ids if t not in (ids.coord_id, ids.size_id)], tokenizer)
    box = {
        name: min(max(value, 0.0), 1.0)
        for name, value in _box(answer.coords[0], answer.coords[1], answer.sizes[0]).items()
    }
    segment: dict[str, Any] = {"label": generation.job.request.prompt, "svg_path": path.svg_path, "bbox": box}
    if path.error is not None:
        segment["parse_error"] = path.error
    segment["score"] = score(generation.masses[0])
    return {"segments": [segment]}
