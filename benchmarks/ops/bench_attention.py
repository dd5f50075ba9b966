"""Attention: heads of 64 and 128 features, 512 to 16k tokens, causal and full; cuDNN, FA2 (of torch) and FA3 beside.

pytest benchmarks/ops/bench_attention.py
python -m benchmarks.run ops attention --out FILE [--quick] [--only native,cudnn,fa3]

FLOPs: forward 4 B H S^2 D, half of it causal; backward 2.5 times as many.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import harness
from cs336.ops import registry
from cs336.ops.ref import attention as ref

DTYPE = torch.bfloat16


class Shape(NamedTuple):
    B: int
    S: int
    Hq: int
    Hkv: int
    D: int


SHAPES = {
    "tiny": [Shape(1, 24, 2, 1, 16)],
    "quick": [Shape(1, 16384, 64, 8, 128), Shape(8, 2048, 16, 16, 128), Shape(1, 16384, 16, 16, 64)],
    "full": [
        *(Shape(1, S, 64, 8, 128) for S in (16384, 4096, 2048, 1024)),
        *(Shape(B, S, 16, 16, 128) for B, S in ((1, 16384), (4, 4096), (8, 2048), (16, 512))),
        *(
            Shape(B, S, H, H, 64)
            for B, S, H in ((1, 16384, 16), (4, 4096, 32), (8, 2048, 32), (16, 1024, 16), (32, 512, 16))
        ),
    ],
}


def options(shape: Shape, causal: bool) -> tuple:
    """scale, causal, window_left, window_right, softcap of the raw ops."""
    return shape.D**-0.5, causal, -1, -1, 0.0


def heads(shape: Shape, count: int, device: torch.device) -> Tensor:
    """(B, count, S, D), stored by token as a projection leaves it."""
    return torch.randn(shape.B, shape.S, count, shape.D, device=device, dtype=DTYPE).transpose(1, 2)


def fwd_inputs(shape: Shape, causal: bool, device: torch.device) -> tuple:
    q, k, v = (heads(shape, count, device) for count in (shape.Hq, shape.Hkv, shape.Hkv))
    return q, k, v, *options(shape, causal)


def bwd_inputs(shape: Shape, causal: bool, deterministic: bool, device: torch.device) -> tuple:
    q, k, v, *rest = fwd_inputs(shape, causal, device)
    o, lse = registry.call("attention_fwd", q, k, v, *rest)
    return heads(shape, shape.Hq, device), None, q, k, v, o, lse, *rest, deterministic


# ---- the reference, a key head at a time: all of them at once do not fit in memory ----


def by_key_head(function: Callable[..., tuple], tensors: tuple[Tensor, ...], kv_heads: int) -> tuple:
    """tensors: (B, heads, ...) each; what `function` returns of a key head's share of them, put together again."""
    parts = [
        [function(*(t[b : b + 1].chunk(kv_heads, 1)[h] for t in tensors)) for h in range(kv_heads)]
        for b in range(tensors[0].shape[0])
    ]
    by_batch = [[torch.cat(outputs, 1) for outputs in zip(*batch, strict=True)] for batch in parts]
    return tuple(torch.cat(outputs) for outputs in zip(*by_batch, strict=True))


def ref_fwd(q: Tensor, k: Tensor, v: Tensor, *rest) -> tuple:
    return by_key_head(lambda q, k, v: ref.fwd(q, k, v, *rest)[:1], (q, k, v), k.shape[1])


def ref_bwd(do: Tensor, dlse: None, *rest) -> tuple:
    q, k, v, o, lse, *options = rest
    one_head = lambda do, q, k, v, o, lse: ref.bwd(do, None, q, k, v, o, lse, *options)  # noqa: E731
    return by_key_head(one_head, (do, q, k, v, o, lse), k.shape[1])


# ---- peers ----


def sdpa_fwd(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, *_) -> harness.Call:
    if not q.is_cuda:
        raise NotImplementedError("a kernel of CUDA")

    def call() -> tuple:
        with sdpa_kernel(backend):
            o = F.scaled_dot_product_attention(
                q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        return (o,)

    return call


def sdpa_bwd(backend: SDPBackend, do: Tensor, dlse: None, *rest) -> harness.Call:
    """Autograd runs a backward on the stream of its forward, and the default stream cannot be captured in a graph."""
    q, k, v, _, _, *options = rest
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    forward = sdpa_fwd(backend, *leaves, *options)
    here, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        (o,) = forward()
    here.wait_stream(side)
    return lambda: torch.autograd.grad(o, leaves, do, retain_graph=True)


def fa3_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, left: int, *_) -> harness.Call:
    from flash_attn_interface import flash_attn_func

    by_token = [t.transpose(1, 2) for t in (q, k, v)]
    window = (left, 0) if left >= 0 else (-1, -1)

    def call() -> tuple:
        o = flash_attn_func(*by_token, softmax_scale=scale, causal=causal, window_size=window)
        return ((o[0] if isinstance(o, tuple) else o).transpose(1, 2),)

    return call


def sdpa(bind: Callable[..., harness.Call]) -> dict[str, harness.Bind]:
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}
    return {name: functools.partial(bind, backend) for name, backend in backends.items()}


FWD = harness.variants("attention_fwd", keep=(0,)) | {"ref": harness.eager(ref_fwd)} | sdpa(sdpa_fwd) | {"fa3": fa3_fwd}
BWD = harness.variants("attention_bwd", keep=(0, 1, 2)) | {"ref": harness.eager(ref_bwd)} | sdpa(sdpa_bwd)


def cases(size: str) -> Iterator[harness.Case]:
    for shape in SHAPES[size]:
        for causal in (True, False) if shape.S >= 16384 or size == "tiny" else (True,):
            flops = 4 * shape.B * shape.Hq * shape.S**2 * shape.D // (2 if causal else 1)
            mask = "causal" if causal else "full"
            inputs = functools.partial(fwd_inputs, shape, causal)
            yield harness.Case("attention", f"fwd {mask}", shape, DTYPE, inputs, FWD, flops=flops)
            for deterministic in (False, True):
                name = f"bwd {mask}{' deterministic' if deterministic else ''}"
                inputs = functools.partial(bwd_inputs, shape, causal, deterministic)
                yield harness.Case("attention", name, shape, DTYPE, inputs, BWD, flops=flops * 5 // 2)


def bench_attention(benchmark, case):
    harness.bench(benchmark, case)
