"""The vision encoder's kernels as operators of torch, as `operators.py` has the decoder's.

Importing this file imports triton: only `vision_forms.py` does so, when an engine on CUDA is built.

Shape suffixes: N crops, S crop side in pixels, P patches of a crop, R rows, D width, K values of a row.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from md3cli.model.kernels import vision_kernels
from md3cli.model.kernels.registry import launch, operator

NORM_ROWS = 4  # of a program: four programs on a multiprocessor have 74 kB of loads on their way, more than it needs
PATCH_VALUES = 1024  # of a program: one 16-byte store of each thread


def _fake_patch_rows(crops: Tensor, values: Tensor, patch: int, width: int) -> Tensor:
    return values.new_empty(crops.shape[0], (crops.shape[1] // patch) ** 2, width)


@operator("patch_rows(Tensor crops, Tensor values, int patch, int width) -> Tensor", 1, _fake_patch_rows)
def _patch_rows(crops: Tensor, values: Tensor, patch: int, width: int) -> Tensor:
    """Cut uint8 crops [N, S, S, 3] to patches [N, P, width]; `values` [256] has what each byte becomes."""
    num_crops, side, _, channels = crops.shape
    assert crops.is_contiguous(), crops.stride()
    assert channels == vision_kernels.CHANNELS.value
    assert values.shape == (vision_kernels.BYTES.value,), values.shape
    out = _fake_patch_rows(crops, values, patch, width)
    launch(
        vision_kernels.patch_rows, (triton.cdiv(out[0].numel(), PATCH_VALUES), num_crops),
        crops, values, out,
        S=side, PATCH=patch, GRID=side // patch, WIDTH=width, BLOCK=PATCH_VALUES, warps=4,
    )  # fmt: skip
    return out


def _fake_add_layer_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@operator(
    "add_layer_norm(Tensor x, Tensor branch, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    1,
    _fake_add_layer_norm,
)
def _add_layer_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `x + branch` and its LayerNorm, both [..., D]; a branch of fewer rows is repeated."""
    assert x.is_contiguous(), x.stride()
    assert branch.is_contiguous(), branch.stride()
    width = x.shape[-1]
    num_rows, branch_rows = x.numel() // width, branch.numel() // width
    assert num_rows % branch_rows == 0, (x.shape, branch.shape)
    total, norm = _fake_add_layer_norm(x, branch, weight, bias, eps)
    launch(
        vision_kernels.add_layer_norm, (triton.cdiv(num_rows, NORM_ROWS),),
        x, branch, weight, bias, total, norm, num_rows, branch_rows,
        D=width, BD=triton.next_power_of_2(width), BM=NORM_ROWS, EPS=eps, warps=4,
    )  # fmt: skip
    return total, norm


def _fake_scale_rows(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty((x.shape[0], 1), dtype=torch.float32)


@operator("scale_rows(Tensor x, bool gelu) -> (Tensor, Tensor)", 1, _fake_scale_rows)
def _scale_rows(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """Turn rows [R, K], or their GELU, into float8 codes (uint8 [R, K]) and scales [R, 1]."""
    assert x.is_contiguous(), x.stride()
    codes, scale = _fake_scale_rows(x, gelu)
    num_rows, width = x.shape
    launch(
        vision_kernels.scale_rows, (num_rows,),
        x, codes, scale, K=width, BK=triton.next_power_of_2(width), GELU=gelu, warps=4 if width <= 2048 else 8,
    )  # fmt: skip
    return codes, scale
