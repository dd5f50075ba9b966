"""Attention: heads of 64 and 128 features, 512 to 32k tokens, causal and full; cuDNN, FA2 (of torch) and FA3 beside.

pytest benchmarks/ops/bench_attention.py
python -m benchmarks.run ops attention --out FILE [--quick] [--only native,deterministic,cudnn,fa2,fa3]

FLOPs: forward 4 B H S^2 D, half of it causal; backward 2.5 times as many. "deterministic" is our backward that adds in
one order. From 4,096 tokens on FA2 says what is right: the formula would take most of the time.
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


GROUPED = [Shape(B, S, 64, 8, 128) for B, S in ((1, 16384), (1, 4096), (1, 2048), (1, 1024), (4, 512))]
EQUAL = [Shape(B, S, 16, 16, 128) for B, S in ((1, 16384), (4, 4096), (8, 2048), (16, 1024), (16, 512))]
NARROW = [
    Shape(B, S, H, H, 64) for B, S, H in ((1, 16384, 16), (4, 4096, 32), (8, 2048, 32), (16, 1024, 16), (32, 512, 16))
]
CAUSAL = {
    "tiny": [Shape(1, 24, 2, 1, 16)],
    "quick": [GROUPED[0], EQUAL[2], NARROW[0]],
    "full": [*GROUPED, *EQUAL, *NARROW],
}
FULL = {
    "tiny": CAUSAL["tiny"],
    "quick": [],
    "full": [GROUPED[0], EQUAL[0], NARROW[0], *(shapes[i] for shapes in (GROUPED, EQUAL, NARROW) for i in (1, 2, 4))],
}
LONG = {"tiny": [], "quick": [], "full": [Shape(1, 32768, 64, 8, 128)]}
STEP = {"tiny": CAUSAL["tiny"], "quick": [], "full": [NARROW[0]]}  # forward and backward behind each other
FORMULA_TOKENS = 2048


def heads(shape: Shape, count: int, width: int, device: torch.device) -> Tensor:
    """(B, count, S, width), stored by token as a projection leaves it."""
    return torch.randn(shape.B, shape.S, count, width, device=device, dtype=DTYPE).transpose(1, 2)


def fwd_inputs(shape: Shape, causal: bool, device: torch.device, value_dim: int = 0, window: int = -1) -> tuple:
    """q, k, v, then scale, causal, window_left, window_right, softcap of the raw ops."""
    q, k = (heads(shape, count, shape.D, device) for count in (shape.Hq, shape.Hkv))
    v = heads(shape, shape.Hkv, value_dim or shape.D, device)
    return q, k, v, shape.D**-0.5, causal, window, -1, 0.0


def bwd_inputs(shape: Shape, causal: bool, device: torch.device, value_dim: int = 0, window: int = -1) -> tuple:
    q, k, v, *options = fwd_inputs(shape, causal, device, value_dim, window)
    o, lse = registry.call("attention_fwd", q, k, v, *options)
    return torch.randn_like(o), None, q, k, v, o, lse, *options, False


def step_inputs(shape: Shape, causal: bool, device: torch.device) -> tuple:
    inputs = fwd_inputs(shape, causal, device)
    return torch.randn_like(inputs[0]), *inputs


# ---- ours ----


def deterministic_bwd(*args) -> harness.Call:
    return harness.variants("attention_bwd", keep=(0, 1, 2))["native"](*args[:-1], True)


def step(variant: str, do: Tensor, q: Tensor, k: Tensor, v: Tensor, *options) -> harness.Call:
    if reason := registry.why_not("attention_bwd", variant, do, None, q, k, v, q, q[..., 0], *options, False):
        raise NotImplementedError(reason)
    forward, backward = (registry.OPS[f"attention_{name}"].overloads[variant] for name in ("fwd", "bwd"))

    def call() -> tuple:
        o, lse = forward(q, k, v, *options)
        return tuple(backward(do, None, q, k, v, o, lse, *options, False))

    return call


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


def ref_step(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *options) -> tuple:
    def one_head(do: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple:
        o, lse = ref.fwd(q, k, v, *options)
        return ref.bwd(do, None, q, k, v, o, lse, *options, False)

    return by_key_head(one_head, (do, q, k, v), k.shape[1])


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


def sdpa_step(backend: SDPBackend, do: Tensor, q: Tensor, k: Tensor, v: Tensor, *options) -> harness.Call:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    forward = sdpa_fwd(backend, *leaves, *options)
    return lambda: torch.autograd.grad(*forward(), leaves, do)


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
BWD = harness.variants("attention_bwd", keep=(0, 1, 2)) | {"ref": harness.eager(ref_bwd)}
BWD |= {"deterministic": deterministic_bwd} | sdpa(sdpa_bwd)
BOTH = {variant: functools.partial(step, variant) for variant in registry.NAMESPACE}
BOTH |= {"ref": harness.eager(ref_step)} | sdpa(sdpa_step)


def cases(size: str) -> Iterator[harness.Case]:
    """In the order in which a run that is cut short misses them least."""
    for shape in STEP[size]:
        inputs = functools.partial(step_inputs, shape, True)
        yield case("fwd+bwd causal", shape, inputs, BOTH, 7 * shape.B * shape.Hq * shape.S**2 * shape.D)
    for shape in CAUSAL[size]:
        yield from passes(shape, causal=True)
    for shape in FULL[size]:
        yield from passes(shape, causal=False)
    for shape in LONG[size]:
        yield from passes(shape, causal=True)


def passes(shape: Shape, causal: bool) -> Iterator[harness.Case]:
    mask, flops = ("causal", 2) if causal else ("full", 4)
    flops *= shape.B * shape.Hq * shape.S**2 * shape.D
    yield case(f"fwd {mask}", shape, functools.partial(fwd_inputs, shape, causal), FWD, flops)
    yield case(f"bwd {mask}", shape, functools.partial(bwd_inputs, shape, causal), BWD, flops * 5 // 2)


def case(name: str, shape: Shape, inputs: Callable, contenders: dict[str, harness.Bind], flops: int) -> harness.Case:
    right = contenders["fa2"] if shape.S > FORMULA_TOKENS else None
    return harness.Case("attention", name, shape, DTYPE, inputs, contenders, flops=flops, right=right)


def bench_attention(benchmark, case):
    harness.bench(benchmark, case)
