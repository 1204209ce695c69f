"""The plain path: one image, one request, one step at a time, as the specification words it (sections 10 and 11).

Every fast path is tested against it, and `md3 bench --baseline` measures it: eager torch, both crops of an untiled
picture encoded, experts in a loop, a cache that grows by concatenation. Greedy only. It imports the network and the
form of a prompt, and nothing of the fast path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from md3cli.errors import RequestError
from md3cli.images.crops import PreparedImage
from md3cli.model.engine.prompts import Prompt
from md3cli.model.network.moondream import Moondream3, coord_value, not_finite, prefix_mask, size_value
from md3cli.model.network.vision import normalise_crops
from md3cli.records import Task

# Given what the model decides (an id, a bin, 1 or 0 for another object or none), returns what is gone on with.
Choose = Callable[[int], int]


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


class PlainGeneration:
    """One answer in the making: feed embeddings, read the last hidden state."""

    def __init__(self, model: Moondream3, image: PreparedImage | None, choose: Choose = int) -> None:
        self.model, self.choose = model, choose
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
        region = self.model.region
        bin = self.choose(int(self._checked(region.coord_logits(self.hidden)).argmax(-1)))
        value = coord_value(torch.tensor(bin, device=self.model.device), region.num_coord_bins)
        self._feed(region.encode_coord(value)[None, None])
        return bin

    def read_size(self) -> tuple[int, int]:
        """Decode width's and height's bins from the last hidden state and feed their encoding."""
        region = self.model.region
        width, height = map(self.choose, self._checked(region.size_logits(self.hidden)).argmax(-1).tolist())
        value = size_value(torch.tensor([width, height], device=self.model.device), region.num_size_bins)
        self._feed(region.encode_size(value)[None, None])
        return width, height

    def likeliest(self, banned: tuple[int, ...] = ()) -> int:
        """Return the most likely next id outside `banned`."""
        logits = self.logits()
        logits[list(banned)] = float("-inf")
        return int(logits.argmax())

    def logits(self) -> Tensor:
        """Return the vocabulary logits after the last position [V].

        Raises:
            RequestError: of type `model`, one of them is not finite; a decision taken from them would be noise.
        """
        return self._checked(self.model.text.logits(self.hidden))

    def _checked(self, logits: Tensor) -> Tensor:
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
    """Turn the crops of one picture into its embeddings [P, D]; every crop is encoded, equal or not."""
    crops = normalise_crops(torch.from_numpy(image.crops).to(model.device), model.dtype)
    return model.vision.embed(model.vision.encode(crops), image.tiling)


def prompt_embeddings(model: Moondream3, prompt: Prompt) -> Tensor:
    """Return the embeddings [T, D] of a prompt, spatial references filled in."""
    x_TD = model.text.embed(torch.tensor(prompt.ids, device=model.device))
    for index, coord in prompt.coords:
        x_TD[index] = model.region.encode_coord(torch.tensor(coord, device=model.device))
    for index, size_wh in prompt.sizes:
        x_TD[index] = model.region.encode_size(torch.tensor(size_wh, device=model.device))
    return x_TD


@torch.inference_mode()
def answer(
    model: Moondream3,
    image: PreparedImage | None,
    task: Task,
    prompt: Prompt,
    *,
    max_tokens: int,
    max_objects: int,
    choose: Choose = int,
) -> PlainOutput:
    """Answer one request; a query reasons first when its prompt ends with the thinking id.

    `choose` sees every decision in turn and may lead along another path; by default the model decides.

    Raises:
        RequestError: of type `model`, the model computed values that are not finite.
    """
    ids = model.config.tokenizer
    generation = PlainGeneration(model, image, choose)
    generation.feed_prompt(prompt)
    if task in (Task.DETECT, Task.POINT):
        return _find_objects(generation, max_objects, with_size=task is Task.DETECT)
    if task is Task.SEGMENT:
        return _write(generation, max_tokens, end=ids.eos_id, reads=(ids.coord_id, ids.size_id))
    reasoning = None
    if prompt.ids[-1] == ids.thinking_id:
        reasoning = reason(generation, max_tokens)
        generation.feed_token(ids.answer_id)
    output = _write(generation, max_tokens, end=ids.eos_id, banned=(ids.answer_id,))
    output.reasoning = reasoning
    return output


def reason(generation: PlainGeneration, max_tokens: int) -> PlainOutput:
    """Write the reasoning of a query, with the points that it grounds itself on."""
    ids = generation.model.config.tokenizer
    return _write(generation, max_tokens, end=ids.answer_id, banned=(ids.eos_id, ids.size_id), reads=(ids.coord_id,))


def _write(
    generation: PlainGeneration, max_tokens: int, *, end: int, banned: tuple[int, ...] = (), reads: tuple[int, ...] = ()
) -> PlainOutput:
    """Take ids until `end`; behind those in `reads` a coordinate or a size is read. The first decision bans nothing."""
    ids = generation.model.config.tokenizer
    output = PlainOutput()
    token = generation.choose(generation.likeliest())
    while token != end:
        output.token_ids.append(token)
        is_full = len(output.token_ids) == max_tokens
        if token == ids.coord_id and token in reads:
            output.coord_bins.append(generation.read_coord())
        elif token == ids.size_id and token in reads:
            output.size_bins.append(generation.read_size())
        elif not is_full or end == ids.answer_id:  # behind reasoning that was cut short the answer id is fed
            generation.feed_token(token)
        if is_full:
            output.finish_reason = "length"
            break
        token = generation.choose(generation.likeliest(banned))
    return output


def _find_objects(generation: PlainGeneration, max_objects: int, with_size: bool) -> PlainOutput:
    ids = generation.model.config.tokenizer
    output = PlainOutput()
    goes_on = generation.choose(int(generation.likeliest() != ids.eos_id))
    for _ in range(max_objects):
        if not goes_on:
            return output
        output.coord_bins += [generation.read_coord(), generation.read_coord()]
        output.token_ids += [ids.coord_id, ids.coord_id]
        if with_size:
            output.size_bins.append(generation.read_size())
            output.token_ids.append(ids.size_id)
        logits = generation.logits()
        goes_on = generation.choose(int(logits[ids.coord_id] >= logits[ids.eos_id]))
    output.finish_reason = "length"
    return output
