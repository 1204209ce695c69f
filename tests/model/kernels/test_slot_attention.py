"""Attention over slots against plain attention, in Triton's interpreter: lengths, idle rows, company, slots' ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton, which the development extra brings on Linux")

from gpu.triton_cases import OPS, normal, relative_error, slot_attention_twin

from md3cli.model.kernels.operators import BLOCK_QUERIES, SPLIT
from md3cli.model.network.config import HEAD_DIM
from md3cli.model.network.text import rotary_table

CPU = torch.device("cpu")
HEADS, CAPACITY = 2, 1008  # four splits, the last one cut
LENGTHS = (0, 1, 33, SPLIT - 1, SPLIT, SPLIT + 1, 1000, CAPACITY)  # positions that a row reads; 0: idle
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}
NAN = float("nan")

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("unwritten_memory_shows")]


def cache(num_slots: int, dtype: torch.dtype, capacity: int = CAPACITY) -> list[Tensor]:
    """Keys and values of slots."""
    torch.manual_seed(0)
    return [normal(num_slots, HEADS, capacity, HEAD_DIM, dtype=dtype, device=CPU) for _ in range(2)]


def queries(*shape: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(1)
    return normal(*shape, HEADS, HEAD_DIM, dtype=dtype, device=CPU)


def forget_behind(tensors: list[Tensor], slot: int, length: int) -> None:
    """Put NaN where nothing has been stored."""
    for tensor in tensors:
        tensor[slot, :, length:] = NAN


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_step_reads_each_row_up_to_its_own_position(dtype: torch.dtype) -> None:
    """Whatever lies behind it, in shuffled slots, and zeros come of an idle row."""
    stored, count = cache(len(LENGTHS) + 1, dtype), len(LENGTHS)
    slots = torch.randperm(count + 1)[:count]
    for slot, length in zip(slots.tolist(), LENGTHS, strict=True):
        forget_behind(stored, slot, length)
    slots = torch.where(torch.tensor(LENGTHS) > 0, slots, -1)
    position = (torch.tensor(LENGTHS) - 1).clamp_min(0)[:, None]
    q = queries(count, 1, dtype=dtype)
    found = OPS.slot_attention_step(q, *stored, slots, position)
    expected = slot_attention_twin(q, *stored, slots, position)
    assert (found[0] == 0).all()
    for row in range(1, count):
        assert relative_error(found[row], expected[row]) < TOLERANCE[dtype], LENGTHS[row]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [2, 16, 21])
def test_a_block_of_queries_reads_each_up_to_its_own_position(dtype: torch.dtype, length: int) -> None:
    starts = [0, 1, 63, 64, 300, CAPACITY - length]
    stored = cache(len(starts), dtype)
    slots = torch.randperm(len(starts))
    for slot, start in zip(slots.tolist(), starts, strict=True):
        forget_behind(stored, slot, start + length)
    slots[1] = -1
    position = torch.tensor(starts)[:, None] + torch.arange(length)
    q = queries(len(starts), length, dtype=dtype)
    found = OPS.slot_attention_block(q, *stored, slots, position)
    expected = slot_attention_twin(q, *stored, slots, position)
    assert (found[1] == 0).all()
    for row in (0, 2, 3, 4, 5):
        assert relative_error(found[row], expected[row]) < TOLERANCE[dtype], starts[row]


def test_one_prompt_in_several_blocks_of_one_slot_is_the_prompt_in_one() -> None:
    stored = cache(3, torch.float16)
    position = 40 + torch.arange(48)
    q = queries(48, dtype=torch.float16)
    whole = OPS.slot_attention_block(q[None], *stored, torch.tensor([2]), position[None])[0]
    blocks = q.unflatten(0, (3, BLOCK_QUERIES)), torch.tensor([2, 2, 2]), position.unflatten(0, (3, BLOCK_QUERIES))
    found = OPS.slot_attention_block(blocks[0], *stored, *blocks[1:])
    assert torch.equal(found.flatten(0, 1), whole)


@pytest.mark.parametrize("length", [1, 16])
def test_a_rows_bits_know_no_company(length: int) -> None:
    """Alone, in another place, beside loud rows, beside idle ones, in longer slots."""
    attend = OPS.slot_attention_step if length == 1 else OPS.slot_attention_block
    stored = cache(5, torch.float16)
    position = torch.tensor([3, 290, 511, 700, 40])[:, None] + torch.arange(length)
    q, slots = queries(5, length, dtype=torch.float16), torch.tensor([4, 2, 0, 3, 1])
    together = attend(q, *stored, slots, position)
    order = torch.randperm(5)
    assert torch.equal(attend(q[order], *stored, slots[order], position[order]), together[order])
    for row in range(5):
        alone = attend(q[row : row + 1], *stored, slots[row : row + 1], position[row : row + 1])
        assert torch.equal(alone[0], together[row])
        others_idle = torch.where(torch.arange(5) == row, slots, -1)
        assert torch.equal(attend(q, *stored, others_idle, position)[row], together[row])
    loud = q * 30
    loud[1] = q[1]
    moved = torch.where(torch.arange(5) == 1, position.T, CAPACITY - length).T.contiguous()
    assert torch.equal(attend(loud, *stored, slots, moved)[1], together[1])
    longer = [torch.cat([part, torch.full_like(part, NAN)], dim=2) for part in stored]
    assert torch.equal(attend(q, *longer, slots, position), together)


@pytest.mark.parametrize("length", [1, 16])
def test_a_position_behind_the_slots_end_reads_no_neighbour(length: int) -> None:
    """A row steps that far when its end is told one step late; what comes of it is never read, but must not crash."""
    attend = OPS.slot_attention_step if length == 1 else OPS.slot_attention_block
    stored = cache(2, torch.float16, capacity=32)
    forget_behind(stored, 1, 0)
    q, slots = queries(1, length, dtype=torch.float16), torch.tensor([0])
    found = attend(q, *stored, slots, 32 + torch.arange(length)[None])
    at_the_end = attend(q, *stored, slots, torch.full((1, length), 31))
    assert torch.equal(found, at_the_end)


@pytest.mark.parametrize("place", ["keys", "values"])
def test_a_number_that_is_none_stays_to_be_seen(place: str) -> None:
    """The engine fails a row whose logits are not finite; attention must not hide what would make them so."""
    stored = cache(2, torch.float16)
    stored[place == "values"][0, :, 5] = NAN
    for length, attend in ((1, OPS.slot_attention_step), (2, OPS.slot_attention_block)):
        position = torch.full((2, length), 300)
        found = attend(queries(2, length, dtype=torch.float16), *stored, torch.tensor([0, 1]), position)
        assert found[0].isnan().all()
        assert found[1].isfinite().all()


def test_an_idle_row_stores_nothing() -> None:
    """Neither in the last slot, which -1 would be counted from the end, nor before the first."""
    torch.manual_seed(0)
    keys, values = (torch.zeros(3, HEADS, 16, HEAD_DIM, dtype=torch.float16) for _ in range(2))
    qkv = normal(3 * 2, 3 * HEADS * HEAD_DIM, dtype=torch.float16, device=CPU)
    parts, alpha = torch.zeros(1, 6, 2 * HEADS), torch.zeros(HEADS, dtype=torch.float16)
    position = torch.tensor([[0, 1], [5, 6], [9, 10]])
    slots = torch.tensor([1, -1, 0])
    table = rotary_table(position, 1e4)
    OPS.tau_rope_store(qkv, parts, alpha, position, table, slots, keys, values, False)
    for tensor in (keys, values):
        written = (tensor != 0).any(-1).any(1).nonzero().tolist()
        assert written == [[0, 9], [0, 10], [1, 0], [1, 1]]
