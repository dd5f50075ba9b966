"""y = x w^T + b of int8, int4 and fp8 weights in Triton. Whole numbers less their zero are exact in the dtype of x (to
256 in bfloat16), so that a group's product is that of x and q - zero, and its scale multiplies the sum. A byte's two
weights meet the even and the odd features. A float of eight bits is made from its bits, where a GPU may not know it."""

import torch
import triton
import triton.language as tl

from cs336.ops.triton.attention_tile import INTERPRET, dot
from cs336.ops.triton.cast import cast

MOST_FEATURES = 128  # of a step
WIDE = 8192  # features of y, from which on wider tiles keep all multiprocessors busy


@triton.jit(do_not_specialize=["M"])  # it changes from call to call
def _linear_kernel(
    x_ptr, w_ptr, s_ptr, b_ptr, z_ptr, y_ptr, M, N, K, groups, x_stride,
    PER_BYTE: tl.constexpr, FP8: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * x_stride
    w_ptrs = w_ptr + n.to(tl.int64)[:, None] * (K // PER_BYTE)
    x_rows, w_rows = (m < M)[:, None], (n < N)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    steps: tl.constexpr = (GROUP // PER_BYTE + BLOCK_K - 1) // BLOCK_K  # of a group
    for step in range(groups * steps):  # one loop, whose loads are under way ahead
        g = step // steps
        start, last = g * GROUP // PER_BYTE + step % steps * BLOCK_K, tl.minimum((g + 1) * GROUP, K) // PER_BYTE
        j = start + tl.arange(0, BLOCK_K)[None, :]  # bytes
        k = start * PER_BYTE + tl.arange(0, BLOCK_K * PER_BYTE)[None, :]
        q = tl.load(w_ptrs + j, mask=w_rows & (j < last), other=0)
        x = tl.load(x_ptrs + k, mask=x_rows & (k < last * PER_BYTE), other=0.0)
        zero = tl.zeros((BLOCK_N, 1), tl.float32)
        if z_ptr is not None:
            zero += tl.load(z_ptr + n.to(tl.int64) * groups + g, mask=n < N, other=0).to(tl.float32)[:, None]
        if FP8:
            sign_and_size = ((q & 128).to(tl.int32) << 24) | ((q & 127).to(tl.int32) << 20)
            value = sign_and_size.to(tl.float32, bitcast=True) * 2.0**120  # the exponent's bias is 127 for 7
            part = dot(x, tl.trans(cast(value, x.dtype)))
        elif PER_BYTE == 1:
            part = dot(x, tl.trans(cast(q.to(tl.float32) - zero, x.dtype)))
        else:
            even, odd = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_K, 2)))
            low = (q & 15).to(tl.float32) - 8 - zero
            high = (q >> 4).to(tl.float32) - 8 - zero
            part = dot(even, tl.trans(cast(low, x.dtype))) + dot(odd, tl.trans(cast(high, x.dtype)))
        scale = tl.load(s_ptr + n.to(tl.int64) * groups + g, mask=n < N, other=0.0).to(tl.float32)
        acc += part * scale[None, :]
    if b_ptr is not None:
        acc += tl.load(b_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptrs, cast(acc, y_ptr.dtype.element_ty), mask=x_rows & (n < N)[None, :])


def linear_int8(x, weight, scales, bias, group, zeros, constant):
    return _linear(x, weight, scales, bias, group, zeros, 1)


def linear_int4(x, weight, scales, bias, group, zeros, constant):
    return _linear(x, weight, scales, bias, group, zeros, 2)


def linear_fp8(x, weight, scales, bias, group, constant):
    return _linear(x, weight.view(torch.uint8), scales, bias, group, None, 1, fp8=True)


def _linear(x, weight, scales, bias, group, zeros, per_byte, fp8=False):
    (M, K), N = x.shape, weight.shape[0]
    y = x.new_empty(M, N)
    if y.numel() == 0:
        return y
    group = min(group, K)
    features = min(MOST_FEATURES, max(32, triton.next_power_of_2(group)))
    block_m = 16 if M <= 16 else 32 if M <= 32 and per_byte == 1 else 64
    block_n = 64 if N > WIDE else 32
    if INTERPRET.value:
        block_m = block_n = 16
    with torch.cuda.device_of(x):
        _linear_kernel[triton.cdiv(N, block_n), triton.cdiv(M, block_m)](
            x, weight, scales, bias, zeros, y, M, N, K, scales.shape[1], x.stride(0),
            PER_BYTE=per_byte, FP8=fp8, GROUP=group, BLOCK_M=block_m, BLOCK_N=block_n,
            BLOCK_K=features // per_byte, num_warps=4, num_stages=3,
        )  # fmt: skip
    return y
