"""B = batch (any number of dims), S = queries, T = keys, M = d_model, H = heads, D = head_dim."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cs336 import ops
from cs336.nn.checks import check_counts
from cs336.nn.linear import Linear
from cs336.nn.norms import RMSNorm, RMSNormConfig
from cs336.nn.paged import PagedKeyValues
from cs336.nn.positions import RotaryEmbedding
from cs336.nn.state import Context, KeyValues


class Attention(nn.Module):
    """Multi-head self-attention with grouped queries (arXiv:2305.13245), rotary positions, QK-norm (arXiv:2302.05442).

    Args:
        d_model: features of the input and the output.
        num_heads, num_kv_heads: query heads, and the key-value heads they share; as many if None.
        head_dim: features of a head; d_model / num_heads if None.
        bias: of the query, key and value projections; out_bias: of the output's, as bias if None.
        causal: a token sees none after it.
        qk_norm: RMSNorm over each head of the queries and keys, before the rotation.
        rope: rotates queries and keys; layers may share one.

    Raises ValueError for head counts that do not divide.
    """

    # One matmul for q, k and v was no faster on an H200, forward and backward, compiled: 21.4 ms to 21.6 for 6 layers.
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
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        rope: RotaryEmbedding | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        shape = AttentionConfig(num_heads, num_kv_heads, head_dim)
        num_kv_heads, self.head_dim = shape.kv_heads, shape.head_size(d_model)
        if rope is not None and rope.head_dim != self.head_dim:
            raise ValueError(f"rope rotates heads of {rope.head_dim} features, these have {self.head_dim}")
        self.d_model, self.num_heads, self.num_kv_heads, self.causal = d_model, num_heads, num_kv_heads, causal
        q_dim, kv_dim = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = Linear(d_model, q_dim, bias=bias, device=device, dtype=dtype)
        self.k_proj = Linear(d_model, kv_dim, bias=bias, device=device, dtype=dtype)
        self.v_proj = Linear(d_model, kv_dim, bias=bias, device=device, dtype=dtype)
        out_bias = bias if out_bias is None else out_bias
        self.o_proj = Linear(q_dim, d_model, bias=out_bias, device=device, dtype=dtype)
        self.q_norm = RMSNorm(self.head_dim, norm_eps, device=device, dtype=dtype) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, norm_eps, device=device, dtype=dtype) if qk_norm else None
        self.rope = rope

    def new_state(
        self,
        batch_size: int,
        max_len: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KeyValues:
        """Room for max_len tokens of each row; device and dtype are those of the keys, the weights' if None."""
        weight = self.k_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        return KeyValues.allocate(batch_size, max_len, self.num_kv_heads, self.head_dim, device=device, dtype=dtype)

    def new_pages(self, num_pages: int, page_size: int, *, device=None, dtype=None) -> PagedKeyValues:
        """A pool of pages for the keys and values of page_size tokens each; device and dtype as in new_state."""
        weight = self.k_proj.weight
        place = {"device": device or weight.device, "dtype": dtype or weight.dtype}
        return PagedKeyValues.allocate(num_pages, page_size, self.num_kv_heads, self.head_dim, **place)

    def forward(
        self, x_BSM: Tensor, context: Context | None = None, state: KeyValues | PagedKeyValues | None = None
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
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v_BTHD = (projection(x_BSM).unflatten(-1, (-1, self.head_dim)) for projection in projections)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q_BHSD, k_BHTD, v_BHTD = (t.transpose(-2, -3) for t in (q, k, v_BTHD))
        if self.rope is not None:
            positions = context.positions
            if positions is None and state is not None:
                positions = context.slots(x_BSM.shape[-2])
            q_BHSD, k_BHTD = self.rope.rotate_qk(q_BHSD, k_BHTD, positions)
        if state is None and context.cu_seqlens is not None:
            o_BHSD = self._packed(q_BHSD, k_BHTD, v_BHTD, context.cu_seqlens, context.mask)
        elif state is None:
            o_BHSD = ops.attention(q_BHSD, k_BHTD, v_BHTD, context.mask, causal=self.causal)
        else:
            o_BHSD = self._continue(q_BHSD, k_BHTD, v_BHTD, context, state)
        return self.o_proj(o_BHSD.transpose(-2, -3).flatten(-2))

    def _packed(
        self, q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, cu_seqlens: Tensor, mask: Tensor | None
    ) -> Tensor:
        if mask is not None or q_BHSD.dim() != 4:
            raise ValueError("cu_seqlens, the ends of packed documents, take x (B, S, d_model) and no mask")
        B, _, S, _ = q_BHSD.shape
        q_THD, k_THD, v_THD = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHSD, k_BHSD, v_BHSD))
        o_THD = ops.attention_varlen(q_THD, k_THD, v_THD, cu_seqlens, None, S, S, causal=self.causal)
        return o_THD.unflatten(0, (B, S)).transpose(1, 2)

    def _continue(
        self, q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, context: Context, state: KeyValues | PagedKeyValues
    ) -> Tensor:
        if not self.causal or context.mask is not None or context.cu_seqlens is not None:
            raise ValueError("a state needs causal attention without a mask or cu_seqlens: it holds what may be seen")
        if isinstance(state, PagedKeyValues):
            if context.paged is None:
                raise ValueError("a paged state needs context.paged: whose tokens these are, and their pages")
            q_THD, k_THD, v_THD = (x_BHSD[0].transpose(0, 1) for x_BHSD in (q_BHSD, k_BHSD, v_BHSD))
            return state.attend(q_THD, k_THD, v_THD, context.paged).transpose(0, 1)[None]
        begins = state.empty
        state.append(k_BHSD.transpose(1, 2), v_BHSD.transpose(1, 2), context)
        if begins:
            return ops.attention(q_BHSD, k_BHSD, v_BHSD, causal=True)
        return ops.attention(q_BHSD, *state.read(q_BHSD.shape[2], context))


@dataclass(frozen=True)
class AttentionConfig:
    """Causal self-attention: see Attention. Raises ValueError for head counts that do not divide."""

    num_heads: int
    num_kv_heads: int | None = None
    """Key-value heads, shared by groups of query heads (arXiv:2305.13245). None: num_heads."""
    head_dim: int | None = None
    """Features of a head. None: d_model / num_heads."""
    qkv_bias: bool = False
    """Biases of the query, key and value projections, as in Qwen2 (arXiv:2407.10671)."""
    qk_norm: bool = False
    """RMSNorm over each head of the queries and keys (arXiv:2302.05442), with the eps of the block's norms."""
    kind: Literal["attention"] = "attention"

    def __post_init__(self):
        check_counts(num_heads=self.num_heads)
        check_counts(optional=True, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)
        if self.num_heads % self.kv_heads != 0:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}")

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def head_size(self, d_model: int) -> int:
        """Features of a head. Raises ValueError where d_model is not a multiple of num_heads."""
        if self.head_dim is None and d_model % self.num_heads != 0:
            raise ValueError(
                f"d_model {d_model} is not a multiple of num_heads {self.num_heads}: change one or set head_dim"
            )
        return d_model // self.num_heads if self.head_dim is None else self.head_dim

    def build(
        self, d_model: int, *, norm_eps: float, rope: RotaryEmbedding | None, device=None, dtype=None
    ) -> Attention:
        return Attention(
            d_model,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            bias=self.qkv_bias,
            out_bias=False,
            qk_norm=self.qk_norm,
            norm_eps=norm_eps,
            rope=rope,
            device=device,
            dtype=dtype,
        )

    def num_parameters(self, d_model: int) -> int:
        D = self.head_size(d_model)
        biases = (self.num_heads + 2 * self.kv_heads) * D if self.qkv_bias else 0
        return self._matrices(d_model) + biases + (2 * D if self.qk_norm else 0)

    def flops(self, d_model: int, context_length: int) -> int:
        """Of the forward pass, a token: its matmuls, scores and values over context_length tokens counted whole."""
        return 2 * self._matrices(d_model) + 4 * self.num_heads * self.head_size(d_model) * context_length

    def activation_bytes(self, d_model: int, width: int) -> int:
        """Kept for the backward, a token: x, q, k, v, o as attention returns it and as o_proj reads it, float32
        log-sum-exps; with qk_norm what is normalised too. The scores are recomputed."""
        D, norm = self.head_size(d_model), RMSNormConfig()
        normed = (self.num_heads + self.kv_heads) * norm.activation_bytes(D, width) if self.qk_norm else 0
        return width * (d_model + (3 * self.num_heads + 2 * self.kv_heads) * D) + 4 * self.num_heads + normed

    def state_bytes(self, d_model: int, max_len: int, width: int) -> int:
        """Of one sequence's keys and values, `width` bytes an element."""
        return 2 * max_len * self.kv_heads * self.head_size(d_model) * width

    def _matrices(self, d_model: int) -> int:
        return 2 * (self.num_heads + self.kv_heads) * self.head_size(d_model) * d_model
