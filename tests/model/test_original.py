"""Manual loading as the 4-bit card does it: a model of sizes alone, and weights for it."""

from __future__ import annotations

import gc
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from golden_cases import CASES
from PIL import Image

from md3cli import Moondream
from md3cli.errors import CheckpointError, EngineError
from md3cli.model.original import MoondreamConfig, MoondreamModel, load_weights
from md3cli.model.quant.layers import has_packed_weights
from md3cli.model.weights.plan import plan_checkpoint

FOLDER = CASES["int4"][0]
IMAGE = Image.radial_gradient("L").resize((90, 60)).convert("RGB")
SETTINGS = {"max_tokens": 8}


def num_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_a_model_without_weights_takes_no_memory() -> None:
    before = num_tensors()
    model = MoondreamModel(MoondreamConfig())
    assert model.config.text.n_layers == 24  # the real one's, which would take 18.5 GB
    assert num_tensors() == before


@pytest.mark.parametrize("skill", ["caption", "query", "detect", "point", "segment", "encode_image"])
def test_a_skill_before_the_weights_says_what_to_do(skill: str) -> None:
    arguments = (IMAGE,) if skill in ("caption", "encode_image") else (IMAGE, "car")
    with pytest.raises(EngineError, match=r"no weights yet; .*load_weights"):
        getattr(MoondreamModel(MoondreamConfig()), skill)(*arguments)


def test_compile_and_annotate_before_the_weights_say_what_to_do() -> None:
    model = MoondreamModel(MoondreamConfig())
    with pytest.raises(EngineError, match="load_weights"):
        model.compile()
    with pytest.raises(EngineError, match="load_weights"):
        model.annotate([{"image": IMAGE, "task": "caption"}])


def test_the_folders_own_config_wins() -> None:
    model = MoondreamModel(MoondreamConfig())
    load_weights(FOLDER, model, device="cpu")
    assert model.config == plan_checkpoint(FOLDER).config != MoondreamConfig()


def test_low_bits_stay_and_answers_are_those_of_load() -> None:
    model = MoondreamModel(MoondreamConfig())
    load_weights(str(FOLDER), model, device="cpu")
    plain = Moondream.load(FOLDER, device="cpu")
    assert has_packed_weights(model._face().engine.model)
    few = {"max_objects": 2}
    assert model.caption(IMAGE, settings=SETTINGS) == plain.caption(IMAGE, settings=SETTINGS)
    assert model.query(IMAGE, "What?", settings=SETTINGS) == plain.query(IMAGE, "What?", settings=SETTINGS)
    assert model.detect(IMAGE, "car", settings=few) == plain.detect(IMAGE, "car", settings=few)
    assert model.point(model.encode_image(IMAGE), "car", settings=few) == plain.point(IMAGE, "car", settings=few)
    rows = [{"image": IMAGE, "task": "caption", "max_tokens": 8}]
    assert list(model.annotate(rows)) == list(plain.annotate(rows))


def test_the_current_folder_is_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER)
    model = MoondreamModel(MoondreamConfig())
    load_weights("./", model, device="cpu")
    assert isinstance(model.caption(IMAGE, settings=SETTINGS)["caption"], str)


def test_weights_may_be_loaded_again_and_a_failure_leaves_none(tmp_path: Path) -> None:
    model = MoondreamModel(MoondreamConfig())
    load_weights(FOLDER, model, device="cpu")
    load_weights(CASES["a"][0], model, device="cpu", dtype="fp32")
    assert not has_packed_weights(model._face().engine.model)
    damaged = shutil.copytree(FOLDER, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(CheckpointError):
        load_weights(damaged, model, device="cpu")
    with pytest.raises(EngineError, match="load_weights"):
        model.caption(IMAGE)


def test_a_config_goes_to_a_dict_and_back() -> None:
    sizes = plan_checkpoint(FOLDER).config
    read = MoondreamConfig.from_dict({"config": asdict(sizes)})
    assert isinstance(read, MoondreamConfig)
    assert read.to_dict() == asdict(sizes)
    assert MoondreamConfig.from_dict(MoondreamConfig().to_dict()) == MoondreamConfig()
    with pytest.raises(CheckpointError, match=r"text\.dim"):
        MoondreamConfig.from_dict({"text": {"dim": "wide"}})
