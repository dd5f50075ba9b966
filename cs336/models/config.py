from dataclasses import dataclass

from cs336.nn import default_d_ff


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of a pre-norm decoder: RMSNorm, rotary grouped-query attention, SwiGLU.

    A field left at None follows from the others: read `kv_heads`, `head_size` and `ff_size` for its value.
    Raises ValueError for values that do not fit together.
    """

    vocab_size: int
    """Rows of the embedding: at least the tokenizer's vocabulary; a multiple of 64 is faster on a GPU."""
    context_length: int
    """Most tokens the model reads at once."""
    num_layers: int
    d_model: int
    """Features of the residual stream."""
    num_heads: int
    num_kv_heads: int | None = None
    """Key-value heads, shared by groups of query heads (arXiv:2305.13245). None: num_heads."""
    d_ff: int | None = None
    """Hidden features of the SwiGLU. None: 8/3 d_model, rounded up to a multiple of 64."""
    rope_theta: float = 10000.0
    rope_interleaved: bool = False
    """Rotate neighbouring features, as arXiv:2104.09864 does, instead of the two halves of a head."""
    norm_eps: float = 1e-5
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
    head_dim: int | None = None
    """Features of a head, even. None: d_model / num_heads."""

    def __post_init__(self):
        counts = ("vocab_size", "context_length", "num_layers", "d_model", "num_heads")
        for name in (*counts, "num_kv_heads", "d_ff", "head_dim"):
            value = getattr(self, name)
            if value is None and name not in counts:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name in ("rope_theta", "norm_eps", "init_std", "logit_softcap"):
            value = getattr(self, name)
            if value is None and name == "logit_softcap":
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a positive, finite number, got {value!r}")
        if self.head_dim is None and self.d_model % self.num_heads != 0:
            raise ValueError(
                f"d_model {self.d_model} is not a multiple of num_heads {self.num_heads}: change one or set head_dim"
            )
        if self.head_size % 2 != 0:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_size}")
        if self.num_heads % self.kv_heads != 0:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}")

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def ff_size(self) -> int:
        return default_d_ff(self.d_model) if self.d_ff is None else self.d_ff

    def num_parameters(self, embeddings: bool = True) -> int:
        """Weights of the model; without embeddings, less the token embedding and the output head (arXiv:2001.08361)."""
        vectors = 2 * self.d_model + (2 * self.head_size if self.qk_norm else 0)
        vectors += (self.num_heads + 2 * self.kv_heads) * self.head_size if self.qkv_bias else 0
        blocks = self.num_layers * (self._layer_matrices() + vectors) + self.d_model
        tables = 1 if self.tie_embeddings else 2
        return blocks + (tables * self.vocab_size * self.d_model if embeddings else 0)

    def flops_per_token(self, context_length: int | None = None) -> int:
        """Training FLOPs per token, forward and backward: 6 N + 12 L H D T.

        N counts the weights that multiply: the layers' matrices and the output head, tied or not; L layers of H query
        heads of D features attend over T = context_length tokens (the config's if None), counted whole although a
        causal kernel skips half. Chowdhery et al. 2022, arXiv:2204.02311, appendix B; 6 N is arXiv:2001.08361. Norms,
        activations and softmax are left out, and so is what gradient checkpointing recomputes.
        """
        T = self.context_length if context_length is None else context_length
        N = self.num_layers * self._layer_matrices() + self.vocab_size * self.d_model
        return 6 * N + 12 * self.num_layers * self.num_heads * self.head_size * T

    def _layer_matrices(self) -> int:
        attention = 2 * (self.num_heads + self.kv_heads) * self.head_size * self.d_model
        return attention + 3 * self.d_model * self.ff_size
