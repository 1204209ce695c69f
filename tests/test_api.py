"""The Python face with what callers get wrong: an error each, and the object goes on."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from md3cli import Moondream
from md3cli.config import ModelOptions
from md3cli.errors import RequestError
from md3cli.model import api
from md3cli.model.engine import Engine
from md3cli.model.load import load_engine

SCENE = str(Path(__file__).parents[1] / "examples" / "scenes" / "scene_00002.png")
GOOD = {"image": SCENE, "task": "detect", "prompt": "red circle"}


@pytest.fixture(scope="module")
def tiny() -> Moondream:
    return Moondream.load("tiny", device="cpu", dtype="fp32")


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
    ],
)
def test_a_wrong_request_is_an_error_record_and_the_next_is_answered(tiny: Moondream, wrong: dict[str, Any]) -> None:
    bad, good = tiny.annotate([{**GOOD, **wrong}, GOOD])
    assert bad["error"]["type"] == "bad_request"
    assert good["error"] is None
    assert good["objects"]
    if wrong.get("task") not in ("dance", None) or "task" not in wrong:
        assert bad["task"] == wrong.get("task", "detect")


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
    with pytest.raises(RequestError, match="prompt is 5"):
        tiny.point(SCENE, 5)  # type: ignore[arg-type]
    assert tiny.caption(SCENE, settings={"max_tokens": 3})["caption"]


def test_compiling_drops_the_model_first_and_answers_open_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Moondream.load("tiny", device="cpu", dtype="fp32")
    settings = {"max_tokens": 8}
    expected = model.caption(SCENE, settings=settings)["caption"]
    stream = model.caption(SCENE, stream=True, settings=settings)["caption"]
    begun = next(stream)
    old = weakref.ref(model.engine)

    def load(options: ModelOptions) -> Engine:
        assert options.compile
        assert old() is None
        return load_engine(replace(options, compile=False))

    monkeypatch.setattr(api, "load_engine", load)
    model.compile()
    assert begun + "".join(stream) == expected
    assert model.caption(SCENE, settings=settings)["caption"] == expected
