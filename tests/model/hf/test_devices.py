"""Layers over several devices, on the CPU and on disk, answer as one process does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch

pytest.importorskip("accelerate", reason="needs the extra md3cli[hf]")

from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from placed_answers import PLACEMENTS, PRETENDED, TINY, ask, compare, load

from md3cli.errors import EngineError
from md3cli.model.hf.placement import is_spread, settle

SUPPORT = Path(__file__).parents[2] / "support"
EQUAL = {"decisions_equal": True, "tokens_equal": True, "answers_equal": True}


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return ask(load())


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.process
@pytest.mark.filterwarnings("error:The following device_map keys")
def test_offloaded_layers_answer_as_those_in_memory(name: str, expected: dict[str, Any], tmp_path: Path) -> None:
    model = load(offload_folder=tmp_path, **PLACEMENTS[name])
    assert is_spread(model)
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    found = compare(ask(model), expected)
    assert found == {"largest_difference": found["largest_difference"], **EQUAL}
    assert found["largest_difference"] <= 1e-6
    assert model.moondream() is model.moondream()  # offloaded weights change with each pass; the engine does not


@pytest.mark.process
def test_two_devices_never_meet_and_answer_as_one() -> None:
    command = [sys.executable, SUPPORT / "placed_answers.py", *PRETENDED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line.pop("placement") for line in lines] == list(PRETENDED)
    for line in lines:
        assert line.pop("largest_difference") <= 1e-4
        assert line == EQUAL


def test_auto_where_all_fits_puts_no_hooks() -> None:
    assert not is_spread(load(device_map="auto"))


def test_a_folder_is_asked_for_where_disk_is_needed() -> None:
    with pytest.raises(ValueError, match="offload_folder"):
        load(device_map={"": "disk"})


@pytest.mark.filterwarnings("error:The following device_map keys")
def test_offloaded_layers_take_no_adapter_and_are_saved_in_every_layout(tmp_path: Path) -> None:
    """On them transformers would leave the adapter without weights, and what is computed then is noise."""
    plain, model = load(), load(device_map={"": "disk"}, offload_folder=tmp_path / "offloaded")
    with pytest.raises(EngineError, match="lose an adapter's weights"):
        model.add_adapter(LoraConfig(target_modules=["qkv"]))
    plain.add_adapter(LoraConfig(target_modules=["qkv"]))
    plain.name_or_path = str(TINY)
    plain.save_pretrained(tmp_path / "adapter")
    with pytest.raises(EngineError, match="lose an adapter's weights"):
        load(tmp_path / "adapter", device_map={"": "disk"}, offload_folder=tmp_path / "again")
    adapted = load(device_map={"": "disk"}, offload_folder=tmp_path / "adapted")
    get_peft_model(adapted, LoraConfig(target_modules=["qkv"]))  # asks nobody
    for compute in (lambda: adapted(input_ids=torch.arange(20, 24)[None]), adapted.moondream):
        with pytest.raises(EngineError, match=r"lora_A\.default has no weights"):
            compute()
    for layout in ("original", "raw"):
        model.save_pretrained(tmp_path / layout, layout=layout)
        saved = load(tmp_path / layout).state_dict()
        for name, tensor in load().state_dict().items():
            assert torch.equal(saved[name], tensor), name


def test_a_block_is_not_cut_between_devices() -> None:
    model = load()
    placed = cast("Any", dispatch_model(model, {"": "cpu"}, force_hooks=True))
    placed.model.text.blocks[2].attn.qkv._hf_hook.execution_device = "meta"
    with pytest.raises(EngineError, match=r"text\.blocks\.2 on cpu, meta"):
        settle(model, model.model, dict(model.named_parameters()))


def test_hooks_survive_recomputed_blocks_and_let_gradients_through() -> None:
    plain, hooked = load(), load()
    dispatch_model(hooked, {"": "cpu"}, force_hooks=True)
    batch = {"input_ids": torch.arange(20, 32)[None], "labels": torch.arange(20, 32)[None]}
    for model in (plain, hooked):
        model.train().gradient_checkpointing_enable()
        model(**batch).loss.backward()
    hooked.gradient_checkpointing_disable()
    block = hooked.model.text.blocks[1]
    assert isinstance(block, torch.nn.Module)
    assert hasattr(block, "_hf_hook")
    assert "new_forward" in repr(block.forward)
    for ours, theirs in zip(hooked.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or theirs.grad is None or torch.equal(ours.grad, theirs.grad)
