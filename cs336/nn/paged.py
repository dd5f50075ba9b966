"""Attention's state in pages that sequences share: their keys and values lie in one pool, found through a table.

The tokens of a forward pass are those of R sequences, one after the other and without padding: first one token each of
those that decode, then the chunks of those that read their prompt. T = tokens, R = sequences, M = most pages of one,
P = pages, S = tokens a page, H = key-value heads, D = features of a head.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cs336 import ops
from cs336.ops import registry
from cs336.ops.paged_attention import MAX_DECODE_QUERIES


@dataclass(frozen=True)
class Chunks:
    """Sequences of which a pass has several tokens: their rows, their tokens, and where each one's are among these."""

    rows: slice
    tokens: slice
    ends: Tensor
    """(N + 1,) int32: from 0 to the number of tokens."""
    longest: int
    """Tokens of the longest."""


@dataclass(frozen=True)
class PagedTokens:
    """Whose the T tokens of a forward pass are, and where their state is."""

    table: Tensor
    """(R, M) int32: entry j of row r is the page with the tokens [j * S, (j + 1) * S) of sequence r; what is past its
    end may be anything."""
    lengths: Tensor
    """(R,) int32: tokens of each sequence, those of this pass included. 0: a row without a sequence."""
    sequence: Tensor
    """(T,) int32: the row that each token belongs to."""
    position: Tensor
    """(T,) int32: its place in the sequence; negative: padding, which is kept nowhere."""
    num_decodes: int
    """The first rows, of one token each."""
    slots: Tensor
    """(R,) int32: where the state of each sequence is in what has no pages: see nn/slotted.py."""
    continued: Chunks | None = None
    """Behind these: chunks of sequences that have tokens before."""
    fresh: Chunks | None = None
    """Behind these: chunks without tokens before, which need not look into the pages. None inside cs336.invariant() and
    where a state has no pages."""
    settled: bool = field(default=False, kw_only=True)
    """As ops.paged_attention has it, of the rows that decode: the table, the lengths, and all tokens before those of
    this pass were written before a kernel that no other overlaps."""
    spare: int = field(default=0, kw_only=True)
    """As ops.paged_attention has it, of the rows that decode."""

    @functools.cached_property
    def before(self) -> Tensor:
        """(R,) int32: tokens that each row which decodes had before this pass; 0 without a sequence."""
        return (self.lengths[: self.num_decodes] - 1).clamp(min=0)

    @functools.cached_property
    def ends(self) -> Tensor:
        """(R + 1,) int32: where each row's tokens are among the T, where no chunk is fresh."""
        ends = torch.arange(self.num_decodes + 1, dtype=torch.int32, device=self.table.device)
        return ends if self.continued is None else torch.cat((ends[:-1], self.continued.ends + self.num_decodes))


class PagedKeyValues:
    """One layer's pool: keys and values (P, S, H, D). A page is of one sequence, or of several that begin alike."""

    def __init__(self, keys_PSHD: Tensor, values_PSHD: Tensor):
        self.keys, self.values = keys_PSHD, values_PSHD

    @staticmethod
    def allocate(num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, *, device, dtype):
        shape = (num_pages, page_size, num_kv_heads, head_dim)
        return PagedKeyValues(*(torch.empty(shape, device=device, dtype=dtype) for _ in range(2)))

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def copy_pages(self, source_N: Tensor, target_N: Tensor) -> None:
        """What page source_N[i] holds is in page target_N[i] too. int64."""
        for cache_PSHD in (self.keys, self.values):
            ops.copy_pages_(cache_PSHD, source_N, target_N)

    def append(self, k_THD: Tensor, v_THD: Tensor, tokens: PagedTokens) -> None:
        """Keep k and v where their tokens are."""
        ops.append_kv_(self.keys, self.values, k_THD, v_THD, tokens.table, tokens.sequence, tokens.position)

    def attend(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, tokens: PagedTokens, **options: Any) -> Tensor:
        """Let each query see the tokens of its sequence up to its own: (T, Hq, D). k and v are those of these tokens,
        which are kept already.

        options: window, softcap, scale, sinks of ops.paged_attention.
        """
        if registry.is_invariant():  # decoding adds up in another order
            assert tokens.fresh is None
            longest = 1 if tokens.continued is None else tokens.continued.longest
            rows = tokens.table, tokens.lengths, tokens.ends
            return ops.paged_prefill(q_THD, self.keys, self.values, *rows, max_seqlen_q=longest, **options)
        outs = self.read(q_THD, tokens, **options)
        if (some := tokens.fresh) is not None:
            q, k, v = (x_THD[some.tokens] for x_THD in (q_THD, k_THD, v_THD))
            before = options.get("window")
            seen = options | {"window": None if before is None else (before, 0)}
            outs.append(ops.attention_varlen(q, k, v, some.ends, None, some.longest, some.longest, causal=True, **seen))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def read(self, q_THD: Tensor, tokens: PagedTokens, **options: Any) -> list[Tensor]:
        """What the queries see of the pages, those that decode and those of chunks that go on: [(T, Hq, D)], in order.
        Others behind them are not looked at."""
        n, caches, outs = tokens.num_decodes, (self.keys, self.values), []
        if n:
            decodes = tokens.table[:n], tokens.lengths[:n]
            fast = options | {"invariant": False, "settled": tokens.settled, "spare": tokens.spare}  # else see attend
            outs.append(ops.paged_attention(q_THD[:n, None], *caches, *decodes, **fast)[:, 0])
        if (some := tokens.continued) is not None:
            table, lengths, q = tokens.table[some.rows], tokens.lengths[some.rows], q_THD[some.tokens]
            if some.longest <= MAX_DECODE_QUERIES and len(q) == len(lengths) * some.longest:  # drafts, mostly
                q_BQHD = q.reshape(len(lengths), some.longest, *q.shape[1:])
                fast = options | {"invariant": False}
                outs.append(ops.paged_attention(q_BQHD, *caches, table, lengths, **fast).flatten(0, 1))
            else:
                rows = table, lengths, some.ends
                outs.append(ops.paged_prefill(q, *caches, *rows, max_seqlen_q=some.longest, **options))
        return outs


class PagedLatents(PagedKeyValues):
    """One layer's pool of latents with the rotated keys behind them (P, S, L + R). Absorbed queries see one head of
    keys, the beginnings of which, L features, are its values."""

    def __init__(self, cache_PSF: Tensor, kv_rank: int):
        self.cache = cache_PSF
        keys = cache_PSF[:, :, None]
        super().__init__(keys, keys[..., :kv_rank])
        self.rotated = keys[..., kv_rank:]

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes

    def copy_pages(self, source_N: Tensor, target_N: Tensor) -> None:
        ops.copy_pages_(self.keys, source_N, target_N)
