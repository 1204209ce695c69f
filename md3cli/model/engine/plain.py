"""The plain path: one image, one request, one step at a time, as the specification words it.

This is the reference every fast path is tested against and the baseline `md3 bench --baseline`
measures: eager torch, both crops of an untiled picture encoded, experts in a loop, a cache that
grows by concatenation, `while` loops that read like Moondream 3 specification, sections 10 and 11.
Greedy only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from md3cli.errors import RequestError
from md3cli.images.crops import PreparedImage
from md3cli.model.engine.prompts import Prompt
from md3cli.model.engine.state import not_finite
from md3cli.model.network.moondream import Moondream3, prefix_mask
from md3cli.model.network.region import coord_value, size_value
from md3cli.model.network.vision import normalise_crops
from md3cli.records import Task

NO_BAN: tuple[int, ...] = ()


@dataclass(slots=True)
class PlainOutput:
    """What one request decided: ids in order, and the bins behind coordinates and sizes.

    `coord_bins` and `size_bins` follow the order of their ids in `token_ids` (for detect and point:
    coord, coord[, size] per object).
    """

    token_ids: list[int] = field(default_factory=list)
    coord_bins: list[int] = field(default_factory=list)
    size_bins: list[tuple[int, int]] = field(default_factory=list)
    finish_reason: str = "stop"
    reasoning: PlainOutput | None = None


class GrowingStore:
    """Keys and values of all positions so far, one tensor per layer, grown by concatenation."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.length = 0

    def update(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.layers:
            k, v = self.layers[layer]
            k_BHTK, v_BHTK = torch.cat([k, k_BHTK], dim=2), torch.cat([v, v_BHTK], dim=2)
        self.layers[layer] = (k_BHTK, v_BHTK)
        return k_BHTK, v_BHTK


class PlainSequence:
    """One sequence being decoded: feed embeddings, read the last hidden state."""

    def __init__(self, model: Moondream3, image: PreparedImage | None) -> None:
        self.model = model
        self.store = GrowingStore()
        self.hidden: Tensor = torch.empty(0)
        if image is not None:
            self._feed(model.prefix_embeddings(encode_image(model, image)[None]), bidirectional=True)

    def feed_prompt(self, prompt: Prompt) -> None:
        """Feed token ids, placeholders of spatial references replaced by what they point at."""
        self._feed(prompt_embeddings(self.model, prompt)[None])

    def feed_token(self, token: int) -> None:
        """Feed one token id."""
        self._feed(self.model.text.embed(torch.tensor([[token]], device=self.model.device)))

    def read_coord(self) -> int:
        """Decode a coordinate's bin from the last hidden state and feed its encoding."""
        bins = self._checked(self.model.region.coord_logits(self.hidden)).argmax(-1)
        self._feed(self.model.region.encode_coord(coord_value(bins, self.model.region.num_coord_bins))[None, None])
        return int(bins)

    def read_size(self) -> tuple[int, int]:
        """Decode width's and height's bins from the last hidden state and feed their encoding."""
        bins = self._checked(self.model.region.size_logits(self.hidden)).argmax(-1)
        self._feed(self.model.region.encode_size(size_value(bins, self.model.region.num_size_bins))[None, None])
        return int(bins[0]), int(bins[1])

    def choose(self, banned: tuple[int, ...] = NO_BAN) -> int:
        """The most likely next id outside `banned`."""
        logits = self.logits()
        logits[list(banned)] = float("-inf")
        return int(logits.argmax())

    def logits(self) -> Tensor:
        """Vocabulary logits after the last position [V]."""
        return self._checked(self.model.text.logits(self.hidden))

    def _checked(self, logits: Tensor) -> Tensor:
        """The logits, where all are finite; a decision taken from others would be noise."""
        if not logits.isfinite().all():
            raise RequestError(not_finite(self.model.dtype), "model")
        return logits

    def _feed(self, x_1TD: Tensor, bidirectional: bool = False) -> None:
        start, length = self.store.length, x_1TD.shape[1]
        total = start + length
        position = torch.arange(start, total, device=x_1TD.device)[None]
        mask = prefix_mask(total, length if bidirectional else 0, x_1TD.device)[start:]
        self.hidden = self.model.text(x_1TD, position, mask, self.store)[0, -1]
        self.store.length = total


def encode_image(model: Moondream3, image: PreparedImage) -> Tensor:
    """Crops of one picture -> its embeddings [P, D]; every crop is encoded, equal or not."""
    crops = normalise_crops(torch.from_numpy(image.crops).to(model.device), model.dtype)
    return model.vision.embed(model.vision.encode(crops), image.tiling)


def prompt_embeddings(model: Moondream3, prompt: Prompt) -> Tensor:
    """Embeddings [T, D] of a prompt, spatial references filled in."""
    x_TD = model.text.embed(torch.tensor(prompt.ids, device=model.device))
    for index, coord in prompt.coords:
        x_TD[index] = model.region.encode_coord(torch.tensor(coord, device=model.device))
    for index, size_wh in prompt.sizes:
        x_TD[index] = model.region.encode_size(torch.tensor(size_wh, device=model.device))
    return x_TD


@torch.inference_mode()
def answer(
    model: Moondream3, image: PreparedImage | None, task: Task, prompt: Prompt, *, max_tokens: int, max_objects: int
) -> PlainOutput:
    """Greedy answer to one request; a query reasons first when its prompt ends with the thinking id.

    Raises:
        RequestError: of type `model`, the model computed values that are not finite.
    """
    sequence = PlainSequence(model, image)
    sequence.feed_prompt(prompt)
    if task in (Task.DETECT, Task.POINT):
        return _find_objects(sequence, max_objects, with_size=task is Task.DETECT)
    if task is Task.SEGMENT:
        return _draw_path(sequence, max_tokens)
    reasoning = None
    if prompt.ids[-1] == model.config.tokenizer.thinking_id:
        reasoning = _reason(sequence, max_tokens)
        sequence.feed_token(model.config.tokenizer.answer_id)
    output = _write_text(sequence, max_tokens)
    output.reasoning = reasoning
    return output


def _write_text(sequence: PlainSequence, max_tokens: int) -> PlainOutput:
    ids = sequence.model.config.tokenizer
    output = PlainOutput()
    token = sequence.choose()
    while token != ids.eos_id:
        output.token_ids.append(token)
        if len(output.token_ids) == max_tokens:
            output.finish_reason = "length"
            break
        sequence.feed_token(token)
        token = sequence.choose((ids.answer_id,))
    return output


def _reason(sequence: PlainSequence, max_tokens: int) -> PlainOutput:
    ids = sequence.model.config.tokenizer
    output = PlainOutput()
    token = sequence.choose()
    while token != ids.answer_id:
        output.token_ids.append(token)
        if token == ids.coord_id:
            output.coord_bins.append(sequence.read_coord())
        else:
            sequence.feed_token(token)
        if len(output.token_ids) == max_tokens:
            output.finish_reason = "length"
            break
        token = sequence.choose((ids.eos_id, ids.size_id))
    return output


def _find_objects(sequence: PlainSequence, max_objects: int, with_size: bool) -> PlainOutput:
    ids = sequence.model.config.tokenizer
    output = PlainOutput()
    goes_on = sequence.choose() != ids.eos_id
    for _ in range(max_objects):
        if not goes_on:
            return output
        output.coord_bins += [sequence.read_coord(), sequence.read_coord()]
        output.token_ids += [ids.coord_id, ids.coord_id]
        if with_size:
            output.size_bins.append(sequence.read_size())
            output.token_ids.append(ids.size_id)
        logits = sequence.logits()
        goes_on = bool(logits[ids.coord_id] >= logits[ids.eos_id])
    output.finish_reason = "length"
    return output


def _draw_path(sequence: PlainSequence, max_tokens: int) -> PlainOutput:
    ids = sequence.model.config.tokenizer
    output = PlainOutput()
    token = sequence.choose()
    while token != ids.eos_id:
        output.token_ids.append(token)
        if token == ids.coord_id:
            output.coord_bins.append(sequence.read_coord())
        elif token == ids.size_id:
            output.size_bins.append(sequence.read_size())
        else:
            sequence.feed_token(token)
        if len(output.token_ids) == max_tokens:
            output.finish_reason = "length"
            break
        token = sequence.choose()
    return output
