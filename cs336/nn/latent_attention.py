"""Multi-head latent attention, DeepSeek-V2, arXiv:2405.04434: keys and values are made of a short latent, which is all
that decoding keeps.

    c = norm(W_a x)      k_h = [U_h c, rope(w_r x)]      v_h = V_h c      q_h = [a_h, rope(b_h)]
    o_h = softmax(q_h k_h^T / sqrt(D + R)) v_h

While decoding U_h is absorbed into the query and V_h into the output, so that all heads attend to one key [c, rope] of
L + R features and its own first L as the value: q_h k_h^T = (U_h^T a_h) c + rope(b_h) rope(w_r x).

B = batch (any number of dims), S = new tokens, T = keys, H = heads, D = features of a head without positions, R = with
them, L = features of the latent, E = of a value.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from cs336 import ops
from cs336.nn.checks import check_counts, check_positive, check_tokens
from cs336.nn.linear import Linear
from cs336.nn.norms import RMSNorm
from cs336.nn.paged import PagedLatents
from cs336.nn.positions import RotaryEmbedding
from cs336.nn.state import Context, Slots, place_of
from cs336.ops import registry
from cs336.ops.paged_attention import MAX_DECODE_QUERIES


class Latents(Slots):
    """Latent attention's state: the normed latent and the rotated key that heads share, side by side (B, T, L + R)."""

    names = "latents"


class LatentAttention(nn.Module):
    """Causal latent attention: x (B, S, d_model) -> like x. The arguments are LatentAttentionConfig's.

    rope rotates the last rope_dim features of each head; None leaves them as they are.
    """

    def __init__(
        self,
        d_model: int,
        config: "LatentAttentionConfig",
        *,
        norm_eps: float = 1e-5,
        rope: RotaryEmbedding | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if rope is not None and rope.head_dim != config.rope_dim():
            raise ValueError(f"rope rotates {rope.head_dim} features, these heads have {config.rope_dim()}")
        self.d_model, self.config, self.rope = d_model, config, rope
        H, L, R = config.num_heads, config.kv_rank, config.rope_head_dim
        self.q_a_proj = self.q_a_norm = None
        q_in = d_model
        if config.q_rank is not None:
            q_in = config.q_rank
            self.q_a_proj = Linear(d_model, q_in, device=device, dtype=dtype)
            self.q_a_norm = RMSNorm(q_in, norm_eps, device=device, dtype=dtype)
        self.q_proj = Linear(q_in, H * (config.head_dim + R), device=device, dtype=dtype)
        self.kv_a_proj = Linear(d_model, L + R, device=device, dtype=dtype)
        self.kv_a_norm = RMSNorm(L, norm_eps, device=device, dtype=dtype)
        self.kv_b_proj = Linear(L, H * (config.head_dim + config.value_size), device=device, dtype=dtype)
        self.o_proj = Linear(H * config.value_size, d_model, device=device, dtype=dtype)

    def new_state(
        self,
        batch_size: int,
        max_len: int,
        *,
        rollback: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Latents:
        """Room for max_len tokens of each row; device and dtype are the weights' if None."""
        shape = (batch_size, max_len, self.config.kv_rank + self.config.rope_head_dim)
        return Latents(torch.zeros(shape, **place_of(self.kv_a_proj.weight, device, dtype)))

    has_pages = True

    def new_pages(self, num_pages: int, page_size: int, *, device=None, dtype=None) -> PagedLatents:
        """A pool of pages of page_size tokens each; device and dtype as in new_state."""
        L, place = self.config.kv_rank, place_of(self.kv_a_proj.weight, device, dtype)
        return PagedLatents(torch.empty(num_pages, page_size, L + self.config.rope_head_dim, **place), L)

    def forward(
        self, x_BSM: Tensor, context: Context | None = None, state: Latents | PagedLatents | None = None
    ) -> Tensor:
        """x (B, S, d_model) -> (B, S, d_model). context and state as in Attention."""
        check_tokens(x_BSM, self.d_model)
        context = Context() if context is None else context
        config, S = self.config, x_BSM.shape[1]
        q_in = x_BSM if self.q_a_proj is None else self.q_a_norm(self.q_a_proj(x_BSM))  # type: ignore[misc]
        sizes = config.head_dim, config.rope_head_dim
        q_BHSD, q_BHSR = self.q_proj(q_in).unflatten(-1, (config.num_heads, -1)).transpose(1, 2).split(sizes, -1)
        c_BSL, k_BSR = self.kv_a_proj(x_BSM).split((config.kv_rank, config.rope_head_dim), -1)
        c_BSL, k_B1SR = self.kv_a_norm(c_BSL), k_BSR[:, None]
        if isinstance(state, PagedLatents):
            return self.o_proj(self._paged(q_BHSD, q_BHSR, c_BSL, k_B1SR, context, state).flatten(-2)[None])
        if self.rope is not None:
            positions = context.positions
            if positions is None and state is not None:
                positions = context.slots(S)
            q_BHSR, k_B1SR = self.rope.rotate_qk(q_BHSR, k_B1SR, positions)
        begins = True
        if state is not None:
            if context.mask is not None or context.cu_seqlens is not None:
                raise ValueError("a state takes no mask or cu_seqlens: it holds what may be seen")
            begins = state.empty
            state.write((torch.cat((c_BSL, k_B1SR[:, 0]), -1),), context)
        if state is None or begins:
            o_BHSE = self._whole(q_BHSD, q_BHSR, c_BSL, k_B1SR, context)
        else:
            o_BHSE = self._continue(q_BHSD, q_BHSR, context, state)
        return self.o_proj(o_BHSE.transpose(1, 2).flatten(-2))

    def _whole(
        self,
        q_BHSD: Tensor,
        q_BHSR: Tensor,
        c_BSL: Tensor,
        k_B1SR: Tensor,
        context: Context,
        longest: int | None = None,
    ) -> Tensor:
        """Keys and values made of the latents, head by head. longest: of packed documents, if not S."""
        config, (B, H, S, D) = self.config, q_BHSD.shape
        kv_BHSF = self.kv_b_proj(c_BSL).unflatten(-1, (H, -1)).transpose(1, 2)
        k_BHSD, v_BHSE = kv_BHSF.split((D, config.value_size), -1)
        q_BHSQ = torch.cat((q_BHSD, q_BHSR), -1)
        k_BHSQ = torch.cat((k_BHSD, k_B1SR.expand(B, H, S, -1)), -1)
        if context.cu_seqlens is None:
            return ops.attention(q_BHSQ, k_BHSQ, v_BHSE, context.mask, causal=True, scale=config.scale)
        q_THQ, k_THQ, v_THE = (t.transpose(1, 2).flatten(0, 1) for t in (q_BHSQ, k_BHSQ, v_BHSE))
        most = S if longest is None else longest
        o_THE = ops.attention_varlen(
            q_THQ, k_THQ, v_THE, context.cu_seqlens, None, most, most, causal=True, scale=config.scale
        )
        return o_THE.unflatten(0, (B, S)).transpose(1, 2)

    def _absorbed(self, q_BHSD: Tensor, q_BHSR: Tensor) -> Tensor:
        """Queries (B, H, S, L + R) of the latents themselves, which all heads share."""
        up_HDL, _ = self._ups(q_BHSD.dtype)
        return torch.cat((_by_head(q_BHSD, up_HDL), q_BHSR), -1)

    def _values(self, o_BHSL: Tensor) -> Tensor:
        """(B, H, S, E) of what was seen of the latents."""
        _, values_HEL = self._ups(o_BHSL.dtype)
        return _by_head(o_BHSL, values_HEL.transpose(1, 2))

    def _ups(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What makes keys (H, D, L) and values (H, E, L) of a latent."""
        weight_HFL = self.kv_b_proj.weight.to(dtype).unflatten(0, (self.config.num_heads, -1))
        up_HDL, values_HEL = weight_HFL.split((self.config.head_dim, self.config.value_size), 1)
        return up_HDL, values_HEL

    @property
    def _scale(self) -> float:
        sizes = self.config.head_dim + self.config.rope_head_dim
        return sizes**-0.5 if self.config.scale is None else self.config.scale

    def _continue(self, q_BHSD: Tensor, q_BHSR: Tensor, context: Context, state: Latents) -> Tensor:
        """(B, H, S, E) of the newest tokens of rows whose latents are kept: each row of them is a page."""
        q_BHSQ, (latents_BTF,) = self._absorbed(q_BHSD, q_BHSR), state.entries
        (B, _, S, _), L = q_BHSQ.shape, self.config.kv_rank
        differentiable = torch.is_grad_enabled() and q_BHSQ.requires_grad
        if differentiable or S == 0 or registry.kernels("paged_prefill", q_BHSQ.device)[0] == "ref":
            kv_B1TF = latents_BTF[:, None, : context.reach]
            mask = state.visible(S, context)
            return self._values(ops.attention(q_BHSQ, kv_B1TF, kv_B1TF[..., :L], mask, scale=self._scale))
        assert context.lengths is not None
        pages, ints = PagedLatents(latents_BTF, L), {"dtype": torch.int32, "device": q_BHSQ.device}
        rows = torch.arange(B, **ints)[:, None], (context.lengths + S).to(torch.int32)  # type: ignore[call-overload]
        q_BSHQ, caches = q_BHSQ.transpose(1, 2), (pages.keys, pages.values)
        if S <= MAX_DECODE_QUERIES:
            o_BSHL = ops.paged_attention(q_BSHQ, *caches, *rows, scale=self._scale)
        else:
            ends = torch.arange(0, B * S + 1, S, **ints)  # type: ignore[call-overload]
            o_BSHL = ops.paged_prefill(
                q_BSHQ.flatten(0, 1), *caches, *rows, ends, max_seqlen_q=S, scale=self._scale
            ).unflatten(0, (B, S))
        return self._values(o_BSHL.transpose(1, 2))

    def _paged(
        self, q_BHSD: Tensor, q_BHSR: Tensor, c_BSL: Tensor, k_B1SR: Tensor, context: Context, state: PagedLatents
    ) -> Tensor:
        """(T, H, E) of the tokens of a step in pages; B is 1, and S the tokens T."""
        tokens = context.paged
        if tokens is None:
            raise ValueError("a paged state needs context.paged: whose tokens these are, and their pages")
        q_THR, k_T1R, c_T1L = q_BHSR[0].transpose(0, 1), k_B1SR[0].transpose(0, 1), c_BSL[0, :, None]
        caches, where = (state.rotated, state.values), (tokens.table, tokens.sequence, tokens.position)
        if self.rope is None:
            ops.append_kv_(*caches, k_T1R, c_T1L, *where)
        else:
            turn = self.rope.cos, self.rope.sin, *where
            q_THR, k_T1R = ops.qk_norm_rope_append_(
                *caches, q_THR, k_T1R, c_T1L, *turn, interleaved=self.rope.interleaved
            )
        q_BHSR, k_B1SR, outs = q_THR.transpose(0, 1)[None], k_T1R.transpose(0, 1)[None], []
        old = slice(0, q_BHSD.shape[2] if tokens.fresh is None else tokens.fresh.tokens.start)
        if old.stop:
            q_THQ = self._absorbed(q_BHSD[:, :, old], q_BHSR[:, :, old])[0].transpose(0, 1)
            o_THL = torch.cat(state.read(q_THQ, tokens, scale=self._scale))
            outs.append(self._values(o_THL.transpose(0, 1)[None])[0].transpose(0, 1))
        if (new := tokens.fresh) is not None:
            q_BHSD, q_BHSR, k_B1SR = (x[:, :, new.tokens] for x in (q_BHSD, q_BHSR, k_B1SR))
            packed = Context(cu_seqlens=new.ends)
            o_BHSE = self._whole(q_BHSD, q_BHSR, c_BSL[:, new.tokens], k_B1SR, packed, new.longest)
            outs.append(o_BHSE[0].transpose(0, 1))
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def _by_head(x_BHSD: Tensor, weight_HDL: Tensor) -> Tensor:
    """x @ weight, for which the weight is read once, whatever B is."""
    B, H, S, D = x_BHSD.shape
    y_HTL = x_BHSD.transpose(0, 1).reshape(H, B * S, D) @ weight_HDL
    return y_HTL.view(H, B, S, y_HTL.shape[-1]).transpose(0, 1)


@dataclass(frozen=True)
class LatentAttentionConfig:
    """Latent attention (MLA): see LatentAttention."""

    num_heads: int
    """Heads, of queries, keys and values."""
    kv_rank: int
    """Features of the latent that keys and values are made of: with rope_head_dim all that decoding keeps."""
    head_dim: int
    """Features of a query and a key that know no position."""
    rope_head_dim: int
    """Features of a query and a key that rotary positions turn; heads share those of the key."""
    value_dim: int | None = None
    """Features of a value. None: head_dim."""
    q_rank: int | None = None
    """Features of the latent that queries are made of. None: queries are made of x."""
    scale: float | None = None
    """Of the scores. None: 1 / sqrt(head_dim + rope_head_dim)."""
    kind: Literal["latent_attention"] = "latent_attention"
    takes_positions: ClassVar[tuple[str, ...]] = ("rope", "none")

    def __post_init__(self):
        check_counts(num_heads=self.num_heads, kv_rank=self.kv_rank)
        check_counts(head_dim=self.head_dim, rope_head_dim=self.rope_head_dim)
        check_counts(optional=True, value_dim=self.value_dim, q_rank=self.q_rank)
        check_positive(optional=True, scale=self.scale)

    @property
    def value_size(self) -> int:
        return self.head_dim if self.value_dim is None else self.value_dim

    def rope_dim(self, d_model: int | None = None) -> int:
        """Features of a head that positions rotate."""
        return self.rope_head_dim

    def build(
        self, d_model: int, *, norm_eps: float, rope: RotaryEmbedding | None, device=None, dtype=None
    ) -> LatentAttention:
        return LatentAttention(d_model, self, norm_eps=norm_eps, rope=rope, device=device, dtype=dtype)

    def num_parameters(self, d_model: int) -> int:
        return self._matrices(d_model) + self.kv_rank + (self.q_rank or 0)

    def flops(self, d_model: int, context_length: int) -> int:
        """Of the forward pass in training, a token: its matmuls, scores and values over context_length tokens counted
        whole."""
        attended = self.head_dim + self.rope_head_dim + self.value_size
        return 2 * self._matrices(d_model) + 2 * self.num_heads * attended * context_length

    def activation_bytes(self, d_model: int, width: int) -> int:
        """Kept for the backward, a token: x; the latents, in and out of their norms, that of the keys with the rotary
        key beside it; whole q, k, and v beside the keys it was made with; o as attention returns it and as o_proj reads
        it; float32 log-sum-exps."""
        H, Q = self.num_heads, self.head_dim + self.rope_head_dim
        latents = self.kv_rank + self.rope_head_dim + self.kv_rank + 2 * (self.q_rank or 0)
        norms = 4 * (2 if self.q_rank else 1)
        heads = H * (2 * Q + self.head_dim + self.value_size + 2 * self.value_size)
        return width * (d_model + latents + heads) + norms + 4 * H

    def state_bytes(self, d_model: int, max_len: int, width: int, rollback: int = 0) -> int:
        """Of one sequence's latents and rotary keys, `width` bytes an element."""
        return max_len * (self.kv_rank + self.rope_head_dim) * width

    def _matrices(self, d_model: int) -> int:
        H, Q = self.num_heads, self.head_dim + self.rope_head_dim
        queries = d_model * H * Q if self.q_rank is None else self.q_rank * (d_model + H * Q)
        latent = d_model * (self.kv_rank + self.rope_head_dim) + self.kv_rank * H * (self.head_dim + self.value_size)
        return queries + latent + H * self.value_size * d_model
