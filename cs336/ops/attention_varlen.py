"""Attention of packed sequences, each to itself: no padding, no mask. ops/attention.py has the formula.

Tq, Tk = tokens of all sequences, N = sequences, Hq, Hkv = heads, D = features of a head, E = of its values.
"""

from typing import Any

import torch
from torch import Tensor

from cs336.ops.attention_autograd import attend, autocast, check_sinks, limits, new_seed, with_sinks
from cs336.ops.attention_raw import check_numbers, check_slopes
from cs336.ops.dispatch import default_scale


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Scaled dot-product attention inside each sequence of a pack.

    Args:
        q: (Tq, Hq, D) floating point; strides as in `attention`.
        k: (Tk, Hkv, D) like q.
        v: (Tk, Hkv, E) like k.
        cu_seqlens_q: (N + 1,) int32 on q's device, from 0 to Tq: sequence n has the queries from cu_seqlens_q[n] to
            cu_seqlens_q[n + 1], and may be empty.
        cu_seqlens_k: the same of the keys, to Tk; cu_seqlens_q if None.
        max_seqlen_q, max_seqlen_k: at least the longest sequence; looked up if None, for which the host waits.
        causal, window, softcap, scale, dropout_p: as in `attention`, at each sequence's own ends.
        alibi_slopes: (Hq,) or (N, Hq) float32.
        sinks: (Hq,), as in `attention`.
        return_lse: return the scores' log-sum-exp too: (Hq, Tq) float32, sinks included.

    Returns o (Tq, Hq, E) like q, or (o, lse). A query without keys gives zeros. Second derivatives are plain torch's.
    Raises ValueError for arguments that do not fit. What cu_seqlens hold is checked on a CPU; on a GPU, where looking
    would make the host wait, the kernels stay inside the tensors, and the results of wrong ones are undefined.
    """
    q, k, v = autocast(q, k, v)
    left, right = limits(window)
    check_numbers(scale, softcap)
    if sinks is not None and q.dim() == 3:
        check_sinks(sinks, q.shape[1], q.device)
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    max_seqlen_q = _longest(cu_seqlens_q) if max_seqlen_q is None else max_seqlen_q
    max_seqlen_k = _longest(cu_seqlens_k) if max_seqlen_k is None else max_seqlen_k
    packing = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    options = default_scale(q) if scale is None else scale, causal, left, right, softcap or 0.0
    if alibi_slopes is None and dropout_p == 0:
        o, lse = attend("attention_varlen", q, k, v, *packing, *options)
    else:
        check_slopes(alibi_slopes)
        extras = alibi_slopes, dropout_p, new_seed(q.device) if dropout_p else None
        o, lse = attend("attention_general", q, k, v, *packing, *options, *extras)
    if sinks is not None:
        o, lse = with_sinks(o.transpose(0, 1), lse, sinks)
        o = o.transpose(0, 1)
    return (o, lse) if return_lse else o


def cu_seqlens(segments_BS: Tensor) -> Tensor:
    """Where the runs of equal ids start in all rows behind each other, and where the last ends: (N + 1,) int32.

    A run ends with its row. How many there are, the host waits for.
    """
    starts_BS = torch.ones_like(segments_BS, dtype=torch.bool)
    starts_BS[:, 1:] = segments_BS[:, 1:] != segments_BS[:, :-1]
    starts = starts_BS.flatten().nonzero()[:, 0]
    return torch.cat((starts, starts.new_tensor([segments_BS.numel()]))).to(torch.int32)


def _longest(cu_seqlens: Tensor) -> int:
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        return 0
    return int(torch.diff(cu_seqlens).max())
