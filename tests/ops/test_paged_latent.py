"""Paged attention whose values are the beginning of its keys (latent attention), against the formula in fp64."""

import itertools

import pytest
import torch
from attentions import BF16, CUDA, F16, F32
from paged import pool
from test_paged_attention import compare

from cs336 import ops
from cs336.ops import registry

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under Triton's interpreter
OPTIONS = 1.0, -1, 0.0, None
if CUDA:
    LENGTHS = [0, 1, 15, 64, 65, 255, 256, 257, 1000, 4097, 20000]
    WIDTHS, DTYPES = [(512, 64), (256, 32), (384, 96), (16, 8)], [BF16, F16]
    HEADS = [(1, 1), (16, 2), (16, 8), (20, 1), (128, 1), (128, 8)]
else:
    LENGTHS = [0, 1, 17, 300]
    WIDTHS, DTYPES, HEADS = [(32, 16), (24, 6)], [F32, BF16], [(1, 1), (3, 2), (20, 1), (5, 8)]


def latents(lengths, L, R, dtype, device, page=16):
    """k_cache and its beginning, table, lengths; and the dense keys and values."""
    k, _, table, lens, dense = pool(lengths, page, 1, L + R, 1, dtype, device)
    return (k, k[..., :L], table, lens), [(x, x[..., :L]) for x, _ in dense]


def refused(variant, op, *args):
    if reason := registry.why_not(op, variant, *args, *OPTIONS):
        pytest.skip(reason)


def decode(variant, device, lengths, L, R, H, Q, dtype, page=16):
    cache, dense = latents(lengths, L, R, dtype, device, page)
    q = torch.randn(len(lengths), Q, H, L + R, device=device).to(dtype)
    refused(variant, "paged_attention", q, *cache)
    o, lse = ops.paged_attention(q, *cache, return_lse=True)
    compare(o, lse, list(q), dense)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("L", "R"), WIDTHS)
def test_widths(variant, device, L, R, dtype):
    decode(variant, device, LENGTHS, L, R, 16 if CUDA else 4, 1, dtype)


@pytest.mark.parametrize(("H", "Q"), HEADS)
def test_heads_and_queries(variant, device, H, Q):
    decode(variant, device, LENGTHS, *WIDTHS[0], H, Q, DTYPES[-1], page=64)


def test_single_precision(variant, device):
    decode(variant, device, LENGTHS[:6], 48, 16, 5, 3, F32, page=24)


def test_a_sequence_gets_the_same_bits_in_any_batch(variant, device):
    if variant == "ref":
        pytest.skip("plain torch does not promise it")
    (k, v, table, lens), _ = latents(LENGTHS, *WIDTHS[0], DTYPES[-1], device)
    q = torch.randn(len(LENGTHS), 2, 6, k.shape[-1], device=device).to(DTYPES[-1])
    refused(variant, "paged_attention", q, k, v, table, lens)
    together = ops.paged_attention(q, k, v, table, lens)
    for b, length in enumerate(LENGTHS):
        alone = slice(b, b + 1)
        o = ops.paged_attention(q[alone], k, v, table[alone, : max(1, -(-length // 16))], lens[alone])
        assert torch.equal(o, together[alone])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("L", "R"), WIDTHS[:2])
def test_prefill_and_its_chunks(variant, device, fixed_order, L, R, dtype):
    lengths, queries = [37, 20, 0, 1, 300 if CUDA else 60], [20, 20, 0, 1, 50]
    cache, dense = latents(lengths, L, R, dtype, device)
    q = torch.randn(sum(queries), 3, L + R, device=device).to(dtype)
    cu = torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32, device=device)
    refused(variant, "paged_prefill", q, *cache, cu, 50)
    o, lse = ops.paged_prefill(q, *cache, cu, max_seqlen_q=50, return_lse=True)
    compare(o.split(queries), lse.split(queries, 1), q.split(queries), dense)
    if variant == "ref":
        return
    k, v, table, _ = cache
    for first, last in ((0, 1), (1, 30), (30, 50)):  # of the last sequence
        rows, ints = (
            slice(sum(queries) - 50 + first, sum(queries) - 50 + last),
            {"dtype": torch.int32, "device": device},
        )
        lens, ends = torch.tensor([lengths[-1] - 50 + last], **ints), torch.tensor([0, last - first], **ints)
        part = ops.paged_prefill(q[rows], k, v, table[-1:], lens, ends, max_seqlen_q=last - first)
        assert torch.equal(part, o[rows])


def test_with_options_and_without_sequences(variant, device):
    """A window, a soft-cap or sinks go another way; no row, no page, no launch."""
    cache, dense = latents([40, 3], 16, 8, DTYPES[0], device)
    q = torch.randn(2, 2, 3, 24, device=device).to(DTYPES[0])
    refused(variant, "paged_attention", q, *cache)
    sinks = torch.tensor([-1.0, 0.0, 2.0], device=device)
    for options in ({"window": 5}, {"softcap": 2.0}, {"sinks": sinks}):
        o, lse = ops.paged_attention(q, *cache, **options, return_lse=True)
        compare(o, lse, list(q), dense, **options)
    assert ops.paged_attention(q[:0], *cache[:2], *(x[:0] for x in cache[2:])).shape == (0, 2, 3, 16)


def test_what_is_read_once():
    pytest.importorskip("triton")
    from cs336.ops.triton.paged_latent import fits

    k = torch.zeros(3, 16, 1, 24)
    assert fits(k, k[..., :16], *OPTIONS[1:])
    for v in (k, k[..., 8:], k[..., :16].clone(), k[:, ::2, :, :16]):
        assert not fits(k, v, *OPTIONS[1:])
    assert not fits(torch.zeros(3, 16, 2, 24), torch.zeros(3, 16, 2, 16), *OPTIONS[1:])
    assert not any(fits(k, k[..., :16], *options) for options in ((5, 0.0, None), (-1, 2.0, None), (-1, 0.0, k)))


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_one_captured_graph_serves_changing_lengths():
    lengths = [5000, 1, 0, 700, 64, 2048]
    (k, v, table, lens), dense = latents(lengths, 512, 64, BF16, "cuda")
    q = torch.randn(len(lengths), 1, 16, 576, device="cuda", dtype=BF16)
    ops.paged_attention(q, k, v, table, lens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = ops.paged_attention(q, k, v, table, lens, return_lse=True)
    for cut in (lengths, [17, 1, 0, 699, 63, 1], [4999, 0, 0, 1, 1, 2000], [0] * 6, lengths):
        lens.copy_(torch.tensor(cut, dtype=torch.int32))
        o.fill_(torch.nan)
        graph.replay()
        compare(o, lse, list(q), [(k[:n], v[:n]) for (k, v), n in zip(dense, cut, strict=True)])
        assert torch.equal(o, ops.paged_attention(q, k, v, table, lens))
