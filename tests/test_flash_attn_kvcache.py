import pytest
import torch
from close import assert_close_to_ref
from ops.attentions import BF16, CUDA, F32, F64, definition

import cs336
from cs336 import flash_attn

DTYPE, D = (BF16, 64) if CUDA else (F32, 16)

CASES = [
    ({}, {"causal": False}),
    ({"causal": True, "softmax_scale": 0.2}, {"causal": True, "scale": 0.2}),
    ({"causal": True, "window_size": (5, 0)}, {"causal": True, "window": (5, None)}),
    ({"causal": True, "softcap": 3.0}, {"causal": True, "softcap": 3.0}),
]


def cache(device, paged, lengths, capacity=48, page=16):
    """k and v of B sequences as a cache, with NaN behind their lengths, and the block table or None."""
    B = len(lengths)
    dense = torch.randn(2, B, capacity, 2, D, device=device).to(DTYPE)
    stored = dense.clone()
    for b, n in enumerate(lengths):
        stored[:, b, n:] = torch.nan
    if not paged:
        return dense, stored.unbind(0), None
    table = torch.randperm(B * capacity // page, device=device).view(B, -1).to(torch.int32)
    pages = torch.empty(2, B * capacity // page, page, 2, D, device=device, dtype=DTYPE)
    pages[:, table.flatten().long()] = stored.view(2, -1, page, 2, D)
    return dense, pages.unbind(0), table


def formula(q, dense, lengths, dtype, causal, window=None, **options):
    outs, lses = [], []
    for b, n in enumerate(lengths):
        args = (x.to(dtype).transpose(0, 1)[None] for x in (q[b], dense[0, b, :n], dense[1, b, :n]))
        o, lse = definition(*args, causal=causal, window=window, **options)
        outs.append(o[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.stack(outs), torch.stack(lses)


def compare(got, q, dense, lengths, **options):
    want, torchs = (formula(q, dense, lengths, dtype, **options) for dtype in (F64, DTYPE))
    wide = formula(q, dense, lengths, F32, **options)
    assert_close_to_ref(got[0], want[0], torchs[0], scale=1.0)
    assert torch.equal(got[1].isinf(), want[1].isinf())  # queries that see no key
    assert_close_to_ref(*(x[1].masked_fill(want[1].isinf(), 0) for x in (got, want, wide)), scale=4.0)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("S", [1, 3, 11])
@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({}, {"causal": False}),
        ({"causal": True, "softmax_scale": 0.2}, {"causal": True, "scale": 0.2}),
        (
            {"causal": True, "window_size": (5, 0), "softcap": 3.0},
            {"causal": True, "window": (5, None), "softcap": 3.0},
        ),
    ],
    ids=str,
)
def test_against_the_definition(device, given, meant, S, paged):
    lengths = [20, 37, 11]
    dense, (k, v), table = cache(device, paged, lengths)
    q = torch.randn(3, S, 4, D, device=device).to(DTYPE)
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    got = cs336.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=lens, block_table=table, **given, return_softmax_lse=True
    )
    compare(got, q, dense, lengths, **meant)


@pytest.mark.parametrize("paged", [False, True])
def test_appends_new_tokens_first(device, paged):
    lengths, new = [20, 0, 37], 4
    dense, (k, v), table = cache(device, paged, lengths)
    fresh = torch.randn(2, 3, new, 2, D, device=device).to(DTYPE)
    for b, n in enumerate(lengths):
        dense[:, b, n : n + new] = fresh[:, b]
    q = torch.randn(3, new, 4, D, device=device).to(DTYPE)
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    got = cs336.flash_attn_with_kvcache(
        q, k, v, *fresh, cache_seqlens=lens, block_table=table, causal=True, return_softmax_lse=True
    )
    compare(got, q, dense, [n + new for n in lengths], causal=True)
    assert lens.tolist() == lengths


def test_rows_of_a_larger_cache_and_one_length(device):
    dense, (k, v), _ = cache(device, False, [48] * 5)
    rows = torch.tensor([3, 0], dtype=torch.int32, device=device)
    q = torch.randn(2, 1, 4, D, device=device).to(DTYPE)
    got = cs336.flash_attn_with_kvcache(q, k, v, cache_batch_idx=rows, cache_seqlens=30, return_softmax_lse=True)
    compare(got, q, dense[:, [3, 0]], [30, 30], causal=True)
    whole = cs336.flash_attn_with_kvcache(q, k, v, cache_batch_idx=rows, return_softmax_lse=True)
    compare(whole, q, dense[:, [3, 0]], [48, 48], causal=True)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_rotary(device, causal, interleaved):
    """Rotation by angle position * frequency: complex numbers say it in one line."""
    lengths, new, R = [20, 3], 2, D // 2
    dense, (k, v), _ = cache(device, False, lengths)
    angles = torch.arange(48, device=device)[:, None] * torch.logspace(0, -2, R // 2, device=device)
    fresh = torch.randn(2, 2, new, 2, D, device=device).to(DTYPE)
    q = torch.randn(2, new, 4, D, device=device).to(DTYPE)

    def rotated(x, position):
        order = torch.arange(R).view(-1, 2) if interleaved else torch.arange(R).view(2, -1).T
        pairs = torch.view_as_complex(x[..., order].double().contiguous())
        turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles[0]).double(), angles[position].double()))
        out = x.clone()
        out[..., order] = turned.to(x.dtype)
        return out

    rotated_q = q.clone()
    for b, n in enumerate(lengths):
        dense[1, b, n : n + new] = fresh[1, b]
        for i in range(new):
            dense[0, b, n + i] = rotated(fresh[0, b, i], n + i)
            rotated_q[b, i] = rotated(q[b, i], n + i if causal else n)
    got = cs336.flash_attn_with_kvcache(
        q, k, v, *fresh, angles.cos(), angles.sin(), torch.tensor(lengths, dtype=torch.int32, device=device),
        causal=causal, rotary_interleaved=interleaved, return_softmax_lse=True,
    )  # fmt: skip
    want = formula(rotated_q, dense, [n + new for n in lengths], F64, causal=causal)
    torch.testing.assert_close(got[0].double(), want[0], atol=3e-2 if CUDA else 1e-4, rtol=1e-2)
    torch.testing.assert_close(got[1].double(), want[1], atol=3e-2 if CUDA else 1e-4, rtol=1e-2)
    assert torch.equal(k[0, :20], dense[0, 0, :20])


LOCAL = [
    ({"window_size": (4, 3)}, {"window": (4, 3)}),
    ({"window_size": (-1, 2), "softcap": 3.0}, {"window": (None, 2), "softcap": 3.0}),
    ({"window_size": (-1, 0)}, {"causal": True}),
    ({"causal": True, "window_size": (4, 3)}, {"causal": True, "window": (4, None)}),
]


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("slopes", [None, "of heads", "of sequences"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("given", "meant"), [({}, {}), *LOCAL], ids=str)
def test_padding_on_the_left_slopes_and_windows_on_both_sides(device, given, meant, padded, slopes, paged):
    """What stands before the padding's end is NaN, and seen by nobody; a sequence may have no key at all."""
    lengths, begins = [20, 37, 11, 5], [3, 16, 0, 5] if padded else [0] * 4
    dense, (k, v), table = cache(device, paged, lengths)
    for b, n in enumerate(begins):
        for x in (k, v):
            for i in range(n):
                (x[b] if table is None else x[table[b, i // 16]])[i % 16 if paged else i] = torch.nan
    q = torch.randn(4, 7, 4, D, device=device).to(DTYPE)
    sizes = {"of heads": (4,), "of sequences": (4, 4)}
    alibi = None if slopes is None else torch.rand(sizes[slopes], device=device)
    lens, left = (torch.tensor(x, dtype=torch.int32, device=device) for x in (lengths, begins))
    options = {"cache_leftpad": left if padded else None, "alibi_slopes": alibi, **given}
    got = cs336.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=lens, block_table=table, **options, return_softmax_lse=True
    )
    for b, (begin, n) in enumerate(zip(begins, lengths, strict=True)):
        more = {"causal": False} | meant
        if alibi is not None:
            more["alibi_slopes"] = alibi if alibi.dim() == 1 else alibi[b]
        compare([x[b : b + 1] for x in got], q[b : b + 1], dense[:, b : b + 1, begin:], [n - begin], **more)


def test_rotary_with_padding_is_by_the_place_in_the_cache(device):
    """As flash-attn has it: the padding says what is seen, not where a token stands."""
    _, (k, v), _ = cache(device, False, [48])
    behind = k[:, 7:].clone(), v[:, 7:].clone()
    angles = torch.arange(48, device=device)[:, None] * torch.logspace(0, -2, D // 2, device=device)
    q, *new = torch.randn(3, 1, 3, 2, D, device=device).to(DTYPE)
    left = torch.tensor([7], dtype=torch.int32, device=device)
    got = cs336.flash_attn_with_kvcache(q, k, v, *new, angles.cos(), angles.sin(), 20, cache_leftpad=left, causal=True)
    tables = angles[7:].cos(), angles[7:].sin()
    want = cs336.flash_attn_with_kvcache(q, *behind, *new, *tables, 13, causal=True)
    torch.testing.assert_close(got, want, atol=2e-2 if CUDA else 1e-5, rtol=1e-2)
    assert torch.equal(k[:, 7:], behind[0])  # rotated alike


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("given", "meant"), [({}, {}), ({"causal": True}, {"causal": True}), *LOCAL], ids=str)
def test_packed_queries_and_pages(device, given, meant, grad):
    """flash_attn_varlen_func with a block_table: chunks of prompts behind prefixes in pages."""
    lengths, queries = [20, 37, 0, 11], [5, 1, 2, 11]
    dense, (k, v), table = cache(device, True, lengths)
    q = torch.randn(sum(queries), 4, D, device=device).to(DTYPE).requires_grad_(grad)
    cu_q, cu_k = (torch.tensor([0, *x], device=device).cumsum(0).to(torch.int32) for x in (queries, lengths))
    out, lse, _ = cs336.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 11, 37, **given, return_attn_probs=True, block_table=table
    )
    for b, n in enumerate(lengths):
        of_b = slice(cu_q[b], cu_q[b + 1])
        got = out[of_b].detach()[None], lse[:, of_b].detach()[None]
        compare(got, q[of_b].detach()[None], dense[:, b : b + 1], [n], **{"causal": False} | meant)
    if grad:
        out.float().square().sum().backward()
        assert q.grad is not None
        assert q.grad.isfinite().all()
        assert q.grad[:5].abs().sum() > 0


def test_refusals(device):
    _, (k, v), _ = cache(device, False, [48])
    q = torch.randn(1, 2, 4, D, device=device).to(DTYPE)
    new = {"k": q[:, :, :2], "v": q[:, :, :2], "cache_seqlens": 20}
    wide = v[0, :, 0]
    one = torch.zeros(1, 1, dtype=torch.int32, device=device)
    for error, match, options in (
        (ValueError, "alibi_slopes must be", {"alibi_slopes": torch.ones(3, device=device)}),
        (
            ValueError,
            r"cache_leftpad must be \(1,\)",
            {"cache_leftpad": torch.zeros(2, dtype=torch.int32, device=device)},
        ),
        (ValueError, "must be a tensor", {"cache_leftpad": [1]}),
        (ValueError, "window_size", {"window_size": (-2, 0)}),
        (ValueError, "together", {"k": q[:, :, :2]}),
        (ValueError, "rotary_cos", {"rotary_cos": q[0, :, 0], "rotary_sin": q[0, :, 0]}),
        (ValueError, "together", {"rotary_cos": v[0, :, 0], **new}),
        (ValueError, r"\(at least 48, R / 2\)", {"rotary_cos": v[0, :9, 0], "rotary_sin": v[0, :9, 0], **new}),
        (ValueError, f"{D} columns rotates twice .* q has {D}", {"rotary_cos": wide, "rotary_sin": wide, **new}),
        (ValueError, "k must be new tokens of q's 1 sequences", {**new, "k": q.repeat(2, 1, 1, 1)[:, :, :2]}),
        (ValueError, "v must be new tokens of q's 1 sequences", {**new, "v": q[0, :, :2]}),
        (ValueError, "leave it out beside a block_table", {"block_table": one, "cache_batch_idx": one[0]}),
    ):
        with pytest.raises(error, match=match):
            cs336.flash_attn_with_kvcache(q, k, v, **options)
    with pytest.raises(ValueError, match="4 dims"):
        cs336.flash_attn_with_kvcache(q[0], k, v)
    with pytest.raises(
        ValueError, match="a cache of 1 rows has no row for each of q's 3 sequences"
    ):  # not read past its end
        cs336.flash_attn_with_kvcache(q.repeat(3, 1, 1, 1), k, v)


def test_no_gradient(device):
    """On a CPU as on a GPU, also where q and what is appended have one."""
    _, (k, v), _ = cache(device, False, [48])
    q = torch.randn(1, 2, 4, D, device=device).to(DTYPE).requires_grad_()
    out = cs336.flash_attn_with_kvcache(q, k, v, q[:, :, :2], q[:, :, :2], cache_seqlens=20)
    assert not any(x.requires_grad for x in (out, k, v))


def test_what_is_copied_where_lengths_are_not_read(device, monkeypatch):
    """As on a GPU: as many rows as the table has room for, of which those of the sequences are the same. Gradients of
    the others are nobody's, whatever stands there."""
    lengths, begins = [20, 37, 0, 48], [3, 16, 0, 0]
    _, (k, v), table = cache(device, True, lengths)
    lens, left = (torch.tensor(x, dtype=torch.int32, device=device) for x in (lengths, begins))
    for b, n in enumerate(lengths):
        table[b, -(-n // 16) :] = -7 if b % 2 else 2**31 - 1  # looked at by nobody
    found = []
    for counts in (True, False):
        monkeypatch.setattr(flash_attn, "readable", lambda *_, counts=counts: counts)
        monkeypatch.setattr(flash_attn, "_counts", lambda _, counts=counts: counts)
        of = [x.cpu() if counts else x for x in (k, v, table, lens, left)]
        caches = [x.clone().requires_grad_() for x in of[:2]]
        *rows, starts = flash_attn._gathered(*caches, *of[2:])
        assert starts.tolist() == [0, 17, 38, 38, 86]
        given = [torch.full_like(x, torch.nan) for x in rows]
        for x in given:
            x[:86] = torch.arange(86, device=x.device)[:, None, None]
        found.append((*(x.detach() for x in rows), *torch.autograd.grad(rows, caches, given)))
    read, unread = found
    assert len(unread[0]) == 4 * 3 * 16
    for whole, part in zip(unread[:2], read[:2], strict=True):
        assert torch.equal(whole[:86].cpu(), part)
        assert part.isfinite().all()
    for whole, part in zip(unread[2:], read[2:], strict=True):
        assert torch.equal(whole.cpu(), part)
        assert part.isfinite().all()


def test_what_is_refused_is_checked_before_anything_is_written():
    _, (k, v), _ = cache(torch.device("cpu"), False, [48])
    before, new = (k.clone(), v.clone()), torch.randn(1, 2, 2, D)
    q, left = torch.randn(1, 2, 4, D), torch.tensor([23], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"from 0 to the length \[22\], got \[23\]"):
        cs336.flash_attn_with_kvcache(q, k, v, new, new, cache_seqlens=20, cache_leftpad=left)
    for wrong in ({"alibi_slopes": torch.ones(3)}, {"softcap": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            cs336.flash_attn_with_kvcache(q, k, v, new, new, cache_seqlens=20, **wrong)
    assert torch.equal(k, before[0])
    assert torch.equal(v, before[1])


def test_padding_compiles():
    _, (k, v), _ = cache(torch.device("cpu"), False, [48, 30])
    q, left = torch.randn(2, 3, 4, D).to(DTYPE), torch.tensor([4, 0], dtype=torch.int32)
    lens = torch.tensor([48, 30], dtype=torch.int32)

    def call(q):
        return cs336.flash_attn_with_kvcache(q, k, v, cache_seqlens=lens, cache_leftpad=left, causal=True)

    torch.testing.assert_close(torch.compile(call, backend="eager")(q), call(q))
