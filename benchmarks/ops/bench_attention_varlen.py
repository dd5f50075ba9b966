"""Attention of packed sequences, through a sliding window, with heads of 96, 192, 256 features; FA3, cuDNN beside.

pytest benchmarks/ops/bench_attention_varlen.py
python -m benchmarks.run ops attention_varlen --out FILE [--quick] [--only native,triton,cudnn,fa3]

FLOPs are those of the keys that may be seen: 4 D for each query, head and key, backward 2.5 times as many. "padded" is
our dense kernel on packed sequences that are all equally long: what varlen costs is the ratio to it.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks import harness
from benchmarks.ops.bench_attention import (
    DTYPE,
    FORMULA_TOKENS,
    Shape,
    bwd_inputs,
    fa3_fwd,
    fwd_inputs,
    ref_bwd,
    ref_fwd,
    sdpa_bwd,
    sdpa_fwd,
)
from cs336.ops import registry

WINDOW = 1024
LENGTHS = {"tiny": [Shape(2, 24, 1, 1, 16)], "quick": [Shape(8, 2048, 16, 16, 128)]}
LENGTHS["full"] = [*LENGTHS["quick"], Shape(2, 8192, 16, 16, 128), Shape(8, 2048, 32, 32, 64)]
WINDOWED = {"tiny": [Shape(1, 24, 1, 1, 16)], "quick": [Shape(1, 16384, 16, 16, 128)]}
WINDOWED["full"] = [*WINDOWED["quick"], Shape(1, 16384, 16, 16, 64)]
WIDE = {"tiny": [(Shape(1, 24, 1, 1, 16), 8)], "quick": [(Shape(1, 16384, 16, 16, 256), 256)]}  # and features of v
WIDE["full"] = [
    *WIDE["quick"],
    (Shape(1, 16384, 16, 16, 192), 128),
    (Shape(1, 16384, 16, 16, 96), 96),
    (Shape(4, 4096, 16, 16, 256), 256),
]


def seen(S: int, window: int) -> int:
    """Pairs of a query and a key that a causal window of so many keys before the query shows."""
    return sum(min(i, window) + 1 for i in range(S))


def packed_inputs(shape: Shape, device: torch.device) -> tuple:
    B, S, H, _, D = shape
    q, k, v = (torch.randn(B * S, H, D, device=device, dtype=DTYPE) for _ in range(3))
    ends = torch.arange(0, B * S + 1, S, device=device, dtype=torch.int32)
    return q, k, v, ends, ends, S, S, D**-0.5, True, -1, -1, 0.0


def packed_bwd_inputs(shape: Shape, device: torch.device) -> tuple:
    q, k, v, *rest = packed_inputs(shape, device)
    o, lse = registry.call("attention_varlen_fwd", q, k, v, *rest)
    return torch.randn_like(o), None, q, k, v, o, lse, *rest, False


def padded_fwd(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, _, S: int, __, *options) -> harness.Call:
    q, k, v = (x.unflatten(0, (-1, S)).transpose(1, 2) for x in (q, k, v))
    return lambda: (registry.call("attention_fwd", q, k, v, *options)[0].transpose(1, 2).flatten(0, 1),)


def padded_bwd(do: Tensor, dlse: None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *rest) -> harness.Call:
    _, _, S, _, *options = rest
    do, q, k, v, o = (x.unflatten(0, (-1, S)).transpose(1, 2) for x in (do, q, k, v, o))
    lse = lse.unflatten(1, (-1, S)).transpose(0, 1).contiguous()

    def call() -> tuple:
        grads = registry.call("attention_bwd", do, dlse, q, k, v, o, lse, *options)
        return tuple(grad.transpose(1, 2).flatten(0, 1) for grad in grads)

    return call


def fa3_varlen(q, k, v, cu, _, S: int, __, scale: float, causal: bool, *___) -> harness.Call:
    from flash_attn_interface import flash_attn_varlen_func

    def call() -> tuple:
        o = flash_attn_varlen_func(q, k, v, cu, cu, S, S, softmax_scale=scale, causal=causal)
        return (o[0] if isinstance(o, tuple) else o,)

    return call


FWD = harness.variants("attention_fwd", keep=(0,)) | {"ref": harness.eager(ref_fwd), "fa3": fa3_fwd}
BWD = harness.variants("attention_bwd", keep=(0, 1, 2)) | {"ref": harness.eager(ref_bwd)}
WIDE_FWD = FWD | {"cudnn": functools.partial(sdpa_fwd, SDPBackend.CUDNN_ATTENTION)}
WIDE_BWD = BWD | {"cudnn": functools.partial(sdpa_bwd, SDPBackend.CUDNN_ATTENTION)}
PACKED_FWD = harness.variants("attention_varlen_fwd", keep=(0,)) | {"padded": padded_fwd, "fa3": fa3_varlen}
PACKED_BWD = harness.variants("attention_varlen_bwd", keep=(0, 1, 2)) | {"padded": padded_bwd}


def cases(size: str) -> Iterator[harness.Case]:
    case = functools.partial(harness.Case, "attention_varlen")
    for shape in LENGTHS[size]:
        flops = 4 * shape.B * shape.Hq * shape.D * seen(shape.S, shape.S)
        yield case("fwd packed", shape, DTYPE, functools.partial(packed_inputs, shape), PACKED_FWD, flops=flops)
        inputs = functools.partial(packed_bwd_inputs, shape)
        yield case("bwd packed", shape, DTYPE, inputs, PACKED_BWD, flops=flops * 5 // 2)
    for shape in WINDOWED[size]:
        flops = 4 * shape.B * shape.Hq * shape.D * seen(shape.S, WINDOW)
        inputs = functools.partial(fwd_inputs, shape, True, window=WINDOW)
        yield case(f"fwd window {WINDOW}", shape, DTYPE, inputs, FWD, flops=flops)
        inputs = functools.partial(bwd_inputs, shape, True, window=WINDOW)
        yield case(f"bwd window {WINDOW}", shape, DTYPE, inputs, BWD, flops=flops * 5 // 2)
    for shape, E in WIDE[size]:
        D, pairs = shape.D, shape.B * shape.Hq * seen(shape.S, shape.S)
        judge = SDPBackend.FLASH_ATTENTION if D == E else SDPBackend.EFFICIENT_ATTENTION
        right = [functools.partial(f, judge) if shape.S > FORMULA_TOKENS else None for f in (sdpa_fwd, sdpa_bwd)]
        inputs = functools.partial(fwd_inputs, shape, True, value_dim=E)
        yield case(f"fwd {D}/{E}", shape, DTYPE, inputs, WIDE_FWD, flops=2 * pairs * (D + E), right=right[0])
        inputs = functools.partial(bwd_inputs, shape, True, value_dim=E)
        yield case(f"bwd {D}/{E}", shape, DTYPE, inputs, WIDE_BWD, flops=2 * pairs * (3 * D + 2 * E), right=right[1])


def bench_attention_varlen(benchmark, case):
    harness.bench(benchmark, case)
