"""How many sequences fit, and which errors mean that too many were tried."""

from __future__ import annotations

import mmap

import pytest
import torch

from md3cli.model import memory
from md3cli.model.config import ModelConfig

CPU, BF16 = torch.device("cpu"), torch.bfloat16


def test_a_slot_of_the_real_model_takes_196608_bytes_a_position() -> None:
    assert memory.slot_bytes(ModelConfig(), 1, BF16) == 196_608
    assert memory.slot_bytes(ModelConfig(), 730, BF16) == 143_523_840


@pytest.mark.parametrize(("free_gib", "expected"), [(1, 2), (4, 8), (16, 32), (64, 32)])
def test_the_automatic_batch_is_a_power_of_two_that_fits(
    free_gib: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: free_gib << 30)
    assert memory.choose_batch_size(None, ModelConfig(), BF16, CPU, 4096) == expected


def test_a_batch_that_cannot_fit_is_cut_down_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4 << 30)
    assert memory.choose_batch_size(5, ModelConfig(), BF16, CPU, 4096) == 5
    with pytest.warns(UserWarning, match="--batch-size 100000: memory holds"):
        assert memory.choose_batch_size(100_000, ModelConfig(), BF16, CPU, 4096) < 20


def test_out_of_memory_is_told_from_other_failures() -> None:
    assert memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert memory.is_out_of_memory(MemoryError())
    assert memory.is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"))
    assert not memory.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_memory_can_be_asked_for_here() -> None:
    assert memory.free_bytes(CPU) > 1 << 20
    memory.reset_peak_rss()
    before = memory.peak_rss()
    with mmap.mmap(-1, 64 << 20) as block:  # fresh pages; an allocator may have some from before
        block.write(b"1" * len(block))
        assert memory.peak_rss() - before > 32 << 20
