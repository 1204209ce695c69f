"""The original class's methods on the transformers class, where they are more than `Moondream`'s own."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import CASES
from hf_cases import picture
from PIL import Image
from reference.random_models import draw_network
from reference.writing import write_checkpoint

from md3cli.errors import ConfigError
from md3cli.model.engine import ready
from md3cli.model.hf import Moondream3ForConditionalGeneration

SETTINGS = {"max_tokens": 5}


@pytest.fixture
def model(tmp_path: Path) -> Any:
    folder = write_checkpoint(draw_network(22), tmp_path / "model", "original")
    return Moondream3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def image() -> Image.Image:
    return Image.radial_gradient("L").resize((90, 60)).convert("RGB")


def test_compiling_changes_no_answer_and_no_weight(
    model: Any, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, names = model.caption(image, settings=SETTINGS), [name for name, _ in model.named_parameters()]
    engine = model.moondream().engine
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match=r"nothing is compiled: no C\+\+ compiler \(no-such-compiler\) is installed"):
        model.compile()
    assert model.moondream().engine is engine
    assert model.caption(image, settings=SETTINGS) == expected
    assert [name for name, _ in model.named_parameters()] == names


def test_arguments_of_compile_are_refused_by_name(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"compile\(backend='inductor', fullgraph=True\): .* torch.compile\(model"):
        model.compile(backend="inductor", fullgraph=True)


def test_a_training_step_drops_what_was_compiled(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ready, "why_not", lambda network: None)
    monkeypatch.setattr(ready.Search, "steps", lambda self, eager: ready.CompiledSteps(eager, self.max_context))
    model.compile()
    assert isinstance(model.moondream().engine.passes.decode, ready.CompiledSteps)

    next(model.parameters()).requires_grad_(False).add_(0)
    assert not isinstance(model.moondream().engine.passes.decode, ready.CompiledSteps)


def test_weights_in_another_place_drop_what_was_compiled(model: Any) -> None:
    """Compiled code would go on with the tensor that was there, and the modules that it calls with the new one."""
    engine = model.moondream().engine
    assert model.moondream().engine is engine
    norm = model.model.text.post_ln.weight
    norm.data = norm.data + 1
    assert model.moondream().engine is not engine


def test_a_copy_makes_its_own_engine() -> None:
    model = Moondream3ForConditionalGeneration.from_pretrained(CASES["a"][0], dtype=torch.float32).eval()
    image, settings = picture("a", 0), {"max_tokens": 3}
    expected = model.caption(image, settings=settings)
    copied = deepcopy(model)
    assert copied.caption(image, settings=settings) == expected
    assert copied.moondream().engine is not model.moondream().engine
    assert copied.moondream().engine.model is copied.model
