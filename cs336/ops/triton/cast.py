"""Rounding that is the same on a GPU and in the interpreter."""

import os

import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def cast(x, dtype: tl.constexpr):
    """fp32 x in dtype, rounded to nearest even: Triton's interpreter would cut bfloat16 off instead."""
    if INTERPRET and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def cast_fp8(x, dtype: tl.constexpr):
    """fp32 x, of numbers that are none too large for it, in float8e4nv or float8e5, rounded to nearest even: Triton's
    interpreter would cut the others off."""
    if INTERPRET:
        DROPPED: tl.constexpr = 20 if dtype == tl.float8e4nv else 21  # of 23 bits
        NORMAL: tl.constexpr = 2.0**-6 if dtype == tl.float8e4nv else 2.0**-14
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)) >> DROPPED << DROPPED
        fixed: tl.constexpr = NORMAL * 1.5 * 2.0**DROPPED  # beside which the smallest step is the last bit
        small = (x + fixed) - fixed
        y = tl.where(tl.abs(x) < NORMAL, small, rounded.to(tl.float32, bitcast=True)).to(dtype)
        return tl.where(x == x, y.to(tl.uint8, bitcast=True), 0x7F).to(tl.uint8).to(dtype, bitcast=True)  # 0x7F: NaN
    return x.to(dtype)
