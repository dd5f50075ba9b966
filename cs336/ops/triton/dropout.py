"""Dropout in Triton: the four words of a counter are for four neighbours."""

import torch
import triton
import triton.language as tl

from cs336.ops.triton.cast import cast

BLOCK = 2048


@triton.jit
def _dropout_kernel(x_ptr, residual_ptr, y_ptr, seed_ptr, numel, below, scale, BLOCK: tl.constexpr):
    counter = tl.program_id(0).to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    none = tl.zeros((BLOCK // 4,), tl.uint32)
    a, b, c, d = tl.philox(tl.load(seed_ptr), low, high, none, none)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK,))
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < numel
    x = tl.load(x_ptr + i, mask=live, other=0.0).to(tl.float32)
    y = tl.where(words.to(tl.int64) >= below, x * scale, 0.0)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + i, mask=live, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, cast(y, y_ptr.dtype.element_ty), mask=live)


def fwd(x, residual, seed, p):
    y, below = x.new_empty(x.shape), min(round(p * 2**32), 2**32 - 1)
    if x.numel():
        with torch.cuda.device_of(x):
            _dropout_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                x, residual, y, seed, x.numel(), below, 1 / (1 - p), BLOCK
            )
    return y
