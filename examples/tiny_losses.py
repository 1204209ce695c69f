"""What the embedded model is trained to reduce.

Text is cross-entropy; coordinates and sizes are cross-entropy against a Gaussian over the bins, since
a neighbouring bin is nearly right; the router gets the usual load-balancing term (Fedus et al., Switch
Transformers); and while training is young, a dense loss on the image embeddings (what does each cell
show?) opens the vision tower's eyes. The dense heads are thrown away.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tiny_batch import NUM_CELL_VALUES, DenseTargets, TaskRows
from torch import Tensor, nn
from torch.nn import functional as F
from world import COLOURS, KINDS, MAX_SHAPES

from md3cli.images.crops import Tiling
from md3cli.model.network.layers import MoeMlp
from md3cli.model.network.moondream import Moondream3, size_bin
from md3cli.model.network.vision import normalise_crops

BIN_SIGMA = 6.0  # bins; wider while training is young
YOUNG_BIN_SIGMA = 40.0
BALANCE_WEIGHT = 0.01


class DenseHeads(nn.Module):
    """Linear read-outs of an image embedding: kind, colour, place from the left, is-a-centre, offset and size."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.widths = (len(KINDS), len(COLOURS), MAX_SHAPES, 1, 1, NUM_CELL_VALUES)
        self.read = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, sum(self.widths)))

    def forward(self, image_BGD: Tensor, dense: DenseTargets) -> tuple[Tensor, dict[str, float]]:
        """Loss and the accuracies worth logging."""
        kind, colour, rank, seen, centre, values = self.read(image_BGD).float().split(self.widths, dim=-1)
        shown = dense.kind >= 0
        is_centre = dense.is_centre > 0
        loss = F.binary_cross_entropy_with_logits(seen[..., 0], shown.float())
        loss = loss + 2 * F.binary_cross_entropy_with_logits(centre[..., 0], dense.is_centre)
        for logits, labels, weight in ((kind, dense.kind, 1.0), (colour, dense.colour, 1.0), (rank, dense.rank, 0.5)):
            loss = loss + weight * F.cross_entropy(logits[shown], labels[shown])
        loss = loss + F.smooth_l1_loss(values[shown], dense.values[shown], beta=0.1)
        hits = {
            "dense_kind": (kind[is_centre].argmax(-1) == dense.kind[is_centre]),
            "dense_colour": (colour[is_centre].argmax(-1) == dense.colour[is_centre]),
            "dense_rank": (rank[is_centre].argmax(-1) == dense.rank[is_centre]),
            "dense_offset": (values - dense.values)[is_centre][:, :2].abs() < 0.15,
        }
        return loss, {name: hit.float().mean().item() for name, hit in hits.items()}


class RouterBalance:
    """Watches the routers during a forward pass and says how uneven their choices are."""

    def __init__(self, model: Moondream3) -> None:
        self._logits: list[Tensor] = []
        self._choices = 0
        for module in model.modules():
            if isinstance(module, MoeMlp):
                self._choices = module.config.experts_per_token
                module.router.register_forward_hook(self._watch)

    def _watch(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._logits.append(output)

    def pop_loss(self) -> tuple[Tensor, float]:
        """Load-balancing loss summed over layers (1 a layer when even), and the least used expert's share."""
        total, least = torch.zeros(()), 1.0
        for logits in self._logits:
            logits_NX = logits.float().flatten(0, -2)
            num_experts = logits_NX.shape[-1]
            chosen = F.one_hot(logits_NX.topk(self._choices, dim=-1).indices, num_experts).sum(1).float()
            share = chosen.mean(0) / self._choices
            total = total.to(share.device) + num_experts * (share * logits_NX.softmax(-1).mean(0)).sum()
            least = min(least, share.min().item())
        self._logits.clear()
        return total, least


def soft_bins(logits: Tensor, bins: Tensor, sigma: float) -> Tensor:
    """Divergence [...] of logits [..., n] from a Gaussian around the real-valued `bins` [...]; 0 at best."""
    numbers = torch.arange(logits.shape[-1], device=logits.device, dtype=torch.float32)
    wanted = torch.softmax(-0.5 * ((numbers - bins[..., None]) / sigma) ** 2, dim=-1)
    return -(wanted * logits.float().log_softmax(-1)).sum(-1) + (wanted * wanted.clamp_min(1e-9).log()).sum(-1)


def embed_images(model: Moondream3, crops: Tensor, tilings: tuple[Tiling, ...]) -> Tensor:
    """Image embeddings [B, G, D] of a batch with mixed tilings; the crops are encoded as one batch."""
    features = model.vision.encode(normalise_crops(crops))
    pooled, whole, start = [], [], 0
    for tiling in tilings:
        stop = start + 1 + tiling.rows * tiling.cols
        whole.append(features[start])
        pooled.append(model.vision.pool(model.vision.stitch(features[start + 1 : stop], tiling)))
        start = stop
    return model.vision.project(torch.stack(whole), torch.stack(pooled))


class PrefixCache:
    """Keys and values of the pictures' prefixes, layer by layer: first written, then read by rows of tasks."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._pictures: Tensor | None = None

    def read_for(self, pictures: Tensor) -> None:
        """From now on put in front of row r the prefix of picture `pictures[r]`."""
        self._pictures = pictures

    def update(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """See `md3cli.model.network.text.KeyValueStore`."""
        if self._pictures is None:
            self._layers[layer] = (k_BHTK, v_BHTK)
            return k_BHTK, v_BHTK
        k, v = (prefix[self._pictures] for prefix in self._layers[layer])
        return torch.cat([k, k_BHTK], dim=2), torch.cat([v, v_BHTK], dim=2)


def _inputs(model: Moondream3, rows: TaskRows) -> Tensor:
    """Embeddings of what is fed in after the prefix, [R, T, D]."""
    is_value, is_size = (~rows.values[..., i].isnan() for i in (0, 1))
    is_coord = is_value & ~is_size
    coords, sizes = rows.values[is_coord][:, 0], rows.values[is_size]
    x_RTD = model.text.embed(rows.ids).float()
    x_RTD = x_RTD.index_put(is_coord.nonzero(as_tuple=True), model.region.encode_coord(coords).float())
    return x_RTD.index_put(is_size.nonzero(as_tuple=True), model.region.encode_size(sizes).float())


@dataclass(frozen=True, slots=True)
class LossParts:
    """Means over the positions that have such a target."""

    text: Tensor
    coord: Tensor
    size: Tensor
    text_accuracy: float


def sequence_loss(model: Moondream3, image_BGD: Tensor, rows: TaskRows, sigma: float = BIN_SIGMA) -> LossParts:
    """Text, coordinate and size losses of all tasks; `sigma` is the width of the wanted bins."""
    cache = PrefixCache()
    prefix = model.prefix_embeddings(image_BGD).float()
    position = torch.arange(prefix.shape[1], device=prefix.device).expand(prefix.shape[:2])
    model.text(prefix, position, None, cache)
    cache.read_for(rows.pictures)
    hidden = model.text(_inputs(model, rows), rows.positions, rows.mask, cache)
    has_text, has_coord, has_size = rows.weights > 0, ~rows.coords.isnan(), ~rows.sizes[..., 0].isnan()
    targets, weights = rows.targets[has_text], rows.weights[has_text]
    logits = model.text.logits(hidden[has_text]).float()
    text = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
    region = model.region
    coord_bins = rows.coords[has_coord] * region.num_coord_bins
    size_bins = size_bin(rows.sizes[has_size], region.num_size_bins)
    coord = soft_bins(region.coord_logits(hidden[has_coord]), coord_bins, sigma)
    size = soft_bins(region.size_logits(hidden[has_size]), size_bins, sigma)
    return LossParts(text, coord.mean(), size.mean(), (logits.argmax(-1) == targets).float().mean().item())
