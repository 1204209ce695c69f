"""A network that processes share answers as in one process, in every one of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("accelerate", reason="needs the extra md3cli[hf]")

from placed_answers import TINY, load
from shared_answers import four_heads, run
from transformers.distributed import DistributedConfig

from md3cli.errors import EngineError
from md3cli.model.hf import Moondream3Config, Moondream3ForConditionalGeneration
from md3cli.model.hf.parallel import TP_PLAN, Cut, check_config, share_out

EQUAL = {"decisions_equal": True, "tokens_equal": True, "answers_equal": True}
SHARES = {"tp2": 0.54, "ep2": 0.89, "tp2 x ep2": 0.54}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found, one after the other; at the end the second is killed."""
    room = tmp_path_factory.mktemp("pair")
    calls = ("answers", list(SHARES), ""), ("saved", str(room)), ("refusals", str(room / "adapter")), ("killed",)
    return run(2, room, *calls)


def check(found: list[dict[str, Any]], shares: dict[str, float]) -> None:
    for name, most in shares.items():
        answers = [of_rank["answers"][name] for of_rank in found]
        assert len({of_rank["bits"] for of_rank in answers}) == 1  # so that no decision can part the processes
        assert all(of_rank["bytes"] <= most for of_rank in answers)
        assert answers[0]["largest_difference"] <= 1e-4
        assert answers[0].items() >= EQUAL.items(), name


@pytest.mark.process
def test_two_processes_answer_as_one_and_each_holds_its_part(pair: list[dict[str, Any]]) -> None:
    """Of the embedded model 0.06 stays whole (the token table, norms, routers); by experts alone all but those does."""
    check(pair, SHARES)


@pytest.mark.slow
def test_four_processes_answer_as_one(tmp_path: Path) -> None:
    shares = {"ep4": 0.83, "tp4": 0.30, "tp4 x ep4": 0.30}
    check(run(4, tmp_path, ("answers", list(shares), str(four_heads(tmp_path)))), shares)


@pytest.mark.process
def test_a_process_that_dies_ends_the_wait_of_the_others(pair: list[dict[str, Any]]) -> None:
    first, second = pair
    assert "killed" not in second
    assert set(first["killed"]) == {"forward", "caption"}
    for said in first["killed"].values():
        assert said.startswith("process 0 of the 2 that share the network has lost the others: ")


@pytest.mark.process
def test_a_shared_network_is_saved_whole_and_what_cannot_be_shared_is_refused(pair: list[dict[str, Any]]) -> None:
    first, second = pair
    said = dict(first["refusals"])
    assert said == second["refusals"]
    assert first["saved"] == second["saved"] == {"original": True, "raw": True}
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


def meta_model() -> Moondream3ForConditionalGeneration:
    with torch.device("meta"):
        return Moondream3ForConditionalGeneration(Moondream3Config.from_pretrained(TINY))


@pytest.fixture
def mesh(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A mesh of so many processes, of which this is the first, and the others are not there and say nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield dist.init_device_mesh("cpu", (request.param,), mesh_dim_names=("tp",))
    dist.destroy_process_group()


@pytest.mark.parametrize("mesh", [3], indirect=True)
@pytest.mark.parametrize(
    ("module", "what"),
    {
        "text.blocks.*.attn": r"2 heads of model\.text\.blocks\.0\.attn",
        "text.blocks.0.mlp": r"512 inner values of model\.text\.blocks\.0\.mlp",
        "text.blocks.1.mlp": r"128 inner values of an expert of model\.text\.blocks\.1\.mlp",
        "text.lm_head": r"608 outputs of model\.text\.lm_head",
        "vision.blocks.*.attn": r"4 heads of model\.vision\.blocks\.0\.attn",
        "vision.proj_mlp": r"512 inner values of model\.vision\.proj_mlp",
        "region.size_decoder": r"2048 outputs of model\.region\.size_decoder",
    }.items(),
)
def test_sizes_that_do_not_divide_are_refused_by_name(mesh: Any, module: str, what: str) -> None:
    plan = {f"model.{name}": "replicate" for name in TP_PLAN}
    plan[f"model.{module}"] = TP_PLAN.get(module, "inner")
    config = DistributedConfig(tp_size=3, tp_plan=plan)
    with pytest.raises(EngineError, match=rf"tp_size=3 does not divide the {what}; .* tp_plan=.*'replicate'"):
        share_out(meta_model(), config, mesh)


@pytest.mark.parametrize("mesh", [3, 5], indirect=True)
def test_a_process_without_experts_is_refused(mesh: Any) -> None:
    size = mesh.size()
    config = DistributedConfig(tp_size=size, ep_size=size, tp_plan={})
    with pytest.raises(EngineError, match=rf"ep_size={size} leaves a process without any of the 4 experts"):
        share_out(meta_model(), config, mesh)


def test_experts_are_shared_by_all_processes_or_none() -> None:
    config = DistributedConfig(tp_size=4, ep_size=4)
    config.ep_size = 2  # transformers looks when it is made
    with pytest.raises(EngineError, match=r"ep_size=2 must be tp_size \(4\) or 1"):
        check_config(config)


@pytest.mark.parametrize("there", [None, "1", "4"])
def test_processes_that_are_not_there_are_missed(there: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if there is not None:
        monkeypatch.setenv("WORLD_SIZE", there)
        monkeypatch.setenv("RANK", "0")
    said = rf"tp_size=2 needs 2 processes and there are {there or 1}: .*torchrun --nproc-per-node 2"
    with pytest.raises(EngineError, match=said):
        load(distributed_config={"tp_size": 2})


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("cut", [Cut(0), Cut(1, 3), Cut(1, 2), Cut(0, 2)])
def test_parts_make_the_whole(cut: Cut, size: int) -> None:
    whole = torch.arange(12 * 18).reshape(12, 18)
    parts = [cut.of(whole, rank, size) for rank in range(size)]
    assert torch.equal(cut.join(parts), whole)
    assert sum(part.numel() for part in parts) == whole.numel()
