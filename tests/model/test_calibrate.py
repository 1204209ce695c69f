"""Calibration: what hooks add up is what the matrices were fed; it lowers the error of products."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from md3cli.errors import InputError
from md3cli.images.crops import ImageLimits, prepare_image
from md3cli.model.calibrate import DAMPING, PRIOR_TOKENS, InputMoments, collect_importance
from md3cli.model.engine.plain import encode_image
from md3cli.model.network.layers import ExpertMatrices, Linear
from md3cli.model.quant.search import search
from md3cli.model.weights.codes import LowBit
from md3cli.model.weights.hub import ModelFiles, model_path, resolve_model
from md3cli.model.weights.names import is_int8_vision, is_portable
from md3cli.model.weights.read import load_model
from md3cli.records import ImageItem, Request, RowFailure, SourceRow, Task

SCENES = Path(__file__).parents[2] / "examples" / "scenes"
CAPTION = (Request(Task.CAPTION, max_tokens=4),)


@pytest.fixture(scope="module")
def tiny() -> ModelFiles:
    return resolve_model("tiny", offline=True)


def rows(*numbers: int, requests: tuple[Request, ...] = CAPTION) -> Iterator[SourceRow]:
    for number in numbers:
        path = str(SCENES / f"scene_{number:05d}.png")
        yield SourceRow(ImageItem(path, path), requests)


def collect(files: ModelFiles, given: Iterator[SourceRow]) -> dict[str, Tensor]:
    return dict(collect_importance(files, given, device=torch.device("cpu"), dtype=torch.float32))


class _Stub(nn.Module):
    """One dense matrix and three experts, under names that are quantised."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Module()
        self.text.attn = nn.Module()
        self.text.attn.proj = Linear(4, 2)
        self.text.mlp = nn.Module()
        self.text.mlp.fc1 = ExpertMatrices(3, 4, 2)
        self.text.mlp.router = Linear(4, 3)


def test_dense_inputs_are_averaged_over_all_tokens() -> None:
    model = _Stub()
    moments = InputMoments(model)  # type: ignore[arg-type]
    x = torch.randn(2, 5, 4)
    model.text.attn.proj(x)
    model.text.attn.proj(x * 3)
    moments.close()
    model.text.attn.proj(x * 100)  # no longer watched
    means = 5 * x.flatten(0, 1).square().mean(0)
    found = moments.importance()
    assert found.keys() == {"text.attn.proj.weight"}  # routers stay as they are, the experts saw nothing
    assert torch.allclose(found["text.attn.proj.weight"], means + DAMPING * means.mean())


def test_experts_see_their_own_tokens_and_lean_on_all_of_them() -> None:
    model = _Stub()
    moments = InputMoments(model)  # type: ignore[arg-type]
    x = torch.randn(7, 4)
    model.text.mlp.fc1(x, [5, 2, 0])
    found = moments.importance()["text.mlp.fc1.weight"]
    average = x.square().mean(0)
    for expert, part in enumerate(x.split([5, 2, 0])):
        means = (part.square().sum(0) + PRIOR_TOKENS * average) / (len(part) + PRIOR_TOKENS)
        assert torch.allclose(found[expert], means + DAMPING * means.mean(), rtol=1e-4)


def test_every_matrix_that_becomes_codes_was_watched(tiny: ModelFiles) -> None:
    requests = (*CAPTION, Request(Task.DETECT, "circle", max_objects=2))
    found = collect(tiny, rows(1, requests=requests))
    model = load_model(tiny.path, dtype=torch.float32)
    wanted = {name for name in model.state_dict() if is_portable(name) or is_int8_vision(name)}
    assert found.keys() == wanted
    for name, importance in found.items():
        weight = model.get_parameter(name)
        assert importance.shape == (weight.shape[::2] if weight.ndim == 3 else weight.shape[1:])
        assert importance.min() > 0


@pytest.mark.process
def test_error_of_products_falls_on_pictures_that_were_not_looked_at(tiny: ModelFiles) -> None:
    """Over the vision tower; measured on 12 scenes after 64: by 8 %, of experts' products by 13 %."""
    found = collect(tiny, rows(0, 1, 2, 3))
    model = load_model(tiny.path, dtype=torch.float32)
    inputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if is_int8_vision(f"{name}.weight"):
            module.register_forward_pre_hook(lambda module, given, name=name: inputs.update({name: given[0]}))
    path = str(SCENES / "scene_00005.png")
    with torch.inference_mode():
        encode_image(model, prepare_image(ImageItem(path, path), model.config.vision.crop_config, ImageLimits(), None))
    errors = [0.0, 0.0]
    for name, x in inputs.items():
        weight, x = model.get_parameter(f"{name}.weight"), x.flatten(0, -2)
        for number, importance in enumerate((None, found[f"{name}.weight"])):
            change = search(weight, LowBit.INT4, importance).dequantise(torch.float32) - weight
            errors[number] += ((x @ change.T).square().sum() / (x @ weight.T).square().sum()).item()
    assert len(inputs) == 4 * 6 + 2
    assert errors[1] < 0.97 * errors[0]


def test_what_cannot_be_read_is_skipped_with_one_warning(tiny: ModelFiles, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no picture")
    broken = SourceRow(ImageItem("x.png", str(tmp_path / "x.png")), CAPTION)
    failed = SourceRow(None, CAPTION, failure=RowFailure("bad_row", "no such column"))
    with pytest.warns(
        UserWarning,
        match="2 rows were skipped for want of a picture that can be read; the first: x.png: the content is no known",
    ):
        assert collect(tiny, iter([broken, *rows(1), failed]))


def test_nothing_to_look_at_is_an_error(tiny: ModelFiles) -> None:
    with pytest.raises(InputError, match="nothing to calibrate with"):
        collect(tiny, iter(()))


def test_the_embedded_model_is_not_changed(tiny: ModelFiles) -> None:
    before = (model_path("tiny") / "model.safetensors").read_bytes()
    collect(tiny, rows(1))
    assert (model_path("tiny") / "model.safetensors").read_bytes() == before
