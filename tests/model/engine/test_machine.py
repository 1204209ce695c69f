"""How many sequences fit, which errors mean that too many were tried, and how numbers get to the device and back."""

from __future__ import annotations

import mmap
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from md3cli.errors import ConfigError
from md3cli.model.engine import encoder, machine
from md3cli.model.engine.machine import MemoryPlan, milestone, send, start_download, upload
from md3cli.model.network.config import ModelConfig
from md3cli.model.weights.random_weights import CONFIGS, random_model

CPU, MPS, CUDA, BF16 = torch.device("cpu"), torch.device("mps"), torch.device("cuda", 0), torch.bfloat16
REAL = ModelConfig()
BF16_WEIGHTS, FP8_WEIGHTS, INT4_WEIGHTS = 18.54e9, 10.51e9, 6.19e9
CONTEXT = 0.5e9  # CUDA's own, taken before anybody asks


def test_a_slot_of_the_real_model_takes_196608_bytes_a_position() -> None:
    assert machine.slot_bytes(ModelConfig(), 1, BF16) == 196_608
    assert machine.slot_bytes(ModelConfig(), 730, BF16) == 143_523_840


@pytest.mark.parametrize("device", [CPU, MPS])
@pytest.mark.parametrize(("free_gib", "expected"), [(1, 2), (4, 8), (16, 32), (64, 32)])
def test_the_automatic_batch_is_a_power_of_two_that_fits(
    free_gib: int, expected: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda device: free_gib << 30)
    assert machine.plan_memory(None, REAL, BF16, device, 4096) == MemoryPlan(expected, None, None)


@pytest.mark.parametrize("device", [CPU, MPS, CUDA])
def test_a_batch_that_cannot_fit_is_cut_down_and_said(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda device: 4 << 30)
    assert machine.plan_memory(5, REAL, BF16, device, 4096).slots == 5
    with pytest.warns(UserWarning, match="--batch-size 100000: memory holds"):
        assert machine.plan_memory(100_000, REAL, BF16, device, 4096).slots < 20


def test_apples_gpu_is_asked_for_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 << 30)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 5 << 30)
    assert machine.free_bytes(MPS) == 7 << 30


# -- a CUDA device ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "weights", "slots", "crops", "pictures"),
    [
        (84.9e9, BF16_WEIGHTS, 128, 36, 16),  # 80 GB, as an H100 counts them
        (47.6e9, BF16_WEIGHTS, 76, 36, 16),
        (23.6e9, BF16_WEIGHTS, 10, 9, 1),  # 24 GB with their error correction
        (23.6e9, FP8_WEIGHTS, 28, 36, 16),
        (16.8e9, FP8_WEIGHTS, 13, 9, 1),
        (16.8e9, INT4_WEIGHTS, 21, 36, 16),
        (12.6e9, FP8_WEIGHTS, 1, 3, 1),
        (12.6e9, INT4_WEIGHTS, 14, 9, 1),
        (8.5e9, INT4_WEIGHTS, 2, 3, 1),
    ],
)
def test_cards_of_every_size_get_a_plan(card: float, weights: float, slots: int, crops: int, pictures: int) -> None:
    plan = machine.plan_cuda(int(card - CONTEXT - weights), REAL, BF16, 4096)
    assert plan == MemoryPlan(slots, crops, pictures * 730)


def test_few_slots_that_were_asked_for_get_the_passes_of_few() -> None:
    assert machine.plan_cuda(60 * 10**9, REAL, BF16, 4096, asked=8) == MemoryPlan(8, 9, 730)
    assert machine.plan_cuda(60 * 10**9, REAL, BF16, 4096, asked=16) == MemoryPlan(16, 36, 16 * 730)
    assert machine.plan_cuda(60 * 10**9, REAL, BF16, 4096, asked=150).slots == 150


def test_a_smaller_context_makes_room_for_more_and_a_larger_one_takes_none() -> None:
    free = 5 * 10**9
    assert machine.plan_cuda(free, REAL, BF16, 768).slots >= 2 * machine.plan_cuda(free, REAL, BF16, 1536).slots
    assert machine.plan_cuda(free, REAL, BF16, 32768) == machine.plan_cuda(free, REAL, BF16, 1536)


@given(
    free=st.integers(0, 140 * 10**9),
    asked=st.none() | st.integers(1, 300),
    max_context=st.integers(731, 32768),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_a_plan_never_takes_more_than_is_free_and_exists_where_one_picture_fits(
    free: int, asked: int | None, max_context: int, dtype: torch.dtype
) -> None:
    if free < machine.least_room(REAL, dtype, max_context):
        with pytest.raises(ConfigError, match="GB of GPU memory are free"):
            machine.plan_cuda(free, REAL, dtype, max_context, asked=asked)
        return
    plan = machine.plan_cuda(free + 1, REAL, dtype, max_context, asked=asked)  # 1: what rounding takes
    assert plan.max_crops is not None
    assert plan.prefill_tokens is not None
    sizes = machine.PassSizes(plan.max_crops, plan.prefill_tokens // 730, 1)
    slot = machine.slot_bytes(REAL, min(max_context, 1536), dtype)
    assert machine.pass_bytes(REAL, sizes, dtype) + plan.slots * slot <= free
    assert 1 <= plan.slots <= (asked or 128)


def test_a_card_too_small_for_one_picture_is_said_with_what_to_do() -> None:
    with pytest.raises(ConfigError) as error:
        machine.plan_cuda(900_000_000, REAL, BF16, 4096)
    assert str(error.value) == (
        "0.9 GB of GPU memory are free beside the model and one picture at a time takes 1.3 GB: "
        "use --quant int4, a smaller --max-context, or a card with more memory"
    )


def test_what_the_encoder_remembers_is_reckoned_with() -> None:
    assert machine.REMEMBERED_BYTES == encoder.MEMORY_BYTES
    crop, picture = machine.PassSizes(1, 0, 1), machine.PassSizes(0, 1, 1)
    none = machine.pass_bytes(REAL, machine.PassSizes(0, 0, 1), BF16)
    assert machine.pass_bytes(REAL, crop, BF16) - none == pytest.approx(21e6, rel=0.01)
    assert machine.pass_bytes(REAL, picture, BF16) - none == pytest.approx(730 * 120e3, rel=0.01)


def test_out_of_memory_is_told_from_other_failures() -> None:
    assert machine.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert machine.is_out_of_memory(MemoryError())
    assert machine.is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"))
    for status in ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"):
        assert machine.is_out_of_memory(RuntimeError(f"CUDA error: {status} when calling `cublasCreate(handle)`"))
    assert not machine.is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"))
    assert not machine.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_what_torch_says_of_a_shortage_is_cut_to_its_point() -> None:
    said = (
        "CUDA out of machine. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.52 GiB of which 1.10 GiB is "
        "free. See documentation for Memory Management (https://docs.pytorch.org/docs/stable/notes/cuda.html)"
    )
    assert machine.shortage(torch.OutOfMemoryError(said)) == "CUDA out of machine. Tried to allocate 2.00 GiB"
    assert machine.shortage(RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")) == (
        "CUDA error: out of memory"
    )
    assert machine.shortage(MemoryError()) == "MemoryError"


def test_memory_can_be_asked_for_here() -> None:
    assert machine.free_bytes(CPU) > 1 << 20
    machine.reset_peak_rss()
    before = machine.peak_rss()
    with mmap.mmap(-1, 64 << 20) as block:  # fresh pages; an allocator may have some from before
        block.write(b"1" * len(block))
        assert machine.peak_rss() - before > 32 << 20


@pytest.mark.process
def test_a_model_that_was_dropped_is_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a model refer to themselves: torch has their memory back only when cycles were looked for."""
    model = random_model(CONFIGS["mini"], dtype=torch.float32, device=CPU)
    experts = weakref.ref(model.text.blocks[-1].mlp)
    given_back = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(experts() is None))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 8 << 30))
    del model
    assert machine.free_bytes(CUDA) == 3 << 30
    assert given_back == [True]


# -- copies ----------------------------------------------------------------------------------------

INTS = st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40), max_size=12)
REALS = st.lists(st.lists(st.floats(width=32, allow_nan=False), max_size=40), max_size=6)


@pytest.mark.process
@given(INTS, REALS)
def test_what_was_sent_is_there_in_order(ints: list[list[int]], reals: list[list[float]]) -> None:
    whole, real = send(CPU, ints, reals)
    assert [part.tolist() for part in whole] == ints
    assert [part.tolist() for part in real] == reals
    assert all(part.dtype is torch.int64 for part in whole)
    assert all(part.dtype is torch.float32 for part in real)


def test_all_parts_are_of_one_block_and_aligned() -> None:
    (first, second, third), _ = send(CPU, [[1, 2, 3], [4], [5] * 17])
    assert first.untyped_storage().data_ptr() == third.untyped_storage().data_ptr()
    assert all(part.storage_offset() * part.itemsize % 64 == 0 for part in (first, second, third))


def test_elsewhere_than_on_cuda_copies_are_complete_at_once() -> None:
    tensor = torch.arange(3)
    assert upload(tensor, CPU) is tensor
    assert start_download(tensor) is tensor
    assert milestone(CPU) is None
