"""Codes of 8 and 4 bits decoded two numbers at a time, in a card's own words: PTX that Triton puts into its kernels.

Converting one code by the card's instructions takes a quarter to an eighth of the rate of plain arithmetic, and the
decoding, not the memory, then bounds a step (64 conversions of 285 instructions took two thirds of float8's time).
Four codes of one register become two registers of two 16-bit numbers instead, by moving bits.

Stands alone because `expert_kernels.py` also has what Triton's interpreter runs, which cannot run PTX: there these
functions have the twins `decoded` and `_nibbles`, and tests/model/kernels/test_packed_codes.py executes the PTX.
Ideas: numbers whose exponent makes the mantissa's last bits whole are Marlin's and FasterTransformer's.
Source: Moondream 3 specification, sections 19.2 and 19.3.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A 4-bit code c in the last mantissa bits of 128 (bfloat16, 0x4300) or 1024 (float16, 0x6400) reads as that plus c.
CODE_OFFSET_BF16 = tl.constexpr(128.0)
CODE_OFFSET_FP16 = tl.constexpr(1024.0)

# $6: four bytes. $0, $1: their low codes; $2, $3: their high ones; $4, $5: ones.
_INT4 = """{
.reg .b32 low, high;
and.b32 low, $6, 0x0f0f0f0f;
shr.u32 high, $6, 4;
and.b32 high, high, 0x0f0f0f0f;
prmt.b32 $0, low, EXPONENT, 0x4140;
prmt.b32 $1, low, EXPONENT, 0x4342;
prmt.b32 $2, high, EXPONENT, 0x4140;
prmt.b32 $3, high, EXPONENT, 0x4342;
mov.b32 $4, ONES;
mov.b32 $5, ONES;
}"""
INT4_BF16 = tl.constexpr(_INT4.replace("EXPONENT", "0x43434343").replace("ONES", "0x3f803f80"))
INT4_FP16 = tl.constexpr(_INT4.replace("EXPONENT", "0x64646464").replace("ONES", "0x3c003c00"))

# $2: four float8 codes. $0, $1: their values. A code's exponent and mantissa are put where bfloat16 has the low bits of
# its own; times 2 ** 120 that is the code's value, denormal codes included. Adding -0 keeps the sign of zero.
FP8_BF16 = tl.constexpr("""{
.reg .b32 front, back, sign, shift, nothing;
prmt.b32 front, $2, 0, 0x1404;
prmt.b32 back, $2, 0, 0x3424;
mov.b32 shift, 0x7b807b80;
mov.b32 nothing, 0x80008000;
and.b32 sign, front, 0x80008000;
and.b32 front, front, 0x7f007f00;
shr.u32 front, front, 4;
or.b32 front, front, sign;
fma.rn.bf16x2 $0, front, shift, nothing;
and.b32 sign, back, 0x80008000;
and.b32 back, back, 0x7f007f00;
shr.u32 back, back, 4;
or.b32 back, back, sign;
fma.rn.bf16x2 $1, back, shift, nothing;
}""")


@triton.jit
def packed_fp8(codes):
    """Float8 codes as bfloat16, exact."""
    return tl.inline_asm_elementwise(FP8_BF16, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4)


@triton.jit
def packed_int4(codes, dtype: tl.constexpr):
    """Low and high codes of bytes in bfloat16 or float16, CODE_OFFSET added, and ones.

    The ones come from here so that they lie with the threads that the codes lie with: a product that takes its
    own would want the rows in another order, and their loads would not run ahead.
    """
    if dtype == tl.bfloat16:
        found = tl.inline_asm_elementwise(
            INT4_BF16, "=r,=r,=r,=r,=r,=r,r", [codes], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True, pack=4,
        )  # fmt: skip
    else:  # a second `return` would have to be of the same types
        found = tl.inline_asm_elementwise(
            INT4_FP16, "=r,=r,=r,=r,=r,=r,r", [codes], dtype=(tl.float16, tl.float16, tl.float16),
            is_pure=True, pack=4,
        )  # fmt: skip
    return found
