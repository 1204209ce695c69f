"""Codes and scales: what is lost, what is not, and how a stack of experts is taken apart."""

from __future__ import annotations

import pytest
import torch

from md3cli.model.weights.codes import (
    LowBit,
    pack_nibbles,
    quantise,
    quantise_fp8,
    quantise_int4,
    quantise_int8,
    unpack_nibbles,
)

LARGEST_ERROR = {LowBit.INT8: 1 / 254, LowBit.INT4: 2 / 30, LowBit.FP8: 1 / 16}  # of the row's largest magnitude


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("kind", LowBit)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 256), (3, 32, 128)])
def test_a_weight_comes_back_within_half_a_step(kind: LowBit, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    full = weight(*shape, dtype=dtype)
    again = quantise(full, kind).dequantise(torch.float32)
    assert again.shape == full.shape
    worst = (again - full.float()).abs() / full.float().abs().amax(-1, keepdim=True)
    assert 0 < worst.max() <= LARGEST_ERROR[kind] * 1.001


@pytest.mark.parametrize("kind", LowBit)
def test_zeros_and_denormals_stay_finite(kind: LowBit) -> None:
    full = torch.zeros(4, 128)
    full[1] = 1e-40
    assert (quantise(full, kind).dequantise(torch.float32) - full).abs().max() <= 1e-38


@pytest.mark.parametrize("kind", LowBit)
def test_a_stack_of_experts_taken_apart_is_the_same(kind: LowBit) -> None:
    stacked = quantise(weight(3, 32, 128), kind)
    assert stacked.num_matrices == 3
    parts = [part.dequantise(torch.float32) for part in stacked.matrices()]
    assert torch.equal(torch.stack(parts), stacked.dequantise(torch.float32))
    (alone,) = quantise(weight(32, 128), kind).matrices()
    assert torch.equal(alone.dequantise(torch.float32), quantise(weight(32, 128), kind).dequantise(torch.float32))


def test_groups_that_reach_over_rows_are_told() -> None:
    assert quantise(weight(4, 256), LowBit.INT4).is_by_row
    across = quantise(weight(4, 64), LowBit.INT4)
    assert not across.is_by_row
    assert across.dequantise(torch.float32).shape == (4, 64)
    with pytest.raises(AssertionError, match="reach over rows"):
        list(across.matrices())


def test_scales_that_were_searched_for_are_used() -> None:
    full = weight(8, 128)
    small = torch.full((8,), 0.01)
    for quantiser in (quantise_int8, quantise_fp8):
        assert torch.equal(quantiser(full, small).scale, small)
    scale, zero_point = torch.full((8, 1), 0.25), torch.full((8, 1), 8.0)
    codes = quantise_int4(full, scale, zero_point).codes
    assert torch.equal(codes, (full / 0.25 + 8).round().clamp(0, 15).to(torch.uint8))


def test_large_weights_are_done_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    full = weight(10, 256)
    whole = {kind: quantise(full, kind) for kind in LowBit}
    monkeypatch.setattr("md3cli.model.weights.codes._PIECE_ELEMENTS", 700)
    for kind, expected in whole.items():
        again = quantise(full, kind)
        assert torch.equal(again.codes.view(torch.uint8), expected.codes.view(torch.uint8))
        assert torch.equal(again.dequantise(torch.float32), expected.dequantise(torch.float32))


def test_nibbles() -> None:
    codes = torch.arange(4 * 128).reshape(4, 128).remainder(16).to(torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.shape == (2, 128)
    assert packed[0, 5] >> 4 == codes[0, 5]
    assert packed[0, 5] & 15 == codes[2, 5]
    assert torch.equal(unpack_nibbles(packed), codes)
