"""The experts of a prefix by our kernels and by torch's grouped product: which one a card should run."""

from __future__ import annotations

from dataclasses import replace

import torch

from md3cli.model.engine.kernels import GroupedExperts
from md3cli.model.network.layers import MoeMlp
from md3cli.model.weights.random_weights import random_model

from .child import Run
from .timing import flusher, median_ms

PICTURES = (1, 8, 22)
FAST_CAPABILITIES = (9, 10)  # elsewhere torch's product is a loop that waits for the host


@torch.inference_mode()
def compare_with_grouped(run: Run) -> None:
    """Times of one sparse layer's experts, routing and the block's sums included, in bf16."""
    if torch.cuda.get_device_capability(run.device)[0] not in FAST_CAPABILITIES:
        run.note("grouped_mm", "not fast on this card, not compared")
        return
    from md3cli.model.kernels.forms import FusedExperts

    layer = sparse_layer(run)
    own, length, flush = FusedExperts(layer, run.config.prefix_len), run.config.prefix_len, flusher(run.device)
    layer.run = GroupedExperts(layer)
    for count in PICTURES:
        h, residual, branch = (
            torch.randn(count, length, run.config.text.dim, device=run.device).to(torch.bfloat16) for _ in range(3)
        )
        forms = {
            "own kernels": lambda h=h, r=residual, b=branch: own(h, None, r, b),
            "grouped_mm": lambda h=h, r=residual, b=branch: r + b + layer(h),
        }
        for form, step in forms.items():
            ms = median_ms(step, run.device, repeats=20, between=flush)
            run.figure(f"experts of a layer, {count * length} rows, bf16, {form}", 1e3 * ms, "us")


def sparse_layer(run: Run) -> MoeMlp:
    """One layer's router and experts at real size."""
    config = run.config
    assert config.text.moe is not None
    text = replace(config.text, n_layers=1, vocab_size=64, moe=replace(config.text.moe, start_layer=0))
    small = replace(config, text=text, vision=replace(config.vision, enc_n_layers=1))
    model = random_model(small, dtype=torch.bfloat16, device=run.device, seed=5)
    layer = model.text.blocks[0].mlp
    assert isinstance(layer, MoeMlp)
    return layer
