"""Answers restricted to a list: every choice is scored whole, the most probable one is the answer.

Constrained decoding done exactly: instead of walking token by token along what is allowed, each
choice is fed behind the prompt as it would have been written, up to the end of text, and its
probability is the product of its tokens'. Scores are those probabilities, brought to a sum of 1.

Shape suffixes: B sequences of a pass, T fed positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from md3cli.model.kv_cache import KVCache, PromptStore
from md3cli.model.moondream import Moondream3
from md3cli.model.tasks import Sequence


@dataclass(frozen=True, slots=True)
class ChoiceRow:
    """A sequence about to answer: its slot, the position where the answer id goes, its choices' ids."""

    slot: int
    position: int
    choices: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, sequence: Sequence, slot: int, end: int) -> ChoiceRow:
        """The answer id stands at the prompt's end, or is what reasoning would feed next; `end` is the slot's."""
        return cls(slot, end if sequence.reasons else end - 1, sequence.choices)

    @property
    def end(self) -> int:
        """One behind the last position that any choice takes."""
        return self.position + 1 + max(map(len, self.choices))


@torch.inference_mode()
def choice_probabilities(model: Moondream3, cache: KVCache, rows: Seq[ChoiceRow]) -> list[list[float]]:
    """For each row the probability of each of its choices, sum 1.

    One pass for the first choice of all rows, one for the second, and so on: the choices of a row
    are written to the same positions of its slot one after another, each seeing only itself.
    """
    scores: list[list[float]] = [[] for _ in rows]
    for number in range(max(len(row.choices) for row in rows)):
        asked = [index for index, row in enumerate(rows) if number < len(row.choices)]
        found = _log_probabilities(model, cache, [rows[i] for i in asked], [rows[i].choices[number] for i in asked])
        for index, value in zip(asked, found, strict=True):
            scores[index].append(value)
    return [torch.tensor(values, dtype=torch.float64).softmax(0).tolist() for values in scores]


def _log_probabilities(
    model: Moondream3, cache: KVCache, rows: Seq[ChoiceRow], choices: Seq[tuple[int, ...]]
) -> list[float]:
    """Log-probability of one choice per row, its end of text included."""
    device, ids = model.device, model.config.tokenizer
    fed = [[ids.answer_id, *choice] for choice in choices]
    wanted = [[*choice, ids.eos_id] for choice in choices]
    width = max(map(len, fed))
    fed_BT = torch.tensor([row + [ids.eos_id] * (width - len(row)) for row in fed], device=device)
    wanted_BT = torch.tensor([row + [ids.eos_id] * (width - len(row)) for row in wanted], device=device)
    position_BT = torch.tensor([row.position for row in rows], device=device)[:, None] + torch.arange(
        width, device=device
    )
    total = max(row.position for row in rows) + width
    cache.fit(max(total, cache.capacity))
    mask = (torch.arange(total, device=device) <= position_BT[:, :, None])[:, None]
    slots_B = torch.tensor([row.slot for row in rows], device=device)
    hidden = model.text(model.text.embed(fed_BT), position_BT, mask, PromptStore(cache, slots_B, position_BT, total))
    chosen_BT = _log_softmax(model, hidden).gather(2, wanted_BT[..., None])[..., 0]
    lengths = torch.tensor([len(row) for row in fed], device=device)
    is_real = torch.arange(width, device=device) < lengths[:, None]
    values: list[float] = chosen_BT.masked_fill(~is_real, 0.0).sum(1).tolist()
    return values


def _log_softmax(model: Moondream3, hidden_BTD: Tensor) -> Tensor:
    return model.text.logits(hidden_BTD).float().log_softmax(-1)
