"""B = batch, S = tokens, M = d_model, V = vocabulary."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cs336 import ops
from cs336.models.cache import KVCache, LayerKV
from cs336.models.config import TransformerConfig
from cs336.nn import Attention, Embedding, Linear, RMSNorm, RotaryEmbedding, SwiGLU


class Block(nn.Module):
    """x, stream -> x, stream. What a sublayer returns is added to the stream by the next norm, in one pass."""

    def __init__(self, config: TransformerConfig, rope: RotaryEmbedding, device=None, dtype=None):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps, device, dtype)
        self.attention = Attention(
            config.d_model,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            bias=config.qkv_bias,
            out_bias=False,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
            rope=rope,
            device=device,
            dtype=dtype,
        )
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps, device, dtype)
        self.mlp = SwiGLU(config.d_model, config.d_ff, device, dtype)

    def forward(
        self,
        x_BSM: Tensor,
        stream_BSM: Tensor | None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: LayerKV | None = None,
    ) -> tuple[Tensor, Tensor]:
        if stream_BSM is None:
            normed_BSM, stream_BSM = self.attention_norm(x_BSM), x_BSM
        else:
            normed_BSM, stream_BSM = self.attention_norm(x_BSM, stream_BSM)
        x_BSM = self.attention(normed_BSM, positions, mask, cache)
        normed_BSM, stream_BSM = self.mlp_norm(x_BSM, stream_BSM)
        return self.mlp(normed_BSM), stream_BSM


class Transformer(nn.Module):
    """Pre-norm decoder: RMSNorm, rotary grouped-query attention, SwiGLU.

    Under torch.autocast the residual stream is in autocast's dtype. Set `gradient_checkpointing` to recompute each
    layer in the backward instead of keeping its activations.
    """

    def __init__(
        self, config: TransformerConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        meta = torch.device("meta")  # memory and weights come once, below
        self.rope = RotaryEmbedding(
            config.head_size, config.context_length, config.rope_theta, config.rope_interleaved, meta
        )
        self.embedding = Embedding(config.vocab_size, config.d_model, meta, dtype)
        self.layers = nn.ModuleList(Block(config, self.rope, meta, dtype) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps, meta, dtype)
        tied = config.tie_embeddings
        self.head = None if tied else Linear(config.d_model, config.vocab_size, device=meta, dtype=dtype)
        self.to_empty(device=torch.get_default_device() if device is None else device)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Matrices normal with init_std, what writes to the stream over sqrt(2 * num_layers); norms 1, biases 0."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0 if name.endswith("bias") else 1)
            else:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                depth = 2 * self.config.num_layers if writes else 1
                parameter.normal_(std=self.config.init_std / depth**0.5)
        self.rope.reset_parameters()

    def forward(self, token_ids_BS: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, S, V) of the next token after each.

        Args:
            token_ids_BS: (B, S) int64 or int32 in [0, vocab_size).
            cache: the tokens before these, to which these are appended.

        Returns the weights' dtype, or autocast's; float32 with a soft-cap.
        Raises ValueError for a shape or dtype that does not fit, or past context_length.
        """
        return self.logits(self.features(token_ids_BS, cache))

    def loss(self, token_ids_BS: Tensor, targets_BS: Tensor) -> Tensor:
        """Mean cross-entropy (float32 scalar, nats) of targets (B, S); a target of -100 counts for nothing."""
        features_BSM = self.features(token_ids_BS)
        return ops.cross_entropy(self._project(features_BSM), targets_BS, softcap=self.config.logit_softcap)

    def features(self, token_ids_BS: Tensor, cache: KVCache | None = None) -> Tensor:
        """What the head reads: (B, S, M), normalised. Arguments and errors as forward's."""
        self._check(token_ids_BS, cache)
        S = token_ids_BS.shape[1]
        x_BSM, stream_BSM = self.embedding(token_ids_BS).to(self.compute_dtype), None
        positions = None if cache is None else cache.positions(S)
        mask = None if cache is None else cache.mask(S)
        for i, layer in enumerate(self.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled() and cache is None:
                x_BSM, stream_BSM = checkpoint(layer, x_BSM, stream_BSM, use_reentrant=False)
            else:
                x_BSM, stream_BSM = layer(
                    x_BSM, stream_BSM, positions, mask, None if cache is None else cache.layers[i]
                )
        return self.norm(x_BSM, stream_BSM)[0]

    def logits(self, features_BSM: Tensor) -> Tensor:
        """(..., M) as `features` returns them -> (..., V), soft-capped."""
        logits_BSV, cap = self._project(features_BSM), self.config.logit_softcap
        return logits_BSV if cap is None else cap * torch.tanh(logits_BSV.float() / cap)

    def _project(self, features_BSM: Tensor) -> Tensor:
        if self.head is None:
            return nn.functional.linear(features_BSM, self.embedding.weight)
        return self.head(features_BSM)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Autocast's dtype inside torch.autocast, the weights' outside."""
        kind, dtype = self.device.type, self.embedding.weight.dtype
        autocast = kind != "meta" and torch.is_autocast_enabled(kind)  # is_autocast_available: a graph break in 2.11
        return torch.get_autocast_dtype(kind) if autocast else dtype

    def new_cache(self, batch_size: int, max_len: int | None = None, padding: list[int] | None = None) -> KVCache:
        """An empty cache for this model's dtype and device; max_len is context_length if None. See KVCache."""
        config = self.config
        return KVCache(
            config.num_layers,
            batch_size,
            config.kv_heads,
            config.context_length if max_len is None else max_len,
            config.head_size,
            padding=padding,
            device=self.device,
            dtype=self.compute_dtype,
        )

    def _check(self, token_ids_BS: Tensor, cache: KVCache | None) -> None:
        if token_ids_BS.dim() != 2:
            raise ValueError(f"token_ids must be (batch, tokens), got shape {tuple(token_ids_BS.shape)}")
        tokens = token_ids_BS.shape[1] + (0 if cache is None else cache.longest)
        if tokens > self.config.context_length:
            raise ValueError(f"{tokens} tokens do not fit the model's context_length of {self.config.context_length}")
