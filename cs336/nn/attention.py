"""B = batch (any number of dims), S = queries, T = keys, M = d_model, H = heads, D = head_dim."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cs336 import ops
from cs336.nn.checks import check_counts, check_flags, check_positive, check_probabilities, head_size
from cs336.nn.linear import Linear, join, joined
from cs336.nn.norms import RMSNorm, RMSNormConfig
from cs336.nn.paged import PagedKeyValues, PagedTokens
from cs336.nn.positions import AlibiSlopes, RotaryEmbedding
from cs336.nn.recent import Recent
from cs336.nn.state import Context, KeyValues, place_of
from cs336.ops import registry


class Attention(nn.Module):
    """Multi-head self-attention with grouped queries (arXiv:2305.13245), rotary positions, QK-norm (arXiv:2302.05442).

    Args:
        d_model: features of the input and the output.
        num_heads, num_kv_heads: query heads, and the key-value heads they share; as many if None.
        head_dim: features of a head; d_model / num_heads if None.
        bias: of the query, key and value projections; out_bias: of the output's, as bias if None.
        causal: a token sees none after it.
        window: tokens that a token sees, itself and those right before it (arXiv:2004.05150); all if None.
        qk_norm: RMSNorm over each head of the queries and keys, before the rotation; "all": over all heads at once.
        softcap: bound c of the scores, which become c * tanh(score / c) (arXiv:2408.00118).
        scale: of the scores; 1 / sqrt(head_dim) if None.
        dropout: share of the probabilities that is dropped in training.
        rope: rotates queries and keys; layers may share one.
        alibi: slope * distance is taken off the scores (arXiv:2108.12409).
        sinks: each head has one more score, learned, of no token, whose value is zero (arXiv:2508.10925).

    Raises ValueError for head counts that do not divide.
    """

    # One matmul for q, k and v was no faster on an H200, forward and backward, compiled: 21.4 ms to 21.6 for 6 layers
    # of 768 features, 48.1 to 47.9 for 8 of 1600.
    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        bias: bool = False,
        out_bias: bool | None = None,
        causal: bool = True,
        window: int | None = None,
        qk_norm: bool | Literal["all"] = False,
        norm_eps: float = 1e-5,
        softcap: float | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        rope: RotaryEmbedding | None = None,
        alibi: bool = False,
        sinks: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        shape = AttentionConfig(num_heads, num_kv_heads, head_dim, window=window)
        num_kv_heads, self.head_dim = shape.kv_heads, shape.head_size(d_model)
        if rope is not None and rope.head_dim != self.head_dim:
            raise ValueError(f"rope rotates heads of {rope.head_dim} features, these have {self.head_dim}")
        if window is not None and not causal:
            raise ValueError("a window counts the tokens before: it needs causal attention")
        self.d_model, self.num_heads, self.num_kv_heads, self.causal = d_model, num_heads, num_kv_heads, causal
        self.window = window
        q_dim, kv_dim = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = Linear(d_model, q_dim, bias=bias, device=device, dtype=dtype)
        self.k_proj = Linear(d_model, kv_dim, bias=bias, device=device, dtype=dtype)
        self.v_proj = Linear(d_model, kv_dim, bias=bias, device=device, dtype=dtype)
        out_bias = bias if out_bias is None else out_bias
        self.o_proj = Linear(q_dim, d_model, bias=out_bias, device=device, dtype=dtype)
        q_normed, k_normed = (q_dim, kv_dim) if qk_norm == "all" else (self.head_dim, self.head_dim)
        self.q_norm = RMSNorm(q_normed, norm_eps, device=device, dtype=dtype) if qk_norm else None
        self.k_norm = RMSNorm(k_normed, norm_eps, device=device, dtype=dtype) if qk_norm else None
        self.qk_norm, self.softcap, self.scale, self.dropout = qk_norm, softcap, scale, dropout
        self.rope = rope
        self.alibi = AlibiSlopes(num_heads, device=device) if alibi else None
        self.sinks = nn.Parameter(torch.zeros(num_heads, device=device, dtype=dtype)) if sinks else None

    def new_state(
        self,
        batch_size: int,
        max_len: int,
        *,
        rollback: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KeyValues | Recent:
        """Room for max_len tokens of each row, or with a shorter window for what it sees and `rollback` tokens more;
        device and dtype are those of the keys, the weights' if None."""
        place = place_of(self.k_proj.weight, device, dtype)
        if self.window is not None and self.window + rollback < max_len:
            shape = (self.num_kv_heads, self.head_dim)
            return Recent.allocate(batch_size, self.window, shape, shape, rollback=rollback, **place)
        return KeyValues.allocate(batch_size, max_len, self.num_kv_heads, self.head_dim, **place)

    @property
    def has_pages(self) -> bool:
        """Whether it can read its state from pages, which knows no alibi."""
        return self.causal and self.alibi is None

    def new_pages(self, num_pages: int, page_size: int, *, device=None, dtype=None) -> PagedKeyValues:
        """A pool of pages for the keys and values of page_size tokens each; device and dtype as in new_state."""
        place = place_of(self.k_proj.weight, device, dtype)
        return PagedKeyValues.allocate(num_pages, page_size, self.num_kv_heads, self.head_dim, **place)

    def forward(
        self, x_BSM: Tensor, context: Context | None = None, state: KeyValues | Recent | PagedKeyValues | None = None
    ) -> Tensor:
        """x (..., S, d_model) -> (..., S, d_model).

        context: positions, and the mask of x or its cu_seqlens; with a state its lengths, or whose tokens x (1, T,
            d_model) are and the pages of theirs.
        state: the tokens before x (B, S, d_model), of which context.lengths are kept; x's keys and values join them.

        Raises ValueError for shapes or dtypes that do not fit.
        """
        if x_BSM.dim() < 2 or x_BSM.shape[-1] != self.d_model:
            raise ValueError(f"x must be (..., tokens, {self.d_model}), got shape {tuple(x_BSM.shape)}")
        context = Context() if context is None else context
        q, k, v = joined(x_BSM, (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None and self.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v_BTHD = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        in_pages = isinstance(state, PagedKeyValues) and context.paged is not None and not torch.is_grad_enabled()
        if in_pages and self.rope is not None and not registry.is_invariant():
            o_THD = self._step(q[0], k[0], v_BTHD[0], context.paged, state)  # type: ignore[arg-type]
            return self.o_proj(o_THD.flatten(-2)[None])
        if self.q_norm is not None and self.k_norm is not None and self.qk_norm != "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q_BHSD, k_BHTD, v_BHTD = (t.transpose(-2, -3) for t in (q, k, v_BTHD))
        if self.rope is not None:
            positions = context.positions
            if positions is None and state is not None:
                positions = context.slots(x_BSM.shape[-2])
            q_BHSD, k_BHTD = self.rope.rotate_qk(q_BHSD, k_BHTD, positions)
        if registry.is_invariant() and not isinstance(state, PagedKeyValues):
            o_BHSD = self._invariant(q_BHSD, k_BHTD, v_BHTD, context, state)
        elif state is None and context.cu_seqlens is not None:
            o_BHSD = self._packed(q_BHSD, k_BHTD, v_BHTD, context.cu_seqlens, context.mask)
        elif state is None:
            o_BHSD = self._attend(q_BHSD, k_BHTD, v_BHTD, context.mask)
        else:
            o_BHSD = self._continue(q_BHSD, k_BHTD, v_BHTD, context, state)
        return self.o_proj(o_BHSD.transpose(-2, -3).flatten(-2))

    def _step(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, tokens: PagedTokens, state: PagedKeyValues) -> Tensor:
        """(T, H, D) of the tokens of a step in pages: normed, turned and kept in one launch, then attended. What is
        normed is not rounded before it turns."""
        assert self.rope is not None
        options: dict[str, Any] = {"interleaved": self.rope.interleaved}
        if self.q_norm is not None and self.k_norm is not None and self.qk_norm != "all":
            options |= {"q_weight": self.q_norm.weight, "k_weight": self.k_norm.weight, "eps": self.q_norm.eps}
        where = self.rope.cos, self.rope.sin, tokens.table, tokens.sequence, tokens.position
        caches = state.keys, state.values
        q_THD, k_THD = ops.qk_norm_rope_append_(*caches, q_THD, k_THD, v_THD, *where, **options)
        return state.attend(q_THD, k_THD, v_THD, tokens, **self._paged_options)

    def join(self) -> None:
        """Lay the projections of queries, keys and values together: see nn/linear.py."""
        join((self.q_proj, self.k_proj, self.v_proj))

    def _options(self, S: int) -> dict[str, Any]:
        """Of ops.attention, for S queries."""
        dropout = self.dropout if self.dropout and self.training else 0.0
        options = {"softcap": self.softcap, "scale": self.scale, "sinks": self.sinks}
        return options | {"dropout_p": dropout, "window": self._sees(S)}

    @property
    def _paged_options(self) -> dict[str, Any]:
        """Of ops.paged_attention and its like."""
        before = None if self.window is None else self.window - 1
        sinks = None if self.sinks is None else self.sinks.float()
        return {"window": before, "softcap": self.softcap, "scale": self.scale, "sinks": sinks}

    @property
    def _slopes(self) -> Tensor | None:
        return None if self.alibi is None else self.alibi.slopes

    def _packed(
        self, q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, cu_seqlens: Tensor, mask: Tensor | None
    ) -> Tensor:
        if mask is not None or q_BHSD.dim() != 4:
            raise ValueError("cu_seqlens, the ends of packed documents, take x (B, S, d_model) and no mask")
        B, _, S, _ = q_BHSD.shape
        q_THD, k_THD, v_THD = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHSD, k_BHSD, v_BHSD))
        options = self._options(S) | {"causal": self.causal, "alibi_slopes": self._slopes}
        o_THD = ops.attention_varlen(q_THD, k_THD, v_THD, cu_seqlens, None, S, S, **options)
        return o_THD.unflatten(0, (B, S)).transpose(1, 2)

    def _attend(self, q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None = None) -> Tensor:
        options = self._options(q_BHSD.shape[-2])
        return ops.attention(q_BHSD, k_BHSD, v_BHSD, mask, causal=self.causal, alibi_slopes=self._slopes, **options)

    def _sees(self, S: int) -> tuple[int, int] | None:
        """What ops.attention calls the window; None where S tokens fit into it."""
        return None if self.window is None or self.window >= S else (self.window - 1, 0)

    def _continue(
        self,
        q_BHSD: Tensor,
        k_BHSD: Tensor,
        v_BHSD: Tensor,
        context: Context,
        state: KeyValues | Recent | PagedKeyValues,
    ) -> Tensor:
        if not self.causal or context.mask is not None or context.cu_seqlens is not None:
            raise ValueError("a state needs causal attention without a mask or cu_seqlens: it holds what may be seen")
        if isinstance(state, PagedKeyValues):
            if context.paged is None:
                raise ValueError("a paged state needs context.paged: whose tokens these are, and their pages")
            q_THD, k_THD, v_THD = (x_BHSD[0].transpose(0, 1) for x_BHSD in (q_BHSD, k_BHSD, v_BHSD))
            state.append(k_THD, v_THD, context.paged)
            return state.attend(q_THD, k_THD, v_THD, context.paged, **self._paged_options).transpose(0, 1)[None]
        begins, S, new = state.empty, q_BHSD.shape[2], (k_BHSD.transpose(1, 2), v_BHSD.transpose(1, 2))
        if isinstance(state, KeyValues):
            state.append(*new, context)
            if begins:
                return self._attend(q_BHSD, k_BHSD, v_BHSD)
            k_BHTD, v_BHTD, seen_B1ST = state.read(S, context)
            behind_BST = context.slots(S)[:, :, None] - torch.arange(k_BHTD.shape[2], device=k_BHTD.device)
            if self.window is not None:
                seen_B1ST = seen_B1ST & (behind_BST < self.window)[:, None]
            return self._attend_masked(q_BHSD, k_BHTD, v_BHTD, seen_B1ST, behind_BST)
        if begins:
            state.write(new, context)
            return self._attend(q_BHSD, k_BHSD, v_BHSD)
        return self._attend_masked(q_BHSD, *self._recent(new, context, state))

    def _invariant(self, q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, context: Context, state) -> Tensor:
        """Attention with the bits of a paged state's."""
        dropped = self.dropout and self.training
        if not self.causal or self.alibi is not None or context.mask is not None or dropped or state is not None:
            raise ValueError(
                "inside cs336.invariant() attention is causal, without alibi, masks and dropout, and its state is paged"
            )
        *B, _, S, _ = q_BHSD.shape
        q_THD, k_THD, v_THD = (x.transpose(-2, -3).flatten(0, -3) for x in (q_BHSD, k_BHSD, v_BHSD))
        ends = context.cu_seqlens
        if ends is None:
            ends = torch.arange(0, len(q_THD) + 1, S, dtype=torch.int32, device=q_THD.device)
        o_THD = ops.attention_invariant(q_THD, k_THD, v_THD, ends, S, **self._paged_options)
        return o_THD.unflatten(0, (*B, S)).transpose(-2, -3)

    def _attend_masked(
        self, q_BHSD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, seen_B1ST: Tensor, behind_BST: Tensor
    ) -> Tensor:
        """Attention over what a state holds; behind (B, S, T): how many tokens a key stands behind its query."""
        mask = seen_B1ST if self.alibi is None else self.alibi.bias(seen_B1ST, behind_BST)
        return ops.attention(q_BHSD, k_BHTD, v_BHTD, mask, **self._options(k_BHTD.shape[2]) | {"window": None})

    def _recent(
        self, new: tuple[Tensor, Tensor], context: Context, state: Recent
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys and values (B, H, T, D) of a ring and of the new tokens, what these see of them (B, 1, S, T), and how
        far they stand behind (B, S, T).

        One new token is written first; of more, the last would take the places of what the first ones still see.
        """
        assert context.lengths is not None
        assert self.window is not None
        S = new[0].shape[1]
        if S == 1:
            state.write(new, context)
            held_BT, entries = state.held(context.lengths + 1), state.entries
        else:
            held_BT = torch.cat((state.held(context.lengths), context.slots(S)), 1)
            entries = tuple(torch.cat(pair, 1) for pair in zip(state.entries, new, strict=True))
            state.write(new, context)
        behind_BST = context.slots(S)[:, :, None] - held_BT[:, None]
        mask_BST = (behind_BST >= 0) & (behind_BST < self.window) & (held_BT >= 0)[:, None]
        k_BHTD, v_BHTD = (entry.transpose(1, 2) for entry in entries)
        return k_BHTD, v_BHTD, mask_BST[:, None], behind_BST


@dataclass(frozen=True)
class AttentionConfig:
    """Causal self-attention: see Attention. Raises ValueError for head counts that do not divide."""

    num_heads: int
    """Query heads."""
    num_kv_heads: int | None = None
    """Key-value heads, shared by groups of query heads (arXiv:2305.13245). None: num_heads."""
    head_dim: int | None = None
    """Features of a head. None: d_model / num_heads."""
    qkv_bias: bool = False
    """Biases of the query, key and value projections, as in Qwen2 (arXiv:2407.10671)."""
    qk_norm: bool | Literal["all"] = False
    """RMSNorm over each head of the queries and keys (arXiv:2302.05442), with the eps of the block's norms; "all": over
    all heads at once, as in OLMo 2 (arXiv:2501.00656)."""
    window: int | None = None
    """Tokens that a token sees, itself and those right before it (arXiv:2004.05150). None: all."""
    out_bias: bool = False
    """Bias of the output projection."""
    softcap: float | None = None
    """Bound c of the scores, which become c * tanh(score / c), as in Gemma 2 (arXiv:2408.00118)."""
    scale: float | None = None
    """Of the scores. None: 1 / sqrt(head_dim)."""
    dropout: float = 0.0
    """Share of the attention probabilities that is dropped in training."""
    sinks: bool = False
    """One more score a head, learned, of no token and with a value of zero, as in gpt-oss (arXiv:2508.10925)."""
    kind: Literal["attention"] = "attention"
    takes_positions: ClassVar[tuple[str, ...]] = ("rope", "alibi", "none")

    def __post_init__(self):
        check_counts(num_heads=self.num_heads)
        check_counts(optional=True, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, window=self.window)
        if self.num_heads % self.kv_heads != 0:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}")
        if self.qk_norm not in (False, True, "all"):
            raise ValueError(f"qk_norm must be true, false or 'all', got {self.qk_norm!r}")
        check_flags(qkv_bias=self.qkv_bias, out_bias=self.out_bias, sinks=self.sinks)
        check_positive(optional=True, softcap=self.softcap, scale=self.scale)
        check_probabilities(dropout=self.dropout)

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def head_size(self, d_model: int) -> int:
        """Features of a head. Raises ValueError where d_model is not a multiple of num_heads."""
        return head_size(d_model, self.num_heads, self.head_dim)

    def rope_dim(self, d_model: int) -> int:
        """Features of a head that positions rotate."""
        return self.head_size(d_model)

    def build(
        self,
        d_model: int,
        *,
        norm_eps: float,
        rope: RotaryEmbedding | None = None,
        alibi: bool = False,
        device=None,
        dtype=None,
    ) -> Attention:
        return Attention(
            d_model,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            bias=self.qkv_bias,
            out_bias=self.out_bias,
            window=self.window,
            qk_norm=self.qk_norm,
            norm_eps=norm_eps,
            softcap=self.softcap,
            scale=self.scale,
            dropout=self.dropout,
            rope=rope,
            alibi=alibi,
            sinks=self.sinks,
            device=device,
            dtype=dtype,
        )

    def num_parameters(self, d_model: int) -> int:
        D = self.head_size(d_model)
        biases = (self.num_heads + 2 * self.kv_heads) * D if self.qkv_bias else 0
        biases += (d_model if self.out_bias else 0) + (self.num_heads if self.sinks else 0)
        normed = {False: 0, True: 2 * D, "all": (self.num_heads + self.kv_heads) * D}[self.qk_norm]
        return self._matrices(d_model) + biases + normed

    def flops(self, d_model: int, context_length: int) -> int:
        """Of the forward pass, a token: its matmuls, scores and values over context_length tokens counted whole, or
        over the window's."""
        seen = context_length if self.window is None else min(self.window, context_length)
        return 2 * self._matrices(d_model) + 4 * self.num_heads * self.head_size(d_model) * seen

    def activation_bytes(self, d_model: int, width: int) -> int:
        """Kept for the backward, a token: x, q, k, v, o as attention returns it and as o_proj reads it, float32
        log-sum-exps, and with sinks the shares these leave; with qk_norm what is normalised too. The scores are
        recomputed."""
        D, norm = self.head_size(d_model), RMSNormConfig()
        normed = (self.num_heads + self.kv_heads) * norm.activation_bytes(D, width) if self.qk_norm else 0
        if self.qk_norm == "all":
            normed = sum(norm.activation_bytes(heads * D, width) for heads in (self.num_heads, self.kv_heads))
        stats = 4 * self.num_heads * (2 if self.sinks else 1)
        return width * (d_model + (3 * self.num_heads + 2 * self.kv_heads) * D) + stats + normed

    def state_bytes(self, d_model: int, max_len: int, width: int, rollback: int = 0) -> int:
        """Of one sequence's keys and values, `width` bytes an element."""
        if self.window is not None:
            max_len = min(max_len, self.window + rollback)
        return 2 * max_len * self.kv_heads * self.head_size(d_model) * width

    def _matrices(self, d_model: int) -> int:
        return 2 * (self.num_heads + self.kv_heads) * self.head_size(d_model) * d_model
