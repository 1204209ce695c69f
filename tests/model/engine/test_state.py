"""Random numbers that are functions, and the nucleus they draw from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from md3cli.model.engine.state import sample, top_p_probabilities, uniform

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


@example(logits=[0.0, 4.8e-15], temperature=1.0, top_p=0.5)  # one probability in float32: either may be first
@given(
    logits=st.lists(st.floats(-20, 20), min_size=2, max_size=12),
    temperature=st.floats(0.1, 3),
    top_p=st.floats(0.01, 1),
)
def test_nucleus_holds_the_mass_and_always_the_first(logits: list[float], temperature: float, top_p: float) -> None:
    row = torch.tensor([logits], dtype=torch.float32)
    p, ids = top_p_probabilities(row, torch.tensor([temperature]), torch.tensor([top_p]))
    assert p[0, 0] > 0
    likely = (row / torch.tensor([temperature])).softmax(dim=-1)
    assert likely[0, ids[0, 0]] == likely.max()
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


# -- Apple's GPU, which has no float64 ------------------------------------------------------------


class OnApple(torch.Tensor):
    """A tensor that says it is on mps; `Apple` computes with what is inside."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnApple:
        assert inner.dtype is not torch.float64, "mps has no float64"
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device="mps:0")
        made.held = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("used outside the mode")

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Columns are cut without an index: torch switches to the device for one, and here it knows none."""
        if func is torch.Tensor.__getitem__:
            x, (_, column) = args
            return x.unsqueeze(1) if column is None else x.select(1, column)
        with torch._C.DisableTorchFunctionSubclass():  # results are what they are, not all of this class
            return func(*args, **(kwargs or {}))


class Apple(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        seen = []

        def inside(value: Any) -> Any:
            seen.append(isinstance(value, OnApple))
            return value.held if isinstance(value, OnApple) else value

        args, kwargs = tree_map(inside, args), tree_map(inside, kwargs)
        target = kwargs.get("device")
        is_apple = any(seen) if target is None else torch.device(target).type == "mps"
        if is_apple and target is not None:
            kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        return tree_map(lambda t: OnApple(t) if isinstance(t, Tensor) else t, result) if is_apple else result


def test_on_apples_gpu_the_same_ids_are_drawn_without_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    count = 200
    logits = torch.randn(count, 50, generator=generator) * 3
    temperature = torch.rand(count, generator=generator) * (torch.arange(count) % 4 > 0)
    top_p, seed, draw = torch.rand(count, generator=generator), torch.arange(count) * 7919, torch.arange(count) % 5
    expected = sample(logits, temperature, top_p, uniform(seed, draw))
    with Apple():
        apple = [OnApple(tensor) for tensor in (logits, temperature, top_p, seed, draw)]
        found = sample(*apple[:3], uniform(*apple[3:]))
    assert found.device.type == "mps"
    assert torch.equal(found.held, expected)


def test_no_temperature_leaves_the_range_of_float32() -> None:
    """An index of -1 would end the process on CUDA."""
    logits = torch.tensor([[1.0, 30_000.0, 3.0]]).expand(6, -1)
    temperature = torch.tensor([1e-45, 1e-40, 1e-30, 1e-20, 1e-3, 0.0])
    u = torch.full((6,), 0.999, dtype=torch.float64)
    assert sample(logits, temperature, torch.ones(6), u).tolist() == [1] * 6


def test_a_row_of_nan_gets_an_id_and_changes_no_other() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [torch.nan] * 3, [1.0, 2.0, 3.0]])
    ones, u = torch.ones(3), torch.full((3,), 0.5, dtype=torch.float64)
    drawn = sample(logits, ones, ones, u)
    assert 0 <= drawn[1] < 3
    assert drawn[0] == drawn[2] == sample(logits[:1], ones[:1], ones[:1], u[:1])[0]
