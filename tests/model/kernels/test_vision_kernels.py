"""The vision encoder with the GPU's forms in place, in Triton's interpreter, against the plain one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

pytest.importorskip("triton", reason="the kernels need triton, which the development extra brings on Linux")

from golden_cases import load_case
from gpu.triton_cases import OPS, normal, relative_error

from md3cli.model.engine.encoder import ImageEncoder
from md3cli.model.kernels import vision_forms
from md3cli.model.kernels.float8_products import plain_scale_rows
from md3cli.model.kernels.forms import place_forms
from md3cli.model.kernels.vision_forms import FusedMlp, attention_order
from md3cli.model.network.config import LAYER_NORM_EPS, VisionConfig
from md3cli.model.network.layers import Mlp
from md3cli.model.network.moondream import Moondream3
from md3cli.model.network.vision import VisionEncoder, normalise_crops

CPU = torch.device("cpu")


def with_kernels(model: Moondream3) -> Moondream3:
    placed = copy.deepcopy(model)
    place_forms(placed)
    return placed


def random_crops(config: VisionConfig, count: int) -> Tensor:
    return torch.randint(256, (count, config.crop_size, config.crop_size, 3), dtype=torch.uint8)


@pytest.mark.process
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_the_real_size_are_the_plain_ones_bit_for_bit(dtype: torch.dtype) -> None:
    config = VisionConfig()
    with torch.device("meta"):
        encoder = VisionEncoder(config)
    crops = random_crops(config, 2)
    crops.flatten()[:256] = torch.arange(256)  # every byte
    plain = encoder.patchify(normalise_crops(crops, dtype))
    values = normalise_crops(torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1), dtype).flatten()
    found = OPS.patch_rows(crops, values, config.enc_patch_size, 592)
    assert found.dtype == dtype
    assert torch.equal(found[..., : config.patch_dim], plain)
    assert not found[..., config.patch_dim :].any()


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_bytes_become_the_same_features(name: str) -> None:
    plain = load_case(name).model
    fused = with_kernels(plain)
    crops = random_crops(plain.config.vision, 3)
    with torch.inference_mode():
        expected = plain.vision.encode(normalise_crops(crops))
        found = fused.vision.encode_rows(fused.vision.patch_rows(crops))
        assert relative_error(found, expected) < 1e-5
        assert torch.equal(fused.vision.encode(normalise_crops(crops)), found)  # rows without zeros behind them


def test_forms_of_a_copy_compute_with_the_copys_weights() -> None:
    fused = with_kernels(load_case("c").model)
    crops = random_crops(fused.config.vision, 1)
    with torch.inference_mode():
        before = fused.vision.encode_rows(fused.vision.patch_rows(crops))
        copied = copy.deepcopy(fused)
        for parameter in copied.vision.blocks.parameters():
            parameter.zero_()
        assert torch.equal(fused.vision.encode_rows(fused.vision.patch_rows(crops)), before)
        assert not torch.equal(copied.vision.encode_rows(copied.vision.patch_rows(crops)), before)


def test_names_of_weights_stay() -> None:
    plain = load_case("c").model
    assert with_kernels(plain).vision.state_dict().keys() == plain.vision.state_dict().keys()


@pytest.mark.parametrize("width", [24, 1152, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_sum_is_rounded_before_its_norm(dtype: torch.dtype, width: int) -> None:
    x, branch = (normal(7, width, dtype=dtype, device=CPU, scale=30) for _ in range(2))
    weight, bias = (normal(width, dtype=dtype, device=CPU) for _ in range(2))
    total, norm = OPS.add_layer_norm(x, branch, weight, bias, LAYER_NORM_EPS)
    assert torch.equal(total, x + branch)
    expected = F.layer_norm((x + branch).double(), (width,), weight.double(), bias.double(), LAYER_NORM_EPS)
    assert relative_error(norm, expected) < (1e-6 if dtype is torch.float32 else 5e-4)


def test_a_branch_of_fewer_rows_is_repeated() -> None:
    x, branch = normal(12, 24, dtype=torch.float32, device=CPU), normal(3, 24, dtype=torch.float32, device=CPU)
    weight, bias = torch.ones(24), torch.zeros(24)
    total, _ = OPS.add_layer_norm(x.view(4, 3, 24), branch[None], weight, bias, LAYER_NORM_EPS)
    assert torch.equal(total, x.view(4, 3, 24) + branch)


def test_a_row_is_the_same_alone_and_in_company() -> None:
    x, branch = (normal(9, 1152, dtype=torch.float32, device=CPU) for _ in range(2))
    weight, bias = (normal(1152, dtype=torch.float32, device=CPU) for _ in range(2))
    together = OPS.add_layer_norm(x, branch, weight, bias, LAYER_NORM_EPS)
    for row in (0, 3, 8):
        alone = OPS.add_layer_norm(x[row : row + 1], branch[row : row + 1], weight, bias, LAYER_NORM_EPS)
        assert all(torch.equal(one[0], all_[row]) for one, all_ in zip(alone, together, strict=True))


def test_the_gelu_is_by_tanh_on_a_cpu_too() -> None:
    plain = Mlp(8, 12, 4)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, 8) * 3
    assert torch.equal(FusedMlp(plain)(x), plain(x))


def test_pictures_are_embedded_by_the_forms() -> None:
    case = load_case("c")
    plain, fused = ImageEncoder(case.model), ImageEncoder(with_kernels(case.model), sizes=(4,), max_crops=4)
    for one, other in zip(plain.encode(case.images[:2]), fused.encode(case.images[:2]), strict=True):
        assert relative_error(other, one) < 1e-5


@pytest.mark.parametrize(
    ("capability", "version", "first"),
    [
        ((9, 0), "2.11.0+cu130", SDPBackend.CUDNN_ATTENTION),
        ((9, 0), "2.13.1", SDPBackend.CUDNN_ATTENTION),
        ((9, 0), "2.10.0", SDPBackend.FLASH_ATTENTION),
        ((8, 6), "2.13.0", SDPBackend.FLASH_ATTENTION),
        (None, "2.13.0", SDPBackend.FLASH_ATTENTION),
    ],
)
def test_an_attention_is_chosen_by_card_and_torch(
    capability: tuple[int, int] | None, version: str, first: SDPBackend
) -> None:
    order = attention_order(capability, version)
    assert order[0] == first
    assert order[-1] == SDPBackend.MATH  # which is able of everything
    assert len(set(order)) == len(order)


def test_what_was_measured_last_holds_for_a_newer_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    later = {(2, 11): vision_forms.CUDNN_FIRST, (2, 14): vision_forms.FLASH_FIRST}
    monkeypatch.setitem(vision_forms.ATTENTION_BY_CARD, (9, 0), later)
    assert attention_order((9, 0), "2.13.0")[0] == SDPBackend.CUDNN_ATTENTION
    assert attention_order((9, 0), "2.15.0")[0] == SDPBackend.FLASH_ATTENTION


# -- float8 ----------------------------------------------------------------------------------------


def test_every_value_between_codes_is_rounded_as_by_torch() -> None:
    """The codes, the middles between them, and what lies beside those; a row's largest value is 448, its scale 1."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    beside = [torch.nextafter(middles, torch.full_like(middles, end)) for end in (0.0, torch.inf)]
    values = torch.cat([codes, middles, *beside])
    rows = torch.cat([values, -values])[None]
    found, scale = OPS.scale_rows(rows, False)
    assert scale.tolist() == [[1.0]]
    assert torch.equal(found, rows.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_any_size_are_scaled_as_by_torch(dtype: torch.dtype, gelu: bool) -> None:
    x = (torch.randn(20, 144) * torch.logspace(-4, 2, 20)[:, None]).to(dtype)
    x[3] = 0
    codes, scale = OPS.scale_rows(x, gelu)
    expected, expected_scale = plain_scale_rows(x, gelu=gelu)
    assert torch.allclose(scale, expected_scale, rtol=1e-5)
    assert (codes.view(torch.float8_e4m3fn).float() - expected.float()).abs().max() <= 32  # the largest two codes
    assert (codes != expected.view(torch.uint8)).sum() < 10
    assert not codes[3].any()


def test_a_row_with_a_value_that_is_no_number_stays_so() -> None:
    x = torch.randn(2, 32)
    x[1, 5] = torch.nan
    codes, scale = OPS.scale_rows(x, False)
    values = codes.view(torch.float8_e4m3fn).float() * scale
    assert values.isnan().nonzero().tolist() == [[1, 5]]


def test_a_scaled_row_is_the_same_alone_and_in_company() -> None:
    x = torch.randn(5, 4304)
    together = OPS.scale_rows(x, True)
    alone = OPS.scale_rows(x[3:4], True)
    assert all(torch.equal(all_[3], one[0]) for one, all_ in zip(alone, together, strict=True))
