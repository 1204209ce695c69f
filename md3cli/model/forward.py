"""The engine's forward passes: pictures' prefixes, prompts, one decode step.

Three functions of tensors do the work and can be compiled: `run_prefixes`, `run_prompts`,
`decode_step`. `Passes` prepares their inputs. Eager passes take the sizes as they come; compiled
ones pad rows and lengths to a few fixed sizes, so that after each size was seen once nothing is
compiled again. Padding repeats a row that is there anyway or writes where nothing has been attended
to yet, so it changes no answer.

Shape suffixes: B rows of a prefill, N rows of a decode step, P image positions, T new positions, D width.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from md3cli.model.decoding import Mode, Rows, Step, advance
from md3cli.model.kv_cache import DecodeStore, KVCache, PrefixStore, PromptStore, round_up
from md3cli.model.moondream import Moondream3
from md3cli.model.plain import prompt_embeddings
from md3cli.model.tasks import Sequence
from md3cli.records import Task

IDLE = int(Mode.IDLE)
PROMPT_STEP = 32  # compiled prompts are padded to a multiple of this


def run_prefixes(model: Moondream3, cache: KVCache, slots_B: Tensor, embeddings_BPD: Tensor) -> None:
    """Run pictures' prefixes into their slots; a prefix attends to all of itself and to nothing else."""
    x_BTD = model.prefix_embeddings(embeddings_BPD)
    position = torch.arange(x_BTD.shape[1], device=x_BTD.device).expand(x_BTD.shape[0], -1)
    model.text(x_BTD, position, None, PrefixStore(cache, slots_B))


def run_prompts(
    model: Moondream3, cache: KVCache, slots_B: Tensor, x_BTD: Tensor, start_B: Tensor, last_B: Tensor, total: int
) -> Tensor:
    """Run prompts into slots behind position `start_B`; the hidden state at index `last_B` of each [B, D]."""
    device = x_BTD.device
    position_BT = start_B[:, None] + torch.arange(x_BTD.shape[1], device=device)
    mask = (torch.arange(total, device=device) <= position_BT[:, :, None])[:, None]
    hidden_BTD = model.text(x_BTD, position_BT, mask, PromptStore(cache, slots_B, position_BT, total))
    return hidden_BTD[torch.arange(x_BTD.shape[0], device=device), last_B]  # type: ignore[no-any-return]


def decode_step(
    model: Moondream3, cache: KVCache, rows: Rows, next_ND: Tensor, max_context: int, *, is_sampled: bool
) -> Step:
    """Feed slots 0 … N-1 their next inputs and take their next decisions."""
    position_N1 = rows.position[:, None]
    mask = (torch.arange(cache.capacity, device=next_ND.device) <= position_N1[:, :, None])[:, None]
    store = DecodeStore(cache, rows.position)
    hidden_ND = model.text(next_ND[:, None], position_N1, mask, store)[:, 0]
    moved = rows._replace(position=rows.position + (rows.mode != IDLE))
    return advance(model, moved, hidden_ND, max_context, is_sampled=is_sampled)


class Passes:
    """The three passes over one model, eager until `compile` is called."""

    def __init__(self, model: Moondream3) -> None:
        self.model = model
        self.is_compiled = False
        self._run_prefixes, self._run_prompts, self._decode_step = run_prefixes, run_prompts, decode_step

    def compile(self, backend: str = "inductor") -> None:
        """Compile each pass for fixed sizes; what is already compiled for a size is used again."""
        self.is_compiled = True
        self._run_prefixes = torch.compile(run_prefixes, dynamic=False, backend=backend)
        self._run_prompts = torch.compile(run_prompts, dynamic=False, backend=backend)
        self._decode_step = torch.compile(decode_step, dynamic=False, backend=backend)

    def prefill_prefixes(self, cache: KVCache, slots: Seq[int], embeddings: Seq[Tensor], num_rows: int) -> None:
        """Run up to `num_rows` pictures' prefixes into their slots."""
        if self.is_compiled:
            slots, embeddings = _repeat_last(slots, num_rows), _repeat_last(embeddings, num_rows)
        slots_B = torch.tensor(slots, device=self.model.device)
        self._run_prefixes(self.model, cache, slots_B, torch.stack(list(embeddings)))

    def prefill_prompts(self, cache: KVCache, batch: Seq[Sequence], slots: Seq[int], min_positions: int) -> Tensor:
        """Run prompts into slots that hold their pictures' prefixes; hidden state after each prompt [B, D].

        Padding behind a short prompt is overwritten by its answer before anything attends to it.
        `min_positions` are in use by the other slots.
        """
        device, num_prompts = self.model.device, len(batch)
        width = max(len(sequence.prompt.ids) for sequence in batch)
        if self.is_compiled:
            width = round_up(width, PROMPT_STEP)
            batch, slots = _repeat_last(batch, cache.num_slots), _repeat_last(slots, cache.num_slots)
        total = max(sequence.start for sequence in batch) + width
        cache.fit(max(total, min_positions))
        x_BTD = torch.zeros(len(batch), width, self.model.config.text.dim, dtype=self.model.dtype, device=device)
        for row, sequence in enumerate(batch):
            x_BTD[row, : len(sequence.prompt.ids)] = prompt_embeddings(self.model, sequence.prompt)
        hidden_BD = self._run_prompts(
            self.model,
            cache,
            torch.tensor(slots, device=device),
            x_BTD,
            torch.tensor([sequence.start for sequence in batch], device=device),
            torch.tensor([len(sequence.prompt.ids) - 1 for sequence in batch], device=device),
            cache.capacity if self.is_compiled else total,
        )
        return hidden_BD[:num_prompts]

    def decode(
        self, cache: KVCache, rows: Rows, next_SD: Tensor, *, num_rows: int, max_context: int, is_sampled: bool
    ) -> Step:
        """One decision for slots 0 … `num_rows`-1 (compiled: for all slots)."""
        window = slice(0, cache.num_slots if self.is_compiled else num_rows)
        return self._decode_step(
            self.model, cache, rows.pick(window), next_SD[window], max_context, is_sampled=is_sampled
        )


def _repeat_last(items: Seq, size: int) -> list:  # type: ignore[type-arg]
    return [*items, *[items[-1]] * (size - len(items))]


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
        is_point=torch.tensor([request.task is Task.POINT for request in requests], device=device),
        emitted=whole([0] * size),
        limit=whole([sequence.limit for sequence in batch]),
        position=whole([sequence.start + len(sequence.prompt.ids) for sequence in batch]),
        temperature=real([request.temperature for request in requests]),
        top_p=real([request.top_p for request in requests]),
        seed=whole([wrap_int64(request.seed) for request in requests]),
        draws=whole([0] * size),
    )


def wrap_int64(value: int) -> int:
    """A seed of any size as a signed 64-bit number."""
    return (value + 2**63) % 2**64 - 2**63
