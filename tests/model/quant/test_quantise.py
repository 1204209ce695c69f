"""Quantising whole checkpoints: what becomes codes, what stays, how it survives kills and bad weights."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from reference import random_models
from reference.reading import read_network
from reference.writing import FORMATS, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from md3cli.errors import CheckpointError, OutputError
from md3cli.model.inspect import inspect_checkpoint, verify_checkpoint
from md3cli.model.quant import quantise as module
from md3cli.model.quant.quantise import QuantiseSettings, quantise_checkpoint
from md3cli.model.weights import write
from md3cli.model.weights.codes import LowBit, quantise
from md3cli.model.weights.hub import model_path
from md3cli.model.weights.names import Format, Recipe, is_int8_vision, is_portable
from md3cli.model.weights.plan import CheckpointPlan, plan_checkpoint
from md3cli.model.weights.read import CheckpointReader, load_model, read_quantised

GOLDEN = Path(__file__).parents[2] / "golden"
TINY = model_path("tiny")
LAYOUTS = {LowBit.INT4: Format.INT4, LowBit.INT8: Format.INT8, LowBit.FP8: Format.ORIGINAL_FP8}
draw_network = functools.cache(random_models.draw_network)


def weights_of(plan: CheckpointPlan, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    with CheckpointReader(plan, dtype=dtype) as weights:
        return dict(weights.items())


def recipes_of(plan: CheckpointPlan) -> dict[str, Recipe]:
    return {slot.name: slot.recipe for slot in plan.slots}


@pytest.mark.process
@pytest.mark.parametrize("kind", LowBit)
@pytest.mark.parametrize("has_int8_vision", [False, True])
def test_the_large_matrices_become_codes_and_the_rest_stays(
    tmp_path: Path, kind: LowBit, has_int8_vision: bool
) -> None:
    plan = quantise_checkpoint(TINY, tmp_path / "out", QuantiseSettings(kind, has_int8_vision))
    assert plan.layout is LAYOUTS[kind]
    before, after = weights_of(plan_checkpoint(TINY)), weights_of(plan)
    for slot in plan.slots:
        is_expert = ".mlp.fc" in slot.name and len(slot.shape) == 3
        is_chosen = is_expert if kind is LowBit.FP8 else is_portable(slot.name)
        wanted = Recipe[kind.name] if is_chosen else Recipe.COPY
        if has_int8_vision and is_int8_vision(slot.name):
            wanted = Recipe.INT8
        assert slot.recipe is wanted, slot.name
        if wanted is Recipe.COPY:
            assert torch.equal(before[slot.name], after[slot.name]), slot.name
            continue
        error = (after[slot.name] - before[slot.name]).square().sum()
        plain = quantise(before[slot.name], LowBit[wanted.name]).dequantise(torch.float32) - before[slot.name]
        assert 0 < error <= plain.square().sum() * (1 + 1e-5), slot.name
    assert plan.config.tokenizer == plan_checkpoint(TINY).config.tokenizer
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()


@pytest.mark.process
@pytest.mark.parametrize("name", ["text.blocks.2.mlp.router.weight", "text.wte", "text.lm_head.weight"])
@pytest.mark.parametrize("kind", LowBit)
def test_routers_embedding_and_head_are_never_codes(name: str, kind: LowBit, tmp_path: Path) -> None:
    plan = quantise_checkpoint(TINY, tmp_path / "out", QuantiseSettings(kind, has_int8_vision=True))
    assert recipes_of(plan)[name] is Recipe.COPY


@pytest.mark.process
def test_int4_is_what_the_reference_reads(tmp_path: Path) -> None:
    """The original's scheme: an independent reader of it finds the same values."""
    network = draw_network(5)
    source = write_checkpoint(network, tmp_path / "source", "original")
    plan = quantise_checkpoint(source, tmp_path / "out", QuantiseSettings(LowBit.INT4))
    theirs = read_network(tmp_path / "out").tensors
    ours = weights_of(plan)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    document = json.loads((tmp_path / "out" / "config.json").read_text())["config"]
    assert document["text"]["group_size"] == document["region"]["group_size"] == 128
    assert {entry.dtype for entry in plan.files.entries.values()} == {"U8", "F32", "BF16"}


def test_fp8_is_what_the_reference_reads(tmp_path: Path) -> None:
    source = write_checkpoint(draw_network(5), tmp_path / "source", "raw")
    plan = quantise_checkpoint(source, tmp_path / "out", QuantiseSettings(LowBit.FP8))
    theirs = read_network(tmp_path / "out").tensors
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights_of(plan).items())


def test_int8_says_in_its_config_what_it_is(tmp_path: Path) -> None:
    plan = quantise_checkpoint(TINY, tmp_path / "out", QuantiseSettings(LowBit.INT8))
    scheme = json.loads((tmp_path / "out" / "config.json").read_text())["config"]["quantization_config"]
    group = scheme["config_groups"]["group_0"]
    assert scheme["quant_method"] == "md3"
    assert group["weights"] == {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    assert "text.blocks.*.mlp.fc1" in group["targets"]
    codes = load_file(plan.files.files[0])
    name = "model.text.blocks.0.attn.qkv.weight"
    assert codes[name].dtype is torch.int8
    assert codes[f"{name}_scale"].shape == (codes[name].shape[0], 1)
    values = codes[name].float() * codes[f"{name}_scale"]
    assert torch.equal(values, weights_of(plan)["text.blocks.0.attn.qkv.weight"])


@pytest.mark.process
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", [LowBit.INT4, LowBit.INT8])
def test_every_layout_is_a_source(tmp_path: Path, form: str, kind: LowBit) -> None:
    source = write_checkpoint(draw_network(6), tmp_path / "source", form)
    plan = quantise_checkpoint(source, tmp_path / "out", QuantiseSettings(kind))
    before, after = weights_of(plan_checkpoint(source)), weights_of(plan)
    worst = 0.2 if kind is LowBit.INT4 else 0.02
    for name, weight in before.items():
        assert (after[name] - weight).norm() <= worst * weight.norm(), name
    if form == "int4" and kind is LowBit.INT4:  # code by code
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.process
def test_shorter_scales_cost_little(tmp_path: Path) -> None:
    short = quantise_checkpoint(TINY, tmp_path / "bf16", QuantiseSettings(LowBit.INT4, int4_scale_dtype=torch.bfloat16))
    full = quantise_checkpoint(TINY, tmp_path / "fp32", QuantiseSettings(LowBit.INT4))
    assert short.files.num_bytes < full.files.num_bytes
    before = weights_of(plan_checkpoint(TINY))

    def error(plan: CheckpointPlan) -> float:
        after = weights_of(plan)
        return sum((after[name] - before[name]).square().sum().item() for name in before if is_portable(name))

    assert error(short) <= 1.02 * error(full)


@pytest.mark.process
def test_importance_reaches_the_search(tmp_path: Path) -> None:
    name = "text.blocks.1.mlp.fc1.weight"
    before = weights_of(plan_checkpoint(TINY))[name]
    importance = torch.full(before.shape[::2], 1e-4)
    importance[:, ::7] = 1.0
    settings = QuantiseSettings(LowBit.INT4)
    blind = weights_of(quantise_checkpoint(TINY, tmp_path / "blind", settings))
    seeing = weights_of(quantise_checkpoint(TINY, tmp_path / "seeing", settings, importance={name: importance}))
    assert {key for key in blind if not torch.equal(blind[key], seeing[key])} == {name}
    errors = [((tensors[name] - before)[..., ::7]).square().sum() for tensors in (seeing, blind)]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.process
def test_shards_have_an_index_and_digests(tmp_path: Path) -> None:
    plan = quantise_checkpoint(TINY, tmp_path / "out", QuantiseSettings(LowBit.INT4), shard_limit_bytes=1_000_000)
    assert len(plan.files.files) > 2
    found = verify_checkpoint(tmp_path / "out")
    assert {file.known_from for file in found.files} == {"SHA256SUMS"}
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "out", check=True)


# -- kills and faults ------------------------------------------------------------------------------

KILLED = """
import os, sys
from pathlib import Path
from md3cli.model.weights import write as writer
from md3cli.model.weights.hub import model_path
from md3cli.model.quant.quantise import QuantiseSettings, quantise_checkpoint
from md3cli.model.weights.codes import LowBit

write = writer.write_shard

def write_some_and_die(file, shard, *args):
    if any(slot.name.startswith("text.blocks.3.") for slot in shard.slots):
        file.write_bytes(b"half")
        os.kill(os.getpid(), 9)
    return write(file, shard, *args)

writer.write_shard = write_some_and_die
quantise_checkpoint(
    model_path("tiny"), Path(sys.argv[1]), QuantiseSettings(LowBit.INT4), shard_limit_bytes=500_000
)
"""


@pytest.mark.process
@pytest.mark.parametrize("is_same", [True, False])
def test_a_killed_run_is_continued_by_the_same_command_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_same: bool
) -> None:
    died = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], capture_output=True, timeout=120)
    assert died.returncode == -9, died.stderr
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial").is_dir()
    made: list[str] = []
    search = module.search
    monkeypatch.setattr(module, "search", lambda *rest, **named: (made.append("x"), search(*rest, **named))[1])
    settings = QuantiseSettings(LowBit.INT4 if is_same else LowBit.INT8)
    plan = quantise_checkpoint(TINY, tmp_path / "out", settings, shard_limit_bytes=500_000)
    all_matrices = sum(is_portable(slot.name) for slot in plan.slots)
    assert len(made) < all_matrices if is_same else len(made) == all_matrices
    fresh = quantise_checkpoint(TINY, tmp_path / "fresh", settings, shard_limit_bytes=500_000)
    for file, other in zip(plan.files.files, fresh.files.files, strict=True):
        assert file.read_bytes() == other.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "out"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in (tmp_path / "fresh").iterdir()}


def test_two_writers_of_one_folder_do_not_meet(tmp_path: Path) -> None:
    from md3cli.model.weights.write import open_partial

    with open_partial(tmp_path / "out", None), pytest.raises(OutputError, match="being written by another process"):
        quantise_checkpoint(TINY, tmp_path / "out", QuantiseSettings(LowBit.INT4))


def test_a_disk_that_lies_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drop = write.drop_cache

    def drop_and_damage(descriptor: int) -> None:
        drop(descriptor)
        with open(f"/proc/self/fd/{descriptor}", "r+b") as stream:
            stream.seek(-5, 2)
            stream.write(b"\x55")

    monkeypatch.setattr(write, "drop_cache", drop_and_damage)
    with pytest.raises(OutputError, match="reads back different"):
        quantise_checkpoint(TINY, tmp_path / "out", QuantiseSettings(LowBit.INT4))
    assert list(tmp_path.iterdir()) == []


def copy_of_tiny(tmp_path: Path, changed: Mapping[str, Tensor]) -> Path:
    folder = Path(shutil.copytree(TINY, tmp_path / "source"))
    save_file(load_file(folder / "model.safetensors") | changed, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_without_a_scale_are_named(tmp_path: Path, value: float) -> None:
    name = next(key for key in load_file(TINY / "model.safetensors") if key.endswith("blocks.0.mlp.fc2.weight"))
    weight = load_file(TINY / "model.safetensors")[name]
    weight[0, 0] = value
    with pytest.raises(CheckpointError, match=r"text\.blocks\.0\.mlp\.fc2\.weight holds values that are not finite"):
        quantise_checkpoint(copy_of_tiny(tmp_path, {name: weight}), tmp_path / "out", QuantiseSettings(LowBit.INT4))
    assert not (tmp_path / ".out.partial").exists()


def test_odd_groups_are_named_before_anything_is_written(tmp_path: Path) -> None:
    """A matrix of 5 x 128 values fills five groups, and nibbles pair them."""
    folder = tmp_path / "source"
    shutil.copytree(TINY, folder)
    document = json.loads((folder / "config.json").read_text())
    document["config"]["region"]["coord_out_dim"] = 1023
    (folder / "config.json").write_text(json.dumps(document))
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        if "coord_decoder" in name:
            tensors[name] = tensors[name][:1023].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"coord_decoder\.weight: 130944 values cannot be packed in 4 bits"):
        quantise_checkpoint(folder, tmp_path / "out", QuantiseSettings(LowBit.INT4))
    assert not (tmp_path / ".out.partial").exists()
    assert quantise_checkpoint(folder, tmp_path / "out", QuantiseSettings(LowBit.INT8)).layout is Format.INT8


@pytest.mark.process
def test_fp8_of_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(draw_network(3, dense=True), tmp_path / "source", "original")
    with pytest.raises(CheckpointError, match="no experts, and fp8 is for experts only; use int8 or int4"):
        quantise_checkpoint(source, tmp_path / "out", QuantiseSettings(LowBit.FP8))


# -- what is left afterwards -----------------------------------------------------------------------


@pytest.mark.process
def test_bytes_are_accounted_for_by_part_and_format(tmp_path: Path) -> None:
    plan = quantise_checkpoint(TINY, tmp_path / "out", QuantiseSettings(LowBit.INT4, has_int8_vision=True))
    summary = inspect_checkpoint(tmp_path / "out")
    parts = {str(part.part): part.formats for part in summary.parts}
    assert set(parts["experts"]) == {"int4"}
    assert set(parts["vision"]) == {"int8", "bf16"}
    assert set(parts["routers"]) == set(parts["tau"]) == set(parts["embedding"]) == {"bf16"}
    total = sum(size for formats in parts.values() for size in formats.values())
    assert total == sum(entry.num_bytes for entry in plan.files.entries.values())


def test_codes_are_stored_once_and_read_as_codes(tmp_path: Path) -> None:
    plan = quantise_checkpoint(TINY, tmp_path / "out", QuantiseSettings(LowBit.INT8))
    slot = next(slot for slot in plan.slots if slot.name == "text.blocks.1.mlp.fc1.weight")
    with CheckpointReader(plan, dtype=torch.float32) as weights:
        codes = read_quantised(slot, weights.read_stored)
        assert torch.equal(codes.dequantise(torch.float32), weights[slot.name])
    assert (codes.kind, codes.scale.shape) == (LowBit.INT8, slot.shape[:2])


@pytest.mark.process
def test_what_is_written_answers(tmp_path: Path) -> None:
    quantise_checkpoint(TINY, tmp_path / "out", QuantiseSettings(LowBit.INT4, has_int8_vision=True))
    model = load_model(tmp_path / "out", dtype=torch.float32)
    hidden = model.text(model.text.embed(torch.tensor([[1, 2, 3]])), torch.arange(3)[None])
    assert hidden.isfinite().all()
