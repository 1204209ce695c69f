"""Random models: every expert and every tensor different, the same from the same seed, finite answers."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch

from md3cli.model.network.config import ModelConfig, MoeConfig
from md3cli.model.network.layers import ExpertMatrices
from md3cli.model.network.moondream import Moondream3
from md3cli.model.weights import random_weights
from md3cli.model.weights.random_weights import BLOCK, CONFIGS, UNTHINKABLE, forbid_end, random_model

CPU = torch.device("cpu")
MINI = CONFIGS["mini"]
BF16 = torch.bfloat16


def experts_of(model: Moondream3) -> list[torch.Tensor]:
    """The matrices of all experts of all layers, one by one."""
    return [expert for module in model.modules() if isinstance(module, ExpertMatrices) for expert in module.weight]


def are_all_different(tensors: list[torch.Tensor]) -> bool:
    return len({tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors}) == len(tensors)


def test_every_expert_is_different_where_its_size_is_a_power_of_two() -> None:
    """An expert of 2**20 values, and one of 2**19: with a block of 2**20 they would all be the same."""
    moe = MoeConfig(num_experts=4, start_layer=0, experts_per_token=2, expert_inner_dim=2048)
    config = replace(MINI, text=replace(MINI.text, n_layers=2, moe=moe))
    experts = experts_of(random_model(config, dtype=BF16, device=CPU))
    assert {expert.numel() for expert in experts} == {1 << 20, 1 << 19}
    assert are_all_different(experts)


def test_a_block_that_divides_an_expert_makes_them_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above would say if it could not tell."""
    monkeypatch.setattr(random_weights, "BLOCK", 1 << 12)
    assert not are_all_different(experts_of(random_model(MINI, dtype=BF16, device=CPU)))


@pytest.mark.parametrize("name", CONFIGS)
def test_no_expert_starts_where_another_does(name: str) -> None:
    """The block's length is a prime that divides no expert's size; checked without filling 18 GB."""
    assert all(BLOCK % divisor for divisor in range(2, 1025))
    with torch.device("meta"):
        experts = experts_of(Moondream3(CONFIGS[name]))
    assert experts
    assert all(expert.numel() % BLOCK for expert in experts)


def test_every_tensor_is_different() -> None:
    model = random_model(MINI, dtype=BF16, device=CPU)
    assert are_all_different([parameter for parameter in model.parameters() if parameter.numel() > 1])


@pytest.mark.process
def test_the_same_seed_gives_the_same_model() -> None:
    first, again, other = (
        list(random_model(MINI, dtype=torch.float32, device=CPU, seed=seed).parameters()) for seed in (3, 3, 4)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_are_those_of_a_model_that_could_be_loaded(name: str) -> None:
    config = CONFIGS[name]
    assert ModelConfig.from_sections(asdict(config)) == config


def test_a_mini_model_has_every_part_of_the_real_one() -> None:
    text = MINI.text
    assert text.moe is not None
    assert 1 <= text.moe.start_layer < text.n_layers - 1
    widths = (text.dim, text.ff_dim, text.moe.expert_inner_dim, MINI.vision.enc_dim, MINI.vision.enc_ff_dim)
    assert not any(width % 128 for width in widths)
    size = sum(parameter.nbytes for parameter in random_model(MINI, dtype=BF16, device=CPU).parameters())
    assert size < 16e6


@torch.inference_mode()
def test_activations_stay_finite_through_a_prefix() -> None:
    model = random_model(MINI, dtype=BF16, device=CPU)
    hidden = model.text(torch.randn(1, 82, MINI.text.dim).to(BF16), torch.arange(82)[None])
    assert hidden.isfinite().all()
    assert 0.1 < hidden.float().std() < 100


def test_nothing_ends_before_its_budget() -> None:
    model = random_model(MINI, dtype=torch.float32, device=CPU)
    forbid_end(model)
    with torch.inference_mode():
        logits = model.text.logits(torch.randn(64, MINI.text.dim))
    ids = MINI.tokenizer
    assert (logits[:, [ids.eos_id, ids.answer_id]] < UNTHINKABLE / 2).all()
    assert logits.isfinite().all()
