"""Answers restricted to a list: every choice is scored whole, the most probable one is the answer.

Constrained decoding done exactly: instead of walking token by token along what is allowed, each choice is fed behind
the prompt as it would have been written, up to the end of text, and its probability is the product of its tokens'.
Scores are those probabilities, brought to a sum of 1. Only the engine's step calls this; it stands apart because it is
a way of deciding of its own.

Shape suffixes: B generations of a pass, T fed positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from md3cli.model.engine.generation import Generation
from md3cli.model.engine.kv_cache import KVCache, PromptStore
from md3cli.model.engine.machine import send
from md3cli.model.network.moondream import Moondream3


@dataclass(frozen=True, slots=True)
class ChoiceRow:
    """A generation about to choose: its slot, the position where the answer id goes, its choices' ids."""

    slot: int
    position: int
    choices: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, generation: Generation, slot: int, end: int) -> ChoiceRow:
        """Note where the answer id goes: it ends the prompt, or is fed next behind reasoning; `end` is the slot's."""
        return cls(slot, end if generation.reasons else end - 1, generation.choices)

    @property
    def end(self) -> int:
        """One behind the last position that any choice takes."""
        return self.position + 1 + max(map(len, self.choices))


V = TypeVar("V")


class ChoiceInts(NamedTuple, Generic[V]):
    """What one pass is given: lists on the host, int64 tensors on the device."""

    fed: V  # [B * T] the answer id and a choice, padded
    wanted: V  # [B * T] what is to come of each: the choice and the end of text, padded
    lengths: V  # [B] without padding
    slots: V  # [B]
    positions: V  # [B] of what is fed first


@torch.inference_mode()
def choice_probabilities(
    model: Moondream3, cache: KVCache, rows: Sequence[ChoiceRow]
) -> tuple[Tensor, list[list[float]]]:
    """Score every choice of every row.

    One pass for the first choice of all rows, one for the second, and so on: the choices of a row
    are written to the same positions of its slot one after another, each seeing only itself. All
    passes are sent to the device at once, and read back at once.

    Return the rows' slots [B] on the device, and for each row the probability of each of its choices, sum 1.
    """
    numbers = range(max(len(row.choices) for row in rows))
    asked = [[index for index, row in enumerate(rows) if number < len(row.choices)] for number in numbers]
    passes = [_columns(model, [rows[i] for i in some], number) for number, some in zip(numbers, asked, strict=True)]
    # One behind the last position that a pass writes, padding included.
    totals = [max(columns.positions) + max(columns.lengths) for columns in passes]
    cache.fit(max(cache.capacity, *totals))
    sent = iter(send(model.device, [column for columns in passes for column in columns])[0])
    on_device = [ChoiceInts(*islice(sent, len(ChoiceInts._fields))) for _ in passes]
    found = [_log_probabilities(model, cache, *both) for both in zip(on_device, totals, strict=True)]
    scores: list[list[float]] = [[] for _ in rows]
    for index, value in zip((i for some in asked for i in some), torch.cat(found).tolist(), strict=True):
        scores[index].append(value)
    # Every row has choices, so the first pass is of all rows.
    return on_device[0].slots, [torch.tensor(values, dtype=torch.float64).softmax(0).tolist() for values in scores]


def _columns(model: Moondream3, rows: Sequence[ChoiceRow], number: int) -> ChoiceInts[list[int]]:
    ids, choices = model.config.tokenizer, [row.choices[number] for row in rows]
    width = 1 + max(map(len, choices))

    def padded(lists: Iterable[tuple[int, ...]]) -> list[int]:
        return [id for some in lists for id in (*some, *[ids.eos_id] * (width - len(some)))]

    return ChoiceInts(
        fed=padded((ids.answer_id, *choice) for choice in choices),
        wanted=padded((*choice, ids.eos_id) for choice in choices),
        lengths=[1 + len(choice) for choice in choices],
        slots=[row.slot for row in rows],
        positions=[row.position for row in rows],
    )


def _log_probabilities(model: Moondream3, cache: KVCache, ints: ChoiceInts[Tensor], total: int) -> Tensor:
    """Return the log-probability [B] of a choice a row, its end of text included; NaN where a logit is not finite."""
    fed_BT, wanted_BT = (ids.unflatten(0, (len(ints.slots), -1)) for ids in (ints.fed, ints.wanted))
    index_T = torch.arange(fed_BT.shape[1], device=fed_BT.device)
    position_BT = ints.positions[:, None] + index_T
    mask = (torch.arange(total, device=fed_BT.device) <= position_BT[:, :, None])[:, None]
    is_real_BT = index_T < ints.lengths[:, None]
    store = PromptStore(cache, ints.slots, position_BT, total)
    hidden = model.text(model.text.embed(fed_BT), position_BT, mask, store, is_real_BT)
    chosen_BT = _log_softmax(model, hidden).gather(2, wanted_BT[..., None])[..., 0]
    return chosen_BT.masked_fill(~is_real_BT, 0.0).sum(1)


def _log_softmax(model: Moondream3, hidden_BTD: Tensor) -> Tensor:
    logits = model.text.logits(hidden_BTD).float()
    is_finite = logits.isfinite().all(-1, keepdim=True)  # the softmax of minus infinity is a number
    return logits.log_softmax(-1).masked_fill(~is_finite, torch.nan)
