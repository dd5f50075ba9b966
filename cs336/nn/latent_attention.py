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
from cs336.nn.checks import check_counts, check_positive
from cs336.nn.linear import Linear
from cs336.nn.norms import RMSNorm
from cs336.nn.positions import RotaryEmbedding
from cs336.nn.state import Context, Slots


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
        weight = self.kv_a_proj.weight
        shape = (batch_size, max_len, self.config.kv_rank + self.config.rope_head_dim)
        return Latents(torch.zeros(shape, device=device or weight.device, dtype=dtype or weight.dtype))

    def forward(self, x_BSM: Tensor, context: Context | None = None, state: Latents | None = None) -> Tensor:
        """x (B, S, d_model) -> (B, S, d_model). context and state as in Attention."""
        if x_BSM.dim() != 3 or x_BSM.shape[-1] != self.d_model:
            raise ValueError(f"x must be (batch, tokens, {self.d_model}), got shape {tuple(x_BSM.shape)}")
        context = Context() if context is None else context
        config, S = self.config, x_BSM.shape[1]
        q_in = x_BSM if self.q_a_proj is None else self.q_a_norm(self.q_a_proj(x_BSM))  # type: ignore[misc]
        sizes = config.head_dim, config.rope_head_dim
        q_BHSD, q_BHSR = self.q_proj(q_in).unflatten(-1, (config.num_heads, -1)).transpose(1, 2).split(sizes, -1)
        c_BSL, k_BSR = self.kv_a_proj(x_BSM).split((config.kv_rank, config.rope_head_dim), -1)
        c_BSL, k_B1SR = self.kv_a_norm(c_BSL), k_BSR[:, None]
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
            o_BHSE = self._absorbed(q_BHSD, q_BHSR, context, state)
        return self.o_proj(o_BHSE.transpose(1, 2).flatten(-2))

    def _whole(self, q_BHSD: Tensor, q_BHSR: Tensor, c_BSL: Tensor, k_B1SR: Tensor, context: Context) -> Tensor:
        """Keys and values made of the latents, head by head."""
        config, (B, H, S, D) = self.config, q_BHSD.shape
        kv_BHSF = self.kv_b_proj(c_BSL).unflatten(-1, (H, -1)).transpose(1, 2)
        k_BHSD, v_BHSE = kv_BHSF.split((D, config.value_size), -1)
        q_BHSQ = torch.cat((q_BHSD, q_BHSR), -1)
        k_BHSQ = torch.cat((k_BHSD, k_B1SR.expand(B, H, S, -1)), -1)
        if context.cu_seqlens is None:
            return ops.attention(q_BHSQ, k_BHSQ, v_BHSE, context.mask, causal=True, scale=config.scale)
        q_THQ, k_THQ, v_THE = (t.transpose(1, 2).flatten(0, 1) for t in (q_BHSQ, k_BHSQ, v_BHSE))
        o_THE = ops.attention_varlen(
            q_THQ, k_THQ, v_THE, context.cu_seqlens, None, S, S, causal=True, scale=config.scale
        )
        return o_THE.unflatten(0, (B, S)).transpose(1, 2)

    def _absorbed(self, q_BHSD: Tensor, q_BHSR: Tensor, context: Context, state: Latents) -> Tensor:
        """All heads attend to the latents themselves."""
        D, L, scale, dtype = self.config.head_dim, self.config.kv_rank, self.config.scale, q_BHSD.dtype
        up_HDL, values_HEL = (
            self.kv_b_proj.weight.to(dtype)
            .unflatten(0, (self.config.num_heads, -1))
            .split((D, self.config.value_size), 1)
        )
        q_BHSQ = torch.cat((q_BHSD @ up_HDL, q_BHSR), -1)
        kv_B1TQ = state.entries[0][:, None, : context.reach]
        mask = state.visible(q_BHSD.shape[2], context)
        scale = (D + self.config.rope_head_dim) ** -0.5 if scale is None else scale
        o_BHSL = ops.attention(q_BHSQ, kv_B1TQ, kv_B1TQ[..., :L], mask, scale=scale)
        return o_BHSL @ values_HEL.transpose(1, 2)


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
