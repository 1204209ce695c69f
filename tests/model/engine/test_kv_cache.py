"""Slots of keys and values: what is stored stays through growing, shrinking and copying."""

from __future__ import annotations

import random

import pytest
import torch
from golden_cases import assert_answer, load_case
from hypothesis import given, settings
from hypothesis import strategies as st

from md3cli.model.engine.kv_cache import GROWTH, DecodeStore, KVCache, PromptStore
from md3cli.records import Job, Request, Task


def small_cache(num_slots: int = 3, capacity: int = 10) -> KVCache:
    config = load_case("a").model.config
    return KVCache(config, num_slots, capacity, dtype=torch.float32, device=torch.device("cpu"))


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 900), min_size=1, max_size=6))
def test_resizing_keeps_what_fits_and_never_goes_below_the_start(sizes: list[int]) -> None:
    cache = small_cache()
    marks = torch.randn(cache.keys[0][:, :, :10].shape)
    for tensor in (*cache.keys, *cache.values):
        tensor[:, :, :10] = marks
    for size in sizes:
        cache.fit(max(size, 10))
        assert cache.capacity >= max(size, GROWTH)
        assert cache.capacity < 2 * max(size, GROWTH) + 2 * GROWTH
        for tensor in (*cache.keys, *cache.values):
            assert tensor.shape[2] == cache.capacity
            assert torch.equal(tensor[:, :, :10], marks)


def test_copy_takes_the_prefix_and_nothing_else() -> None:
    cache = small_cache()
    for tensor in cache.keys:
        tensor[0] = 1.0
    cache.copy(0, 2, 4)
    assert all((tensor[2, :, :4] == 1).all() and (tensor[2, :, 4:] == 0).all() for tensor in cache.keys)
    assert all((tensor[1] == 0).all() for tensor in cache.keys)


def test_decode_reads_its_slots_in_place() -> None:
    cache = small_cache()
    store = DecodeStore(cache, torch.tensor([3, 5]), torch.tensor([True, True]))
    k = torch.randn(2, cache.keys[0].shape[1], 1, 64)
    keys, values = store.update(1, k, 2 * k)
    assert keys.data_ptr() == cache.keys[1].data_ptr()
    assert keys.is_contiguous()
    assert torch.equal(keys[0, :, 3], k[0, :, 0])
    assert torch.equal(values[1, :, 5], 2 * k[1, :, 0])


def test_prompts_write_behind_what_their_slots_hold() -> None:
    cache = small_cache()
    position = torch.tensor([[4, 5], [0, 1]])
    k = torch.randn(2, cache.keys[0].shape[1], 2, 64)
    keys, _ = PromptStore(cache, torch.tensor([2, 0]), position, 6).update(0, k, k)
    assert keys.shape[2] == 6
    assert torch.equal(cache.keys[0][2, :, 4:6], k[0])
    assert torch.equal(cache.keys[0][0, :, 0:2], k[1])


@pytest.mark.process
@pytest.mark.parametrize("seed", [0, 1])
def test_long_and_short_generations_side_by_side_through_growth_and_shrinkage(seed: int) -> None:
    case = load_case("c")
    keys = [key for key in range(len(case.requests)) if case.is_certain(key)]
    short = [case.job(key) for key in random.Random(seed).choices(keys, k=30)]
    endless = Request(Task.QUERY, "Describe it.", reasoning=True, max_tokens=90)
    jobs: list[Job] = [*short[:10], Job(1000, case.images[0], endless), *short[10:]]
    engine = case.engine(batch_size=4)
    capacities = []
    fit = engine.cache.fit

    def noted(num_positions: int) -> None:
        fit(num_positions)
        capacities.append(engine.cache.capacity)

    engine.cache.fit = noted  # type: ignore[method-assign]
    for answer in engine.run(jobs):
        if answer.key != 1000:
            assert_answer(answer, case.expected[answer.key])
    assert max(capacities) > min(capacities)
