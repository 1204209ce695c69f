"""Checkpoints in every layout, held in few bits: what is packed, what stays, and that answers hold."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_cases import CASES, GoldenCase, assert_answer, load_case
from safetensors.torch import save_file

from md3cli.config import ModelOptions
from md3cli.errors import CheckpointError, ConfigError
from md3cli.file_cache import FileCache
from md3cli.model.engine.compiled import CompiledSteps
from md3cli.model.engine.encoder import EncodingCache
from md3cli.model.engine.kernels import optimise
from md3cli.model.engine.load import load_engine, load_weights
from md3cli.model.kernels.float8_products import Float8Linear, Float8Mlp, float8_fault, scale_rows
from md3cli.model.kernels.weights import KernelExperts, KernelLinear, KernelWeight
from md3cli.model.network.layers import Linear, Mlp
from md3cli.model.network.moondream import Moondream3
from md3cli.model.network.vision import VisionEncoder
from md3cli.model.quant.layers import (
    Int8Mlp,
    PackedMatrices,
    gelu_tanh_,
    has_packed_weights,
    low_bit_matrices,
    quantise_vision,
)
from md3cli.model.quant.load import has_low_bits, low_bit_of, quantise_decoder
from md3cli.model.quant.matrices import Int4Matrix, Int8Matrix, LowBitLinear
from md3cli.model.quant.search import search
from md3cli.model.weights.codes import LowBit
from md3cli.model.weights.hub import model_path
from md3cli.model.weights.plan import plan_checkpoint
from md3cli.model.weights.random_weights import CONFIGS, random_model
from md3cli.model.weights.read import load_model

CPU = torch.device("cpu")
TINY = model_path("tiny")


def loaded(path: Path, quant: str, dtype: str = "auto", adapter: Path | None = None) -> Moondream3:
    options = ModelOptions(
        model=str(path), quant=quant, dtype=dtype, adapter=str(adapter) if adapter else None, cache=False
    )
    return load_weights(options, plan_checkpoint(path), dtype=torch.float32, device=CPU)


def hidden_of(model: Moondream3, length: int) -> torch.Tensor:
    x = torch.randn(2, length, model.config.text.dim, generator=torch.Generator().manual_seed(0)) * 0.5
    with torch.inference_mode():
        return model.text(x, torch.arange(length).expand(2, -1))  # type: ignore[no-any-return]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the middle token: one that stands between two experts may be sent to the other by any rounding."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


@pytest.mark.process
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_the_decoders_matrices_are_packed_and_nothing_else(quant: str) -> None:
    model = loaded(TINY, quant)
    packed = {name for name, m in model.named_modules() if isinstance(m, (LowBitLinear, PackedMatrices))}
    layers = range(model.config.text.n_layers)
    leaves = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert packed == {f"text.blocks.{layer}.{leaf}" for layer in layers for leaf in leaves}
    assert {type(m) for m in low_bit_matrices(model)} == {Int8Matrix if quant == "int8" else Int4Matrix}
    plain = load_model(TINY, dtype=torch.float32).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, plain[name]), name


@pytest.mark.process
@pytest.mark.parametrize("length", [1, 5, 64])
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_kernels_agree_with_the_plain_network_of_the_same_codes(quant: str, length: int) -> None:
    packed, plain = loaded(TINY, quant), loaded(TINY, quant, dtype="fp32")
    assert not list(low_bit_matrices(plain))
    assert error(hidden_of(packed, length), hidden_of(plain, length)) < (0.06 if quant == "int8" else 1e-4)
    assert error(hidden_of(plain, length), hidden_of(loaded(TINY, "none"), length)) < (0.06 if quant == "int8" else 0.3)


@pytest.mark.parametrize("name", ["int4", "raw-fp8"])
def test_stored_codes_run_as_they_are(name: str) -> None:
    folder = CASES[name][0]
    plan = plan_checkpoint(folder)
    assert has_low_bits(plan, "stored")
    assert not has_low_bits(plan, "none")
    model, plain = loaded(folder, "stored"), load_model(folder, dtype=torch.float32)
    assert list(low_bit_matrices(model))
    assert error(hidden_of(model, 7), hidden_of(plain, 7)) < (0.06 if name == "raw-fp8" else 1e-4)
    assert not list(low_bit_matrices(loaded(folder, "none")))


def test_the_same_codes_are_not_rounded_twice() -> None:
    stored, asked = loaded(CASES["int4"][0], "stored"), loaded(CASES["int4"][0], "int4")
    assert torch.equal(hidden_of(stored, 5), hidden_of(asked, 5))


@pytest.mark.process
@pytest.mark.parametrize("name", ["int4", "raw-fp8"])
def test_with_fp32_golden_answers_come_from_dequantised_values(name: str) -> None:
    case = load_case(name)
    model = loaded(CASES[name][0], "stored", dtype="fp32")
    optimise(model)
    keys = [key for key in range(len(case.requests)) if case.is_certain(key)]
    for answer in case.engine(4, model).run(case.job(key) for key in keys):
        assert_answer(answer, case.expected[answer.key])


def test_vision_tau_norms_and_heads_are_never_low() -> None:
    for slot in plan_checkpoint(TINY).slots:
        kept = slot.name.startswith(("vision.", "region.", "text.wte", "text.lm_head", "text.post_ln"))
        kept |= ".tau." in slot.name or ".router." in slot.name or ".ln." in slot.name or slot.name.endswith(".bias")
        assert (low_bit_of(slot, "int8") is None) == kept, slot.name


@pytest.mark.process
def test_an_adapter_is_merged_before_rounding(tmp_path: Path) -> None:
    config = plan_checkpoint(TINY).config.text
    generator = torch.Generator().manual_seed(0)
    factors = {
        f"text_lora.dense.0.{name}": torch.randn(shape, generator=generator) * 0.1
        for name, shape in {
            "up_a": (4, config.dim),
            "up_b": (config.ff_dim, 4),
            "down_a": (4, config.ff_dim),
            "down_b": (config.dim, 4),
        }.items()
    }
    save_file(factors, tmp_path / "adapter.safetensors")
    adapter = tmp_path / "adapter.safetensors"
    plain = loaded(TINY, "none", adapter=adapter)
    assert error(hidden_of(plain, 5), hidden_of(loaded(TINY, "none"), 5)) > 0.05
    for dtype in ("auto", "fp32"):
        assert error(hidden_of(loaded(TINY, "int8", dtype, adapter), 5), hidden_of(plain, 5)) < 0.06


def test_no_such_scheme_is_said() -> None:
    with pytest.raises(ConfigError, match="--quant int3: use stored, none, int8, int4"):
        loaded(TINY, "int3")
    with pytest.raises(CheckpointError, match="adapter"):
        loaded(TINY, "int8", adapter=Path("no/such/adapter"))


# -- answers ---------------------------------------------------------------------------------------


def answers(case: GoldenCase, model: Moondream3, batch_size: int, order: list[int]) -> dict[int, object]:
    return {a.key: (a.result, a.output_tokens) for a in case.engine(batch_size, model).run(map(case.job, order))}


def comparable(result: object) -> object:
    """Scores have three decimals and may fall either way at half a thousandth."""
    if isinstance(result, dict):
        return {key: comparable(value) for key, value in result.items() if key != "score"}
    return [comparable(item) for item in result] if isinstance(result, (list, tuple)) else result


@pytest.mark.process
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_answers_do_not_depend_on_batch_or_company(quant: str) -> None:
    case = load_case("a")
    model = loaded(CASES["a"][0], quant)
    optimise(model)
    keys = list(range(len(case.requests)))
    alone = answers(case, model, 1, keys)
    for batch_size in (4, 16):
        random.Random(batch_size).shuffle(keys)
        together = answers(case, model, batch_size, keys)
        for key in alone:
            assert comparable(together[key]) == comparable(alone[key]), key


@pytest.mark.process
def test_a_checkpoint_whose_sizes_are_held_in_part_is_run() -> None:
    """Of a dense layer's two matrices 4 bits hold one: the other stays plain, and both forms stand side by side."""
    case = load_case("int4")
    model = loaded(CASES["int4"][0], "stored")
    assert isinstance(model.text.blocks[0].mlp.fc2, LowBitLinear)
    assert not isinstance(model.text.blocks[0].mlp.fc1, LowBitLinear)
    optimise(model)
    keys = [key for key in range(len(case.requests)) if case.is_certain(key)]
    for answer in case.engine(4, model).run(case.job(key) for key in keys):
        assert_answer(answer, case.expected[answer.key])


# -- random weights --------------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.parametrize("for_kernels", [False, True])
@pytest.mark.parametrize(("kind", "experts_only"), [(LowBit.FP8, True), (LowBit.INT4, False)])
def test_random_weights_are_put_into_few_bits(kind: LowBit, experts_only: bool, for_kernels: bool) -> None:
    config = CONFIGS["mini"]
    plain, model = (random_model(config, dtype=torch.float32, device=CPU) for _ in range(2))
    quantise_decoder(model, kind, experts_only=experts_only, for_kernels=for_kernels)
    kinds = (KernelLinear, KernelExperts) if for_kernels else (LowBitLinear, PackedMatrices)
    found = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    sparse = {layer for layer in range(config.text.n_layers) if config.text.is_moe_layer(layer)}
    leaves = ("mlp.fc1", "mlp.fc2") if experts_only else ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    layers = sparse if experts_only else range(config.text.n_layers)
    assert found == {f"text.blocks.{layer}.{leaf}" for layer in layers for leaf in leaves}
    rest = plain.state_dict()
    assert all(torch.equal(tensor, rest[name]) for name, tensor in model.state_dict().items())
    num_bytes = sum(matrix.num_bytes for matrix in low_bit_matrices(model))
    held = sum(rest[f"{name}.weight"].numel() for name in found)
    # int4 on a CPU: a scale and a zero in the activations' dtype, here float32, for 128 values, as for the kernels
    assert 0 <= num_bytes - held * (0.5 + 8 / 128 if kind is LowBit.INT4 else 1) <= 0.05 * held


@pytest.mark.process
@pytest.mark.parametrize("kind", [LowBit.FP8, LowBit.INT4])
def test_random_weights_in_few_bits_compute_as_before(kind: LowBit) -> None:
    plain, model = (random_model(CONFIGS["mini"], dtype=torch.float32, device=CPU) for _ in range(2))
    quantise_decoder(model, kind)
    optimise(model)
    assert 1e-4 < error(hidden_of(model, 90), hidden_of(plain, 90)) < (0.06 if kind is LowBit.FP8 else 0.3)


# -- vision ----------------------------------------------------------------------------------------


def test_int8_vision_stays_close_and_does_not_see_other_crops() -> None:
    plain, model = loaded(TINY, "none").vision, loaded(TINY, "none").vision
    quantise_vision(model)
    side = model.config.crop_size
    crops = torch.rand(5, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        found = model.encode(crops)
        assert error(found, plain.encode(crops)) < 0.03
        crops[1:] = 1
        assert error(model.encode(crops)[0], found[0]) < 1e-3  # attention in float32 may round differently
    assert_no_plain_products(model)


def test_int8_vision_is_an_option_and_part_of_ids() -> None:
    options = ModelOptions(model="tiny", quant_vision="int8", cache=False)
    engine = load_engine(options)
    assert_no_plain_products(engine.model.vision)
    assert engine.identity.quant == "stored, vision int8"
    for wrong in (replace(options, dtype="fp32"), replace(options, quant_vision="int3")):
        with pytest.raises(ConfigError, match="--quant-vision"):
            load_engine(wrong)


def test_float8_vision_stays_close_and_does_not_see_other_crops() -> None:
    plain, model = loaded(TINY, "none").vision, loaded(TINY, "none").vision
    quantise_vision(model, LowBit.FP8)
    assert not any(isinstance(module, Linear) for module in model.blocks.modules())
    side = model.config.crop_size
    crops = torch.rand(5, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        found = model.encode(crops)
        assert 1e-3 < error(found, plain.encode(crops)) < 0.1  # three bits of mantissa
        crops[1:] = 1
        assert error(model.encode(crops)[0], found[0]) < 1e-3


def test_a_float8_product_is_that_of_the_values_its_codes_stand_for() -> None:
    plain = Linear(48, 32)
    torch.nn.init.normal_(plain.weight)
    torch.nn.init.normal_(plain.bias)
    matrix = KernelWeight.of_quantised(search(plain.weight, LowBit.FP8))
    product = Float8Linear(matrix, plain.bias)
    x = torch.randn(2, 3, 48) * 5
    codes, scale = scale_rows(x.view(6, 48))
    rows = codes.double() * scale.double()
    expected = rows @ matrix.dequantise(torch.float32)[0].double().T + plain.bias.double()
    assert error(product(x).view(6, 32), expected) < 1e-6
    assert error(rows, x.view(6, 48)) < 0.04


def test_a_float8_feed_forward_is_close_to_the_plain_one() -> None:
    plain = Mlp(48, 64, 32)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    layers = [
        Float8Linear(KernelWeight.of_quantised(search(layer.weight, LowBit.FP8)), layer.bias)
        for layer in (plain.fc1, plain.fc2)
    ]
    x = torch.randn(2, 3, 48)
    assert 1e-4 < error(Float8Mlp(*layers)(x), plain(x)) < 0.06


def test_float8_vision_is_counted_among_weights_of_few_bits() -> None:
    model = loaded(TINY, "none")
    held = sum(
        p.numel() for name, p in model.vision.blocks.named_parameters() if ".ln" not in name and "bias" not in name
    )
    quantise_vision(model.vision, LowBit.FP8)
    assert has_packed_weights(model)
    found = sum(matrix.num_bytes for matrix in low_bit_matrices(model))
    assert held <= found <= 1.1 * held


FULL_WIDTHS = (1152, 4304)


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "widths", "word"),
    [
        ("cpu", (9, 0), torch.bfloat16, FULL_WIDTHS, "GPU of compute capability 8.9"),
        ("cuda", (8, 6), torch.bfloat16, FULL_WIDTHS, "GPU of compute capability 8.9"),
        ("cuda", (8, 9), torch.float16, FULL_WIDTHS, "bf16"),
        ("cuda", (9, 0), torch.bfloat16, (36, 48), "multiples of 16"),
        ("cuda", (8, 9), torch.bfloat16, FULL_WIDTHS, None),
        ("cuda", (12, 0), torch.bfloat16, FULL_WIDTHS, None),
    ],
)
def test_float8_vision_is_refused_where_it_is_not_to_be_had(
    device: str, capability: tuple[int, int], dtype: torch.dtype, widths: tuple[int, ...], word: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    fault = float8_fault(torch.device(device), dtype, widths)
    assert fault is None if word is None else word in str(fault)


def test_float8_vision_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^--quant-vision fp8 needs a GPU .*; leave it out$"):
        load_engine(ModelOptions(model="tiny", device="cpu", quant_vision="fp8", cache=False))


def test_encodings_of_other_vision_weights_or_bits_are_not_taken(tmp_path: Path) -> None:
    files, plain = FileCache(tmp_path, 1 << 20), loaded(TINY, "none")
    other = loaded(TINY, "none")
    other.vision.blocks[0].mlp.fc1.weight.data = other.vision.blocks[0].mlp.fc1.weight.data + 1
    saved = EncodingCache(files, plain, background="none")
    saved.save("picture", torch.zeros(saved.shape))
    assert EncodingCache(files, plain, background="none").load("picture") is not None
    for bits in ("int8", "fp8"):
        assert EncodingCache(files, plain, background="none", quant_vision=bits).load("picture") is None
    assert EncodingCache(files, other, background="none").load("picture") is None


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_low_bits_are_not_compiled_and_that_is_said(quant: str) -> None:
    with pytest.warns(UserWarning, match="nothing is compiled"):
        engine = load_engine(ModelOptions(model="tiny", quant=quant, compile=True, cache=False))
    assert not isinstance(engine.passes.decode, CompiledSteps)


def assert_no_plain_products(vision: VisionEncoder) -> None:
    for block in vision.blocks:
        assert isinstance(block.mlp, Int8Mlp)
        assert isinstance(block.attn.qkv, LowBitLinear)
        assert isinstance(block.attn.proj, LowBitLinear)


def test_the_short_form_of_gelu_is_torchs() -> None:
    x = torch.linspace(-12, 12, 10_001)
    assert (gelu_tanh_(x.clone()) - torch.nn.functional.gelu(x, approximate="tanh")).abs().max() < 2e-6
