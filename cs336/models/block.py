"""One layer of a Transformer, and its description: a mixer and an MLP, each behind a norm.

x = x + mixer(norm(x))
x = x + mlp(norm(x))
"""

from dataclasses import dataclass, field
from typing import Annotated, NamedTuple, overload

import torch
from pydantic import Field
from torch import Tensor, nn

from cs336.nn import (
    AttentionConfig,
    Context,
    GELUConfig,
    HyenaConfig,
    LatentAttentionConfig,
    LayerNormConfig,
    LinearAttentionConfig,
    Mamba2Config,
    MixerState,
    NoPositionsConfig,
    RMSNormConfig,
    RopeConfig,
    RotaryEmbedding,
    SwiGLUConfig,
)

Mixer = Annotated[
    AttentionConfig | LatentAttentionConfig | LinearAttentionConfig | Mamba2Config | HyenaConfig,
    Field(discriminator="kind"),
]
MLP = Annotated[SwiGLUConfig | GELUConfig, Field(discriminator="kind")]
Norm = Annotated[RMSNormConfig | LayerNormConfig, Field(discriminator="kind")]
Positions = Annotated[RopeConfig | NoPositionsConfig, Field(discriminator="kind")]


@dataclass(frozen=True)
class BlockConfig:
    mixer: Mixer
    mlp: MLP = field(default_factory=SwiGLUConfig)
    norm: Norm = field(default_factory=RMSNormConfig)
    """Before the mixer and before the MLP."""
    positions: Positions = field(default_factory=RopeConfig)
    """Of kind "none" if left out where the mixer takes no rotary ones."""
    name: str = field(default="", compare=False)
    """What a pattern calls this block."""

    def __post_init__(self):
        if "rope" not in self.mixer.takes_positions and self.positions == RopeConfig():
            object.__setattr__(self, "positions", NoPositionsConfig())
        if self.positions.kind not in self.mixer.takes_positions:
            known = " or ".join(map(repr, self.mixer.takes_positions))
            raise ValueError(f"a {self.mixer.kind} mixer takes positions of kind {known}, got {self.positions.kind!r}")

    def check(self, d_model: int) -> None:
        """Raises ValueError for values that do not fit together."""
        self.positions.check(self.mixer.rope_dim(d_model))

    def build_rope(self, d_model: int, context_length: int, *, device=None) -> RotaryEmbedding | None:
        return self.positions.build(self.mixer.rope_dim(d_model), context_length, device=device)

    def num_parameters(self, d_model: int) -> int:
        norms = 2 * self.norm.num_parameters(d_model)
        return self.mixer.num_parameters(d_model) + self.mlp.num_parameters(d_model) + norms

    def flops(self, d_model: int, context_length: int) -> int:
        """Of the forward pass, a token, over context_length tokens counted whole; norms and activations left out."""
        return self.mixer.flops(d_model, context_length) + self.mlp.flops(d_model)

    def activation_bytes(self, d_model: int, width: int) -> int:
        """Kept for the backward, a token, `width` bytes an element."""
        norms = 2 * self.norm.activation_bytes(d_model, width)
        return self.mixer.activation_bytes(d_model, width) + self.mlp.activation_bytes(d_model, width) + norms

    def state_bytes(self, d_model: int, max_len: int, width: int, rollback: int = 0) -> int:
        """Of one sequence while decoding, `width` bytes an element."""
        return self.mixer.state_bytes(d_model, max_len, width, rollback)


class Stream(NamedTuple):
    """The residual stream between two norms: its value is the sum, which the next norm forms in its own pass."""

    total: Tensor
    update: Tensor | None
    """What the last sublayer returned, not yet added."""

    def normed(self, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """norm(value) and the value."""
        return (norm(self.total), self.total) if self.update is None else norm(self.update, self.total)


class TransformerBlock(nn.Module):
    """x (..., S, d_model) -> x like it; a Stream gives a Stream, so that a stack of blocks adds within its norms.

    rope: config.build_rope(...), which blocks may share. The mixer's place in the tree is `attention`, whatever its
    kind, and its norm's `attention_norm`: the names that weights have had since there was one kind.
    """

    def __init__(
        self,
        config: BlockConfig,
        d_model: int,
        rope: RotaryEmbedding | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.attention_norm = config.norm.build(d_model, device=device, dtype=dtype)
        self.attention = config.mixer.build(d_model, norm_eps=config.norm.eps, rope=rope, device=device, dtype=dtype)
        self.mlp_norm = config.norm.build(d_model, device=device, dtype=dtype)
        self.mlp = config.mlp.build(d_model, device=device, dtype=dtype)

    @overload
    def forward(self, x: Tensor, context: Context | None = None, state: MixerState | None = None) -> Tensor: ...

    @overload
    def forward(self, x: Stream, context: Context | None = None, state: MixerState | None = None) -> Stream: ...

    def forward(self, x, context=None, state=None):
        """context, state: of the mixer."""
        stream = x if isinstance(x, Stream) else Stream(x, None)
        normed, total = stream.normed(self.attention_norm)
        stream = Stream(total, self.attention(normed, context, state))
        normed, total = stream.normed(self.mlp_norm)
        update = self.mlp(normed)
        return Stream(total, update) if isinstance(x, Stream) else total + update
