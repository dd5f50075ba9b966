"""Attention of packed sequences, through a sliding window, with heads of 96, 192, 256 features; FA3, cuDNN beside.

pytest benchmarks/ops/bench_attention_varlen.py
python -m benchmarks.run ops attention_varlen --out FILE [--quick] [--only native,cudnn,fa3]

FLOPs are those of the keys that may be seen: 4 D for each query, head and key, backward 2.5 times as many. "padded" is
our dense kernel on packed sequences that are all equally long: what varlen costs is the ratio to it.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.ops.bench_attention import DTYPE, fa3_fwd, ref_bwd, ref_fwd, sdpa, sdpa_fwd
from cs336.ops import registry

WINDOW = 1024
# B, S, heads, features of q and k, features of v
LENGTHS = {"tiny": [(2, 24, 1, 16)], "quick": [(8, 2048, 16, 128)]}
LENGTHS["full"] = [*LENGTHS["quick"], (2, 8192, 16, 128), (8, 2048, 32, 64)]
WIDE = {"tiny": [(1, 24, 1, 16, 8)], "quick": [(1, 16384, 16, 256, 256)]}
WIDE["full"] = [*WIDE["quick"], (1, 16384, 16, 192, 128), (1, 16384, 16, 96, 96), (4, 4096, 16, 256, 256)]
WINDOWED = {"tiny": [(1, 24, 1, 16)], "quick": [(1, 16384, 16, 128)]}
WINDOWED["full"] = [*WINDOWED["quick"], (1, 16384, 16, 64)]


def seen(S: int, window: int) -> int:
    """Pairs of a query and a key that a causal window of so many keys before the query shows."""
    return sum(min(i, window) + 1 for i in range(S))


def normal(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=DTYPE)


def dense_inputs(B: int, S: int, H: int, D: int, E: int, window: int, device: torch.device) -> tuple:
    q, k, v = (normal(B, S, H, width, device=device).transpose(1, 2) for width in (D, D, E))
    return q, k, v, D**-0.5, True, window, -1, 0.0


def dense_bwd_inputs(B: int, S: int, H: int, D: int, E: int, window: int, device: torch.device) -> tuple:
    q, k, v, *rest = dense_inputs(B, S, H, D, E, window, device)
    o, lse = registry.call("attention_fwd", q, k, v, *rest)
    return normal(B, S, H, E, device=device).transpose(1, 2), None, q, k, v, o, lse, *rest, False


def packed_inputs(B: int, S: int, H: int, D: int, device: torch.device) -> tuple:
    q, k, v = (normal(B * S, H, D, device=device) for _ in range(3))
    ends = torch.arange(0, B * S + 1, S, device=device, dtype=torch.int32)
    return q, k, v, ends, ends, S, S, D**-0.5, True, -1, -1, 0.0


def packed_bwd_inputs(B: int, S: int, H: int, D: int, device: torch.device) -> tuple:
    q, k, v, *rest = packed_inputs(B, S, H, D, device)
    o, lse = registry.call("attention_varlen_fwd", q, k, v, *rest)
    return normal(B * S, H, D, device=device), None, q, k, v, o, lse, *rest, False


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


CUDNN = {"cudnn": sdpa(sdpa_fwd)["cudnn"]}
FWD = harness.variants("attention_fwd", keep=(0,)) | {"ref": harness.eager(ref_fwd), "fa3": fa3_fwd}
BWD = harness.variants("attention_bwd", keep=(0, 1, 2)) | {"ref": harness.eager(ref_bwd)}
PACKED_FWD = harness.variants("attention_varlen_fwd", keep=(0,)) | {"padded": padded_fwd, "fa3": fa3_varlen}
PACKED_BWD = harness.variants("attention_varlen_bwd", keep=(0, 1, 2)) | {"padded": padded_bwd}


def cases(size: str) -> Iterator[harness.Case]:
    case = functools.partial(harness.Case, "attention_varlen")
    for B, S, H, D in LENGTHS[size]:
        flops = 4 * B * H * D * seen(S, S)
        shape = (B, S, H, H, D)
        yield case("fwd packed", shape, DTYPE, functools.partial(packed_inputs, B, S, H, D), PACKED_FWD, flops=flops)
        inputs = functools.partial(packed_bwd_inputs, B, S, H, D)
        yield case("bwd packed", shape, DTYPE, inputs, PACKED_BWD, flops=flops * 5 // 2)
    for B, S, H, D in WINDOWED[size]:
        shape, flops = (B, S, H, H, D), 4 * B * H * D * seen(S, WINDOW)
        inputs = functools.partial(dense_inputs, B, S, H, D, D, WINDOW)
        yield case(f"fwd window {WINDOW}", shape, DTYPE, inputs, FWD, flops=flops)
        inputs = functools.partial(dense_bwd_inputs, B, S, H, D, D, WINDOW)
        yield case(f"bwd window {WINDOW}", shape, DTYPE, inputs, BWD, flops=flops * 5 // 2)
    for B, S, H, D, E in WIDE[size]:
        flops = 2 * B * H * (D + E) * seen(S, S)
        inputs = functools.partial(dense_inputs, B, S, H, D, E, -1)
        yield case(f"fwd {D}/{E}", (B, S, H, H, D), DTYPE, inputs, FWD | CUDNN, flops=flops)


def bench_attention_varlen(benchmark, case):
    harness.bench(benchmark, case)
