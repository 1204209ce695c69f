"""Answers that are chosen from a list: the probability of every choice, exactly.

Choosing is constrained decoding done exactly: instead of walking token by token along what is allowed, each choice is
fed behind the prompt as it would have been written, up to the end of text, and its probability is the product of its
tokens'. Scores are those probabilities, brought to a sum of 1; the most probable choice is the answer.

On CUDA every pass has one size for each width of its choices, rounded up (`passes.ShapePlan`).

Shape suffixes: B rows of a pass, T new positions, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Generic, NamedTuple

import torch
from torch import Tensor

from md3cli.model.engine.generation import Generation
from md3cli.model.engine.kv_cache import KVCache, PromptStore, round_up
from md3cli.model.engine.machine import send
from md3cli.model.engine.passes import BLOCK, NO_SLOT, ShapePlan, V
from md3cli.model.network.moondream import Moondream3

LOGIT_ROWS = 16  # of a planned pass whose logits are computed together: 50 MB for blocks of the real model


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


class ChoiceInts(NamedTuple, Generic[V]):
    """What one pass is given: lists on the host, int64 tensors on the device."""

    fed: V  # [B * T] the answer id and a choice, padded
    wanted: V  # [B * T] what is to come of each: the choice and the end of text, padded
    lengths: V  # [B] without padding
    slots: V  # [B]
    positions: V  # [B] of what is fed first


@dataclass(frozen=True, slots=True)
class ChoicePass:
    """One choice of each of `rows`, which count among all rows asked; padded to `width` ids and `num_rows` rows."""

    number: int
    rows: Sequence[int]
    width: int
    num_rows: int


def cut_passes(rows: Sequence[ChoiceRow], plan: ShapePlan | None) -> Iterator[ChoicePass]:
    """Yield a pass for the first choice of all rows, one for the second, and so on.

    With a plan, one or more for each width of their choices, all of nearly as many tokens as a pass of prompts.
    """
    for number in range(max(len(row.choices) for row in rows)):
        asked = [index for index, row in enumerate(rows) if number < len(row.choices)]
        widths = {index: 1 + len(rows[index].choices[number]) for index in asked}
        if plan is None:
            yield ChoicePass(number, asked, max(widths.values()), len(asked))
            continue
        rounded = {index: round_up(width, BLOCK) for index, width in widths.items()}
        for width, some in groupby(sorted(asked, key=rounded.__getitem__), key=rounded.__getitem__):
            same, size = list(some), max(1, plan.blocks * BLOCK // width)
            for first in range(0, len(same), size):
                yield ChoicePass(number, same[first : first + size], width, size)


@torch.inference_mode()
def choice_probabilities(
    model: Moondream3, cache: KVCache, rows: Sequence[ChoiceRow], max_context: int, plan: ShapePlan | None = None
) -> tuple[Tensor, list[list[float]]]:
    """Score every choice of every row.

    The choices of a row are written to the same positions of its slot one after another, each seeing only itself. All
    passes are sent to the device at once, and read back at once. Where a choice reaches behind `max_context` its score
    has no meaning.

    Return the rows' slots [B] on the device, and for each row the probability of each of its choices, sum 1.
    """
    passes = list(cut_passes(rows, plan))
    columns = [_choice_columns(model, rows, one) for one in passes]
    # One behind the last position that a pass writes, padding behind shorter choices included.
    totals = [max(given.positions) + max(given.lengths) for given in columns]
    # Fixed slots hold what lies within the context, and store nothing behind their end.
    cache.fit(max(cache.capacity, min(max(totals), max_context) if cache.is_fixed else max(totals)))
    slots_B, *sent = send(model.device, [[row.slot for row in rows], *(part for given in columns for part in given)])[0]
    parts = iter(sent)
    on_device = [ChoiceInts(*islice(parts, len(ChoiceInts._fields))) for _ in passes]
    bounds = [min(total, cache.capacity) for total in totals]
    found = [_log_probabilities(model, cache, *both) for both in zip(on_device, bounds, strict=True)]
    values = torch.cat(found).tolist()
    scores: list[list[float]] = [[] for _ in rows]
    for one in passes:
        for index, value in zip(one.rows, values, strict=False):
            scores[index].append(value)
        values = values[one.num_rows :]
    return slots_B, [torch.tensor(logs, dtype=torch.float64).softmax(0).tolist() for logs in scores]


def _choice_columns(model: Moondream3, rows: Sequence[ChoiceRow], one: ChoicePass) -> ChoiceInts[list[int]]:
    ids, asked = model.config.tokenizer, [rows[index] for index in one.rows]
    choices, num_idle = [row.choices[one.number] for row in asked], one.num_rows - len(asked)

    def padded(lists: Iterable[tuple[int, ...]]) -> list[int]:
        rows_of_ids = [*lists, *[()] * num_idle]
        return [id for some in rows_of_ids for id in (*some, *[ids.eos_id] * (one.width - len(some)))]

    return ChoiceInts(
        fed=padded((ids.answer_id, *choice) for choice in choices),
        wanted=padded((*choice, ids.eos_id) for choice in choices),
        lengths=[*(1 + len(choice) for choice in choices), *[0] * num_idle],
        slots=[*(row.slot for row in asked), *[NO_SLOT] * num_idle],
        positions=[*(row.position for row in asked), *[model.config.prefix_len] * num_idle],
    )


def _log_probabilities(model: Moondream3, cache: KVCache, ints: ChoiceInts[Tensor], total: int) -> Tensor:
    """Return the log-probability [B] of a choice a row, its end of text included; NaN where a logit is not finite."""
    fed_BT, wanted_BT = (ids.unflatten(0, (len(ints.slots), -1)) for ids in (ints.fed, ints.wanted))
    index_T = torch.arange(fed_BT.shape[1], device=fed_BT.device)
    position_BT = ints.positions[:, None] + index_T
    is_real_BT = index_T < ints.lengths[:, None]
    store = PromptStore(cache, ints.slots, position_BT, total)
    hidden = model.text(model.text.embed(fed_BT), position_BT, None, store, is_real_BT)
    num_rows = LOGIT_ROWS if cache.is_fixed else len(hidden)
    parts = zip(hidden.split(num_rows), wanted_BT[..., None].split(num_rows), strict=True)
    chosen_BT = torch.cat([_log_softmax(model, part).gather(2, wanted)[..., 0] for part, wanted in parts])
    return chosen_BT.masked_fill(~is_real_BT, 0.0).sum(1)


def _log_softmax(model: Moondream3, hidden_BTD: Tensor) -> Tensor:
    logits = model.text.logits(hidden_BTD).float()
    is_finite = logits.isfinite().all(-1, keepdim=True)  # the softmax of minus infinity is a number
    return logits.log_softmax(-1).masked_fill(~is_finite, torch.nan)
