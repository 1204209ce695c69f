"""A row of a batch before it is a tensor: ids, the values behind them, and what is to be learned.

`prompt_row` is the prompt alone; `training_row` continues it with the answer of a record (`md3`'s own
JSON Lines), so that finished, corrected records are training data as they are. Of reasoning the text is
learned, not what it points at.

Shape suffixes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from md3cli.errors import RequestError
from md3cli.model.config import ModelConfig
from md3cli.model.hf.config import IMAGE_TOKEN_ID
from md3cli.model.hf.prompting import split_reasoning
from md3cli.model.prompts import Prompt, Prompts, Tokenizer
from md3cli.model.training_loss import IGNORE
from md3cli.records import Request, Task

Value = tuple[float, float]
_NAN = float("nan")


@dataclass(slots=True)
class Row:
    """Ids with, position by position, the value behind each, its label, and the value to predict."""

    ids: list[int] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    targets: list[Value] = field(default_factory=list)

    def feed(self, ids: Sequence[int]) -> None:
        """Inputs that are not learned."""
        for token in ids:
            self._add(token, (_NAN, _NAN), IGNORE, (_NAN, _NAN))

    def emit(self, ids: Sequence[int]) -> None:
        """Ids to learn."""
        for token in ids:
            self._add(token, (_NAN, _NAN), token, (_NAN, _NAN))

    def emit_value(self, token: int, value: Value, *, is_decided: bool) -> None:
        """A coordinate or size to learn; `is_decided` where its id is a decision too (else it is simply its turn)."""
        self._add(token, value, token if is_decided else IGNORE, value)

    def _add(self, token: int, value: Value, label: int, target: Value) -> None:
        self.ids.append(token)
        self.values.append(value)
        self.labels.append(label)
        self.targets.append(target)


def prompt_row(prompt: Prompt, config: ModelConfig, *, has_image: bool) -> Row:
    """The picture's placeholders and the prompt, spatial references filled in."""
    row = Row()
    if has_image:
        row.feed([config.tokenizer.bos_id, *[IMAGE_TOKEN_ID] * config.vision.num_patches])
    start = len(row.ids)
    row.feed(prompt.ids)
    for index, coord in prompt.coords:
        row.values[start + index] = (coord, coord)
    for index, size_wh in prompt.sizes:
        row.values[start + index] = size_wh
    return row


def training_row(
    record: Mapping[str, Any], request: Request, prompts: Prompts, tokenizer: Tokenizer, config: ModelConfig
) -> Row:
    """A record's request and its result, the result to be learned.

    Raises:
        RequestError: the record has no result, or its task cannot be learned from records.
    """
    if request.task is Task.SEGMENT:
        raise RequestError("segment records keep the path's numbers and not its ids; they cannot be learned from")
    has_image = record.get("image") is not None
    row = prompt_row(prompts.build(request, has_image), config, has_image=has_image)
    tokens = config.tokenizer
    if request.task in (Task.DETECT, Task.POINT):
        key = "objects" if request.task is Task.DETECT else "points"
        for item in _result(record, key):
            _emit_object(row, item, config)
    else:
        text = _result(record, "caption" if request.task is Task.CAPTION else "answer")
        if request.reasoning and request.task is Task.QUERY:
            row.emit([*tokenizer.encode(_result(record, "reasoning")["text"]), tokens.answer_id])
        row.emit(tokenizer.encode(text))
    row.emit([tokens.eos_id])
    return row


def answered_row(row: Row, answer: str, tokenizer: Tokenizer, config: ModelConfig) -> Row:
    """A prompt's row continued by an answer in words (and thoughts before it), to be learned."""
    *thoughts, text = split_reasoning(answer)
    for thought in thoughts:
        row.emit([*tokenizer.encode(thought), config.tokenizer.answer_id])
    row.emit([*tokenizer.encode(text), config.tokenizer.eos_id])
    return row


def _result(record: Mapping[str, Any], key: str) -> Any:
    if record.get(key) is None:
        raise RequestError(f"a record of task {record.get('task')} has no {key!r} to learn from")
    return record[key]


def _emit_object(row: Row, item: Mapping[str, float], config: ModelConfig) -> None:
    """A box or point: that there is one is a decision, its numbers follow in turn (specification, section 11)."""
    tokens = config.tokenizer
    if "x_min" in item:
        x, y = (item["x_min"] + item["x_max"]) / 2, (item["y_min"] + item["y_max"]) / 2
    else:
        x, y = item["x"], item["y"]
    row.emit_value(tokens.coord_id, (x, x), is_decided=True)
    row.emit_value(tokens.coord_id, (y, y), is_decided=False)
    if "x_min" in item:
        size_wh = (item["x_max"] - item["x_min"], item["y_max"] - item["y_min"])
        row.emit_value(tokens.size_id, size_wh, is_decided=False)


def pad_rows(
    rows: Sequence[Row], pad_id: int, *, side: str, multiple: int = 1, with_labels: bool = False
) -> dict[str, Tensor]:
    """Rows as tensors [B, T], padded on one side; `region_values` only where a row has one."""
    width = max(len(row.ids) for row in rows)
    width = -(-width // multiple) * multiple

    def padded(values: Sequence[Any], fill: Any) -> list[Any]:
        room = [fill] * (width - len(values))
        return [*room, *values] if side == "left" else [*values, *room]

    nothing = (_NAN, _NAN)
    batch = {
        "input_ids": torch.tensor([padded(row.ids, pad_id) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row.ids), 0) for row in rows]),
    }
    if any(value[0] == value[0] for row in rows for value in row.values):  # not NaN
        batch["region_values"] = torch.tensor([padded(row.values, nothing) for row in rows])
    if with_labels:
        batch["labels"] = torch.tensor([padded(row.labels, IGNORE) for row in rows])
        batch["region_labels"] = torch.tensor([padded(row.targets, nothing) for row in rows])
    return batch
