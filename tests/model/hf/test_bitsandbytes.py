"""bitsandbytes under the transformers classes: what is packed, what it computes, files, and no code from the hub."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import CASES
from hf_cases import load_hf, picture
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytest.importorskip("bitsandbytes", reason="needs the extra md3cli[bnb]")

from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from md3cli import Moondream, model_path
from md3cli.config import ModelOptions
from md3cli.errors import CheckpointError, ConfigError, EngineError
from md3cli.model.engine.load import load_weights
from md3cli.model.hf import Moondream3Config, Moondream3ForConditionalGeneration, Moondream3Processor
from md3cli.model.hf.bnb import (
    ExpertLayers,
    join_experts,
    require_library,
    resident_bytes,
    split_experts,
    use_expert_layers,
)
from md3cli.model.hf.config import PARTS, lora_targets
from md3cli.model.network.layers import ExpertMatrices
from md3cli.model.weights.plan import plan_checkpoint
from md3cli.model.weights.random_weights import CONFIGS, random_model

FOLDER = CASES["c"][0]
EXAMPLES = Path(__file__).parents[3] / "examples"
NF4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
WAYS: dict[str, dict[str, Any]] = {
    "nf4": NF4,
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "double": {**NF4, "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
MOST_BYTES = {"nf4": 0.36, "fp4": 0.36, "double": 0.36, "int8": 0.6}
MOST_ERROR = {"nf4": 0.25, "fp4": 0.3, "double": 0.25, "int8": 0.05}


def packing(way: str, **settings: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**WAYS[way], **settings)  # type: ignore[no-untyped-call]


def load_packed(way: str, source: str | Path = FOLDER, **settings: Any) -> Moondream3ForConditionalGeneration:
    settings.setdefault("dtype", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(str(source), quantization_config=packing(way), **settings)
    assert isinstance(model, Moondream3ForConditionalGeneration)
    return model


def packed_layers(model: nn.Module) -> dict[str, nn.Linear]:
    kinds = ("Linear4bit", "Linear8bitLt")
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in kinds and isinstance(module, nn.Linear)
    }


# -- what is packed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_tiny_keeps_its_bytes_in_few_bits_experts_included(way: str) -> None:
    full = Moondream3ForConditionalGeneration.from_pretrained(model_path("tiny"), dtype=torch.bfloat16)
    model = load_packed(way, model_path("tiny"))
    assert resident_bytes(model) <= MOST_BYTES[way] * resident_bytes(full)
    assert model.is_quantized
    assert getattr(model, "is_loaded_in_8bit" if way == "int8" else "is_loaded_in_4bit")
    assert model.hf_quantizer.quantization_config is model.config.quantization_config
    assert model.get_memory_footprint() < 0.6 * full.get_memory_footprint()
    plain = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert {name.rsplit(".", 1)[-1] for name in plain} == {"router", "patch_emb", "coord_decoder"}
    assert not any(isinstance(module, ExpertMatrices) for module in model.modules())
    assert sum(isinstance(module, ExpertLayers) for module in model.modules()) == 8


@pytest.mark.parametrize("way", WAYS)
def test_a_random_model_whose_widths_are_real_ones_shortened(way: str) -> None:
    """Through `from_pretrained` without a folder, from a state."""
    network = random_model(CONFIGS["mini"], dtype=torch.bfloat16, device=torch.device("cpu"))
    state = {f"model.{name}": value for name, value in network.state_dict().items()}
    model = Moondream3ForConditionalGeneration.from_pretrained(
        None, config=Moondream3Config.from_network(CONFIGS["mini"]), state_dict=state, dtype=torch.bfloat16,
        quantization_config=packing(way),
    )  # fmt: skip
    matrices = [name for name, value in network.state_dict().items() if value.dim() == 3 and "mlp" in name]
    assert matrices
    for name in matrices:
        path = name.removesuffix(".weight")
        experts = model.model.get_submodule(path)
        assert isinstance(experts, ExpertLayers)
        assert len(experts) == network.get_parameter(name).shape[0]


def test_modules_that_are_skipped_stay_plain_and_the_compute_dtype_is_kept() -> None:
    skipped = ["model.vision", "lm_head", "model.text.blocks.1.mlp.fc2"]
    config = packing("nf4", llm_int8_skip_modules=skipped, bnb_4bit_compute_dtype=torch.bfloat16)
    model = Moondream3ForConditionalGeneration.from_pretrained(FOLDER, quantization_config=config)
    layers = packed_layers(model)
    assert not any(name.startswith("model.vision") or name.endswith("lm_head") for name in layers)
    assert "model.text.blocks.0.attn.qkv" in layers
    assert all(layer.compute_dtype is torch.bfloat16 for layer in layers.values())
    experts = {name: len([layer for layer in layers if layer.startswith(name)]) for name in moe_paths(model)}
    assert {name for name, count in experts.items() if not count} == {
        name for name in experts if name.startswith("model.text.blocks.1.mlp.fc2")
    }


def moe_paths(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, ExpertLayers)]


# -- what it computes -------------------------------------------------------------------------------


def logits_of(model: Any) -> Tensor:
    processor = load_hf("c")[1]
    batch = processor(text=["detect: cat", "query: what?"], images=[picture("c", 0), picture("c", 1)])
    with torch.no_grad():
        return model(**batch).logits.float()  # type: ignore[no-any-return]


def unpacked(layer: Any) -> Tensor:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    return dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).float()


@pytest.mark.parametrize("way", WAYS)
def test_experts_compute_what_their_packed_weights_stand_for_with_gradients(way: str) -> None:
    """Of rows with gradients and without, in training and evaluation, in any order; experts without rows, too."""
    model = load_packed(way, model_path("tiny"), dtype=torch.float32)
    plain = Moondream3ForConditionalGeneration.from_pretrained(model_path("tiny"), dtype=torch.float32)
    experts = model.model.text.blocks[2].mlp.fc1
    weights = torch.stack([unpacked(layer) for layer in experts])
    true = plain.model.text.blocks[2].mlp.fc1.weight
    assert (weights - true).norm() <= MOST_ERROR[way] * true.norm()
    counts = [3, 0, 1, 2]
    stand_in = ExpertMatrices(*weights.shape[:1], weights.shape[2], weights.shape[1])
    stand_in.weight = nn.Parameter(weights, requires_grad=False)
    for is_training in (False, True, False, True):
        model.train(is_training)
        x = torch.randn(6, weights.shape[2], generator=torch.Generator().manual_seed(0), requires_grad=True)
        other = x.detach().clone().requires_grad_(True)
        out, wanted = experts(x, counts), stand_in(other, counts)
        assert (out - wanted).norm() < 0.02 * wanted.norm()
        with torch.no_grad():
            assert (experts(x, counts) - wanted).norm() < 0.02 * wanted.norm()
        out.sum().backward()
        wanted.sum().backward()
        assert x.grad is not None
        assert other.grad is not None
        assert (x.grad - other.grad).norm() < 0.02 * other.grad.norm()


@pytest.mark.parametrize("way", ["nf4", "int8"])
def test_widths_that_are_no_multiples_of_blocks(way: str) -> None:
    """The library's own inference products on this CPU would refuse the reference case's widths."""
    model = load_packed(way, dtype=torch.float32)
    assert any(layer.in_features % 64 or layer.out_features % 32 for layer in packed_layers(model).values())
    found = logits_of(model)
    assert torch.equal(found, logits_of(model))
    model.dequantize()
    assert not packed_layers(model)
    true = logits_of(model)
    assert (found - true).norm() < (0.2 if way == "int8" else 1e-4) * true.norm()


def test_own_methods_and_generate_agree_over_packed_weights() -> None:
    path = model_path("tiny")
    model, processor = load_packed("nf4", path, dtype=torch.float32), Moondream3Processor.from_pretrained(path)
    image = picture("c", 0)
    assert image is not None
    boxes = model.detect(image, "red circle", settings={"max_objects": 3})["objects"]
    inputs = processor(text=["detect: red circle"], images=[image])
    generated = model.generate(**inputs, max_objects=3)
    assert boxes
    corners = torch.tensor([[box[key] for key in ("x_min", "y_min", "x_max", "y_max")] for box in boxes])
    assert torch.allclose(corners, generated[0], atol=1e-6)


# -- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["nf4", "double", "int8"])
def test_a_packed_folder_loads_again_with_the_same_bytes(way: str, tmp_path: Path) -> None:
    model = load_packed(way)
    wanted = logits_of(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(str(tmp_path))
    assert again.hf_quantizer.pre_quantized
    assert again.dtype is torch.bfloat16
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value.to(theirs[name].dtype), theirs[name]), name
    assert packed_layers(model).keys() == packed_layers(again).keys()
    assert torch.equal(logits_of(again), wanted)
    with pytest.raises(CheckpointError, match=r"packed as by bitsandbytes.*take the checkpoint it was packed from"):
        Moondream.load(str(tmp_path))
    with pytest.raises(CheckpointError, match="layout raw has no place"):
        model.save_pretrained(tmp_path / "raw", layout="raw")
    wide = Moondream3ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    kinds = {parameter.dtype for parameter in wide.parameters() if parameter.is_floating_point()}
    assert kinds == {torch.float32}
    assert (logits_of(wide) - wanted).abs().mean() <= 0.1 * wanted.abs().mean()
    other = BitsAndBytesConfig(load_in_8bit=way != "int8", load_in_4bit=way == "int8")
    for settings in ({"quantization_config": other}, {"quant": "int8"}):
        with pytest.raises(ConfigError, match=r"not packed again|packed by bitsandbytes"):
            Moondream3ForConditionalGeneration.from_pretrained(tmp_path, **settings)


def test_packed_layers_are_not_offloaded(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot be placed as device_map says"):
        load_packed("nf4", device_map={"": "disk"}, offload_folder=tmp_path)


def test_eight_bits_in_float16_give_gradients() -> None:
    """There the library changes the inputs of its product, and back."""
    model = load_packed("int8", dtype=torch.float16).train()
    model.add_adapter(LoraConfig(r=2, **lora_targets(model.config, ["attention"])))
    ids = torch.arange(20, 32)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert found
    assert all(gradient is not None and gradient.isfinite().all() for gradient in found)


def damaged(folder: Path, name: str, value: Tensor | None) -> None:
    state = load_file(folder / "model.safetensors")
    del state[name]
    if value is not None:
        state[name] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGES: dict[str, tuple[str, str, Any]] = {
    "fewer scales": ("nf4", "weight.absmax", lambda t: t[:-1].clone()),
    "scales of another kind": ("nf4", "weight.absmax", lambda t: t.to(torch.float16)),
    "no scales": ("nf4", "weight.absmax", lambda t: None),
    "scales that are not finite": ("nf4", "weight.absmax", lambda t: t * float("nan")),
    "fewer codes": ("nf4", "weight", lambda t: t[:-8].clone()),
    "another table": ("nf4", "weight.quant_map", lambda t: t[:3].clone()),
    "fewer outer scales": ("double", "weight.nested_absmax", lambda t: t[:0].clone()),
    "fewer rows' scales": ("int8", "SCB", lambda t: t[:-1].clone()),
    "a matrix of another size": ("int8", "weight", lambda t: t[:-1].clone()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_packed_weights_are_refused_before_the_library_reads_by_them(damage: str, tmp_path: Path) -> None:
    way, leaf, change = DAMAGES[damage]
    load_packed(way).save_pretrained(tmp_path)
    name = f"model.text.blocks.0.attn.qkv.{leaf}"
    damaged(tmp_path, name, change(load_file(tmp_path / "model.safetensors")[name]))
    with pytest.raises(CheckpointError, match=r"qkv|cannot be read"):
        AutoModelForCausalLM.from_pretrained(str(tmp_path))


def test_a_quant_state_that_promises_another_shape_is_refused(tmp_path: Path) -> None:
    load_packed("nf4").save_pretrained(tmp_path)
    name = "model.text.blocks.0.attn.qkv.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(load_file(tmp_path / "model.safetensors")[name].tolist()))
    state["shape"] = [state["shape"][0] * 1000, state["shape"][1]]
    damaged(tmp_path, name, torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="qkv"):
        AutoModelForCausalLM.from_pretrained(str(tmp_path))


def test_a_dequantised_model_is_saved_as_a_plain_checkpoint(tmp_path: Path) -> None:
    model = load_packed("nf4", model_path("tiny"))
    model.dequantize()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    plain = Moondream3ForConditionalGeneration.from_pretrained(tmp_path)
    assert isinstance(plain.model.text.blocks[1].mlp.fc1, ExpertMatrices)
    state = {f"model.{name}": value for name, value in plain.model.state_dict().items()}
    assert all(torch.equal(value, state[name]) for name, value in join_experts(model.state_dict()).items())


def test_experts_are_split_and_joined_without_a_change() -> None:
    state = {f"model.{name}": value for name, value in load_hf("c")[0].model.state_dict().items()}
    apart = split_experts(state)
    assert any(name.endswith("mlp.fc1.0.weight") for name in apart)
    joined = join_experts(apart)
    assert joined.keys() == state.keys()
    assert all(torch.equal(joined[name], value) for name, value in state.items())


# -- no code from the hub ---------------------------------------------------------------------------

FAKE = """
from pathlib import Path

__version__ = "0.0.1"


def get_kernel(*args, **kwargs):
    Path(__file__).with_name("called").touch()
    raise RuntimeError("called")


def __getattr__(name):
    raise AttributeError(name)
"""
PROGRAMS = {
    "hf": "import md3cli.model.hf; import bitsandbytes",
    "peft": "import md3cli.model.hf; import peft; from peft.tuners.lora import Linear4bit",
    "lora": """
import torch
from md3cli import model_path
from md3cli.model.hf import Moondream3ForConditionalGeneration as Model
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
model = Model.from_pretrained(model_path("tiny"), quantization_config=settings)
model = get_peft_model(prepare_model_for_kbit_training(model), LoraConfig(target_modules=["attn.qkv"]))
model(input_ids=torch.tensor([[0, 1, 2]]))
""",
    "examples/training.py": f"sys.path.insert(0, {str(EXAMPLES)!r}); import training",
    "examples/sft_trl.py": f"""
sys.path.insert(0, {str(EXAMPLES)!r}); sys.argv[1:] = ["--help"]
try:
    import sft_trl
except SystemExit:
    pass
""",
}


@pytest.mark.process
@pytest.mark.parametrize("program", PROGRAMS)
def test_bitsandbytes_fetches_no_code_when_it_comes_through_us(program: str, tmp_path: Path) -> None:
    """A package `kernels` is there, as in many environments: nobody asks it for code, and nobody complains."""
    if "trl" in program:
        pytest.importorskip("trl", reason="needs the extra md3cli[trl]")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text(FAKE)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
{PROGRAMS[program]}
import bitsandbytes.backends.cpu.ops as ops
import bitsandbytes.backends.mps.ops as mps
assert getattr(ops, "gemm_4bit_forward_kernel", None) is None
mps._kernel_load_failed = False
assert mps._get_kernel() is None
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "kernels-community" not in done.stderr
    assert not (tmp_path / "kernels/called").exists()


def test_kernels_from_the_hub_are_refused_for_the_model_itself(tmp_path: Path) -> None:
    for argument in ({"use_kernels": True}, {"kernel_config": object()}, {"allow_all_kernels": True}):
        with pytest.raises(EngineError, match="downloads code"):
            Moondream3ForConditionalGeneration.from_pretrained(FOLDER, **argument)
    with pytest.raises(EngineError, match="kernels-community/flash-attn"):
        Moondream3ForConditionalGeneration.from_pretrained(FOLDER, attn_implementation="kernels-community/flash-attn")
    hostile = Moondream3Config.from_pretrained(FOLDER, attn_implementation="someone/kernel")
    with pytest.raises(EngineError, match="someone/kernel"):
        Moondream3ForConditionalGeneration.from_pretrained(FOLDER, config=hostile)
    model = Moondream3ForConditionalGeneration.from_pretrained(FOLDER)
    for make in (
        lambda: Moondream3ForConditionalGeneration(hostile),
        lambda: AutoModelForCausalLM.from_config(hostile),
        lambda: Moondream3ForConditionalGeneration.from_pretrained(FOLDER, config=hostile, quant="int8"),
        lambda: model.set_attn_implementation("someone/kernel"),
    ):
        with pytest.raises(EngineError, match="someone/kernel"):
            make()
    with pytest.raises(EngineError, match="use_kernels downloads code"):
        model.set_use_kernels(True)
    with pytest.raises(EngineError, match="experts_implementation 'deepgemm' is not to be had"):
        Moondream3ForConditionalGeneration.from_pretrained(FOLDER, experts_implementation="deepgemm")


def test_a_missing_library_and_a_device_without_a_back_end_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("no kernel for this")

    with monkeypatch.context() as patched:
        patched.setattr(bitsandbytes.nn, "Linear4bit", fails)
        with pytest.raises(EngineError, match=r"does not compute in 4 bits on cpu in bfloat16: no kernel for this"):
            load_packed("nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(EngineError, match=r"pip install 'md3cli\[bnb\]'"):
        require_library(packing("nf4"), torch.device("cpu"), torch.float32)


# -- QLoRA ------------------------------------------------------------------------------------------


def records() -> list[dict[str, Any]]:
    box = {"x_min": 0.1, "y_min": 0.2, "x_max": 0.5, "y_max": 0.6}
    return [
        {"image": picture("c", 0), "task": "detect", "prompt": "red circle", "objects": [box]},
        {"image": picture("c", 1), "task": "query", "prompt": "How many shapes are there?", "answer": "7"},
    ]


def tune(way: str, folder: Path) -> tuple[Any, list[float]]:
    """Train adapters on every part of a packed `tiny`, and save them."""
    path = model_path("tiny")
    model = prepare_model_for_kbit_training(load_packed(way, path, dtype=torch.float32))
    targets = lora_targets(model.config, PARTS)
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **targets))
    trainer = Trainer(
        model=tuned,
        args=TrainingArguments(
            output_dir=str(folder / "trainer"), per_device_train_batch_size=2, max_steps=5, learning_rate=5e-3,
            logging_steps=1, report_to=[], remove_unused_columns=False, use_cpu=True, dataloader_pin_memory=False,
            disable_tqdm=True, seed=3, lr_scheduler_type="constant", save_strategy="no",
        ),
        train_dataset=records(),  # type: ignore[arg-type]
        data_collator=Moondream3Processor.from_pretrained(path).collate,  # type: ignore[arg-type]
    )  # fmt: skip
    trainer.train()
    tuned.eval().save_pretrained(str(folder / "adapter"))
    return tuned, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def tiny_logits(model: Any) -> Tensor:
    batch = Moondream3Processor.from_pretrained(model_path("tiny")).collate(records())
    batch.pop("labels")
    with torch.no_grad():
        return model.eval()(**batch).logits.float()  # type: ignore[no-any-return]


@pytest.mark.process
@pytest.mark.parametrize("way", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_qlora_learns_and_its_adapter_serves_packed_plain_and_command(way: str, tmp_path: Path) -> None:
    tuned, losses = tune(way, tmp_path)
    assert losses[-1] < 0.5 * losses[0]
    experts = [name for name, p in tuned.named_parameters() if p.requires_grad and ".mlp.fc1.0.lora_B" in name]
    assert len(experts) == 4
    factors = [(name, p) for name, p in tuned.named_parameters() if "lora_B" in name and ".mlp.fc1." not in name]
    assert all(p.abs().sum() > 0 for name, p in factors if "vision" in name or "attn" in name)
    adapter, path = tmp_path / "adapter", model_path("tiny")
    again = load_packed(way, adapter, dtype=torch.float32)
    assert torch.equal(tiny_logits(again), tiny_logits(tuned))
    plain = Moondream3ForConditionalGeneration.from_pretrained(adapter, dtype=torch.float32)
    assert (tiny_logits(plain) - tiny_logits(tuned)).norm() < 0.3 * tiny_logits(tuned).norm()
    # The same folder, read without peft by `--adapter`, changes the same weights by as much.
    options = ModelOptions(model=str(path), adapter=str(adapter), dtype="fp32", cache=False)
    served = load_weights(options, plan_checkpoint(path), dtype=torch.float32, device=torch.device("cpu"))
    model = PeftModel.from_pretrained(with_layers(path), adapter).merge_and_unload()
    merged = join_experts(model.model.state_dict())
    for name, weight in served.state_dict().items():
        assert torch.allclose(merged[name], weight, atol=1e-6), name
    face = Moondream.load(str(path), adapter=str(adapter), dtype="fp32")
    assert (
        face.detect(picture("c", 0), "red circle")["objects"] == plain.detect(picture("c", 0), "red circle")["objects"]
    )


def with_layers(path: Path) -> Moondream3ForConditionalGeneration:
    model = Moondream3ForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    use_expert_layers(model)
    return model


def test_an_adapter_of_stacks_is_refused_for_packed_experts(tmp_path: Path) -> None:
    model = Moondream3ForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32)
    get_peft_model(model, LoraConfig(r=2, **lora_targets(model.config))).save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match="adapts the experts as stacks"):
        load_packed("nf4", tmp_path)


@pytest.mark.process
def test_the_example_trains_on_four_bits_and_asks_the_command_with_its_adapter(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "finetune_lora.py"), "--out", str(tmp_path), "--bits", "4"]
    subprocess.run([*command, "--steps", "2", "--batch-size", "2", "--scenes", "2"], check=True, cwd=tmp_path)
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
    assert (tmp_path / "after/eval.json").is_file()
