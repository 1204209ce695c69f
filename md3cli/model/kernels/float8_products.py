"""Products of rows and weights that are both float8, for the vision encoder; each row and each output has a scale.

On CUDA rows are scaled and rounded by a kernel of our own and multiplied by torch's float8 product, whose matrix units
run at twice the rate of 16 bits. The plain path, which a CPU takes, computes the same: the same codes, multiplied as
float32 numbers. A row is scaled by its own largest value, so it does not see the rows beside it.

Nothing here imports triton: what runs on CUDA is an operator that `forms.place_forms` brings. The modules are put in
place by `quant/layers.py`, which searches for the weights' scales.

Shape suffixes: R rows, K inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from md3cli.model.kernels.tiles import WeightForm
from md3cli.model.kernels.weights import KernelWeight
from md3cli.model.weights.codes import FP8_MAX

LEAST_CAPABILITY = (8, 9)  # older matrix units know no float8
WIDTH_MULTIPLE = 16  # of inputs and outputs, as torch's product wants them
LEAST_PEAK = 1e-30  # a row of zeros counts as having it: 448 / 0 times 0 is no number


def float8_fault(device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> str | None:
    """Say what keeps float8 products of these widths from being had on a device; None where nothing does."""
    least = ".".join(map(str, LEAST_CAPABILITY))
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return f"needs a GPU of compute capability {least} or newer (RTX 40, L40S, H100)"
    if dtype is not torch.bfloat16:
        return "is computed in bf16 alone"
    if any(width % WIDTH_MULTIPLE for width in widths):
        return f"needs a vision encoder whose widths are multiples of {WIDTH_MULTIPLE}"
    return None


def scale_rows(x_RK: Tensor, *, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """Turn rows into codes, float8 e4m3fn [R, K], and scales, float32 [R, 1]: value = code * scale.

    `gelu` takes the GELU (by tanh) of the values first, without rounding it.
    """
    if x_RK.is_cuda:
        codes, scale = torch.ops.md3.scale_rows(x_RK, gelu)
        return codes.view(torch.float8_e4m3fn), scale
    return plain_scale_rows(x_RK, gelu=gelu)


def plain_scale_rows(x_RK: Tensor, *, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """Do what `scale_rows` says by torch's own operations."""
    wide = x_RK.float()
    if gelu:
        wide = F.gelu(wide, approximate="tanh")
    peak_R1 = wide.abs().amax(dim=1, keepdim=True).clamp_min(LEAST_PEAK)
    codes = (wide * (FP8_MAX / peak_R1)).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes, peak_R1 / FP8_MAX


class Float8Linear(nn.Module):
    """`layers.Linear` in float8; what it computes is in the dtype of its rows."""

    def __init__(self, weight: KernelWeight, bias: Tensor) -> None:
        super().__init__()
        assert weight.form is WeightForm.FP8
        assert weight.num_matrices == 1, weight.codes.shape
        assert weight.scale is not None
        self.matrix, self.bias = weight, bias.detach()
        self.weight_KO = (
            weight.codes[0].view(torch.float8_e4m3fn).t()
        )  # a view: torch's product wants inputs side by side
        self.scale_1O = weight.scale

    def forward(self, x: Tensor) -> Tensor:
        """Compute [..., K] -> [..., O]."""
        codes_RK, scale_R1 = scale_rows(x.reshape(-1, x.shape[-1]))
        return self.multiply(codes_RK, scale_R1, x.dtype).view(*x.shape[:-1], -1)

    def multiply(self, codes_RK: Tensor, scale_R1: Tensor, dtype: torch.dtype) -> Tensor:
        """Multiply scaled rows by the weight and add the bias: [R, O] of `dtype`, on CUDA bfloat16."""
        if not codes_RK.is_cuda:
            product_RO = (codes_RK.float() @ self.weight_KO.float()) * scale_R1 * self.scale_1O
            return (product_RO + self.bias.float()).to(dtype)
        # Sums of fewer bits: their error is a hundredth of that of float8's three bits, and their rate is higher.
        return torch._scaled_mm(
            codes_RK, self.weight_KO, scale_R1, self.scale_1O, bias=self.bias, out_dtype=dtype, use_fast_accum=True
        )


class Float8Mlp(nn.Module):
    """`layers.Mlp` in float8; the activation is computed while rows are scaled for the second product."""

    def __init__(self, fc1: Float8Linear, fc2: Float8Linear) -> None:
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2

    def forward(self, x: Tensor) -> Tensor:
        """Compute [..., K] -> [..., O]."""
        inner_RI = self.fc1(x).flatten(0, -2)
        return self.fc2.multiply(*scale_rows(inner_RI, gelu=True), x.dtype).view(*x.shape[:-1], -1)
