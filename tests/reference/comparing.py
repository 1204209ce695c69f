"""What of a reference answer is certain, and whether a result of the program agrees with it.

A decision is sure where its margin and the experts' margin are wide enough for the arithmetic in
use; after the first one that is not, two correct implementations may go different ways. Results are
compared in full where every decision is sure, else as far as the sure ones reach.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from reference.sequence import Model
from reference.skills import Answer
from reference.texts import grounded

DECISIONS_OF_AN_OBJECT = {"detect": 5, "point": 3}  # go on; x, y[, width, height]
COORDINATE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Margins:
    """Least gap of a sure decision, in logits: of the choice itself, of the experts behind it."""

    choice: float
    experts: float


FLOAT32 = Margins(1e-3, 1e-5)
BFLOAT16 = Margins(1.5, 0.05)


def num_sure(answer: Answer, margins: Margins) -> int:
    """Decisions before the first unsure one."""
    for number, decision in enumerate(answer["trace"]):
        if decision["margin"] < margins.choice or decision["moe_margin"] < margins.experts:
            return number
    return len(answer["trace"])


def is_certain(answer: Answer, margins: Margins) -> bool:
    return num_sure(answer, margins) == len(answer["trace"])


def expected_result(request: dict, answer: Answer) -> dict[str, Any]:
    """The record's result keys for a reference answer, scores aside."""
    skill = request["skill"]
    if skill == "caption":
        return {"caption": answer["caption"]}
    if skill == "query":
        result = {"answer": answer["answer"]}
        if "reasoning" in answer:
            thought = answer["reasoning"]
            result["reasoning"] = {key: thought[key] for key in ("text", "grounding")}
        return result
    if skill == "segment":
        found = [{key: answer[key] for key in ("svg_path", "bbox")}] if "bbox" in answer else []
        return {"segments": found}
    key = "objects" if skill == "detect" else "points"
    return {key: answer[key]}


def assert_agrees(model: Model, request: dict, answer: Answer, result: dict[str, Any], margins: Margins) -> None:
    """`result` says what the sure decisions of `answer` say.

    Keys the reference does not know (labels, scores) are not looked at.
    """
    if is_certain(answer, margins):
        assert_within(expected_result(request, answer), result)
        if request["skill"] == "segment" and result["segments"]:
            assert ("parse_error" in result["segments"][0]) == ("parse_error" in answer)
        return
    sure = num_sure(answer, margins)
    skill = request["skill"]
    if skill in DECISIONS_OF_AN_OBJECT:
        key = "objects" if skill == "detect" else "points"
        whole = sure // DECISIONS_OF_AN_OBJECT[skill]
        assert_within(answer[key][:whole], result[key][:whole])
    elif skill == "caption":
        assert result["caption"].startswith(settled_text(model, answer["token_ids"][:sure]))
    elif skill == "query":
        assert_query_begins_alike(model, answer, result, sure)


def assert_query_begins_alike(model: Model, answer: Answer, result: dict[str, Any], sure: int) -> None:
    tokens = sum(decision["kind"] == "token" for decision in answer["trace"][:sure])
    thought = answer.get("reasoning")
    if thought is not None:
        of_thought = len(thought["token_ids"]) + (thought["finish"] == "stop")
        last_of_thought = next_after(answer["trace"], of_thought)
        if sure < last_of_thought:
            begun = settled_thought(model, thought["token_ids"][:tokens])
            assert result["reasoning"]["text"].startswith(begun)
            return
        assert_within(expected_result({"skill": "query"}, answer)["reasoning"], result["reasoning"])
        tokens -= of_thought
    assert result["answer"].startswith(settled_text(model, answer["token_ids"][:tokens]))


def next_after(trace: list[dict], num_tokens: int) -> int:
    """How many decisions it takes until `num_tokens` tokens and the coordinates behind them are decided."""
    seen = 0
    for number, decision in enumerate(trace):
        if decision["kind"] == "token":
            if seen == num_tokens:
                return number
            seen += 1
    return len(trace)


def settled_text(model: Model, ids: list[int]) -> str:
    """Text of a beginning; half a character at its end is still open."""
    return model.text_of(ids).rstrip("\ufffd")


def settled_thought(model: Model, ids: list[int]) -> str:
    """The same for a reasoning phase, whose chunks are decoded one by one."""
    chunks: list[tuple[list[int], list[float]]] = [([], [])]
    for token in ids:
        if token in (model.ids["start_ground_points_id"], model.ids["end_ground_id"]):
            chunks.append(([], []))
        chunks[-1][0].append(token)
    return grounded(model, chunks)["text"].rstrip("\ufffd")


def assert_within(expected: Any, actual: Any) -> None:
    """`actual` holds all of `expected`: keys of objects, lists of one length, floats to 1e-6."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            assert_within(value, actual[key])
    elif isinstance(expected, list):
        assert len(actual) == len(expected), (expected, actual)
        for ours, theirs in zip(expected, actual, strict=True):
            assert_within(ours, theirs)
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, abs=COORDINATE_TOLERANCE)
    else:
        assert actual == expected
