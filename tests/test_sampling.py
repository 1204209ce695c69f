"""Random numbers that are functions, and the nucleus they draw from."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from md3cli.model.sampling import sample, top_p_probabilities, uniform

INT64 = st.integers(min_value=-(2**63), max_value=2**63 - 1)


@given(seed=INT64, draw=st.integers(min_value=0, max_value=2**40))
def test_uniform_is_in_range_and_repeats(seed: int, draw: int) -> None:
    first = uniform(torch.tensor([seed]), torch.tensor([draw]))
    assert 0 <= first.item() < 1
    assert torch.equal(first, uniform(torch.tensor([seed]), torch.tensor([draw])))


def test_uniform_is_uniform_over_draws_and_over_seeds() -> None:
    numbers, zeros = torch.arange(20_000), torch.zeros(20_000, dtype=torch.int64)
    for u in (uniform(zeros, numbers), uniform(numbers, zeros)):
        counts = torch.histc(u, bins=20, min=0, max=1)
        assert ((counts - 1000).abs() < 150).all()
        assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1].item()) < 0.03


@given(
    logits=st.lists(st.floats(-20, 20), min_size=2, max_size=12),
    temperature=st.floats(0.1, 3),
    top_p=st.floats(0.01, 1),
)
def test_nucleus_holds_the_mass_and_always_the_first(logits: list[float], temperature: float, top_p: float) -> None:
    row = torch.tensor([logits], dtype=torch.float32)
    p, ids = top_p_probabilities(row, torch.tensor([temperature]), torch.tensor([top_p]))
    assert p[0, 0] > 0
    assert row[0, ids[0, 0]] == row.max()
    assert abs(p.sum().item() - 1) < 1e-5
    kept = ids[0, p[0] > 0]
    mass = (row[0].double() / temperature).softmax(0)[kept].sum().item()
    assert mass >= top_p - 1e-4


def test_frequencies_follow_the_nucleus() -> None:
    count = 40_000
    logits = torch.tensor([2.0, 1.0, 0.0, -3.0]).expand(count, -1)
    ones = torch.ones(count)
    u = uniform(torch.full((count,), 7), torch.arange(count))
    drawn = sample(logits, ones, ones * 0.9, u).bincount(minlength=4) / count
    p, ids = top_p_probabilities(logits[:1], ones[:1], ones[:1] * 0.9)
    expected = torch.zeros(4).scatter(0, ids[0], p[0])
    assert (drawn - expected).abs().max() < 0.01
    assert drawn[3] == 0


def test_temperature_zero_is_argmax_and_the_lowest_id_on_a_tie() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0], [3.0, 0.0, 1.0]])
    assert sample(logits, torch.zeros(2), torch.ones(2), torch.tensor([0.99, 0.99])).tolist() == [1, 0]
