"""`from_pretrained` and `save_pretrained`: every layout in, three out, and the Auto classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden_cases import CASES, load_case
from hf_cases import inputs_for, load_hf, picture
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

from md3cli import Moondream
from md3cli.errors import CheckpointError, EngineError
from md3cli.model.hf import Moondream3Config, Moondream3ForConditionalGeneration, Moondream3Processor
from md3cli.model.weights.names import Format
from md3cli.model.weights.plan import plan_checkpoint


def load(folder: Path, **settings: object) -> Moondream3ForConditionalGeneration:
    model = Moondream3ForConditionalGeneration.from_pretrained(folder, **settings)
    assert isinstance(model, Moondream3ForConditionalGeneration)
    return model.eval()


def logits_of(model: Moondream3ForConditionalGeneration, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs_for(name, [0, 1])).logits


@pytest.mark.parametrize("name", CASES)
def test_every_layout_loads_as_the_checkpoint_reader_reads_it(name: str) -> None:
    model, case = load_hf(name)[0], load_case(name)
    weights = case.model.state_dict()
    assert set(model.state_dict()) == {f"model.{key}" for key in weights}
    assert all(torch.equal(model.state_dict()[f"model.{key}"], value) for key, value in weights.items())
    assert model.config.has_region_ln == ("region.ln.weight" in weights)
    assert model.config.network == case.model.config


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForImageTextToText])
def test_auto_classes_know_the_model(auto: type) -> None:
    model = auto.from_pretrained(str(CASES["b"][0]))
    assert isinstance(model, Moondream3ForConditionalGeneration)
    assert model.dtype == torch.bfloat16  # as stored
    assert isinstance(AutoConfig.from_pretrained(str(CASES["b"][0])), Moondream3Config)


@pytest.mark.process
def test_what_is_saved_loads_again_here_in_md3_and_in_the_auto_classes(tmp_path: Path) -> None:
    model = load_hf("a")[0]
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder in (tmp_path / "whole", tmp_path / "shards"):
        again = AutoModelForCausalLM.from_pretrained(str(folder)).eval()
        assert again.dtype == torch.float32
        assert torch.equal(logits_of(again, "a"), logits_of(model, "a"))
        assert again.generation_config.to_dict() == model.generation_config.to_dict()
        plan = plan_checkpoint(folder)
        assert plan.layout is Format.ORIGINAL
        assert plan.config == load_case("a").model.config
        settings = {"max_objects": 2}
        found = Moondream.load(str(folder), dtype="fp32").detect(picture("a", 0), "cat", settings=settings)
        assert found == model.detect(picture("a", 0), "cat", settings=settings)


@pytest.mark.process
def test_the_ports_layout_and_the_vendors(tmp_path: Path) -> None:
    model = load_hf("hf-port")[0]  # weights without region.ln
    for layout in (Format.HF, Format.RAW):
        model.save_pretrained(tmp_path / layout, layout=layout)
        assert plan_checkpoint(tmp_path / layout).layout is layout
        again = load(tmp_path / layout)
        assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
        assert torch.allclose(logits_of(again, "hf-port"), logits_of(model, "hf-port"), atol=1e-5)
    document = json.loads((tmp_path / "hf/config.json").read_text())
    assert document["architectures"] == ["Moondream3ForConditionalGeneration"]
    assert set(document) >= {"text_config", "vision_config", "region_config"}


def test_the_port_has_no_place_for_region_ln(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no LayerNorm before its region heads"):
        load_hf("a")[0].save_pretrained(tmp_path / "port", layout="hf")
    assert not (tmp_path / "port").exists()
    with pytest.raises(CheckpointError, match="layout 'onnx' is not one of original, hf, raw"):
        load_hf("a")[0].save_pretrained(tmp_path / "port", layout="onnx")


def test_dtypes_and_device_maps() -> None:
    folder = CASES["c"][0]
    assert load(folder, dtype="float32").dtype == torch.float32
    assert load(folder, torch_dtype=torch.float16).dtype == torch.float16
    placed = load(folder, device_map={"": "cpu"}, dtype=torch.float32)
    assert torch.equal(logits_of(placed, "c"), logits_of(load_hf("c")[0], "c"))
    with pytest.raises(CheckpointError, match="dtype 'float3': no such dtype"):
        load(folder, dtype="float3")


def test_a_quantisation_whose_library_is_missing_is_named() -> None:
    with pytest.raises(EngineError, match="bitsandbytes"):
        load(CASES["c"][0], quantization_config=BitsAndBytesConfig(load_in_4bit=True))


def test_a_new_network_from_a_config_trains_and_has_no_tokenizer(tmp_path: Path) -> None:
    config = Moondream3Config.from_network(load_case("c").model.config, has_region_ln=False)
    torch.manual_seed(0)
    model = Moondream3ForConditionalGeneration(config)
    assert model.model.region.ln is None
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    batch = load_hf("c")[1].collate([{"image": picture("c", 0), "task": "query", "prompt": "how?", "answer": "so"}])
    model(**batch).loss.backward()
    with pytest.raises(EngineError, match="no tokenizer"):
        model.caption(picture("c", 0))
    model.tokenizer_source = str(CASES["c"][0])
    assert "caption" in model.caption(picture("c", 0), settings={"max_tokens": 2})


def test_configs_of_every_layout_are_kept_as_one(tmp_path: Path) -> None:
    for name in CASES:
        config = Moondream3Config.from_pretrained(str(CASES[name][0]))
        assert config.network == load_case(name).model.config
        config.save_pretrained(tmp_path / name)
        assert Moondream3Config.from_pretrained(str(tmp_path / name)).network == config.network
        assert config.num_hidden_layers == config.network.text.n_layers
    with pytest.raises(CheckpointError, match=r"text\.dim must be 64"):
        Moondream3Config({"text": {"dim": 100}})


def test_a_processor_stands_alone(tmp_path: Path) -> None:
    processor = load_hf("b")[1]
    processor.save_pretrained(tmp_path)
    again = Moondream3Processor.from_pretrained(tmp_path)
    text, image = "detect: cat", picture("b", 1)
    for key, value in processor(text=text, images=image).items():
        assert torch.equal(again(text=text, images=image)[key], value)
