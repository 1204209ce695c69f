"""The three forward passes of the engine, as functions of tensors: prefixes, prompts, one decode step.

Each runs the text decoder with the store that fits (`kv_cache`) and knows nothing of scheduling.
Prefill and decode are separate so that each keeps few shapes.

Shape suffixes: B rows of a prefill, N rows of a decode step, P image positions, T new positions, D width.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from md3cli.model.decoding import Mode, Rows, Step, advance
from md3cli.model.kv_cache import DecodeStore, KVCache, PrefixStore, PromptStore
from md3cli.model.moondream import Moondream3
from md3cli.model.plain import prompt_embeddings
from md3cli.model.tasks import Sequence
from md3cli.records import Task


def prefill_prefixes(model: Moondream3, cache: KVCache, slots: Seq[int], embeddings_BPD: Tensor) -> None:
    """Run pictures' prefixes into their slots; a prefix attends to all of itself and to nothing else."""
    device, prefix_len = model.device, model.config.prefix_len
    position = torch.arange(prefix_len, device=device).expand(len(slots), -1)
    store = PrefixStore(cache, torch.tensor(slots, device=device))
    model.text(model.prefix_embeddings(embeddings_BPD), position, None, store)


def prefill_prompts(model: Moondream3, cache: KVCache, batch: Seq[Sequence], slots: Seq[int]) -> Tensor:
    """Run prompts into slots that hold their pictures' prefixes; hidden state after each prompt [B, D].

    Padding behind a short prompt is overwritten by its answer before anything attends to it.
    """
    device = model.device
    starts, lengths = [s.start for s in batch], [len(s.prompt.ids) for s in batch]
    width = max(lengths)
    total = max(start + width for start in starts)
    cache.ensure_capacity(total)
    x_BTD = torch.zeros(len(batch), width, model.config.text.dim, dtype=model.dtype, device=device)
    for row, sequence in enumerate(batch):
        x_BTD[row, : lengths[row]] = prompt_embeddings(model, sequence.prompt)
    position_BT = torch.tensor(starts, device=device)[:, None] + torch.arange(width, device=device)
    mask = (torch.arange(total, device=device) <= position_BT[:, :, None])[:, None]
    store = PromptStore(cache, torch.tensor(slots, device=device), position_BT, total)
    hidden_BTD: Tensor = model.text(x_BTD, position_BT, mask, store)
    last = torch.tensor(lengths, device=device) - 1
    return hidden_BTD[torch.arange(len(batch), device=device), last]


def decode_step(
    model: Moondream3, cache: KVCache, rows: Rows, next_ND: Tensor, length: int, max_context: int, *, is_sampled: bool
) -> Step:
    """Feed every row its next input, attend over the first `length` positions, take the next decisions."""
    position_N1 = rows.position[:, None]
    mask = (torch.arange(length, device=next_ND.device) <= position_N1[:, :, None])[:, None]
    store = DecodeStore(cache, rows.position, length)
    hidden_ND = model.text(next_ND[:, None], position_N1, mask, store)[:, 0]
    moved = rows._replace(position=rows.position + (rows.mode != Mode.IDLE))
    return advance(model, moved, hidden_ND, max_context, is_sampled=is_sampled)


def new_rows(batch: Seq[Sequence], device: torch.device) -> Rows:
    """State of rows whose prompts have just been run."""
    requests = [sequence.job.request for sequence in batch]
    size = len(batch)

    def whole(values: Seq[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    def real(values: Seq[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    return Rows(
        mode=whole([int(sequence.start_mode) for sequence in batch]),
        is_first=torch.ones(size, dtype=torch.bool, device=device),
        is_point=torch.tensor([r.task is Task.POINT for r in requests], device=device),
        emitted=whole([0] * size),
        limit=whole([sequence.limit for sequence in batch]),
        position=whole([sequence.start + len(sequence.prompt.ids) for sequence in batch]),
        temperature=real([r.temperature for r in requests]),
        top_p=real([r.top_p for r in requests]),
        seed=whole([wrap_int64(r.seed) for r in requests]),
        draws=whole([0] * size),
    )


def wrap_int64(value: int) -> int:
    """A seed of any size as a signed 64-bit number."""
    return (value + 2**63) % 2**64 - 2**63
