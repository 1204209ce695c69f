"""From a request to a sequence of decisions and back to an answer: the host's side of a row.

A `Sequence` collects the events of one row and, at the end, says them in the words of a record's
result keys. What the network computes with is `decoding.Rows`; nothing here touches a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from md3cli.images import PreparedImage
from md3cli.model.config import ModelConfig
from md3cli.model.decoding import Event, Finish, Mode
from md3cli.model.paths import parse_path
from md3cli.model.prompts import Prompt, Tokenizer
from md3cli.model.region import SIZE_OCTAVES
from md3cli.records import Request, RowFailure, Task

FINISH_REASONS = {Finish.STOP: "stop", Finish.LENGTH: "length"}
SCORE_MIN, SCORE_MAX = 0.001, 0.999


@dataclass(frozen=True, slots=True)
class Job:
    """One request to run; jobs whose images have the same `sha256` share one encoding.

    `image` None is a text-only query. `key` is the caller's and comes back with the answer.
    """

    key: int
    image: PreparedImage | EncodedImage | None
    request: Request


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A picture already turned into embeddings [P, D] (on the CPU); `sha256` names it."""

    embeddings: Any
    width: int
    height: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a job: `result` holds the record's result keys, or `failure` says why there are none."""

    key: int
    result: dict[str, Any] | None = None
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    output_tokens: int = 0
    failure: RowFailure | None = None


@dataclass(slots=True)
class Decisions:
    """Ids of one phase in order; bins and masses in the order of the ids that brought them."""

    token_ids: list[int] = field(default_factory=list)
    coords: list[float] = field(default_factory=list)
    sizes: list[tuple[float, float]] = field(default_factory=list)
    finish_reason: str = "stop"


@dataclass(slots=True)
class Sequence:
    """One job in flight."""

    job: Job
    prompt: Prompt
    config: ModelConfig
    reasoning: Decisions | None = None
    answer: Decisions = field(default_factory=Decisions)
    masses: list[list[float]] = field(default_factory=list)  # per object: continue, x, y[, width, height]
    is_done: bool = False

    def restart(self) -> None:
        """Forget every decision: the row starts again from its prompt."""
        self.reasoning, self.answer, self.masses, self.is_done = None, Decisions(), [], False

    @property
    def image_key(self) -> str | None:
        """What sequences about the same picture share."""
        return self.job.image.sha256 if self.job.image is not None else None

    @property
    def start(self) -> int:
        """Position of the prompt's first id: behind the picture's prefix, or 0."""
        return self.config.prefix_len if self.job.image is not None else 0

    @property
    def start_mode(self) -> Mode:
        """The kind of the first decision."""
        task = self.job.request.task
        if task in (Task.DETECT, Task.POINT):
            return Mode.X
        if task is Task.SEGMENT:
            return Mode.SEGMENT
        return Mode.REASON if self.reasons else Mode.TEXT

    @property
    def reasons(self) -> bool:
        """A query that thinks before it answers."""
        return self.job.request.task is Task.QUERY and self.job.request.reasoning

    @property
    def limit(self) -> int:
        """Budget of the phase: objects for detect and point, tokens otherwise."""
        request = self.job.request
        return request.max_objects if request.task in (Task.DETECT, Task.POINT) else request.max_tokens

    def reasoning_result(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The record's `reasoning` of a sequence that has finished thinking."""
        assert self.reasoning is not None
        result = grounded_text(self.reasoning, self.config, tokenizer)
        result["finish_reason"] = self.reasoning.finish_reason
        return result

    def absorb(self, event: Event) -> None:
        """Take in one decision of this sequence's row."""
        mode, token, finish = Mode(int(event.mode)), int(event.token), Finish(int(event.finish))
        if mode is Mode.REASON:
            self._absorb_reasoning(event, token)
        elif mode is Mode.X:
            self._absorb_start(event, finish)
        elif mode is Mode.Y:
            self._add_coord(self.answer, event, scored=True)
        elif mode is Mode.SIZE:
            self._add_size(self.answer, event, scored=True)
        elif finish is not Finish.STOP:
            self._absorb_token(event, token, mode)
        if finish is not Finish.NO:
            self.is_done = True
            self._close(mode, FINISH_REASONS[finish])

    def _absorb_reasoning(self, event: Event, token: int) -> None:
        if self.reasoning is None:
            self.reasoning = Decisions()
        ids, request = self.config.tokenizer, self.job.request
        if token == ids.answer_id:
            spent = len(self.reasoning.token_ids) >= request.max_tokens
            self.reasoning.finish_reason = "length" if spent else "stop"
        elif token == ids.coord_id:
            self._add_coord(self.reasoning, event, scored=False)
        else:
            self.reasoning.token_ids.append(token)

    def _absorb_start(self, event: Event, finish: Finish) -> None:
        if finish is not Finish.STOP:
            self.masses.append([event.continue_mass])
            self._add_coord(self.answer, event, scored=True)

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

    def _close(self, mode: Mode, reason: str) -> None:
        self.answer.finish_reason = reason
        if mode is Mode.REASON and self.reasoning is not None and reason == "length":
            self.reasoning.finish_reason = "length"  # the context is full; there was no room for an answer


def build_answer(sequence: Sequence, tokenizer: Tokenizer) -> Answer:
    """The finished sequence in the words of a record."""
    request = sequence.job.request
    results = {
        Task.CAPTION: _caption,
        Task.QUERY: _query,
        Task.DETECT: _detect,
        Task.POINT: _point,
        Task.SEGMENT: _segment,
    }
    phases = [p for p in (sequence.reasoning, sequence.answer) if p is not None]
    return Answer(
        key=sequence.job.key,
        result=results[request.task](sequence, tokenizer),
        finish_reason=sequence.answer.finish_reason,
        prompt_tokens=sequence.start + len(sequence.prompt.ids),
        output_tokens=sum(len(p.token_ids) for p in phases),
    )


def score(masses: Seq[float]) -> float:
    """How sure the model was of an object, 0.001 to 0.999, 3 decimals.

    P(an object here rather than the end) × the geometric mean of the softmax mass near each chosen
    bin: x and y, for boxes width and height too (`decoding.near_mass`).
    """
    continue_mass, *parts = masses
    value = continue_mass * math.prod(parts) ** (1 / len(parts))
    return round(min(max(value, SCORE_MIN), SCORE_MAX), 3)


def _caption(sequence: Sequence, tokenizer: Tokenizer) -> dict[str, Any]:
    return {"caption": tokenizer.decode(sequence.answer.token_ids)}


def _query(sequence: Sequence, tokenizer: Tokenizer) -> dict[str, Any]:
    result: dict[str, Any] = {"answer": tokenizer.decode(sequence.answer.token_ids)}
    if sequence.reasoning is not None:
        result["reasoning"] = sequence.reasoning_result(tokenizer)
    return result


def grounded_text(reasoning: Decisions, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Text and grounding of a reasoning phase: chunks are opened by ground ids, coordinates belong to theirs.

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


def _detect(sequence: Sequence, tokenizer: Tokenizer) -> dict[str, Any]:
    coords, label = sequence.answer.coords, sequence.job.request.prompt
    objects = []
    # An object that the context cut short has no size and is left out.
    for x, y, size_wh, masses in zip(coords[0::2], coords[1::2], sequence.answer.sizes, sequence.masses, strict=False):
        objects.append({"label": label, **_box(x, y, size_wh), "score": score(masses)})
    return {"objects": objects}


def _point(sequence: Sequence, tokenizer: Tokenizer) -> dict[str, Any]:
    coords, label = sequence.answer.coords, sequence.job.request.prompt
    points = []
    for x, y, masses in zip(coords[0::2], coords[1::2], sequence.masses, strict=False):
        points.append({"label": label, "x": x, "y": y, "score": score(masses)})
    return {"points": points}


def _segment(sequence: Sequence, tokenizer: Tokenizer) -> dict[str, Any]:
    answer = sequence.answer
    if len(answer.coords) < 2 or not answer.sizes:
        return {"segments": []}
    ids = sequence.config.tokenizer
    path = parse_path([t for t in answer.token_ids if t not in (ids.coord_id, ids.size_id)], tokenizer)
    box = {
        name: min(max(value, 0.0), 1.0)
        for name, value in _box(answer.coords[0], answer.coords[1], answer.sizes[0]).items()
    }
    segment: dict[str, Any] = {"label": sequence.job.request.prompt, "svg_path": path.svg_path, "bbox": box}
    if path.error is not None:
        segment["parse_error"] = path.error
    segment["score"] = score(sequence.masses[0])
    return {"segments": [segment]}
