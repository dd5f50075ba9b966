import torch
import triton
import triton.language as tl

from cs336.ops.triton.cast import cast

BLOCK = 2048


@triton.jit
def _scale(x_ptr, out_ptr, scale, numel, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < numel, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, cast(x * scale, out_ptr.dtype.element_ty), mask=i < numel)


@triton.jit
def _scale_kernel(x_ptr, out_ptr, scale_ptr, numel, BLOCK: tl.constexpr):
    scale = tl.load(scale_ptr)
    if x_ptr is not None:
        _scale(x_ptr, out_ptr, scale, numel, BLOCK)
    else:
        if scale != 1.0:
            _scale(out_ptr, out_ptr, scale, numel, BLOCK)


def scale_(out, x, scale):
    if out.numel():
        with torch.cuda.device_of(out):
            _scale_kernel[(triton.cdiv(out.numel(), BLOCK),)](x, out, scale, out.numel(), BLOCK)
