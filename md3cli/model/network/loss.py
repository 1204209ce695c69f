"""The loss of a batch for fine-tuning: text, coordinates and sizes, each a mean over its own targets.

A decision is read from the hidden state before it: position t predicts what stands at t + 1. Text is
cross-entropy over the vocabulary. Coordinates and sizes are cross-entropy against a narrow Gaussian
over the bins (neighbouring bins are nearly right), less the Gaussian's own entropy, so that 0 is perfect.

Shape suffixes: B rows, T positions, D width, K targets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from md3cli.model.network.moondream import Moondream3, size_bin

IGNORE = -100  # label of a position that is no target
SIGMA_SHARE = 6 / 1024  # the Gaussian's standard deviation, as a share of all bins; the embedded model learned with it


class Losses(NamedTuple):
    """Means over the targets of each kind, 0 where there are none; `total` is their sum."""

    total: Tensor
    text: Tensor
    coord: Tensor
    size: Tensor


def batch_loss(
    model: Moondream3, hidden_BTD: Tensor, logits_BTV: Tensor, ids_BT: Tensor, labels_BT: Tensor, values: Tensor | None
) -> Losses:
    """Return the losses of a batch whose decisions are `labels_BT` (ids, IGNORE elsewhere).

    `values` [B, T, 2] are the coordinates (in [..., 0]) and sizes (width, height) to predict for the
    ids at their positions, NaN elsewhere.
    """
    labels, before = labels_BT[:, 1:], hidden_BTD[:, :-1]
    is_text = labels != IGNORE
    zero = hidden_BTD.sum() * 0.0  # keeps the graph whole in a batch without targets of a kind
    text = coord = size = zero
    if is_text.any():
        text = F.cross_entropy(logits_BTV[:, :-1][is_text].float(), labels[is_text])
    if values is not None:
        tokens, region, targets = model.config.tokenizer, model.region, values[:, 1:]
        known, ids = ~targets[..., 0].isnan(), ids_BT[:, 1:]
        is_coord, is_size = known & (ids == tokens.coord_id), known & (ids == tokens.size_id)
        if is_coord.any():
            bins = targets[is_coord][:, 0] * region.num_coord_bins
            coord = near_bins_loss(region.coord_logits(before[is_coord]), bins).mean()
        if is_size.any():
            bins = size_bin(targets[is_size], region.num_size_bins)
            size = near_bins_loss(region.size_logits(before[is_size]), bins).mean()
    return Losses(text + coord + size, text, coord, size)


def near_bins_loss(logits: Tensor, bins: Tensor) -> Tensor:
    """Return the cross-entropy [...] of logits [..., n] against a Gaussian around the real-valued `bins` [...]."""
    num_bins = logits.shape[-1]
    numbers = torch.arange(num_bins, device=logits.device, dtype=torch.float32)
    distance = (numbers - bins.clamp(0, num_bins - 1)[..., None].float()) / (SIGMA_SHARE * num_bins)
    log_wanted = (-0.5 * distance**2).log_softmax(dim=-1)
    return (log_wanted.exp() * (log_wanted - logits.float().log_softmax(dim=-1))).sum(dim=-1)
