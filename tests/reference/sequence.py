"""A model with its tokenizer, and one sequence that is fed and asked (specification, sections 6 to 9, 13)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from reference import network as net
from reference.network import Network
from reference.preprocess import crops_of


@dataclass(frozen=True)
class Encoded:
    """A picture as the decoder sees it; the intermediate values are kept for inspection."""

    features: Tensor
    tiling: tuple[int, int]
    embedding: Tensor


@dataclass(frozen=True)
class Model:
    """A network with its tokenizer."""

    network: Network
    tokenizer: Tokenizer

    @property
    def ids(self) -> dict[str, int]:
        return self.network.config["tokenizer"]

    def tokens_of(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def text_of(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def encode_image(self, image: Image.Image) -> Encoded:
        crops, tiling = crops_of(image, self.network.config)
        pixels = (torch.from_numpy(crops).float() / 255 - 0.5) / 0.5
        features = torch.stack([net.encode_crop(self.network, crop) for crop in pixels.permute(0, 3, 1, 2)])
        return Encoded(features, tiling, net.image_embedding(self.network, features, tiling))


@dataclass
class Sequence:
    """One growing input sequence; `look` recomputes it from position 0."""

    model: Model
    inputs: Tensor  # [T, D]
    prefix_len: int
    trace: list[dict] = field(default_factory=list)
    hidden: Tensor = field(init=False)  # [D], last position, before the final LayerNorm
    logits: Tensor = field(init=False)
    moe_margin: float = field(init=False)

    def feed(self, rows: Tensor) -> None:
        self.inputs = torch.cat([self.inputs, rows.reshape(-1, self.inputs.shape[1])])
        self.look()

    def feed_ids(self, ids: list[int]) -> None:
        self.feed(self.model.network.tensors["text.wte"][ids])

    def look(self) -> None:
        decoded = net.decode(self.model.network, self.inputs, self.prefix_len)
        self.hidden, self.moe_margin = decoded.hidden[-1], decoded.moe_margin
        self.logits = net.token_logits(self.model.network, self.hidden)

    def decide(self, kind: str, logits: Tensor, banned: Iterable[int] = ()) -> int:
        """Argmax of what is allowed (lowest id on a tie); noted in the trace."""
        allowed = logits.clone()
        allowed[list(banned)] = -math.inf
        choice = int(allowed.argmax())
        best, second = allowed.topk(2).values.tolist()
        self.note(kind, choice, best - second, best)
        return choice

    def note(self, kind: str, choice: int, margin: float, top: float) -> None:
        position = len(self.inputs) - 1
        self.trace.append(
            {
                "kind": kind,
                "choice": choice,
                "margin": margin,
                "top": top,
                "pos": position,
                "moe_margin": self.moe_margin,
            }
        )

    def decide_token(self, banned: Iterable[int] = ()) -> int:
        return self.decide("token", self.logits, banned)

    def decide_coord(self) -> float:
        logits = net.coord_logits(self.model.network, self.hidden)
        return net.coord_of_bin(self.decide("coord", logits), len(logits))

    def decide_size(self) -> tuple[float, float]:
        wide, high = net.size_logits(self.model.network, self.hidden)
        width = net.size_of_bin(self.decide("size_w", wide), len(wide))
        return width, net.size_of_bin(self.decide("size_h", high), len(high))

    def decide_coord_or_eos(self) -> int:
        coord_id, eos_id = self.model.ids["coord_id"], self.model.ids["eos_id"]
        coord, eos = self.logits[coord_id].item(), self.logits[eos_id].item()
        choice = coord_id if coord >= eos else eos_id
        self.note("coord_or_eos", choice, abs(coord - eos), max(coord, eos))
        return choice


def references(model: Model, refs: list[list[float]]) -> tuple[list[int], list[Tensor]]:
    """Placeholder ids of spatial references and the embeddings that replace them, one each."""
    network, ids = model.network, model.ids
    placeholders: list[int] = []
    embeddings: list[Tensor] = []
    for ref in refs:
        if len(ref) == 2:
            centre = ref
        else:
            x_min, y_min, x_max, y_max = ref
            centre = [(x_min + x_max) / 2, (y_min + y_max) / 2]
        placeholders += [ids["coord_id"]] * 2
        embeddings += [net.encode_coord(network, value) for value in centre]
        if len(ref) == 4:
            placeholders.append(ids["size_id"])
            embeddings.append(net.encode_size(network, x_max - x_min, y_max - y_min))
    return placeholders, embeddings


def start(model: Model, encoded: Encoded | None, head: list[int], refs: list, tail: list[int]) -> tuple[Sequence, list]:
    """The sequence with prefix and prompt fed, and the prompt's ids (BOS among them without an image)."""
    table = model.network.tensors["text.wte"]
    bos = model.ids["bos_id"]
    placeholders, embeddings = references(model, refs)
    prompt = torch.cat([table[head], *(row[None] for row in embeddings), table[tail]])
    if encoded is None:
        sequence = Sequence(model, table[[bos]], prefix_len=0)
        prompt_ids = [bos, *head, *placeholders, *tail]
    else:
        prefix = torch.cat([table[[bos]], encoded.embedding])
        sequence = Sequence(model, prefix, prefix_len=model.network.prefix_len)
        prompt_ids = [*head, *placeholders, *tail]
    sequence.feed(prompt)
    return sequence, prompt_ids
