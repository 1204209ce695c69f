"""The PTX that decodes codes, executed line by line on every byte: Triton's interpreter has none.

An instruction is what NVIDIA's PTX manual says of it, on 32-bit words; here for many words at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton, which the development extra brings on Linux")

from md3cli.model.kernels import operators, packed_codes
from md3cli.model.kernels.expert_kernels import FP8_PACKED, INT4_PACKED
from md3cli.model.kernels.tiles import WeightForm
from md3cli.model.kernels.weights import fp8_values

WORD = 0xFFFFFFFF


def prmt(a: Tensor, b: Tensor, selector: Tensor) -> Tensor:
    """Each nibble of the selector names one of eight bytes: four of `a`, four of `b`."""
    given = [(word >> (8 * byte)) & 0xFF for word in (a, b) for byte in range(4)]
    chosen = [(int(selector) >> (4 * place)) & 0xF for place in range(4)]
    return sum((given[byte] << (8 * place) for place, byte in enumerate(chosen)), torch.zeros_like(a))


def fma_bf16x2(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """`a * b + c` of both halves, rounded once."""
    wide = [halves(word, torch.bfloat16).double() for word in torch.broadcast_tensors(a, b, c)]
    exact = wide[0] * wide[1] + wide[2]
    rounded = exact.to(torch.bfloat16)
    assert torch.equal(rounded.double(), exact)
    bits = rounded.view(torch.int16).long() & 0xFFFF
    return bits[..., 0] | (bits[..., 1] << 16)


INSTRUCTIONS: dict[str, Callable[..., Tensor]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": prmt,
    "fma.rn.bf16x2": fma_bf16x2,
}


def halves(word: Tensor, dtype: torch.dtype) -> Tensor:
    """Both 16-bit numbers of each word, the low one first."""
    parts = torch.stack([word & 0xFFFF, word >> 16], dim=-1)
    return torch.where(parts >= 1 << 15, parts - (1 << 16), parts).to(torch.int16).view(dtype)


def execute(ptx: str, num_outputs: int, words: Tensor) -> list[Tensor]:
    """What the registers $0 to $num_outputs - 1 hold afterwards; the last argument of the code is `words`."""
    registers = {f"${num_outputs}": words}

    def value(operand: str) -> Tensor:
        return registers[operand] if operand in registers else torch.tensor(int(operand, 0))

    for line in re.findall(r"^(?!\.reg)([a-z].*);$", ptx, flags=re.MULTILINE):
        name, _, operands = line.partition(" ")
        target, *others = operands.split(", ")
        registers[target] = INSTRUCTIONS[name](*map(value, others)) & WORD
    return [registers[f"${index}"].expand_as(words) for index in range(num_outputs)]


def words_of_every_byte() -> tuple[Tensor, Tensor]:
    """Words in whose four places each byte stands once among others: (words [256], their bytes [256, 4])."""
    byte = torch.arange(256)
    bytes_W4 = torch.stack([(byte + shift) % 256 for shift in (0, 67, 131, 201)], dim=1)
    return (bytes_W4 << torch.tensor([0, 8, 16, 24])).sum(1), bytes_W4


@pytest.mark.parametrize(
    ("ptx", "dtype", "offset"),
    [
        (packed_codes.INT4_BF16, torch.bfloat16, packed_codes.CODE_OFFSET_BF16),
        (packed_codes.INT4_FP16, torch.float16, packed_codes.CODE_OFFSET_FP16),
    ],
)
def test_4_bit_codes_become_the_offset_and_the_code(ptx: Any, dtype: torch.dtype, offset: Any) -> None:
    words, codes = words_of_every_byte()
    found = [halves(word, dtype) for word in execute(ptx.value, 6, words)]
    low, high, ones = (torch.cat(found[first : first + 2], dim=-1).float() for first in (0, 2, 4))
    assert torch.equal(low, (codes & 15).float() + offset.value)
    assert torch.equal(high, (codes >> 4).float() + offset.value)
    assert torch.equal(ones, torch.ones(256, 4))


def test_float8_codes_become_their_values_with_their_sign() -> None:
    words, codes = words_of_every_byte()
    found = torch.cat([halves(word, torch.bfloat16) for word in execute(packed_codes.FP8_BF16.value, 2, words)], dim=-1)
    expected = fp8_values()[codes]
    is_finite = expected.isfinite()  # the other two are refused when a file is read
    assert torch.equal(found.float()[is_finite], expected[is_finite])
    assert torch.equal(found.signbit()[is_finite], (codes >= 128)[is_finite])


def test_cards_are_given_the_packed_forms_and_the_interpreter_is_not() -> None:
    for capability in ((8, 0), (8, 9), (9, 0), (12, 0)):
        assert operators.kernel_form(WeightForm.INT4, torch.bfloat16, capability) == INT4_PACKED.value
        assert operators.kernel_form(WeightForm.FP8, torch.bfloat16, capability) == FP8_PACKED.value
    for form in WeightForm:
        assert operators.kernel_form(form, torch.bfloat16, None) == form
        assert operators.kernel_form(form, torch.float32, (9, 0)) == form
