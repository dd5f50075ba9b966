"""Linear layers of bfloat16 (few rows), int8, fp8 and int4 weights: ours beside cuBLAS with bfloat16 weights.

pytest benchmarks/ops/bench_linear_few_rows.py
python -m benchmarks.run ops linear_few_rows --out FILE [--quick]

Shapes are rows, out_features, in_features: of Llama-3.2-1B and Qwen3-8B, with what reads the same x joined. Bytes: the
weights, their scales (groups of 128), x and y once. "cublas" multiplies with bfloat16 weights, whatever the pass;
"torch" with weights of the same width: tinygemm's int4 in groups of 128; fp8, and int8 of 32 rows or more, with x of
the same dtype and a scale a row. For these to be right a row's groups share their scale, and x has few bits.
"""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks import harness
from cs336.inference.quantization import round_to_nearest
from cs336.ops import registry
from cs336.ops.ref.linear_quantized import dequantize_fp8, dequantize_int4, dequantize_int8

DTYPE = torch.bfloat16
GROUP = 128
LAYERS = [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (6144, 4096), (4096, 4096), (24576, 4096)]
SHAPES = {
    "tiny": [(3, 24, 256)],
    "quick": [(M, N, K) for N, K in ((24576, 4096), (4096, 4096), (3072, 2048)) for M in (1, 4, 16, 32, 64, 256)],
    "full": [(M, N, K) for N, K in LAYERS for M in (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)],
}
DEQUANTIZE = {"int8": dequantize_int8, "fp8": dequantize_fp8, "int4": dequantize_int4}
BYTES = {"bf16": 2.0, "int8": 1 + 2 / GROUP, "fp8": 1 + 2 / GROUP, "int4": 0.5 + 2 / GROUP}  # of a weight


def inputs(shape: tuple[int, int, int], weights: str, device: torch.device) -> tuple:
    M, N, K = shape
    x, w = (torch.randn(n, K, device=device).to(DTYPE) for n in (M, N))
    if weights == "bf16":
        return x, w
    if weights == "int8":
        x = (32 * x).round().clamp(-127, 127)
    elif weights == "fp8":
        x = x.to(torch.float8_e4m3fn).to(DTYPE)
    q, scales = round_to_nearest(w, weights, K)
    return x, q, scales.repeat(1, -(-K // GROUP))


def ours(variant: str, weights: str, *args) -> harness.Call:
    name = "linear_few_rows" if weights == "bf16" else f"linear_{weights}"
    args += (None,) if weights == "bf16" else (None, GROUP)
    args += (None,) if weights in ("int8", "int4") else ()
    if reason := registry.why_not(name, variant, *args, True):
        raise NotImplementedError(reason)
    overload = registry.OPS[name].overloads[variant]
    return lambda: (overload(*args, True),)


def cublas(weights: str, x, w, scales=None) -> harness.Call:
    w = w if scales is None else DEQUANTIZE[weights](w, scales, GROUP).to(DTYPE)
    return lambda: (F.linear(x, w),)


def torchs(weights: str, x, w, scales=None) -> harness.Call:
    """torch's own product with weights of this width."""
    if not x.is_cuda or weights == "bf16" or x.shape[1] % GROUP:
        raise NotImplementedError("torch has a product for few rows of int8, int4 and fp8 on CUDA alone")
    if weights == "int4":
        packed = torch._convert_weight_to_int4pack(w << 4 | w >> 4, 8)
        grids = torch.stack((scales.t(), torch.zeros_like(scales.t())), -1).contiguous()
        return lambda: (torch._weight_int4pack_mm(x, packed, GROUP, grids),)
    of_w = scales[:, 0].float()[None]
    if weights == "int8":
        M = len(x)
        x_int8 = F.pad(x, (0, 0, 0, max(0, 32 - M))).to(w.dtype)
        return lambda: ((torch._int_mm(x_int8, w.t())[:M] * of_w).to(DTYPE),)
    x_fp8, of_x = x.to(w.dtype), torch.ones(len(x), 1, device=x.device)
    return lambda: (torch._scaled_mm(x_fp8, w.t(), scale_a=of_x, scale_b=of_w, out_dtype=DTYPE),)


def cases(size: str) -> Iterator[harness.Case]:
    for shape in SHAPES[size]:
        M, N, K = shape
        for weights, each in BYTES.items():
            contenders = {v: functools.partial(ours, v, weights) for v in registry.NAMESPACE}
            contenders["cublas"] = functools.partial(cublas, weights)
            contenders["torch"] = functools.partial(torchs, weights)
            moved = 2 * M * (N + K)
            own = {"cublas": moved + 2 * N * K}
            draw = functools.partial(inputs, shape, weights)
            yield harness.Case(
                "linear", weights, shape, DTYPE, draw, contenders, bytes=int(moved + each * N * K), own_bytes=own
            )


def bench_linear_few_rows(benchmark, case):
    harness.bench(benchmark, case)
