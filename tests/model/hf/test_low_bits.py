"""Checkpoints in 8 and 4 bits under the transformers classes: `Moondream`'s bytes and answers, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import CASES
from hf_cases import WORDS, picture, request_of, scenes
from low_bit_bytes import reachable_bytes
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Mxfp4Config, Trainer, TrainingArguments

from md3cli import Moondream, model_path
from md3cli.errors import CheckpointError, ConfigError, EngineError
from md3cli.model.engine.machine import MemoryPlan
from md3cli.model.hf import Moondream3ForConditionalGeneration, Moondream3Processor, low_bits, original_methods
from md3cli.model.hf.config import lora_targets
from md3cli.model.hf.low_bits import one_device
from md3cli.model.quant.layers import has_packed_weights
from md3cli.model.quant.quantise import QuantiseSettings, quantise_checkpoint
from md3cli.model.weights.codes import LowBit
from md3cli.model.weights.names import Format
from md3cli.model.weights.plan import QUANT_METHOD, plan_checkpoint

INT4 = CASES["int4"][0]
FP8 = CASES["raw-fp8"][0]
BF16 = torch.bfloat16
FOLDERS: dict[LowBit, Path] = {}


@pytest.fixture(params=LowBit)
def tiny_in(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in one of the schemes, as `md3 models quantize` writes it; made once."""
    kind = request.param
    if kind not in FOLDERS:
        FOLDERS[kind] = tmp_path_factory.mktemp("tiny") / kind
        quantise_checkpoint(model_path("tiny"), FOLDERS[kind], QuantiseSettings(kind))
    return FOLDERS[kind]


def load(folder: Path, **settings: Any) -> Moondream3ForConditionalGeneration:
    model = AutoModelForCausalLM.from_pretrained(str(folder), **{"dtype": BF16, **settings})
    assert isinstance(model, Moondream3ForConditionalGeneration)
    return model


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's files, as it is stored."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - it is no mapping
    return found


# -- what stays packed -----------------------------------------------------------------------------


@pytest.mark.process
def test_bytes_and_answers_are_moondreams(tiny_in: Path) -> None:
    """Every skill, on pictures of several tilings, to the last id, coordinate and score."""
    model, engine = load(tiny_in, device_map={"": "cpu"}), Moondream.load(tiny_in, device="cpu", dtype="bf16")
    assert model.is_packed
    assert model.dtype == BF16
    assert not model.training
    ours, theirs = reachable_bytes(engine.engine.model), reachable_bytes(model)
    assert abs(theirs - ours) <= 0.02 * ours
    assert (
        ours < reachable_bytes(load(tiny_in, quant="none")) < 1.02 * load(tiny_in, quant="none").get_memory_footprint()
    )
    assert model.get_memory_footprint() == pytest.approx(theirs, rel=0.01)
    rows = [request_of(words, image) | {"max_tokens": 24, "max_objects": 6} for image in scenes() for words in WORDS]
    for ours_record, theirs_record in zip(engine.annotate(rows), model.moondream().annotate(rows), strict=True):
        for key in ("answer", "caption", "reasoning", "objects", "points", "finish_reason"):
            assert ours_record.get(key) == theirs_record.get(key)
    image = scenes()[1]
    assert model.query(image, "How many shapes are there?") == engine.query(image, "How many shapes are there?")


@pytest.mark.process
@pytest.mark.parametrize("folder", [INT4, FP8])
def test_generate_and_forward_work_on_packed_weights(folder: Path) -> None:
    name = folder.name
    model, processor = load(folder), Moondream3Processor.from_pretrained(folder)
    image, settings = picture(name, 0), {"max_tokens": 5}
    inputs = processor(text=["caption: short"], images=[image])
    ids = model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(ids) == model.caption(image, "short", settings=settings)["caption"]
    wide = load(folder, quant="none")
    logits, wanted = (one(**inputs).logits[0, -1].float() for one in (model, wide))
    assert (logits - wanted).norm() < 0.1 * wanted.norm()
    batch = processor.collate([{"image": image, "task": "query", "prompt": "how?", "answer": "so"}])
    with torch.no_grad():
        assert model(**batch).loss == pytest.approx(wide(**batch).loss.item(), rel=0.05)


def test_auto_is_as_stored_and_packed() -> None:
    model = load(INT4, dtype="auto")
    assert model.is_packed
    assert model.dtype == BF16
    loaded, info = AutoModelForCausalLM.from_pretrained(str(FP8), output_loading_info=True)
    assert loaded.is_packed
    assert not info


def test_float32_none_and_other_quantisers_start_from_plain_weights() -> None:
    for settings in ({"dtype": torch.float32}, {"dtype": "float32"}, {"quant": "none"}):
        model = load(INT4, **settings)
        assert not model.is_packed
        assert not has_packed_weights(model.model)
        model.train()
    packing = BitsAndBytesConfig(load_in_4bit=True)
    assert low_bits.read_quant({"quantization_config": packing}) == "none"
    with pytest.raises(ConfigError, match="quant='int4': quantization_config starts from plain weights"):
        low_bits.read_quant({"quant": "int4", "quantization_config": packing})
    with pytest.raises(ConfigError, match=r"load_in_8bit belongs in quantization_config=BitsAndBytesConfig\("):
        load(INT4, load_in_8bit=True)
    for other in (Mxfp4Config(), {"quant_method": "eetq"}, {"bits": 4}, "4bit"):  # the first two fetch kernels
        with pytest.raises(ConfigError, match=r"quantization_config of '(mxfp4|eetq|dict|str)': BitsAndBytesConfig"):
            load(INT4, quantization_config=other)
    with pytest.raises(ConfigError, match="quant='int3': use stored, none, int8, int4"):
        load(INT4, quant="int3")


@pytest.mark.process
def test_plain_checkpoints_are_packed_on_demand(tmp_path: Path) -> None:
    model = load(model_path("tiny"), quant="int4")
    assert model.is_packed
    image, engine = scenes()[2], Moondream.load("tiny", device="cpu", dtype="bf16", quant="int4")
    assert model.detect(image, "shape") == engine.detect(image, "shape")
    rounded = load(model_path("tiny"), quant="int4", dtype=torch.float32)
    exact = Moondream.load("tiny", device="cpu", dtype="fp32", quant="int4")
    assert rounded.train().eval().detect(image, "shape") == exact.detect(image, "shape")
    with pytest.raises(ConfigError, match=r"`md3 models quantize .* --quant int4`"):
        model.save_pretrained(tmp_path / "saved")


def test_our_own_words_about_int8_are_not_taken_for_a_librarys(tmp_path: Path) -> None:
    """They stand under `config`; at the top transformers would look for a quantiser of that name."""
    folder = tmp_path / "int8"
    quantise_checkpoint(CASES["c"][0], folder, QuantiseSettings(LowBit.INT8))
    document = json.loads((folder / "config.json").read_text())
    document["quantization_config"] = document["config"].pop("quantization_config")
    assert document["quantization_config"]["quant_method"] == QUANT_METHOD
    (folder / "config.json").write_text(json.dumps(document))
    assert load(folder).is_packed
    wide = load(folder, quant="none")
    assert not wide.is_packed
    assert getattr(wide.config, "quantization_config", None) is None


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.process
def test_codes_are_saved_as_they_were_read(tiny_in: Path, tmp_path: Path) -> None:
    model = load(tiny_in)
    model.save_pretrained(tmp_path / "saved")
    assert plan_checkpoint(tmp_path / "saved").layout is plan_checkpoint(tiny_in).layout
    before, after = stored(tiny_in), stored(tmp_path / "saved")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype is after[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    again = load(tmp_path / "saved")
    assert again.is_packed
    assert json.loads((tmp_path / "saved/config.json").read_text())["auto_map"]["AutoModelForCausalLM"]
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
    image = scenes()[0]
    assert again.detect(image, "circle") == model.detect(image, "circle")


@pytest.mark.parametrize("folder", [INT4, FP8])
def test_every_layout_of_few_bits_is_saved(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.save_pretrained(tmp_path / "codes")
    assert plan_checkpoint(tmp_path / "codes").layout is plan_checkpoint(folder).layout
    model.save_pretrained(tmp_path / "wide", layout="original")
    assert plan_checkpoint(tmp_path / "wide").layout is Format.ORIGINAL
    wide = load(tmp_path / "wide").model.state_dict()
    for name, tensor in load(folder, quant="none").model.state_dict().items():
        assert torch.equal(tensor, wide[name]), name
    with pytest.raises(ConfigError, match="save_pretrained of weights in 8 or 4 bits takes no max_shard_size"):
        model.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    model.save_pretrained(tmp_path / "of another process", is_main_process=False)
    assert not (tmp_path / "of another process").exists()


def test_an_adapters_folder_starts_from_plain_weights(tmp_path: Path) -> None:
    base = load(INT4, quant="none")
    adapted = get_peft_model(base, LoraConfig(r=2, **lora_targets(base.config.network, ["attention"])))
    adapted.save_pretrained(tmp_path)
    for model in (load(tmp_path), Moondream3ForConditionalGeneration.from_pretrained(tmp_path)):
        assert not model.is_packed
        assert model.active_adapters() == ["default"]
    named, info = Moondream3ForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True, adapter_name="mine"
    )
    assert named.active_adapters() == ["mine"]
    assert not info["missing_keys"]
    with pytest.raises(EngineError, match="no adapter can be put"):
        load(tmp_path, quant="stored")
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        load(tmp_path)


# -- what cannot be --------------------------------------------------------------------------------


def adapt(model: Moondream3ForConditionalGeneration) -> None:
    get_peft_model(model, LoraConfig(r=2, **lora_targets(model.config.network)))


REFUSED: dict[str, tuple[Callable[[Moondream3ForConditionalGeneration], Any], type[Exception], str]] = {
    "train": (lambda model: model.train(), EngineError, "cannot be trained.*quant='none'"),
    "an adapter": (lambda model: model.add_adapter(LoraConfig()), EngineError, "no adapter.*quant='none'"),
    "a saved adapter": (lambda model: model.load_adapter("x"), EngineError, "Moondream.load.*adapter.*quant='none'"),
    "peft": (adapt, ValueError, "takes no adapter: load the model with quant='none'"),
    "half": (lambda model: model.half(), EngineError, "stays in bfloat16; for float16, load it with"),
    "float": (lambda model: model.to(torch.float32), EngineError, "stays in bfloat16; for float32, load it with"),
    "tensors": (lambda model: model.state_dict(), EngineError, "save_pretrained writes them"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_packed_weights_cannot_do_is_refused_in_words(what: str) -> None:
    ask, kind, words = REFUSED[what]
    with pytest.raises(kind, match=words):
        ask(load(INT4))


@pytest.mark.process
def test_trainer_is_refused_before_a_step(tmp_path: Path) -> None:
    model, processor = load(INT4), Moondream3Processor.from_pretrained(INT4)
    records = [{"image": None, "task": "query", "prompt": "how?", "answer": "so"}]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, remove_unused_columns=False
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=records, data_collator=processor.collate)
    with pytest.raises(EngineError, match="cannot be trained"):
        trainer.train()


def test_no_gradient_is_lost_without_a_word() -> None:
    """The residual stream would carry one past the packed products, and it would be wrong."""
    model, processor = load(INT4), Moondream3Processor.from_pretrained(INT4)
    model.model.text.wte.requires_grad_(True)
    batch = processor.collate([{"image": None, "task": "query", "prompt": "how?", "answer": "so"}])
    with pytest.raises(EngineError, match="through which no gradient flows"):
        model(**batch)
    with torch.no_grad():
        assert model(**batch).loss.isfinite()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"device_map": {"model.vision": "cpu", "model.text": "disk"}}, "lie on one device.*names cpu, disk"),
        ({"device_map": {"": "disk"}}, "lie on one device.*names disk"),
        ({"device_map": {"": "cuda:99"}}, "cuda:99"),
        ({"tp_plan": "auto"}, "takes no tp_plan"),
        ({"offload_folder": "x", "max_memory": {0: "1GB"}}, "takes no max_memory, offload_folder"),
    ],
)
def test_what_needs_several_devices_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(INT4, **settings)


def test_device_maps_that_mean_one_device() -> None:
    cpu = torch.device("cpu")
    for one in ("cpu", cpu, {"": "cpu"}, {"model.vision": "cpu", "model.text": cpu}, None):
        assert one_device(one) == cpu
    assert load(INT4, device_map="cpu").hf_device_map == {"": cpu}


def test_a_move_reads_the_files_anew_in_the_form_of_that_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(INT4)
    network = model.model
    assert model.to("cpu").to(BF16).model is network
    elsewhere, asked = load(INT4).model, []
    monkeypatch.setattr(low_bits, "choose_device", torch.device)
    monkeypatch.setattr(low_bits.PackedSource, "load", lambda self, device: asked.append(device) or elsewhere)
    torch.nn.Sequential(model).to("meta")
    assert asked == [torch.device("meta")]
    assert model.model is elsewhere


def test_the_files_may_be_gone_and_that_is_said(tmp_path: Path) -> None:
    shutil.copytree(INT4, tmp_path / "gone")
    model = load(tmp_path / "gone")
    image = picture("int4", 0)
    before = model.detect(image, "cat", settings={"max_objects": 1})
    shutil.rmtree(tmp_path / "gone")
    assert model.detect(image, "cat", settings={"max_objects": 1}) == before
    with pytest.raises(Exception, match="no such file or folder"):
        model.save_pretrained(tmp_path / "saved")


def test_a_new_engine_is_made_for_other_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plans = load(INT4), []
    plan = original_methods.plan_memory

    def watched(*arguments: Any) -> MemoryPlan:
        plans.append(plan(*arguments))
        return plans[-1]

    monkeypatch.setattr(original_methods, "plan_memory", watched)
    assert model.moondream() is model.moondream()
    proj = model.model.text.blocks[0].mlp.fc2
    proj.matrix = type(proj.matrix)(proj.matrix.packed, proj.matrix.scales_and_zeros_GO2, proj.matrix.text_pass)
    model.moondream()
    assert len(plans) == 2
