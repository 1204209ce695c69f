"""The rows of a generation: where each starts, what each decided, and how results are handed out.

Ids and values are collected on the host, one decision a step; what `generate` returns is made of them
at the end. Nothing here runs the network.

Shape suffixes: B rows, T positions, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from md3cli.errors import RequestError
from md3cli.model.config import ModelConfig
from md3cli.model.decoding import Event, Finish, Mode, Rows, idle_rows, not_finite
from md3cli.model.hf.inputs import read_task, start_mode
from md3cli.model.region import coord_value, size_value
from md3cli.model.tasks import FINISH_REASONS
from md3cli.records import Task

_NO_VALUE = (float("nan"), float("nan"))


@dataclass
class Moondream3Generation(ModelOutput):
    """What `generate` returns with `return_dict_in_generate`.

    `sequences` [B, T]: the inputs' ids and what was decided, padded behind; a coordinate or size shows
    as its id. `region_values` [B, S, 2]: the values behind the decided ids, NaN elsewhere. `objects`: for
    each row of detect boxes [n, 4], of point points [n, 2], None otherwise. `finish_reasons`: `stop`
    or `length` for each row.
    """

    sequences: Tensor | None = None
    region_values: Tensor | None = None
    objects: list[Tensor | None] | None = None
    finish_reasons: list[str] | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    past_key_values: object | None = None


def read_prompts(ids_BT: Tensor, valid_BT: Tensor, has_image_B: Tensor, prefix_len: int) -> list[list[int]]:
    """Each row's prompt: its ids without padding, image and BOS."""
    rows = zip(ids_BT.tolist(), valid_BT.tolist(), has_image_B.tolist(), strict=True)
    prompts = []
    for ids, valid, has_image in rows:
        real = [token for token, is_real in zip(ids, valid, strict=True) if is_real]
        prompts.append(real[prefix_len if has_image else 1 :])
    return prompts


def new_rows(prompts: Sequence[list[int]], lengths: Tensor, limit: int, max_objects: int, config: ModelConfig) -> Rows:
    """State of rows whose inputs have just been run; `lengths` [B] counts their positions."""
    rows = idle_rows(len(prompts), lengths.device)
    for row, prompt in enumerate(prompts):
        task = read_task(prompt, config)
        is_region = task in (Task.DETECT, Task.POINT)
        rows.mode[row] = int(start_mode(task, prompt, config))
        rows.limit[row] = max_objects if is_region else limit
        rows.is_point[row] = task is Task.POINT
    rows.is_first.fill_(True)
    rows.position.copy_(lengths)
    return rows


class Decisions:
    """Ids and values of all rows, step by step."""

    def __init__(self, config: ModelConfig, pad_id: int, num_rows: int, dtype: torch.dtype) -> None:
        self.config, self.pad_id, self.dtype = config, pad_id, dtype
        self.finish_reasons = ["length"] * num_rows
        self.lengths = [0] * num_rows  # decisions of each row
        self._ids: list[list[int]] = []
        self._values: list[list[tuple[float, float]]] = []

    def take(self, events: Tensor) -> list[int]:
        """Note one step's events [B, len(Event)]; the id each row decided on.

        Raises:
            RequestError: of type `model`, a row's decision was taken from values that are not finite.
        """
        parsed = [Event(*values) for values in events.tolist()]
        bad = [row for row, event in enumerate(parsed) if event.mode != Mode.IDLE and not event.is_finite]
        if bad:
            raise RequestError(f"row {bad[0]} of the batch: {not_finite(self.dtype)}", "model")
        for row, event in enumerate(parsed):
            self.lengths[row] += event.mode != Mode.IDLE
            if event.finish != Finish.NO:
                self.finish_reasons[row] = FINISH_REASONS[Finish(int(event.finish))]
        self._ids.append([self._id(event) for event in parsed])
        self._values.append([self._value(event, token) for event, token in zip(parsed, self._ids[-1], strict=True)])
        return self._ids[-1]

    def _id(self, event: Event) -> int:
        tokens, mode, token = self.config.tokenizer, Mode(int(event.mode)), int(event.token)
        if mode is Mode.IDLE:
            return self.pad_id
        if mode is Mode.SIZE:
            return tokens.size_id
        if mode is Mode.Y or (mode is Mode.X and token != tokens.eos_id):
            return tokens.coord_id
        return token

    def _value(self, event: Event, token: int) -> tuple[float, float]:
        tokens, region = self.config.tokenizer, self.config.region
        if event.mode in (Mode.IDLE, Mode.TEXT):
            return _NO_VALUE
        if token == tokens.coord_id:
            value = coord_value(torch.tensor(event.coord_bin), region.coord_out_dim).item()
            return value, value
        if token == tokens.size_id and event.mode != Mode.REASON:
            bins = torch.tensor([event.width_bin, event.height_bin])
            width, height = size_value(bins, region.size_out_dim // 2).tolist()
            return width, height
        return _NO_VALUE

    def ids(self) -> Tensor:
        """All decided ids [B, S]."""
        return torch.tensor(self._ids, dtype=torch.int64).T

    def values(self) -> Tensor:
        """The values behind them [B, S, 2], NaN where there is none."""
        return torch.tensor(self._values, dtype=torch.float32).transpose(0, 1)

    def objects(self, row: int, task: Task | None) -> Tensor | None:
        """Boxes (x_min, y_min, x_max, y_max) or points of a row that looked for objects; None for text."""
        if task not in (Task.DETECT, Task.POINT):
            return None
        values = self.values()[row]
        values = values[~values[:, 0].isnan()]
        if task is Task.POINT:
            return values[: len(values) // 2 * 2, 0].reshape(-1, 2)
        parts = values[: len(values) // 3 * 3].reshape(-1, 3, 2)  # an object the context cut short is left out
        centre, half = parts[:, :2, 0], parts[:, 2] / 2
        return torch.cat([centre - half, centre + half], dim=1)


def plain_results(
    tasks: Sequence[Task | None], sequences: Tensor, objects: list[Tensor | None], lengths: Sequence[int]
) -> Tensor | list[Tensor]:
    """What `generate` returns: ids [B, T], boxes [B, most, 4] or points [B, most, 2], a list where rows differ in kind.

    Rows with fewer objects are padded with zeros. In a list each row has its own length: ids are the
    inputs' and the row's `lengths[row]` decisions.
    """
    found = [entry for entry in objects if entry is not None]
    if not found:
        return sequences
    if len(found) == len(objects) and len(set(tasks)) == 1:
        return torch.nn.utils.rnn.pad_sequence(found, batch_first=True).to(sequences.device)
    width = sequences.shape[1] - max(lengths)
    rows = zip(sequences, objects, lengths, strict=True)
    return [ids[: width + length] if entry is None else entry.to(ids.device) for ids, entry, length in rows]
