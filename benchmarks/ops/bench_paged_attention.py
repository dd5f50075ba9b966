"""Decoding from a paged cache: 1 to 256 sequences of 1k to 128k tokens, 32 query and 8 key-value heads of 128 features,
pages of 16; FlashInfer and FA3 beside.

pytest benchmarks/ops/bench_paged_attention.py
python -m benchmarks.run ops paged_attention --out FILE [--quick] [--only native,flashinfer]

Bytes: keys and values once, B T Hkv (D + E) elements. FlashInfer's plan is made before the clock starts.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from benchmarks import harness

DTYPE = torch.bfloat16


class Shape(NamedTuple):
    B: int
    T: int  # tokens of each sequence
    H: int
    Hkv: int
    D: int
    page: int
    Q: int


SHAPES = {
    "tiny": [Shape(2, 40, 4, 2, 16, 16, 1)],
    "quick": [Shape(B, T, 32, 8, 128, 16, 1) for B, T in ((1, 1024), (1, 8192), (64, 4096))],
    "full": [
        *(
            Shape(B, T, 32, 8, 128, 16, 1)
            for B, T in ((1, 1024), (1, 8192), (1, 131072), (16, 8192), (64, 4096), (128, 8192), (256, 1024))
        ),
        Shape(64, 4096, 32, 8, 128, 64, 1),
        Shape(64, 4096, 32, 8, 128, 16, 4),
        Shape(64, 4096, 64, 8, 64, 16, 1),
        Shape(64, 4096, 8, 8, 128, 16, 1),
    ],
}


def inputs(shape: Shape, invariant: bool, device: torch.device) -> tuple:
    B, T, H, Hkv, D, page, Q = shape
    each = -(-T // page)
    caches = (torch.randn(B * each, page, Hkv, D, device=device, dtype=DTYPE) for _ in range(2))
    table = torch.randperm(B * each, device=device).view(B, each).to(torch.int32)
    lens = torch.full((B,), T, dtype=torch.int32, device=device)
    q = torch.randn(B, Q, H, D, device=device, dtype=DTYPE)
    return q, *caches, table, lens, D**-0.5, -1, 0.0, None, invariant, False


def flashinfer(q, k_cache, v_cache, table, lens, scale, *_) -> harness.Call:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    if q.shape[1] != 1:
        raise NotImplementedError("FlashInfer's decode takes one query a sequence")
    (B, each), page, (H, D) = table.shape, k_cache.shape[1], q.shape[2:]
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    indptr = torch.arange(B + 1, dtype=torch.int32, device=q.device) * each
    last = (lens - 1) % page + 1
    wrapper.plan(
        indptr, table.flatten(), last, H, k_cache.shape[2], D, page,
        q_data_type=q.dtype, kv_data_type=k_cache.dtype, sm_scale=scale,
    )  # fmt: skip
    return lambda: (wrapper.run(q[:, 0], (k_cache, v_cache))[:, None],)


def fa3(q, k_cache, v_cache, table, lens, scale, *_) -> harness.Call:
    from flash_attn_interface import flash_attn_with_kvcache

    def call() -> tuple:
        o = flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=lens, page_table=table, softmax_scale=scale, causal=True
        )
        return (o[0] if isinstance(o, tuple) else o,)

    return call


CONTENDERS = harness.variants("paged_attention", keep=(0,)) | {"flashinfer": flashinfer, "fa3": fa3}


def cases(size: str) -> Iterator[harness.Case]:
    for shape in SHAPES[size]:
        moved = 2 * shape.B * shape.T * shape.Hkv * shape.D * DTYPE.itemsize
        for name, invariant in (("decode", True), ("decode cut anywhere", False)):
            draw = functools.partial(inputs, shape, invariant)
            yield harness.Case("paged_attention", name, shape, DTYPE, draw, CONTENDERS, bytes=moved)


def bench_paged_attention(benchmark, case):
    harness.bench(benchmark, case)
