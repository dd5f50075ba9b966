"""One layer of a Transformer, and its description: a mixer and an MLP, their norms, and how they join the stream.

    pre         x = x + f(norm(x))                          arXiv:2002.04745
    post        x = norm(x + f(x))                          arXiv:1706.03762
    sandwich    x = x + norm'(f(norm(x)))                   arXiv:2105.13290, as in Gemma 2
    reordered   x = x + norm(f(x))                          as in OLMo 2, arXiv:2501.00656
    parallel    x = x + mixer(norm(x)) + mlp(norm(x))       one norm, arXiv:2204.02311

for f the mixer, then the MLP, if there is one. What f gives is dropped out and scaled before it is added.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, get_args, overload

import torch
from pydantic import Field
from torch import Tensor, nn

from cs336.nn import (
    AlibiConfig,
    AttentionConfig,
    Context,
    GELUConfig,
    HyenaConfig,
    LatentAttentionConfig,
    LayerNormConfig,
    LinearAttentionConfig,
    Mamba2Config,
    MixerState,
    MLPConfig,
    MoEConfig,
    NoMLPConfig,
    NoPositionsConfig,
    RMSNormConfig,
    RopeConfig,
    RotaryEmbedding,
    Routing,
    Slotted,
    SwiGLUConfig,
)
from cs336.nn.checks import check_choice, check_flags, check_kind, check_positive, check_probabilities

Mixer = Annotated[
    AttentionConfig | LatentAttentionConfig | LinearAttentionConfig | Mamba2Config | HyenaConfig,
    Field(discriminator="kind"),
]
MLP = Annotated[SwiGLUConfig | GELUConfig | MLPConfig | MoEConfig | NoMLPConfig, Field(discriminator="kind")]
Norm = Annotated[RMSNormConfig | LayerNormConfig, Field(discriminator="kind")]
Positions = Annotated[RopeConfig | AlibiConfig | NoPositionsConfig, Field(discriminator="kind")]
Placement = Literal["pre", "post", "sandwich", "reordered"]


@dataclass(frozen=True)
class BlockConfig:
    mixer: Mixer
    """What lets a token see those before it."""
    mlp: MLP = field(default_factory=SwiGLUConfig)
    """What is done to each token alone."""
    norm: Norm = field(default_factory=RMSNormConfig)
    """Of every norm of the block; the last block's is the model's last too."""
    positions: Positions = field(default_factory=RopeConfig)
    """Of kind "none" if left out where the mixer takes no rotary ones."""
    placement: Placement = "pre"
    """Of the norms: before a sublayer, after its addition, around it, or after it and before its addition."""
    parallel: bool = False
    """The mixer and the MLP read the same normed x. Of pre-norm blocks."""
    residual_scale: float = 1.0
    """What the mixer and the MLP give is multiplied by it before it is added."""
    dropout: float = 0.0
    """Share of the features that is dropped, in training, of what the mixer and the MLP give."""
    stochastic_depth: float = 0.0
    """How often, in training, a sequence skips a mixer or an MLP (arXiv:1603.09382); those kept count for more."""
    name: str = field(default="", compare=False)
    """What a pattern calls this block."""

    def __post_init__(self):
        for name, union in (("mixer", Mixer), ("mlp", MLP), ("norm", Norm), ("positions", Positions)):
            check_kind(name, getattr(self, name), *get_args(get_args(union)[0]))
        check_choice("placement", self.placement, get_args(Placement))
        check_flags(parallel=self.parallel)
        check_positive(residual_scale=self.residual_scale)
        check_probabilities(dropout=self.dropout, stochastic_depth=self.stochastic_depth)
        if self.parallel and self.placement != "pre":
            raise ValueError(f"parallel blocks are normed before: placement must be 'pre', got {self.placement!r}")
        if self.parallel and not self.has_mlp:
            raise ValueError("a parallel block is a mixer beside an MLP: it needs an MLP, got one of kind 'none'")
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

    @property
    def has_mlp(self) -> bool:
        return not isinstance(self.mlp, NoMLPConfig)

    @property
    def num_sublayers(self) -> int:
        """That add to the stream."""
        return 2 if self.has_mlp and not self.parallel else 1

    @property
    def num_norms(self) -> int:
        return self.num_sublayers * (2 if self.placement == "sandwich" else 1)

    def num_parameters(self, d_model: int) -> int:
        norms = self.num_norms * self.norm.num_parameters(d_model)
        return self.mixer.num_parameters(d_model) + self.mlp.num_parameters(d_model) + norms

    def flops(self, d_model: int, context_length: int) -> int:
        """Of the forward pass, a token, over context_length tokens counted whole; norms and activations left out."""
        return self.mixer.flops(d_model, context_length) + self.mlp.flops(d_model)

    def activation_bytes(self, d_model: int, width: int) -> int:
        """Kept for the backward, a token, `width` bytes an element; what dropout drew, as a CPU keeps it."""
        norms = self.num_norms * self.norm.activation_bytes(d_model, width)
        shared = width * d_model if self.parallel else 0  # the x that both read
        drawn = self.num_sublayers * width * d_model if self.dropout else 0
        sublayers = self.mixer.activation_bytes(d_model, width) + self.mlp.activation_bytes(d_model, width)
        return sublayers + norms + drawn - shared

    def state_bytes(self, d_model: int, max_len: int, width: int, rollback: int = 0) -> int:
        """Of one sequence while decoding, `width` bytes an element."""
        return self.mixer.state_bytes(d_model, max_len, width, rollback)


class Stream(NamedTuple):
    """The residual stream between two norms: its value is the sum, which the next norm forms in its own pass."""

    total: Tensor
    update: Tensor | None
    """What the last sublayer returned, not yet added."""
    routing: Routing | None = None
    """Of the mixtures of experts so far."""

    @property
    def value(self) -> Tensor:
        return self.total if self.update is None else self.total + self.update

    def normed(self, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """norm(value) and the value."""
        return (norm(self.total), self.total) if self.update is None else norm(self.update, self.total)

    def flat(self) -> tuple:
        """As tuples of tensors and None: what torch.compile of torch 2.11 returns is of no class of ours."""
        return self.total, self.update, None if self.routing is None else tuple(self.routing)

    @staticmethod
    def of(flat: tuple) -> "Stream":
        total, update, routing = flat
        return Stream(total, update, None if routing is None else Routing(*routing))


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
        self.config = config
        alibi = {"alibi": True} if isinstance(config.positions, AlibiConfig) else {}
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        sandwich = config.placement == "sandwich"
        self.attention_norm = config.norm.build(d_model, **place)
        self.attention = config.mixer.build(d_model, norm_eps=config.norm.eps, rope=rope, **alibi, **place)
        self.attention_post_norm = config.norm.build(d_model, **place) if sandwich else None
        self.mlp_norm = config.norm.build(d_model, **place) if config.num_sublayers == 2 else None
        self.mlp = config.mlp.build(d_model, **place)
        self.mlp_post_norm = config.norm.build(d_model, **place) if sandwich and config.has_mlp else None

    @overload
    def forward(self, x: Tensor, context: Context | None = None, state: MixerState | None = None) -> Tensor: ...

    @overload
    def forward(self, x: Stream, context: Context | None = None, state: MixerState | None = None) -> Stream: ...

    def forward(self, x, context=None, state=None):
        """context, state: of the mixer."""
        stream = x if isinstance(x, Stream) else Stream(x, None)
        read, total = self._read(stream, self.attention_norm)
        if isinstance(state, Slotted):
            y = state.mix(self.attention, read, context)
        else:
            y = self.attention(read, context, state)
        if self.config.parallel:
            more, routing = self._mlp(read, stream.routing)
            stream = Stream(total, self._update(y + more), routing)
        else:
            routing = stream.routing
            stream = self._add(total, y, self.attention_norm, self.attention_post_norm)
            if self.mlp is not None:
                read, total = self._read(stream, self.mlp_norm)
                y, routing = self._mlp(read, routing)
                stream = self._add(total, y, self.mlp_norm, self.mlp_post_norm)
            stream = stream._replace(routing=routing)
        return stream if isinstance(x, Stream) else stream.value

    def _read(self, stream: Stream, norm) -> tuple[Tensor, Tensor]:
        """What a sublayer reads, and the stream's value."""
        if self.config.placement in ("pre", "sandwich"):
            return stream.normed(norm)
        return (value := stream.value), value

    def _add(self, total: Tensor, y: Tensor, norm, post_norm) -> Stream:
        """The stream after a sublayer gave y."""
        match self.config.placement:
            case "pre":
                return Stream(total, self._update(y))
            case "sandwich":
                return Stream(total, self._update(post_norm(y)))
            case "reordered":
                return Stream(total, self._update(norm(y)))
            case _:
                return Stream(Stream(total, self._update(y)).normed(norm)[0], None)

    def _mlp(self, x: Tensor, before: Routing | None) -> tuple[Tensor, Routing | None]:
        assert self.mlp is not None
        y = self.mlp(x)
        if isinstance(y, Tensor):
            return y, before
        y, routing = y
        return y, routing if before is None else before.plus(routing)

    def _update(self, x: Tensor) -> Tensor:
        """What is added to the stream: dropped out, skipped by some sequences, scaled."""
        config = self.config
        if config.dropout:  # asked first: what reads self.training is compiled once for training, once for validation
            x = nn.functional.dropout(x, config.dropout, self.training)
        if config.stochastic_depth and self.training:
            kept = 1 - config.stochastic_depth
            x = x * x.new_empty(*x.shape[:-2], 1, 1).bernoulli_(kept).div_(kept)
        return x if config.residual_scale == 1 else config.residual_scale * x
