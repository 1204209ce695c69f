"""The Python face with what callers get wrong: an error each, and the object goes on; text streams."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st

from md3cli import Moondream
from md3cli.config import ModelOptions
from md3cli.errors import ConfigError, RequestError
from md3cli.model import api
from md3cli.model.api import TextStream
from md3cli.model.engine import load as load_module
from md3cli.model.engine.engine import Engine
from md3cli.model.engine.load import load_engine
from md3cli.model.engine.prompts import Tokenizer

SCENE = str(Path(__file__).parents[2] / "examples" / "scenes" / "scene_00002.png")
GOOD = {"image": SCENE, "task": "detect", "prompt": "red circle"}


@pytest.fixture(scope="module")
def tiny() -> Moondream:
    return Moondream.load("tiny", device="cpu", dtype="fp32")


@pytest.mark.process
@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": "a"},
        {"seed": -1},
        {"seed": 2**70},
        {"temperature": "x"},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"max_objects": 0},
        {"prompt": 5},
        {"prompt": None},
        {"spatial_refs": 5},
        {"spatial_refs": [[2, 2]]},
        {"task": "dance"},
        {"task": None},
        {"task": "caption"},  # with a prompt
        {"task": "caption", "prompt": None, "length": "huge"},
        {"reasoning": "no"},
        {"choices": "yes"},
        {"image": None},
        {"image": "https://example.org/a.png"},
        {"prompt": b"car"},
        {"prompt": np.zeros(2)},
        {"choices": 5},
        {"name": 5},
        {"meta": [1]},
        {"spatial_refs": [[0.5, float("nan")]]},
        {"spatial_refs": [[10**400, 0]]},
        {"spatial_refs": [[True, False]]},
    ],
)
def test_a_wrong_request_is_an_error_record_and_the_next_is_answered(tiny: Moondream, wrong: dict[str, Any]) -> None:
    bad, good = tiny.annotate([{**GOOD, **wrong}, GOOD])
    assert bad["error"]["type"] == "bad_request"
    assert good["error"] is None
    assert good["objects"]
    if wrong.get("task") not in ("dance", None) or "task" not in wrong:
        assert bad["task"] == wrong.get("task", "detect")


@pytest.mark.process
def test_none_and_empty_text_stand_for_the_default(tiny: Moondream) -> None:
    plain = {"image": SCENE, "task": "query", "prompt": "How many shapes are there?"}
    named = {**plain, "length": None, "reasoning": None, "seed": None, "spatial_refs": "", "top_p": ""}
    first, second = (next(tiny.annotate([row])) for row in (plain, named))
    assert first == second
    (text_only,) = tiny.annotate([{**plain, "image": "", "prompt": "How many sides does a triangle have?"}])
    assert text_only["image"] is None
    assert text_only["error"] is None


def test_other_keys_come_back_in_meta(tiny: Moondream) -> None:
    (record,) = tiny.annotate([{**GOOD, "max_toknes": 3, "meta": {"row": 7}}])
    assert record["meta"] == {"max_toknes": 3, "row": 7}


@pytest.mark.parametrize("settings", [{"seed": "a"}, {"temperature": "x"}, {"max_tokens": True}, {"max_toknes": 3}])
def test_wrong_settings_are_refused(tiny: Moondream, settings: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        tiny.caption(SCENE, settings=settings)
    with pytest.raises(RequestError, match="object is int 5, expected text"):
        tiny.point(SCENE, 5)  # type: ignore[arg-type]
    assert tiny.caption(SCENE, settings={"max_tokens": 3})["caption"]


def test_a_stream_that_nobody_reads_on_is_cancelled() -> None:
    model = Moondream.load("tiny", device="cpu")
    expected = model.caption(SCENE)["caption"]
    stream = model.caption(SCENE, stream=True)["caption"]
    next(stream)
    assert model.engine.has_work
    stream.close()
    assert not model.engine._slots.active
    ended = model.caption(SCENE, stream=True)["caption"]
    first = next(ended)
    assert model.caption(SCENE)["caption"] == expected  # steps the stream to its end, too
    ended.close()
    assert expected.startswith(first)
    assert not model._answers


@pytest.mark.process
def test_compiling_answers_open_streams_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Moondream.load("tiny", device="cpu", dtype="fp32")
    settings = {"max_tokens": 8}
    expected = model.caption(SCENE, settings=settings)["caption"]
    stream = model.caption(SCENE, stream=True, settings=settings)["caption"]
    begun = next(stream)

    def ready(engine: Engine, cache_dir: Path | None) -> None:
        assert engine is model.engine
        assert not engine.has_work

    monkeypatch.setattr(api, "make_ready", ready)
    model.compile()
    assert begun + "".join(stream) == expected
    assert model.caption(SCENE, settings=settings)["caption"] == expected


def late_model(delay: int, is_planned: bool) -> Moondream:
    """The tiny model, its results read late or its passes of one size."""
    options = ModelOptions(model="tiny", device="cpu", dtype="fp32", batch_size=4, cache=False)
    with patch.object(load_module, "Engine", partial(Engine, delay=delay, is_planned=is_planned)):
        return Moondream(load_engine(options))


@pytest.fixture(scope="module", params=[(0, True), (1, False), (1, True), (2, False), (2, True)], ids=str)
def late(request: pytest.FixtureRequest) -> Moondream:
    return late_model(*request.param)


STREAMED = ({"max_tokens": 24}, {"max_tokens": 9}, {"max_tokens": 17})
LENGTHS = ("short", "normal", "long")


def open_streams(model: Moondream) -> list[Iterator[str]]:
    return [
        model.caption(SCENE, length, stream=True, settings=settings)["caption"]
        for length, settings in zip(LENGTHS, STREAMED, strict=True)
    ]


@pytest.fixture(scope="module")
def captions(tiny: Moondream) -> list[str]:
    """What the streams say, asked for whole and one at a time."""
    pairs = zip(LENGTHS, STREAMED, strict=True)
    return [tiny.caption(SCENE, length, settings=settings)["caption"] for length, settings in pairs]


@pytest.mark.process
def test_streams_beside_other_calls_say_the_same_however_late_results_are(
    late: Moondream, tiny: Moondream, captions: list[str]
) -> None:
    few = {"max_objects": 2}
    found = tiny.detect(SCENE, "red circle", settings=few)["objects"]
    streams = open_streams(late)
    texts = [""] * len(streams)
    for round in itertools.zip_longest(*streams, fillvalue=""):
        texts = [text + piece for text, piece in zip(texts, round, strict=True)]
        objects = late.detect(SCENE, "red circle", settings=few)["objects"]
        assert [box["x_min"] for box in objects] == [box["x_min"] for box in found]
    assert texts == captions
    assert not late._answers


@pytest.mark.process
@pytest.mark.parametrize("num_read", [1, 2, 4])
def test_a_stream_dropped_half_read_disturbs_no_other(late: Moondream, captions: list[str], num_read: int) -> None:
    dropped, *kept = open_streams(late)
    begun = [next(dropped) for _ in range(num_read)]
    assert captions[0].startswith("".join(begun))
    first = next(kept[0])
    del dropped
    assert first + "".join(kept[0]) == captions[1]
    assert "".join(kept[1]) == captions[2]
    assert not late._answers
    assert not late.engine._slots.active


@pytest.mark.process
@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize("at_step", [2, 5, 9])
def test_a_row_started_again_gives_its_stream_no_piece_twice(delay: int, at_step: int, captions: list[str]) -> None:
    """Memory runs out while streams are read; half of what is in flight then waits for a slot."""
    model = late_model(delay, is_planned=True)
    decode, num_calls = model.engine._decode, 0

    def failing() -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == at_step:
            raise torch.OutOfMemoryError("out of memory (made up)")
        decode()

    model.engine._decode = failing  # type: ignore[method-assign]
    streams = open_streams(model)
    texts = ["".join(column) for column in zip(*itertools.zip_longest(*streams, fillvalue=""), strict=True)]
    assert model.engine.stats.batch_sizes == [4, 2]
    assert texts == captions


@pytest.mark.process
@pytest.mark.parametrize("delay", [1, 2])
def test_compiling_answers_streams_whose_results_are_under_way(
    delay: int, captions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = late_model(delay, is_planned=False)
    monkeypatch.setattr(api, "make_ready", lambda engine, cache_dir: None)
    streams = open_streams(model)
    begun = [next(stream) for stream in streams]
    model.compile()
    assert [first + "".join(stream) for first, stream in zip(begun, streams, strict=True)] == captions


class Evil:
    """Fails at whatever is asked of it."""

    def __repr__(self) -> str:
        raise ValueError

    def __iter__(self) -> Iterator[Any]:
        raise KeyError


@pytest.mark.parametrize(
    "value", [5, True, b"x" * 10**6, ["car"], {1: 2}, object(), np.zeros((3, 3)), Path("x"), Evil(), range(3)]
)
def test_arguments_of_the_wrong_type_are_named_in_few_words(tiny: Moondream, value: Any) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "object": lambda: tiny.detect(SCENE, value),
        "question": lambda: tiny.query(SCENE, value),
        "length": lambda: tiny.caption(SCENE, value),
        "settings": lambda: tiny.point(SCENE, "x", settings=[value]),  # type: ignore[arg-type]
        "temperature": lambda: tiny.caption(SCENE, settings={"temperature": [value]}),
        "spatial_refs": lambda: tiny.query(SCENE, "why", spatial_refs=[[value]]),
    }
    if value is not True:
        calls["reasoning"] = lambda: tiny.query(SCENE, "why", reasoning=value)
        calls["stream"] = lambda: tiny.caption(SCENE, stream=value)
    for name, call in calls.items():
        with pytest.raises(RequestError, match=f"^{name}") as failure:
            call()
        assert len(str(failure.value)) < 300


def test_rows_that_are_no_requests_are_records_and_no_series_is_an_error(tiny: Moondream) -> None:
    *bad, good = tiny.annotate([5, None, "car", {**GOOD, "task": np.zeros(2)}, GOOD])  # type: ignore[list-item]
    assert [record["error"]["type"] for record in bad] == ["bad_request"] * 4
    assert good["error"] is None
    for requests in (GOOD, "car", 5, None):
        with pytest.raises(RequestError, match="requests are"):
            list(tiny.annotate(requests))  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers(tiny: Moondream) -> None:
    settings = {"max_tokens": np.int64(2), "temperature": np.float32(0), "seed": np.uint8(1)}
    assert tiny.caption(SCENE, settings=settings) == tiny.caption(SCENE, settings={"max_tokens": 2, "seed": 1})
    assert tiny.query(SCENE, "why", reasoning=np.False_, spatial_refs=np.full((1, 2), 0.5), settings=settings)


@pytest.mark.parametrize("name", ["device", "dtype", "quant", "adapter", "revision", "tokenizer"])
def test_options_of_the_wrong_type_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is int 5, expected text"):
        Moondream.load("tiny", **{name: 5})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="model is list"):
        Moondream.load([])  # type: ignore[arg-type]


# ---- text streams: the golden pieces, nothing taken back, nothing lost ---------------------------


GOLDEN = Path(__file__).parents[1] / "golden"
TOKENIZER = Tokenizer(tokenizers.Tokenizer.from_file(str(GOLDEN / "case-a" / "checkpoint" / "tokenizer.json")))
UNITS = json.loads((GOLDEN / "units.json").read_text())["stream"]["cases"]
ANSWERS = [
    (entry["result"]["token_ids"], entry["stream"])
    for expected in sorted(GOLDEN.glob("**/expected*.json"))
    for entry in json.loads(expected.read_text())["requests"]
    if "stream" in entry
]


def pieces_of(ids: list[int]) -> list[str]:
    stream = TextStream(TOKENIZER.decode)
    return [piece for piece in [*map(stream.push, ids), stream.finish()] if piece]


@pytest.mark.parametrize("case", UNITS, ids=lambda case: "".join(case["pieces"])[:12] or "empty")
def test_unit_cases(case: dict[str, list]) -> None:
    assert pieces_of(case["ids"]) == case["pieces"]


def test_golden_answers() -> None:
    assert len(ANSWERS) > 50
    for ids, pieces in ANSWERS:
        assert pieces_of(ids) == pieces


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_pieces_make_the_text(text: str) -> None:
    assert "".join(pieces_of(TOKENIZER.encode(text))) == text


def test_a_word_is_held_until_it_ends() -> None:
    stream = TextStream(TOKENIZER.decode)
    shown = [stream.push(token) for token in TOKENIZER.encode("one two")]
    assert "".join(shown) == "one "
    assert stream.finish() == "two"
    assert stream.finish() == ""


def test_the_batch_size_is_the_engines() -> None:
    assert Moondream.load("tiny", device="cpu", batch_size=3).engine.batch_size == 3
    for wrong in (0, True, "8"):
        with pytest.raises(ConfigError, match=r"batch_size is .*expected a whole number"):
            Moondream.load("tiny", device="cpu", batch_size=wrong)  # type: ignore[arg-type]


def test_a_segment_in_the_shape_of_the_vendors_client(tiny: Moondream) -> None:
    (segment,) = tiny.segment(SCENE, "red circle")["segments"]
    assert segment["svg_path"].startswith("M ")
    vendors = {"path": segment["svg_path"], "bbox": segment["bbox"]}
    assert tiny.segment(SCENE, "red circle", shape="vendor") == vendors
    assert tiny.segment(SCENE, "red circle", shape="md3") == {"segments": [segment]}


def test_no_segment_in_the_shape_of_the_vendors_client(tiny: Moondream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "_answer", lambda image, request: {"segments": []})
    assert tiny.segment(SCENE, "dragon", shape="vendor") == {"path": "", "bbox": None}


@pytest.mark.parametrize("shape", ["Vendor", "", None, ["vendor"]])
def test_an_unknown_shape_is_refused_before_anything_is_asked(tiny: Moondream, shape: Any) -> None:
    with pytest.raises(RequestError, match=r"shape is .*, expected md3 or vendor"):
        tiny.segment("nowhere.png", "dog", shape=shape)
