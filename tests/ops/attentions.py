"""Attention as its formula has it, in any dtype, and the comparison of ours with it: forward and all gradients."""

import math

import torch
from close import assert_close_to_ref

CUDA = torch.cuda.is_available()
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


def definition(
    q, k, v, causal=False, window=None, scale=None, softcap=None, mask=None, alibi_slopes=None, kept=None
):  # fmt: skip
    """o (B, Hq, S, E) and lse (B, Hq, S) in q's dtype, each group of queries against its own keys. kept: dropout's."""
    _, Hq, S, D = q.shape
    Hkv, T = k.shape[1:3]
    scores = torch.einsum("bhgsd,bhtd->bhgst", q.unflatten(1, (Hkv, Hq // Hkv)), k).flatten(1, 2)
    scores = scores * (D**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    offset = torch.arange(T, device=q.device) - torch.arange(S, device=q.device)[:, None] - (T - S)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype).view(-1, Hq, 1, 1) * offset.abs()
    if mask is not None and mask.dtype != torch.bool:
        scores, mask = scores + mask.to(scores.dtype), mask > -torch.inf
    sees = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand_as(scores)
    left, right = window or (None, None)
    if causal:
        sees = sees & (offset <= 0)
    if left is not None:
        sees = sees & (offset >= -left)
    if right is not None:
        sees = sees & (offset <= right)
    scores = scores.masked_fill(~sees, torch.finfo(scores.dtype).min)
    top = scores.detach().amax(-1, keepdim=True) if T else scores.new_zeros(*scores.shape[:-1], 1)
    e = torch.where(sees, torch.exp(scores - top), 0)
    total = e.sum(-1, keepdim=True)
    total = torch.where(total == 0, 1, total)  # where a query sees nothing
    lse = torch.where(sees.any(-1), total.log()[..., 0] + top[..., 0], -torch.inf)
    p = e / total
    if kept is not None:
        p = p * kept.to(p.dtype)
    return torch.einsum("bhgst,bhtd->bhgsd", p.unflatten(1, (Hkv, Hq // Hkv)), v).flatten(1, 2), lse


def varlen_definition(q, k, v, cu_q, cu_k, alibi_slopes=None, kept=None, **options):
    """The same for each sequence of packs (T, H, D): o (Tq, Hq, E) and lse (Hq, Tq)."""
    os, lses = [], []
    for n, (a, b, c, d) in enumerate(zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True)):
        slopes = alibi_slopes[n] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        args = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        o, lse = definition(*args, alibi_slopes=slopes, kept=None if kept is None else kept[n], **options)
        os.append(o[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(os), torch.cat(lses, -1)


def sizes_of_sums(q, k, v, seen=None, softmax_scale=None):
    """How large o, dq, dk and dv are, of tensors of unit size: weights are about 1 / T, or 1 / seen of so many keys.

    In float32 all else is so exact that what shows is scale p (dp - delta) k, which cancel where a query sees few keys:
    dp is a sum of E products of unit size, and scale mostly 1 / sqrt(D).
    """
    if q.dtype == F32:
        D, E = q.shape[-1], v.shape[-1]
        of_difference = max(1.0, E**0.5 * abs(D**-0.5 if softmax_scale is None else softmax_scale))
        return 1.0, of_difference, of_difference, 1.0
    if q.dim() == 3:  # a pack, whose shortest sequence may have one token
        return 1.0, 1.0, 1.0, 1.0
    S, T = max(1, q.shape[2]), max(1, min(k.shape[2], seen or k.shape[2]))
    of_keys, of_queries = T**-0.5, min(1.0, S**0.5 / T)
    return of_keys, of_keys, of_queries, of_queries


def check(ours, formula, leaves, scale=4.0, use_lse=True, seen=None, softmax_scale=None):
    """ours(*leaves) and formula(*leaves) give (o, lse); both, and the gradients of both outputs, must agree.

    seen: keys that a query sees at most, through a window.
    scale: kernels round the partial sums of blocks and of the heads of a group, terms so much larger than their sums.
    """
    o, lse = ours(*leaves)
    do = torch.randn_like(o)
    sees = lse.isfinite()
    dlse = torch.where(sees, torch.randn_like(lse), 0.0) if use_lse else torch.zeros_like(lse)

    def gradients(o, lse, leaves):
        loss = (o * do.to(o.dtype)).sum()
        if use_lse:
            loss = loss + torch.where(sees, lse * dlse.to(lse.dtype), 0).sum()
        return torch.autograd.grad(loss, leaves)

    def plain(dtype):
        again = [t.detach().to(dtype).requires_grad_() for t in leaves]
        o, lse = formula(*again)
        return o, *gradients(o, lse, again)

    got = o, *gradients(o, lse, leaves)
    # Backwards take weights from lse as the forward saved it: in float32 half an ulp of it is what a weight is off by.
    largest = lse[sees].abs().max().item() if leaves[0].dtype == F32 and sees.any() else 0.0
    half_an_ulp = 2.0 ** (math.frexp(largest)[1] - 25)
    outputs = zip(("o", "dq", "dk", "dv"), sizes_of_sums(*leaves, seen, softmax_scale), strict=True)
    for (name, size), *three in zip(outputs, got, plain(F64), plain(leaves[0].dtype), strict=True):
        try:
            assert_close_to_ref(*three, scale=scale * size, handed=0.0 if name == "o" else half_an_ulp)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    with torch.no_grad():
        want, wide = (formula(*(t.to(dtype) for t in leaves))[1] for dtype in (F64, torch.promote_types(o.dtype, F32)))
        assert torch.equal(want.isfinite(), sees)
        assert_close_to_ref(lse[sees], want[sees], wide[sees], scale=scale)


def leaves(B, Hq, Hkv, S, T, D, E=None, dtype=F32, device="cpu"):
    """q, k, v as slices of (B, S, H, D) storage, with NaN between them."""
    made = []
    for H, length, width in ((Hq, S, D), (Hkv, T, D), (Hkv, T, D if E is None else E)):
        x = torch.full((B, length, H, width + 8), torch.nan, dtype=dtype, device=device)
        x[..., :width] = torch.randn(B, length, H, width, device=device)
        made.append(x[..., :width].transpose(1, 2).detach().requires_grad_())
    return made


def packed(lengths_q, lengths_k, Hq, Hkv, D, E=None, dtype=F32, device="cpu"):
    """q, k, v (T, H, D), cu_seqlens as tensors and as lists."""
    q, k, v = leaves(1, Hq, Hkv, sum(lengths_q), sum(lengths_k), D, E, dtype, device)
    lists = [[0, *torch.tensor(lengths).cumsum(0).tolist()] for lengths in (lengths_q, lengths_k)]
    tensors = [torch.tensor(cu, dtype=torch.int32, device=device) for cu in lists]
    return [x[0].transpose(0, 1).detach().requires_grad_() for x in (q, k, v)], tensors, lists
