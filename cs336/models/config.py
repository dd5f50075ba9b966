import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cs336.models.block import BlockConfig, Norm
from cs336.nn import AttentionConfig, LongRopeScaling, NoPositionsConfig, RMSNormConfig, RopeConfig, SwiGLUConfig
from cs336.nn.checks import (
    check_choice,
    check_counts,
    check_flags,
    check_kind,
    check_positive,
    check_probabilities,
)

MOST_LAYERS = 1 << 12  # more are a damaged file's, and take minutes to build
# The fields that the short form alone reads.
SHORT = {"num_heads", "num_kv_heads", "head_dim", "qk_norm", "qkv_bias", "d_ff", "norm_eps"}
SHORT |= {"rope_theta", "rope_interleaved"}


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of a decoder: its blocks, described one by one, or all at once in the short form.

    The short form is `num_heads` and what follows it to `head_dim`: RMSNorm, rotary grouped-query attention, SwiGLU in
    every block. `layers` says the same and more, in TOML:

        [[model.layers]]
        mixer = {kind = "attention", num_heads = 8, num_kv_heads = 2}
        mlp = {kind = "gelu"}

    A `pattern` says in which order layers that have a `name` follow each other: "SSSL" where names are letters, else
    names with spaces between them, or a list of names, kept as such a text. Either way the model is made of `blocks`.
    Raises ValueError for values that do not fit together.
    """

    vocab_size: int
    """Rows of the embedding: at least the tokenizer's vocabulary; a multiple of 64 is faster on a GPU."""
    context_length: int
    """Most tokens the model reads at once."""
    num_layers: int
    """Blocks, one after the other."""
    d_model: int
    """Features of the residual stream."""
    num_heads: int | None = None
    """Query heads. None: layers say it."""
    num_kv_heads: int | None = None
    """Key-value heads, shared by groups of query heads (arXiv:2305.13245). None: num_heads."""
    d_ff: int | None = None
    """Hidden features of the SwiGLU. None: 8/3 d_model, rounded up to a multiple of 64."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths: pair i of D features turns by theta^(-2i / D) radians a token."""
    rope_interleaved: bool = False
    """Rotate neighbouring features, as arXiv:2104.09864 does, instead of the two halves of a head."""
    norm_eps: float = 1e-5
    """Added to the mean square before its root is taken."""
    qk_norm: bool = False
    """RMSNorm over each head of the queries and keys (arXiv:2302.05442)."""
    qkv_bias: bool = False
    """Biases of the query, key and value projections, as in Qwen2 (arXiv:2407.10671)."""
    logit_softcap: float | None = None
    """Bound c of the logits, which become c * tanh(logits / c) (arXiv:2408.00118)."""
    tie_embeddings: bool = False
    """The output head is the embedding."""
    init_std: float = 0.02
    """Of every matrix; those that write to the residual stream start at init_std / sqrt(2 * num_layers)."""
    mup_base_width: int | None = None
    """The d_model that init_std and the learning rate were chosen at; this model's follow by muP, so that they serve
    every width: see cs336.models.mup. None: the same at every width."""
    head_dim: int | None = None
    """Features of a head, even. None: d_model / num_heads."""
    position_embedding: Literal["learned", "sinusoidal"] | None = None
    """Absolute positions, added to the embedding: of GPT-2, or of arXiv:1706.03762. Of layers without positions."""
    embedding_scale: float | None = None
    """What the embedding is multiplied by: sqrt(d_model) in arXiv:1706.03762 and in Gemma."""
    logit_scale: float | None = None
    """What the logits are multiplied by, before they are bounded: as in Cohere's models, and in Granite."""
    embedding_dropout: float = 0.0
    """Share of the embedding's features that is dropped in training."""
    float32_norms: bool = False
    """The norms' weights are float32 in 16-bit models too: Gemma's are 1 + what files hold, which 16 bits round."""
    layers: tuple[BlockConfig, ...] | None = None
    """The blocks, which repeat up to num_layers. None: the short form."""
    pattern: str | tuple[str, ...] | None = None
    """The names of layers in order, which repeat up to num_layers: "SSSL", "sliding sliding full", or a list."""

    def __post_init__(self):
        check_counts(vocab_size=self.vocab_size, context_length=self.context_length)
        check_counts(num_layers=self.num_layers, d_model=self.d_model)
        if self.num_layers > MOST_LAYERS:
            raise ValueError(f"num_layers must be at most {MOST_LAYERS:,}, got {self.num_layers:,}")
        check_counts(optional=self.layers is not None, num_heads=self.num_heads)
        check_counts(optional=True, mup_base_width=self.mup_base_width)
        check_counts(optional=True, num_kv_heads=self.num_kv_heads, d_ff=self.d_ff, head_dim=self.head_dim)
        check_positive(rope_theta=self.rope_theta, norm_eps=self.norm_eps, init_std=self.init_std)
        check_positive(optional=True, logit_softcap=self.logit_softcap, logit_scale=self.logit_scale)
        check_positive(optional=True, embedding_scale=self.embedding_scale)
        check_probabilities(embedding_dropout=self.embedding_dropout)
        check_flags(float32_norms=self.float32_norms)
        if self.position_embedding is not None:
            check_choice("position_embedding", self.position_embedding, ("learned", "sinusoidal"))
        if isinstance(self.pattern, list | tuple):
            object.__setattr__(self, "pattern", _as_text(self.pattern))
        check_kind("pattern", self.pattern, str, optional=True)
        check_kind("layers", self.layers, list, tuple, optional=True)
        if self.layers is not None:
            for i, block in enumerate(self.layers):
                check_kind(f"layers[{i}]", block, BlockConfig)
            object.__setattr__(self, "layers", tuple(self.layers))
            self._check_layers(self.layers)
        elif self.pattern is not None:
            raise ValueError(f"pattern {self.pattern!r} orders layers by their names: describe them in layers")
        for block in set(self.blocks):
            block.check(self.d_model)
            if self.position_embedding is not None and not isinstance(block.positions, NoPositionsConfig):
                raise ValueError(
                    f"position_embedding {self.position_embedding!r} beside {block.positions.kind!r} positions: "
                    'give each layer positions = {kind = "none"}, or leave it out'
                )
        if self.position_embedding == "sinusoidal" and self.d_model % 2 != 0:
            raise ValueError(f"d_model must be even for sinusoidal positions, got {self.d_model}")

        if self.mup_base_width is not None:
            self._check_mup()

    def _check_mup(self) -> None:
        if self.tie_embeddings:
            raise ValueError("mup_base_width scales the head and not the embedding: it needs tie_embeddings = false")
        for block in self.blocks:
            kinds = block.mixer.kind, block.mlp.kind
            if kinds[0] != "attention" or kinds[1] not in ("swiglu", "gelu", "mlp"):
                raise ValueError(f"mup_base_width is of attention and dense MLPs, got {kinds[0]} and {kinds[1]}")

    def _check_layers(self, layers: tuple[BlockConfig, ...]) -> None:
        if twice := [
            f.name for f in dataclasses.fields(self) if f.name in SHORT and getattr(self, f.name) != f.default
        ]:
            raise ValueError(f"layers describe the blocks whole: say {', '.join(twice)} there, or leave layers out")
        order = self._ordered(layers)
        if not order or self.num_layers % len(order) != 0:
            raise ValueError(f"num_layers {self.num_layers} is not a multiple of the {len(order)} layers that repeat")

    def _ordered(self, layers: tuple[BlockConfig, ...]) -> tuple[BlockConfig, ...]:
        """Once through the pattern."""
        if self.pattern is None:
            return layers
        assert isinstance(self.pattern, str)  # __post_init__ has made one of a list
        named = {block.name: block for block in layers}
        if len(named) < len(layers) or "" in named or any(len(name.split()) != 1 for name in named):
            raise ValueError("a pattern needs layers with names, each another and one word")
        letters = all(len(name) == 1 for name in named)
        order = list("".join(self.pattern.split())) if letters else self.pattern.split()
        for name in order:
            if name not in named:
                raise ValueError(f"pattern {self.pattern!r} names the layer {name!r}; there are {', '.join(named)}")
        if unused := named.keys() - set(order):
            raise ValueError(f"pattern {self.pattern!r} leaves out the layer {', '.join(sorted(unused))}")
        return tuple(named[name] for name in order)

    @property
    def blocks(self) -> tuple[BlockConfig, ...]:
        """Each layer's description, first to last."""
        layers = self.layers
        if layers is None:
            assert self.num_heads is not None  # __post_init__ has refused that
            mixer = AttentionConfig(self.num_heads, self.num_kv_heads, self.head_dim, self.qkv_bias, self.qk_norm)
            rope = RopeConfig(self.rope_theta, self.rope_interleaved)
            layers = (BlockConfig(mixer, SwiGLUConfig(self.d_ff), RMSNormConfig(self.norm_eps), rope),)
        layers = self._ordered(layers)
        return layers * (self.num_layers // len(layers))

    def short_form(self) -> "TransformerConfig | None":
        """The same model in the short form; None where its blocks differ or are of other kinds."""
        block = self.blocks[0]
        mixer, mlp, norm, rope = block.mixer, block.mlp, block.norm, block.positions
        if not (isinstance(mixer, AttentionConfig) and isinstance(mlp, SwiGLUConfig)):
            return None
        if not (isinstance(norm, RMSNormConfig) and isinstance(rope, RopeConfig)):
            return None
        short: dict[str, Any] = {name: getattr(mixer, name) for name in SHORT if hasattr(mixer, name)}
        short |= {
            "d_ff": mlp.d_ff,
            "norm_eps": norm.eps,
            "rope_theta": rope.theta,
            "rope_interleaved": rope.interleaved,
        }
        if not isinstance(short["qk_norm"], bool):
            return None
        config = dataclasses.replace(self, layers=None, pattern=None, **short)
        return config if config.blocks == self.blocks else None

    def with_blocks(self, blocks: tuple[BlockConfig, ...]) -> "TransformerConfig":
        """The same model of these blocks instead."""
        short: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(self) if f.name in SHORT}
        return dataclasses.replace(self, num_layers=len(blocks), layers=blocks, pattern=None, **short)

    def within(self, max_len: int | None) -> "TransformerConfig":
        """The same model for texts of at most max_len tokens: a LongRoPE whose original context they do not leave has
        its short factors, for a context_length of no more than that. Any other model as it is; None: as it is.

        Raises ValueError for a max_len that is no positive integer.
        """
        check_counts(optional=True, max_len=max_len)
        scalings = (block.positions.scaling for block in self.blocks if isinstance(block.positions, RopeConfig))
        short = [s.original_context_length for s in scalings if isinstance(s, LongRopeScaling)]
        enough = [length for length in short if max_len is not None and max_len <= length]
        return dataclasses.replace(self, context_length=min([self.context_length, *enough]))

    @property
    def kv_heads(self) -> int:
        """Of the first layer of attention. Raises ValueError without one; so does head_size."""
        return self._attention.kv_heads

    @property
    def head_size(self) -> int:
        return self._attention.head_size(self.d_model)

    @property
    def _attention(self) -> AttentionConfig:
        for block in self.blocks:
            if isinstance(block.mixer, AttentionConfig):
                return block.mixer
        raise ValueError(
            f"no layer has heads of attention: the mixers are {sorted({b.mixer.kind for b in self.blocks})}"
        )

    @property
    def ff_size(self) -> int:
        return self.blocks[0].mlp.width(self.d_model)

    @property
    def final_norm(self) -> Norm | None:
        """Before the head: the last block's, unless that one's output is normed already."""
        last = self.blocks[-1]
        return None if last.placement == "post" else last.norm

    def num_parameters(self, embeddings: bool = True) -> int:
        """Weights of the model; without embeddings, less the token embedding and the output head (arXiv:2001.08361)."""
        blocks = sum(block.num_parameters(self.d_model) for block in self.blocks)
        tables = 1 if self.tie_embeddings else 2
        rows = tables * self.vocab_size + (self.context_length if self.position_embedding == "learned" else 0)
        norm = self.final_norm.num_parameters(self.d_model) if self.final_norm else 0
        return blocks + norm + (rows * self.d_model if embeddings else 0)

    def flops_per_token(self, context_length: int | None = None) -> int:
        """Training FLOPs per token, forward and backward: 6 N + 12 L H D T for L layers of attention.

        N counts the weights that multiply: the layers' matrices and the output head, tied or not; L layers of H query
        heads of D features attend over T = context_length tokens (the config's if None), counted whole although a
        causal kernel skips half. Chowdhery et al. 2022, arXiv:2204.02311, appendix B; 6 N is arXiv:2001.08361. Norms,
        activations and softmax are left out, and so is what gradient checkpointing recomputes.
        """
        T = self.context_length if context_length is None else context_length
        return 3 * (sum(block.flops(self.d_model, T) for block in self.blocks) + 2 * self.vocab_size * self.d_model)

    def activation_bytes(self, width: int = 2, *, gradient_checkpointing: bool = False) -> int:
        """Kept for the backward, a token, `width` bytes an element: of the blocks and the last norm, not of the head.

        With gradient checkpointing each block keeps its inputs alone: the residual stream and what is to be added.
        """
        features = width * self.d_model
        ends = features + (self.final_norm.activation_bytes(self.d_model, width) if self.final_norm else 0)
        ends += features if self.embedding_dropout else 0
        if gradient_checkpointing:
            return features * (1 + sum(1 if b.placement == "post" else 2 for b in self.blocks[:-1])) + ends
        return sum(block.activation_bytes(self.d_model, width) for block in self.blocks) + ends

    def state_bytes(self, max_len: int | None = None, width: int = 2, rollback: int = 0) -> int:
        """Of one sequence of max_len tokens (context_length if None) while decoding, `width` bytes an element, that can
        go back `rollback` tokens."""
        max_len = self.context_length if max_len is None else max_len
        return sum(block.state_bytes(self.d_model, max_len, width, rollback) for block in self.blocks)


def _as_text(names: Sequence[str]) -> str:
    """A list of layers' names as the text that says the same."""
    for name in names:
        if not isinstance(name, str) or len(name.split()) != 1:
            raise ValueError(f"a list for a pattern holds layers' names, each one word, got {name!r}")
    return ("" if all(len(name) == 1 for name in names) else " ").join(names)
