"""Loading: every layout against the independent reference, strict, mapped, and at full size."""

from __future__ import annotations

import functools
import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from reference import random_models
from reference.reading import read_network
from reference.writing import (
    FORMATS,
    formats_of,
    hf_names,
    raw_names,
    with_fp8_experts,
    with_int4_matrices,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from md3cli.errors import CheckpointError
from md3cli.model.inspect import inspect_checkpoint
from md3cli.model.network.config import ModelConfig
from md3cli.model.network.moondream import Moondream3
from md3cli.model.weights.names import Format, expected_tensors
from md3cli.model.weights.plan import plan_checkpoint
from md3cli.model.weights.read import CheckpointReader, load_model, stored_dtype

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = {
    GOLDEN / "case-a" / "checkpoint": Format.ORIGINAL,
    GOLDEN / "case-b" / "checkpoint": Format.ORIGINAL,
    GOLDEN / "case-c-formats" / "raw-fp8": Format.RAW_FP8,
    GOLDEN / "case-c-formats" / "hf-port": Format.HF,
    GOLDEN / "case-c-formats" / "int4": Format.INT4,
}
draw_network = functools.cache(random_models.draw_network)
CODES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8"}


def assert_same_tensors(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A raw-fp8 checkpoint to be damaged: names of one file, two dtypes."""
    return Path(shutil.copytree(GOLDEN / "case-c-formats" / "raw-fp8", tmp_path / "checkpoint"))


def change(folder: Path, tensors: Mapping[str, Tensor | None]) -> None:
    """Replace tensors of a single-file checkpoint; None removes."""
    file = folder / "model.safetensors"
    changed = load_file(file) | tensors
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, file)


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_golden_checkpoints_load_as_the_reference_reads_them(folder: Path) -> None:
    assert plan_checkpoint(folder).layout is CASES[folder]
    assert_same_tensors(load_model(folder, dtype=torch.float32).state_dict(), read_network(folder).tensors)


@pytest.mark.process
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("seed", [1, 2])
def test_random_checkpoints_load_as_the_reference_reads_them(tmp_path: Path, form: str, seed: int) -> None:
    folder = write_checkpoint(draw_network(seed), tmp_path / form, form, seed)
    assert_same_tensors(load_model(folder, dtype=torch.float32).state_dict(), read_network(folder).tensors)


@pytest.mark.process
def test_dense_models_load_in_every_layout_that_holds_them(tmp_path: Path) -> None:
    network = draw_network(3, dense=True)
    for form in formats_of(network.config):
        folder = write_checkpoint(network, tmp_path / form, form)
        assert_same_tensors(load_model(folder, dtype=torch.float32).state_dict(), read_network(folder).tensors)


def test_weights_are_mapped_not_copied() -> None:
    folder = GOLDEN / "case-a" / "checkpoint"
    model = load_model(folder, dtype=torch.bfloat16)
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder.resolve()) in line:
            start, stop = line.split()[0].split("-")
            ranges.append(range(int(start, 16), int(stop, 16)))
    assert ranges
    for name, tensor in model.state_dict().items():
        assert any(tensor.data_ptr() in mapped for mapped in ranges), name


def test_models_are_for_inference() -> None:
    model = load_model(GOLDEN / "case-a" / "checkpoint", dtype=torch.bfloat16)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_reader_makes_tensors_on_demand_and_they_outlive_it() -> None:
    plan = plan_checkpoint(GOLDEN / "case-c-formats" / "raw-fp8")
    assert stored_dtype(plan) is torch.bfloat16
    with CheckpointReader(plan, dtype=torch.float32) as weights:
        alpha, experts = weights["text.blocks.0.attn.tau.alpha"], weights["text.blocks.1.mlp.fc1.weight"]
        assert list(weights) == list(expected_tensors(plan.config, has_region_ln=True))
    assert alpha.dtype is experts.dtype is torch.float32
    assert experts.abs().sum() > 0


# -- strictness -----------------------------------------------------------------------------------


def test_every_fault_is_named_in_one_error(single: Path) -> None:
    change(
        single,
        {
            "text_model.lm_head.ln.bias": None,
            "text_model.extra": torch.zeros(2),
            "text_model.transformer.h.0.ln.weight": torch.zeros(63, dtype=torch.bfloat16),
            "text_model.transformer.h.1.gate.bias": torch.zeros(4, dtype=torch.float64),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        load_model(single, dtype=torch.float32)
    message = str(caught.value)
    assert "1 missing: text_model.lm_head.ln.bias" in message
    assert "1 not known: text_model.extra" in message
    assert "1 of another shape: text_model.transformer.h.0.ln.weight is [63], expected [64]" in message
    assert "1 of another dtype: text_model.transformer.h.1.gate.bias is F64, expected BF16 or F16 or F32" in message


def test_many_faults_are_counted(single: Path) -> None:
    change(single, {name: None for name in load_file(single / "model.safetensors") if ".blocks." in name})
    with pytest.raises(CheckpointError, match=r"84 missing: (\S+, ){4}\S+ and 79 more$"):
        load_model(single, dtype=torch.float32)


def test_half_a_layer_norm_is_a_missing_tensor(single: Path) -> None:
    change(single, {"region_model.ln.bias": None})
    with pytest.raises(CheckpointError, match=r"1 missing: region_model\.ln\.bias"):
        load_model(single, dtype=torch.float32)


def test_without_region_ln_the_network_has_none(single: Path) -> None:
    change(single, {"region_model.ln.bias": None, "region_model.ln.weight": None})
    assert load_model(single, dtype=torch.float32).region.ln is None


def test_unscaled_experts_are_not_read(single: Path) -> None:
    change(single, {"text_model.transformer.h.2.moe_quant.up_scale": None})
    with pytest.raises(CheckpointError, match=r"missing: text_model\.transformer\.h\.2\.moe_quant\.up_scale"):
        load_model(single, dtype=torch.float32)


def test_kv_scales_are_ignored(single: Path) -> None:
    change(single, {"text_model.transformer.h.0.kv_quantizer.k_scale": torch.tensor(0.5)})
    load_model(single, dtype=torch.float32)


def test_other_groups_than_128_are_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "case-c-formats" / "int4", tmp_path / "int4"))
    document = json.loads((folder / "config.json").read_text())
    document["config"]["text"]["group_size"] = 64
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="groups of 64; only groups of 128"):
        load_model(folder, dtype=torch.float32)


def int4_copy(tmp_path: Path, changed: Mapping[str, Tensor | None]) -> Path:
    folder = Path(shutil.copytree(GOLDEN / "case-c-formats" / "int4", tmp_path / "int4"))
    change(folder, changed)
    return folder


def test_packed_groups_of_another_size_are_named(tmp_path: Path) -> None:
    name = "text.blocks.0.attn.proj.weight.packed"
    stored = next(key for key in load_file(GOLDEN / "case-c-formats/int4/model.safetensors") if key.endswith(name))
    folder = int4_copy(tmp_path, {stored: torch.zeros(32, 64, dtype=torch.uint8)})
    with pytest.raises(CheckpointError) as caught:
        load_model(folder, dtype=torch.float32)
    assert f"{name} is [32, 64], expected [16, 128] (groups of 64; only groups of 128 are understood)" in str(
        caught.value
    )
    assert "original, original-fp8, raw, raw-fp8, hf, int4, int8" in str(caught.value)


@pytest.mark.parametrize("part", ["scale", "zero_point"])
def test_codes_without_scales_are_named(tmp_path: Path, part: str) -> None:
    name = f"text.blocks.0.attn.proj.weight.{part}"
    stored = next(key for key in load_file(GOLDEN / "case-c-formats/int4/model.safetensors") if key.endswith(name))
    with pytest.raises(CheckpointError, match=rf"format int4 \(of .*1 missing: {name}"):
        load_model(int4_copy(tmp_path, {stored: None}), dtype=torch.float32)


def test_int8_without_scales_is_named(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "case-a" / "checkpoint", tmp_path / "int8"))
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith("text.blocks.0.attn.proj.weight"):
                tensors[name] = tensors[name].to(torch.int8)
        save_file(tensors, file)
    with pytest.raises(
        CheckpointError,
        match=r"proj\.weight is I8, expected BF16 or F16 or F32 \(its scales, .*proj\.weight_scale, are missing\)",
    ):
        load_model(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"quantization_config of 'gptq' is not read; formats .*: original"),
        ({"quant_method": "md3"}, "quantization_config of 'md3' is not read"),
        (
            {"quant_method": "md3", "config_groups": {"group_0": {"weights": {"num_bits": 6, "type": "int"}}}},
            r"stores group_0 as .*'num_bits': 6.*only .*'num_bits': 8",
        ),
    ],
)
@pytest.mark.parametrize("is_inside", [True, False])
def test_a_config_that_says_another_packing_is_refused(
    single: Path, scheme: dict[str, object], message: str, is_inside: bool
) -> None:
    document = json.loads((single / "config.json").read_text())
    (document["config"] if is_inside else document)["quantization_config"] = scheme
    (single / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=message):
        load_model(single, dtype=torch.float32)


def test_missing_config_means_the_real_model(single: Path) -> None:
    (single / "config.json").unlink()
    with pytest.raises(CheckpointError, match="the real model's sizes were assumed"):
        load_model(single, dtype=torch.float32)


def test_absurd_sizes_allocate_nothing(single: Path) -> None:
    document = json.loads((single / "config.json").read_text())
    document["config"]["text"]["n_layers"] = 10**9
    (single / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"text\.n_layers"):
        load_model(single, dtype=torch.float32)


# -- the real model -------------------------------------------------------------------------------


def full_size_tensors(form: str) -> dict[str, Tensor]:
    """Names, shapes and dtypes of the real model's file, as the specification lists them; no data."""
    tables = expected_tensors(ModelConfig(), has_region_ln=form != "hf-port")
    exact = {name: torch.empty(shape, device="meta") for name, shape in tables.items()}
    stored = {name: tensor.to(torch.bfloat16) for name, tensor in exact.items()}
    if form.endswith("fp8"):
        stored = with_fp8_experts(stored, exact)
    if form == "int4":
        stored = with_int4_matrices(stored, exact)
    if form.startswith("raw"):
        return raw_names(stored, fused_tau=form == "raw-fused")
    if form == "hf-port":
        return hf_names(stored)
    return {f"model.{name}": tensor for name, tensor in stored.items()}


def write_sparse(tensors: Mapping[str, Tensor], file: Path) -> None:
    """A safetensors file with this header and a hole for data."""
    header, offset = {}, 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + offset)


@pytest.mark.process
@pytest.mark.parametrize(
    ("form", "gigabytes"),
    [
        ("original", 18.537),
        ("original-fp8", 10.505),
        ("raw", 18.537),
        ("raw-fused", 18.537),
        ("raw-fp8", 10.505),
        ("hf-port", 18.537),
        ("int4", 6.178),
    ],
)
def test_the_real_models_names_load_strictly(tmp_path: Path, form: str, gigabytes: float) -> None:
    write_sparse(full_size_tensors(form), tmp_path / "model.safetensors")
    model = load_model(tmp_path, dtype=torch.bfloat16, device="meta")
    assert sum(p.numel() for p in model.parameters()) == 9_268_626_928 - (4096 if form == "hf-port" else 0)
    summary = inspect_checkpoint(tmp_path)
    assert summary.num_bytes / 1e9 == pytest.approx(gigabytes, abs=0.001)
    assert summary.num_parameters == sum(p.numel() for p in model.parameters())


def test_the_network_has_the_names_of_the_table() -> None:
    for has_ln in (True, False):
        with torch.device("meta"):
            model = Moondream3(ModelConfig(), has_region_ln=has_ln)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert shapes == expected_tensors(ModelConfig(), has_region_ln=has_ln)


# -- inspection -----------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_inspection_accounts_for_every_byte(folder: Path) -> None:
    summary = inspect_checkpoint(folder)
    data = sum(entry.num_bytes for entry in plan_checkpoint(folder).files.entries.values())
    assert sum(part.num_bytes for part in summary.parts) == sum(summary.dtypes.values()) == data
    assert summary.layout is CASES[folder]
    json.dumps(summary.as_json())
