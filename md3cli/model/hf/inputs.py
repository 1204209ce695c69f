"""What the model is given: rows of ids, batches of them, and their masks, positions and embeddings.

A row with a picture begins, behind its padding, with BOS and one placeholder for each image embedding;
the prompt follows. A row's `tiling` says whether it has a picture: (rows, cols), or (0, 0) for none.

Shape suffixes: B rows, T new positions, S all positions, N crops of a row (padded), P image positions, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from md3cli.images.crops import Tiling
from md3cli.model.engine.encoder import crops_per_batch
from md3cli.model.network.config import SEGMENT_TEMPLATE, ModelConfig
from md3cli.model.network.loss import IGNORE
from md3cli.model.network.moondream import Moondream3
from md3cli.records import Task

Value = tuple[float, float]  # a coordinate, twice, or a width and height
NO_VALUE: Value = (float("nan"), float("nan"))


@dataclass(slots=True)
class Row:
    """The ids of a row; at each position also the value behind the id, its label, and the value to predict."""

    ids: list[int] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    targets: list[Value] = field(default_factory=list)

    def add(self, token: int, value: Value = NO_VALUE, label: int = IGNORE, target: Value = NO_VALUE) -> None:
        """Append one position; without a label nothing is learned there."""
        self.ids.append(token)
        self.values.append(value)
        self.labels.append(label)
        self.targets.append(target)

    def cut(self, length: int) -> Row:
        """Return the first `length` positions."""
        return Row(self.ids[:length], self.values[:length], self.labels[:length], self.targets[:length])


def pad_rows(
    rows: Sequence[Row], pad_id: int, *, side: str, multiple: int = 1, with_labels: bool = False
) -> dict[str, Tensor]:
    """Return the rows as tensors [B, T], padded on one side; `region_values` only where a row has one."""
    width = max(len(row.ids) for row in rows)
    width = -(-width // multiple) * multiple

    def padded(values: Sequence[Any], fill: Any) -> list[Any]:
        room = [fill] * (width - len(values))
        return [*room, *values] if side == "left" else [*values, *room]

    batch = {
        "input_ids": torch.tensor([padded(row.ids, pad_id) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row.ids), 0) for row in rows]),
    }
    if any(value[0] == value[0] for row in rows for value in row.values):  # not NaN
        batch["region_values"] = torch.tensor([padded(row.values, NO_VALUE) for row in rows])
    if with_labels:
        batch["labels"] = torch.tensor([padded(row.labels, IGNORE) for row in rows])
        batch["region_labels"] = torch.tensor([padded(row.targets, NO_VALUE) for row in rows])
    return batch


@dataclass(frozen=True, slots=True)
class Batch:
    """The inputs of a forward pass by the names that transformers gives them; `forward` says their shapes."""

    input_ids: Tensor | None = None
    pixel_values: Tensor | None = None
    tilings: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    past_key_values: Cache | None = None
    inputs_embeds: Tensor | None = None
    region_values: Tensor | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Batch:
        """Make a batch of the arguments in `given` that belong to one."""
        return cls(**{item.name: given[item.name] for item in fields(cls) if item.name in given})

    @property
    def num_past(self) -> int:
        """The number of positions that the cache holds already."""
        return self.past_key_values.get_seq_length() if self.past_key_values is not None else 0


class CacheStore:
    """A transformers cache as the decoder's `KeyValueStore`."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def update(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the keys and values of new positions; return those of all positions, as `text.KeyValueStore` says."""
        return self.cache.update(k_BHTK, v_BHTK, layer)


def has_images(tilings: Tensor | None, num_rows: int, device: torch.device) -> Tensor:
    """Return which rows have a picture, bool [B]."""
    if tilings is None:
        return torch.zeros(num_rows, dtype=torch.bool, device=device)
    return tilings.to(device).amin(dim=1) > 0


def read_positions(valid_BS: Tensor, num_new: int) -> Tensor:
    """Return the absolute positions [B, T] of the last `num_new` columns; padding does not count and gets 0."""
    position_BS = valid_BS.long().cumsum(dim=1) - 1
    return position_BS.clamp_min(0)[:, -num_new:]


def make_mask(valid_BS: Tensor, position_BT: Tensor, has_image_B: Tensor, prefix_len: int, width: int) -> Tensor:
    """Return what each new position may attend to, bool [B, 1, T, width].

    A position sees earlier positions that are no padding, and itself; positions of a picture's prefix see all of the
    prefix. `width` is S, or more where a cache of fixed size has room behind.
    """
    num_new, num_all = position_BT.shape[1], valid_BS.shape[1]
    index_S = torch.arange(num_all, device=valid_BS.device)
    new_T = index_S[-num_new:]
    mask_BTS = (index_S <= new_T[:, None]) & valid_BS[:, None]
    if num_new == num_all and bool(has_image_B.any()):
        in_prefix_BT = has_image_B[:, None] & (position_BT < prefix_len) & valid_BS
        mask_BTS = mask_BTS | (in_prefix_BT[:, :, None] & in_prefix_BT[:, None])
    mask_BTS = mask_BTS | (index_S == new_T[:, None])  # padding must see something, or its softmax is 0 / 0
    room = mask_BTS.new_zeros((*mask_BTS.shape[:2], width - num_all))
    return torch.cat([mask_BTS, room], dim=2)[:, None]


def image_columns(valid_BT: Tensor, has_image_B: Tensor, num_patches: int) -> tuple[Tensor, Tensor]:
    """Return the rows and columns of the image placeholders, each [pictures, P]."""
    rows = has_image_B.nonzero()[:, 0]
    first_real = valid_BT.long().argmax(dim=1)[rows]
    columns = first_real[:, None] + 1 + torch.arange(num_patches, device=valid_BT.device)
    return rows[:, None].expand_as(columns), columns


def encode_images(model: Moondream3, pixels_BNCSS: Tensor, tilings: Tensor) -> Tensor:
    """Return the image embeddings [pictures, P, D] of the rows that have a picture.

    Crops of all rows are encoded together.
    """
    whole = [(row, Tiling(*tiling)) for row, tiling in enumerate(tilings.tolist()) if min(tiling) > 0]
    num_tiles = [tiling.rows * tiling.cols for _, tiling in whole]
    distinct = [1 if tiles == 1 else 1 + tiles for tiles in num_tiles]  # an only tile equals the global crop
    crops = [pixels_BNCSS[row, :count] for (row, _), count in zip(whole, distinct, strict=True)]
    chunks = torch.cat(crops).to(model.device, model.dtype).split(crops_per_batch(model))
    features = torch.cat([model.vision.encode(chunk) for chunk in chunks]).split(distinct)
    embeddings = [
        model.vision.embed(feature.expand(2, -1, -1) if len(feature) == 1 else feature, tiling)
        for feature, (_, tiling) in zip(features, whole, strict=True)
    ]
    return torch.stack(embeddings)


def embed_tokens(model: Moondream3, ids_BT: Tensor, region_values: Tensor | None) -> Tensor:
    """Return embeddings [B, T, D]; where a coordinate's or size's id has a value, that of the value.

    `region_values` [B, T, 2] are (coordinate, anything) or (width, height), NaN where there is no value.
    """
    x_BTD = model.text.embed(ids_BT)
    if region_values is None:
        return x_BTD
    tokens = model.config.tokenizer
    known = ~region_values[..., 0].isnan()
    is_coord, is_size = known & (ids_BT == tokens.coord_id), known & (ids_BT == tokens.size_id)
    coords = model.region.encode_coord(region_values[is_coord][:, 0])
    sizes = model.region.encode_size(region_values[is_size])
    x_BTD = x_BTD.index_put(is_coord.nonzero(as_tuple=True), coords.to(x_BTD.dtype))
    return x_BTD.index_put(is_size.nonzero(as_tuple=True), sizes.to(x_BTD.dtype))


def read_task(prompt: list[int], config: ModelConfig) -> Task | None:
    """Return the skill that a prompt's ids open (what follows the image, or BOS); None for a text that opens none."""
    found: dict[int, Task] = {}
    templates = {Task.SEGMENT: SEGMENT_TEMPLATE, **config.tokenizer.templates}
    for name, template in templates.items():
        if name not in tuple(Task) or not template:
            continue
        prefixes = list(template.values()) if name == Task.CAPTION else [template.get("prefix")]
        for prefix in filter(None, prefixes):
            if prompt[: len(prefix)] == list(prefix):
                found[len(prefix)] = Task(name)
    return found[max(found)] if found else None
