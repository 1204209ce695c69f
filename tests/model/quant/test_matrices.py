"""Packed products against plain ones, and a row alone against the same row in company."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from md3cli.model.network.config import MoeConfig
from md3cli.model.network.layers import Linear, MoeMlp
from md3cli.model.quant import matrices
from md3cli.model.quant.layers import Int8Experts, LowBitExperts, PackedMatrices, low_bit_matrices, place_experts
from md3cli.model.quant.matrices import LowBitLinear, Matrix, TextPass, TileMatrix, pack
from md3cli.model.weights.codes import LowBit, QuantisedWeight, quantise

OUTPUTS, INPUTS = 192, 256
DTYPES = [torch.float32, torch.bfloat16]
# Largest share of a product that its activations' rounding takes: int8's dynamic 8 bits, bfloat16's 8.
ACTIVATION_ERROR = {LowBit.INT8: 0.02, LowBit.FP8: 0.03, LowBit.INT4: 0.01}


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight(kind: LowBit, *shape: int) -> QuantisedWeight:
    return quantise(values(*(shape or (OUTPUTS, INPUTS))) * 0.05, kind)


def packed(kind: LowBit, dtype: torch.dtype, *, is_prefix: bool = False) -> Matrix:
    (matrix,) = pack(weight(kind), TextPass(is_prefix), dtype)
    return matrix


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach().float() - expected.detach().float()).norm() / expected.detach().float().norm())


def test_this_machine_has_the_fast_products() -> None:
    """What is tested below as fast is; without the kernels everything falls back to tiles."""
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("avx512_vnni") and capabilities.get("avx512_bf16"):
        assert matrices.has_int8_products()
        assert matrices.has_int4_kernel()
        assert not matrices.reduces_range()


@pytest.mark.parametrize("is_prefix", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LowBit)
@pytest.mark.parametrize("rows", [1, 2, 5, 37])
def test_products_equal_those_of_the_dequantised_weight(
    kind: LowBit, dtype: torch.dtype, is_prefix: bool, rows: int
) -> None:
    x = values(rows, INPUTS, seed=1, dtype=dtype)
    expected = F.linear(x.float(), weight(kind).dequantise(torch.float32))
    assert error(packed(kind, dtype, is_prefix=is_prefix)(x), expected) < ACTIVATION_ERROR[kind]
    assert error(TileMatrix(weight(kind))(x), expected) < 0.005


def test_int4_values_are_exact_in_float32_and_rounded_by_a_tenth_of_a_code_in_bfloat16() -> None:
    codes = weight(LowBit.INT4)
    expected = codes.dequantise(torch.float32)
    steps = codes.scale.view(OUTPUTS, -1).repeat_interleave(128, dim=1)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        (matrix,) = pack(codes, TextPass(), dtype)
        assert isinstance(matrix, matrices.Int4Matrix)
        assert ((matrix.unpacked().T.float() - expected) / steps).abs().max() < tolerance


def test_the_layout_is_that_of_torch() -> None:
    codes = torch.randint(0, 16, (OUTPUTS, INPUTS), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    blocks = matrices.pack_blocks(codes)
    assert torch.equal(matrices.unpack_blocks(blocks, torch.uint8).T, codes)
    if matrices.has_int4_kernel():
        theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
        assert torch.equal(theirs.flatten(), blocks.flatten())


@pytest.mark.parametrize("is_prefix", [False, True])
@pytest.mark.parametrize("kind", LowBit)
def test_a_row_gets_the_same_bits_alone_and_in_company(kind: LowBit, is_prefix: bool) -> None:
    dtype = torch.bfloat16
    matrix, x = packed(kind, dtype, is_prefix=is_prefix), values(16, INPUTS, seed=1, dtype=dtype)
    alone = [matrix(x[row : row + 1])[0] for row in range(16)]
    for company in (x, x * torch.linspace(1, 20, 16)[:, None].to(dtype), x.clone()):
        company[0] = x[0]
        if company is not x:
            company[5, 3] = 60.0  # an outlier of sixty sigma
        for size in (1, 2, 4, 16):
            assert torch.equal(matrix(company[:size])[0], alone[0])
    together = matrix(x)
    for row in range(16):
        assert torch.equal(together[row], alone[row])


@pytest.mark.skipif(not matrices.has_onednn_products(), reason="needs a CPU with VNNI")
@pytest.mark.parametrize("dtype", DTYPES)
def test_onednn_gives_the_same_products_and_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    matrix, x = matrices.OneDnnMatrix(weight(LowBit.INT8)), values(37, INPUTS, seed=1, dtype=dtype)
    expected = F.linear(x.float(), weight(LowBit.INT8).dequantise(torch.float32))
    together = matrix(x)
    assert error(together, expected) < ACTIVATION_ERROR[LowBit.INT8]
    loud = x * 20
    loud[3] = x[3]
    assert torch.equal(matrix(loud)[3], together[3])
    assert torch.equal(matrix(x[3:4])[0], together[3])
    assert (matrix(torch.zeros(2, INPUTS)) == 0).all()


def test_rows_of_zeros_and_of_extremes_stay_finite() -> None:
    matrix = packed(LowBit.INT8, torch.bfloat16)
    x = torch.stack([torch.zeros(INPUTS), torch.full((INPUTS,), 3e38), torch.full((INPUTS,), 1e-42)])
    y = matrix(x)
    assert (y[0] == 0).all()
    assert y[2].abs().max() < 1e-30
    assert torch.isfinite(matrix(x[:1] + 1e30)).all()


def test_cpus_without_vnni_take_seven_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their 16-bit sums would overflow; the products stay right, a little coarser."""
    monkeypatch.setattr(matrices, "reduces_range", lambda: True)
    x = values(5, INPUTS, seed=1)
    expected = F.linear(x, weight(LowBit.INT8).dequantise(torch.float32))
    assert error(packed(LowBit.INT8, torch.float32)(x), expected) < 2 * ACTIVATION_ERROR[LowBit.INT8]


def test_other_machines_compute_from_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "has_int8_products", lambda: False)
    monkeypatch.setattr(matrices, "has_int4_kernel", lambda: False)
    x = values(3, INPUTS, seed=1)
    for kind in LowBit:
        expected = F.linear(x, weight(kind).dequantise(torch.float32))
        matrix = packed(kind, torch.float32)
        assert isinstance(matrix, matrices.Int4Matrix if kind is LowBit.INT4 else TileMatrix)
        assert error(matrix(x), expected) < 1e-5


def test_fewer_bits_take_less_memory() -> None:
    plain = OUTPUTS * INPUTS * 2
    assert packed(LowBit.INT8, torch.bfloat16).num_bytes < 0.55 * plain
    assert packed(LowBit.INT4, torch.bfloat16).num_bytes < 0.27 * plain
    assert TileMatrix(weight(LowBit.FP8)).num_bytes < 0.55 * plain


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_layer_keeps_shape_dtype_and_bias(dtype: torch.dtype) -> None:
    bias = torch.nn.Parameter(values(OUTPUTS, seed=2, dtype=dtype), requires_grad=False)
    x = values(2, 3, INPUTS, seed=1, dtype=dtype)
    plain = Linear(INPUTS, OUTPUTS)
    plain.weight.data, plain.bias.data = weight(LowBit.INT8).dequantise(dtype), bias.data
    for with_bias in (bias, None):
        found = LowBitLinear(packed(LowBit.INT8, dtype), with_bias)(x)
        expected = plain(x) if with_bias is not None else plain(x) - bias
        assert found.shape == (2, 3, OUTPUTS)
        assert found.dtype is dtype
        assert error(found, expected) < 0.02


# -- experts ---------------------------------------------------------------------------------------

NUM_EXPERTS, DIM, INNER = 6, 128, 128


def layers(kind: LowBit, dtype: torch.dtype) -> tuple[MoeMlp, MoeMlp]:
    """A layer with packed experts and its plain twin of the dequantised values."""
    config = MoeConfig(num_experts=NUM_EXPERTS, start_layer=0, experts_per_token=3, expert_inner_dim=INNER)
    made = []
    for is_packed in (True, False):
        layer = MoeMlp(DIM, config)
        layer.router.weight.data, layer.router.bias.data = (
            values(NUM_EXPERTS, DIM, dtype=dtype),
            torch.zeros(NUM_EXPERTS, dtype=dtype),
        )
        for leaf, shape in (("fc1", (NUM_EXPERTS, 2 * INNER, DIM)), ("fc2", (NUM_EXPERTS, DIM, INNER))):
            codes = weight(kind, *shape)
            if is_packed:
                place_experts(layer, leaf, pack(codes, TextPass(), dtype))
            else:
                getattr(layer, leaf).weight.data = codes.dequantise(dtype)
        made.append(layer.requires_grad_(False))
    return made[0], made[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LowBit)
def test_packed_experts_equal_the_plain_loop(kind: LowBit, dtype: torch.dtype) -> None:
    layer, plain = layers(kind, dtype)
    assert isinstance(layer.run, Int8Experts if kind is not LowBit.INT4 else LowBitExperts)
    x = values(37, DIM, seed=3, dtype=dtype)
    assert error(layer(x), plain(x)) < 0.04
    assert layer(x).dtype is dtype


@pytest.mark.parametrize("kind", LowBit)
def test_a_token_gets_the_same_bits_alone_and_in_company(kind: LowBit) -> None:
    layer, _ = layers(kind, torch.bfloat16)
    x = values(16, DIM, seed=3, dtype=torch.bfloat16)
    loud = x * 20
    loud[0] = x[0]
    for size in (1, 2, 4, 16):
        assert torch.equal(layer(loud[:size])[0], layer(x[:1])[0])
        assert torch.equal(layer(x)[size - 1], layer(x[size - 1 : size])[0])


def test_a_layer_runs_packed_only_when_both_weights_are_there() -> None:
    layer = MoeMlp(DIM, MoeConfig(num_experts=2, start_layer=0, experts_per_token=1, expert_inner_dim=INNER))
    place_experts(layer, "fc1", pack(weight(LowBit.INT8, 2, 2 * INNER, DIM), TextPass(), torch.float32))
    assert isinstance(layer.fc1, PackedMatrices)
    assert layer.run == layer.run_experts
    assert len(list(low_bit_matrices(layer))) == 2
