"""Context parallel: each rank has its part of the tokens of every sequence, and attention reaches across.

    ring         keys and values go round, each rank's queries meet one part after the other: arXiv:2310.01889
    all_to_all   tokens are exchanged for heads, so that a rank sees all tokens in H/N heads: arXiv:2309.14509

A ring of causal attention deals tokens in zig-zag: of 2N chunks rank r has chunk r and chunk 2N-1-r, so that at every
step every rank has as much to do. What rank r sees of rank j's tokens then has no mask but at the first step:

    j = r   causal        j < r   all queries, the first half of the keys        j > r   the second half of the queries

and parts are merged by their log-sum-exps: lse = log(e^lse1 + e^lse2), o = e^(lse1 - lse) o1 + e^(lse2 - lse) o2. The
backward needs no more than the merged lse and o: each part's gradient is attention's own. s = tokens of a rank.
"""

import functools
from typing import Any, Literal, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from cs336 import ops
from cs336.models import Transformer, TransformerBlock
from cs336.nn import Attention
from cs336.ops.dispatch import run
from cs336.parallel.collectives import shift
from cs336.parallel.differentiable import Group, check_parts, exchange, own_part

Kind = Literal["ring", "all_to_all"]


def own_tokens(x: Tensor, group: Group = None, *, dim: int = 1, kind: Kind = "ring") -> Tensor:
    """This rank's part of a tensor of all tokens along dim: two chunks in zig-zag for a ring, for all_to_all one.

    kind: that of the model. Raises ValueError for another, and for tokens that do not divide: by 2N for a ring, else N.
    """
    _check_kind(kind)
    N, rank = dist.get_world_size(group), dist.get_rank(group)
    if kind == "all_to_all":
        return own_part(x, dim, group)
    check_parts(x.shape[dim], 2 * N, f"two chunks a rank: {x.shape[dim]} tokens")
    chunks = x.chunk(2 * N, dim)
    return torch.cat((chunks[rank], chunks[2 * N - 1 - rank]), dim)


def _check_kind(kind: str) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be 'ring' or 'all_to_all', got {kind!r}")


def own_positions(s: int, group: Group = None, *, kind: Kind = "ring", device=None) -> Tensor:
    """(s,) int64: where this rank's tokens stand in the whole sequence."""
    return own_tokens(torch.arange(s * dist.get_world_size(group), device=device), group, dim=0, kind=kind)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group = None,
    *,
    causal: bool = True,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """ops.attention of all ranks' tokens, of this rank's queries.

    q (B, Hq, s, D), k (B, Hkv, s, D), v (B, Hkv, s, E) are of this rank's tokens, as `own_tokens` deals them, as many
    on every rank. Returns o (B, Hq, s, E). Each of N - 1 steps sends k and v to the next rank while the part that is
    here is computed; the backward sends them and their float32 gradients. Memory does not grow with N.
    Raises ValueError for shapes that do not fit.
    """
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or q.shape[2] != k.shape[2] or q.shape[2] == 0:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k and v must be (B, H, s, D) of the same s >= 1 tokens, got {shapes}")
    if causal and q.shape[2] % 2 != 0:
        raise ValueError(f"a causal ring deals two chunks a rank: its tokens must be even, got {q.shape[2]}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _Ring.apply(q, k.contiguous(), v.contiguous(), group, causal, scale, softcap or 0.0)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, group, causal, scale, softcap):
        N, rank = dist.get_world_size(group), dist.get_rank(group)
        kept: tuple[Tensor, ...] = (k, v)
        wide = torch.promote_types(q.dtype, torch.float32)
        o = q.new_zeros(*q.shape[:3], v.shape[-1], dtype=wide)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide)
        for step in range(N):
            coming = shift(kept, group) if step < N - 1 else None
            rows, keys = _meeting(rank, (rank - step) % N, q.shape[2], causal)
            k_part, v_part = (x[:, :, keys] for x in kept)
            options = scale, causal and step == 0, -1, -1, softcap
            o_part, lse_part = run("attention_fwd", q[:, :, rows], k_part, v_part, *options)
            merged = torch.logaddexp(lse[:, :, rows], lse_part)
            o[:, :, rows] *= (lse[:, :, rows] - merged).exp()[..., None]
            o[:, :, rows] += (lse_part - merged).exp()[..., None] * o_part
            lse[:, :, rows] = merged
            kept = coming() if coming else kept
        o = o.to(q.dtype)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.args = group, causal, scale, softcap
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do):
        q, k, v, o, lse = ctx.saved_tensors
        group, causal, scale, softcap = ctx.args
        N, rank, do = dist.get_world_size(group), dist.get_rank(group), do.contiguous()
        kept: tuple[Tensor, ...] = (k, v)
        dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
        arriving = None  # the gradients of `kept`, which go round one step behind it
        for step in range(N):
            coming = shift(kept, group) if step < N - 1 else None
            rows, keys = _meeting(rank, (rank - step) % N, q.shape[2], causal)
            mine = [x[:, :, rows] for x in (do, q, o, lse)]
            k_part, v_part = (x[:, :, keys] for x in kept)
            options = scale, causal and step == 0, -1, -1, softcap, ops.registry.is_deterministic()
            do_part, q_part, o_part, lse_part = mine
            parts = run("attention_bwd", do_part, None, q_part, k_part, v_part, o_part, lse_part.contiguous(), *options)
            if arriving is not None:
                dk, dv = arriving()
            dq[:, :, rows] += parts[0]
            dk[:, :, keys] += parts[1]
            dv[:, :, keys] += parts[2]
            arriving = shift((dk, dv), group)
            kept = coming() if coming else kept
        assert arriving is not None
        dk, dv = arriving()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _meeting(rank: int, source: int, s: int, causal: bool) -> tuple[slice, slice]:
    """Which of a rank's queries see which of the keys of another: see the top of the file."""
    everything = slice(0, s)
    if not causal or source == rank:
        return everything, everything
    return (everything, slice(0, s // 2)) if source < rank else (slice(s // 2, s), everything)


def all_to_all_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group = None,
    *,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """ops.attention of all ranks' tokens, of this rank's queries, whose head counts divide by N.

    q (B, Hq, s, D), k (B, Hkv, s, D), v (B, Hkv, s, E) are of the r-th part of the tokens; options are those of
    ops.attention (causal, window, softcap, scale, dropout_p), alibi_slopes and sinks (Hq,). Returns o (B, Hq, s, E).
    Raises ValueError for heads that do not divide.
    """
    for name, x in (("query", q), ("key-value", k)):
        check_parts(x.shape[1], dist.get_world_size(group), f"{name} heads")
    if alibi_slopes is not None:
        alibi_slopes = own_part(alibi_slopes, 0, group)
    if sinks is not None:
        sinks = own_part(sinks, 0, group)
    mine = (_tokens_for_heads(x, group) for x in (q, k, v))
    return _heads_for_tokens(ops.attention(*mine, alibi_slopes=alibi_slopes, sinks=sinks, **options), group)


def _tokens_for_heads(x_BHsD: Tensor, group: Group) -> Tensor:
    """(B, H, s, D) -> (B, H/N, N s, D)"""
    by_heads = x_BHsD.unflatten(1, (dist.get_world_size(group), -1)).movedim(1, 0)
    return _exchanged(by_heads, group).movedim(0, 2).flatten(2, 3)


def _heads_for_tokens(x_BhSD: Tensor, group: Group) -> Tensor:
    """(B, H/N, N s, D) -> (B, H, s, D)"""
    by_tokens = x_BhSD.unflatten(2, (dist.get_world_size(group), -1)).movedim(2, 0)
    return _exchanged(by_tokens, group).movedim(0, 1).flatten(1, 2)


def _exchanged(x_N: Tensor, group: Group) -> Tensor:
    return exchange(x_N.contiguous(), group=group)


class ContextAttention(Attention):
    """An Attention over the tokens of all ranks; x (B, s, d_model) is of this rank's."""

    group: Group
    context_kind: Kind

    def _attend(self, q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            raise ValueError("tokens that are divided among ranks take no mask and no segments")
        options = self._options(q_BHSD.shape[2] * dist.get_world_size(self.group)) | {"causal": self.causal}
        if self.context_kind == "all_to_all":
            return all_to_all_attention(q_BHSD, k_BHSD, v_BHSD, self.group, alibi_slopes=self._slopes, **options)
        kept = {name: options[name] for name in ("causal", "softcap", "scale")}
        return ring_attention(q_BHSD, k_BHSD, v_BHSD, self.group, **kept)

    def _packed(self, *_: Any) -> Tensor:
        raise ValueError("tokens that are divided among ranks take no segments")

    def _continue(self, *_: Any) -> Tensor:
        raise ValueError("tokens that are divided among ranks take no state: decode with the whole model")


def context_parallel(model: Transformer, group: Group = None, kind: Kind = "ring") -> Transformer:
    """Let a model read its part of each sequence's tokens, in place: return it.

    It is called with `own_tokens` of token ids and targets, (B, s); positions are known. What it returns is of these
    tokens, and its loss the sum over them. A gradient is this rank's share of the whole: sum it over the group, as over
    rows of a batch (DDP with group=).

    Raises ValueError, and leaves the model as it was, for other mixers than attention; for a ring with windows, ALiBi,
    sinks or dropout of attention; and for heads that all_to_all cannot divide.
    """
    _check_kind(kind)
    N = dist.get_world_size(group)
    if reason := why_not(model, N, kind):
        raise ValueError(f"the tokens cannot be divided among {N} ranks: {reason}")
    mixers: list[Any] = [cast(TransformerBlock, layer).attention for layer in model.layers]
    for mixer in mixers:
        mixer.__class__ = ContextAttention
        mixer.group, mixer.context_kind = group, kind
    model.register_forward_pre_hook(functools.partial(_with_positions, group, kind), with_kwargs=True)
    return model


def why_not(model: Transformer, N: int, kind: Kind) -> str | None:
    """The reason why N ranks cannot divide the tokens that a model reads."""
    reasons = [(i, _why_not(cast(TransformerBlock, layer).attention, kind, N)) for i, layer in enumerate(model.layers)]
    return next((f"layer {i}: {reason}" for i, reason in reasons if reason), None)


def _why_not(mixer: Any, kind: Kind, N: int) -> str | None:
    if type(mixer) is not Attention:
        return f"it is {type(mixer).__name__}, not Attention"
    if kind == "all_to_all":
        for name in ("num_heads", "num_kv_heads"):
            if (count := getattr(mixer, name)) % N != 0:
                return f"{name} {count} / {N} = {count / N:g}; a ring takes any"
        return None
    absent = {"window": mixer.window, "alibi": mixer.alibi, "sinks": mixer.sinks, "dropout": mixer.dropout or None}
    for name, there in absent.items():
        if there is not None:
            return f"a ring has no {name}; all_to_all has"
    return None


def _with_positions(group: Group, kind: Kind, model: Transformer, args: tuple, kwargs: dict[str, Any]) -> Any:
    if kwargs.get("positions") is None and args and args[0].dim() == 2:
        whole = args[0].shape[1] * dist.get_world_size(group)
        if whole > model.config.context_length:
            raise ValueError(f"{whole} tokens do not fit the model's context_length of {model.config.context_length}")
        positions = own_positions(args[0].shape[1], group, kind=kind, device=args[0].device)
        kwargs = kwargs | {"positions": positions}
    return args, kwargs
