"""A network that processes share answers as in one process, in every one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="needs the extra md3cli[hf]")

from placed_answers import load
from shared_answers import run

from md3cli.errors import EngineError
from md3cli.model.hf.parallel import Cut

EQUAL = {"decisions_equal": True, "tokens_equal": True, "answers_equal": True}


def check(found: list[dict[str, Any]], share: dict[str, float]) -> None:
    for name, most in share.items():
        assert len({of_rank[name].pop("bits") for of_rank in found}) == 1  # so that no decision can part the processes
        for of_rank in found:
            answers = of_rank[name]
            assert answers.pop("bytes") <= most
            assert answers.pop("largest_difference") <= 1e-4
            assert answers == EQUAL, name


@pytest.mark.process
def test_two_processes_answer_as_one_and_each_holds_its_part(tmp_path: Path) -> None:
    """Of the embedded model 0.06 stays whole (the token table, norms, routers); by experts alone all but those does."""
    check(run(2, "answers", ["tp2", "ep2", "tp2 x ep2"], tmp_path), {"tp2": 0.54, "ep2": 0.89, "tp2 x ep2": 0.54})


@pytest.mark.slow
def test_four_processes_share_the_experts(tmp_path: Path) -> None:
    check(run(4, "answers", ["ep4"], tmp_path), {"ep4": 0.83})


@pytest.mark.process
def test_a_shared_network_is_saved_whole_and_what_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    found, other = run(2, "others", str(tmp_path), tmp_path)
    assert found == other
    assert found["saved"] == {"original": True, "raw": True}
    assert (tmp_path / "original" / "tokenizer.json").is_file()
    said = found["said"]
    for name, part in {
        "unknown rule": "no rule sideways; there are heads",
        "unknown module": "no module model.text.head",
        "wrong kind": "'heads' is not for model.text.lm_head, a Linear",
        "two rules": "two rules of the plan cut model.text.blocks.0.attn.qkv.weight",
        "fsdp": "fsdp_size=2 is not to be had",
        "other processes": "tp_size=4 needs 4 processes and there are 2",
        "way of tokens": "ep_implementation='all_to_all'",
        "unknown word": "distributed_config is {'tp_size': 2, 'tp_plann': {}}; it takes tp_size",
        "plan of another name": "tp_plan='sideways' is not to be had",
        "places": "over processes or placed by device_map",
        "beams": "beams that are drawn differ",
        "adapt": "takes no adapter",
        "bits": "a quantised network cannot be shared out",
        "adapter": "a network with an adapter on top cannot",
        "compile": "is not compiled",
        "learn": "does not learn",
    }.items():
        assert part in said.pop(name)
    assert said == {}


def test_processes_that_are_not_there_are_missed() -> None:
    with pytest.raises(
        EngineError, match=r"tp_size=2 needs 2 processes and there are 1: .*torchrun --nproc-per-node 2"
    ):
        load(distributed_config={"tp_size": 2})


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("cut", [Cut(0), Cut(1, 3), Cut(1, 2), Cut(0, 2)])
def test_parts_make_the_whole(cut: Cut, size: int) -> None:
    whole = torch.arange(12 * 18).reshape(12, 18)
    parts = [cut.of(whole, rank, size) for rank in range(size)]
    assert torch.equal(cut.join(parts), whole)
    assert sum(part.numel() for part in parts) == whole.numel()
