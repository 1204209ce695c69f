"""The plan of a training run: sizes, rates, and how they change as a share of the whole run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tiny_losses import BIN_SIGMA, YOUNG_BIN_SIGMA
from tiny_vocabulary import make_config
from tokenizers import Tokenizer

WARMUP_STEPS = 100
DECODER_WARMUP = 0.01  # share of the run


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that decides a training run; kept in state.json."""

    seed: int = 1
    steps: int = 0
    minutes: float = 0.0
    batch_size: int = 16  # pictures a step, over all workers
    text_dim: int = 128
    vision_dim: int = 128
    grid: int = 6
    num_shards: int = 160
    muon_lr: float = 4e-3
    adam_lr: float = 3e-3
    dense_only: float = 0.07  # share of the run in which the dense loss alone is trained
    dense_until: float = 0.60  # share at which its weight has fallen to zero
    decay_from: float = 0.40  # share at which the learning rate begins to fall

    def make_config(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """config.json of the network this plan trains."""
        return make_config(tokenizer, text_dim=self.text_dim, vision_dim=self.vision_dim, grid=self.grid)

    def share(self, step: int, elapsed_s: float) -> float:
        """How much of the run is over, 0-1."""
        return step / self.steps if self.steps else elapsed_s / (60 * self.minutes)

    def rate(self, step: int, share: float) -> float:
        """Factor of the learning rates: warm-up, again when the decoder joins, plateau, cosine to zero."""
        fall = min(1.0, max(0.0, (share - self.decay_from) / (1 - self.decay_from)))
        rise = min(1.0, (step + 1) / WARMUP_STEPS)
        if share >= self.dense_only:
            rise = min(rise, 0.1 + (share - self.dense_only) / DECODER_WARMUP)
        return rise * (0.5 + 0.5 * math.cos(math.pi * fall))

    def bin_sigma(self, share: float) -> float:
        """Width of the wanted bins: coarse positions first, exact ones from the time the rate begins to fall."""
        return BIN_SIGMA + (YOUNG_BIN_SIGMA - BIN_SIGMA) * max(0.0, 1 - share / self.decay_from)

    def dense_weight(self, share: float) -> float:
        """Weight of the dense loss: 1 alone and for a while after, then falling to 0."""
        fall = (share - self.dense_only) / (self.dense_until - self.dense_only)
        return min(1.0, max(0.0, 1.0 - fall))
