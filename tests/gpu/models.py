"""Random models of the check: drawn on the device from a seed, in the forms that the product would choose."""

from __future__ import annotations

import gc

import torch

from md3cli.bench.runs import weight_bytes
from md3cli.model.engine.kernels import GroupedExperts, optimise
from md3cli.model.network.config import ModelConfig
from md3cli.model.network.layers import ExpertMatrices, MoeMlp
from md3cli.model.network.moondream import Moondream3
from md3cli.model.network.text import TextAttention
from md3cli.model.quant.layers import low_bit_matrices, quantise_vision
from md3cli.model.quant.load import quantise_decoder
from md3cli.model.weights.codes import LowBit
from md3cli.model.weights.random_weights import forbid_end, random_model

from .child import Run

SEED = 13
BF16, FP8, INT4 = "bf16", "float8 experts", "int4"
WEIGHT_FORMS = (BF16, FP8, INT4)  # 3.1 is stored in the second, the 4-bit port in the third
FP8_VISION = "all float8"  # the experts, and the products of the vision encoder
# Kernels, as part `kernels` calls them, without which a form of `md3cli.model.kernels.forms` is not used.
EXPERT_KERNELS = {"plan", "up_gate plain", "down plain", "combine"}
PROJECTION_KERNELS = {"tau_products", "tau_rope_store"}
ATTENTION_KERNELS = {"slot_attention_step", "slot_attention_block"}
VISION_KERNELS = {"add_layer_norm", "patch_rows"}


def model_in(run: Run, form: str, config: ModelConfig | None = None) -> Moondream3:
    """A network in one of the weight forms that never ends a text, as the engine runs it."""
    model = random_model(config or run.config, dtype=torch.bfloat16, device=run.device, seed=SEED)
    forbid_end(model)
    if form in (FP8, FP8_VISION):
        quantise_decoder(model, LowBit.FP8, experts_only=True, for_kernels=run.is_cuda)
    elif form == INT4:
        quantise_decoder(model, LowBit.INT4, for_kernels=run.is_cuda)
    if form == FP8_VISION:
        quantise_vision(model.vision, LowBit.FP8)
    apply_forms(run, model)
    free_memory(run)
    return model


def apply_forms(run: Run, model: Moondream3) -> None:
    """Exchange parts for the forms of the device; plain ones where a kernel of a form has failed.

    Weights in few bits have no plain form on a GPU.
    """
    optimise(model)
    failed = set(run.known.get("twins", ()))
    if failed & VISION_KERNELS:
        model.vision.patch_rows, model.vision.encode_rows = (
            model.vision.plain_patch_rows,
            model.vision.plain_encode_rows,
        )
    for module in model.text.modules():
        if isinstance(module, MoeMlp) and failed & EXPERT_KERNELS and isinstance(module.fc1, ExpertMatrices):
            module.fused = None
            module.run = GroupedExperts(module) if module.fc1.weight.dtype is torch.bfloat16 else module.run_experts
        elif isinstance(module, TextAttention) and failed & PROJECTION_KERNELS:
            module.project = module.plain_projection
        if isinstance(module, TextAttention) and failed & (PROJECTION_KERNELS | ATTENTION_KERNELS):
            module.heads = module.plain_heads
    if failed:
        run.note("twins", sorted(failed))


def all_weight_bytes(model: Moondream3) -> int:
    """Memory of every weight, plain and in codes."""
    return weight_bytes(model) + sum(matrix.num_bytes for matrix in low_bit_matrices(model))


def free_memory(run: Run) -> None:
    """Give back what models before this one held."""
    gc.collect()
    if run.is_cuda:
        torch.cuda.empty_cache()
