"""A finished generation in the words of a record: the result keys of its task, scores and a segment's path included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from md3cli.model.engine.generation import Decisions, Generation
from md3cli.model.engine.prompts import Tokenizer
from md3cli.model.network.config import ModelConfig
from md3cli.records import Answer, Task

COMMANDS = frozenset("MmLlHhVvCcSsQqTtAaZz")
VIEWBOX = 960
LAST_CONTROL_ID = 20  # ids up to here are never path text
SCORE_MIN, SCORE_MAX = 0.001, 0.999


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
    """Join words to path data. ValueError: a word that is no number, or stands where none may."""
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
    bin: x and y, for boxes width and height too (`state.near_mass`).
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
