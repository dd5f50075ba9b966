"""What a model takes of a device's memory, added up from its description before anything is allocated.

Counted as eager torch keeps it, with attention that recomputes its scores; torch.compile keeps less where it is told
to be used. Left out are the rotary tables, workspaces of libraries, and what a caching allocator holds in reserve.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass

from cs336.models.block import BlockConfig, TransformerBlock
from cs336.models.config import TransformerConfig
from cs336.models.recompute import KEEPS_ALL, Recompute
from cs336.nn import AttentionConfig, LayerNorm, Linear, MLPConfig, RMSNorm, SwiGLUConfig
from cs336.nn.mlp import KINDS
from cs336.ops.linear_cross_entropy import default_chunk_size


@dataclass(frozen=True)
class Memory:
    """Bytes, by what they are for."""

    weights: int
    gradients: int = 0
    """Of a step that is one micro-batch they come as activations go: what they and the last block take beyond those."""
    optimizer: int = 0
    casts: int = 0
    """Copies of the matrices in autocast's dtype, which live from the forward to the end of the backward; without one
    those that compiled layers make of gate and up, side by side."""
    activations: int = 0
    """Kept for the backward, of all but the head; with gradient checkpointing, and while one block is recomputed."""
    logits: int = 0
    """Of all tokens at once, and what their gradient takes: as much again, or their place and what comes of it."""
    state: int = 0
    """Of the sequences that are being decoded."""

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        parts = [f"{name} {size / 2**20:,.1f}" for name, size in dataclasses.asdict(self).items() if size]
        return f"{self.total / 2**20:,.1f} MiB ({', '.join(parts)})"


def training_memory(
    config: TransformerConfig,
    batch_size: int,
    *,
    context_length: int | None = None,
    weight_bytes: int = 4,
    compute_bytes: int | None = None,
    optimizer_bytes: float = 8,
    gradient_checkpointing: Recompute = False,
    compiled: bool = False,
    layers_compiled: bool | None = None,
    accumulated: bool = True,
    fused_head: bool = False,
) -> Memory:
    """Of a training step at its peak: when the backward begins.

    Args:
        batch_size: sequences of a forward pass, of context_length tokens (the config's if None).
        weight_bytes: of a weight, and of its gradient.
        compute_bytes: of an activation: 2 under autocast to bfloat16. None: weight_bytes.
        optimizer_bytes: a weight; 8 for AdamW's two float32 moments.
        compiled: by our kernels on a GPU, which keep less, and put the loss's gradient in the logits' place.
        layers_compiled: by torch.compile, whose kernels keep as little, and which lays gate and up side by side; as
            `compiled` if None.
        accumulated: micro-batches add to gradients already there.
        fused_head: head and loss are ops.linear_cross_entropy, which has a chunk of the logits.
    """
    width = weight_bytes if compute_bytes is None else compute_bytes
    tokens = batch_size * (config.context_length if context_length is None else context_length)
    parameters = config.num_parameters()
    logits = head_bytes(config, tokens, width, compiled=compiled, fused=fused_head)
    layers_compiled = compiled if layers_compiled is None else layers_compiled
    kept, again = kept_bytes(config, width, gradient_checkpointing, compiled=compiled or layers_compiled)
    activations = tokens * kept + max(0, tokens * again - logits)  # the logits are gone when the first block is again
    weights = gradients = weights_bytes(config, weight_bytes)
    if not accumulated:  # all that has come when one block is left
        last = max(block.activation_bytes(config.d_model, width) for block in config.blocks)
        gradients = max(0, gradients + tokens * last - activations - logits)
    copied = side_by_side_bytes(config, width, gradient_checkpointing) if layers_compiled else 0
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=round(optimizer_bytes * parameters),
        casts=copied if width == weight_bytes else width * matrices(config),  # which are cast to where they are copied
        activations=activations,
        logits=logits,
    )


def head_bytes(config: TransformerConfig, tokens: int, width: int, *, compiled: bool, fused: bool) -> int:
    """Of the logits of so many tokens and their gradient, an activation being `width` bytes."""
    V, M = config.vocab_size, config.d_model
    if fused:  # a chunk of them, and float32 gradients of what the head reads, in parts and whole, and of the head
        chunk = min(tokens, default_chunk_size(tokens, V, width, "cuda" if compiled else "cpu"))
        return chunk * width * V + 8 * tokens * M + 4 * V * M
    wide = width if config.logit_softcap is None else max(4, width)
    capped = width * V if config.logit_softcap is None else 2 * wide * V  # before and after the cap
    if compiled and config.logit_softcap is None:  # in the logits' place; of what the head reads, and of the head
        return width * (tokens * (V + M) + V * M)
    gradient = (wide if compiled or width >= 4 else width + 8) * V  # of 16 bits: by float32 logits and probabilities
    return tokens * (capped + gradient + 4)  # and their float32 log-sum-exp


def kept_bytes(config: TransformerConfig, width: int, recompute: Recompute, *, compiled: bool) -> tuple[int, int]:
    """A token: what is kept for the backward, of all but the head, and what is there of a block while it is
    recomputed."""
    if recompute in KEEPS_ALL:
        kept = config.activation_bytes(width)
        return kept - compiled * sum(_computed_again(block, config.d_model, width) for block in config.blocks), 0
    kept = config.activation_bytes(width, gradient_checkpointing=True)
    again = max(block.activation_bytes(config.d_model, width) for block in config.blocks)
    if recompute == "selective":
        products = {block: products_bytes(block, config.d_model, width) for block in set(config.blocks)}
        kept += sum(products[block] for block in config.blocks)
        again -= min(products.values())
    return kept, again


def _computed_again(block: BlockConfig, d_model: int, width: int) -> int:
    """What is kept of a block by eager torch alone, a token: o in a second order of its dims, and a gate activated."""
    o = block.mixer.num_heads * block.mixer.head_size(d_model) if isinstance(block.mixer, AttentionConfig) else 0
    gate = block.mlp.width(d_model) if isinstance(block.mlp, MLPConfig | SwiGLUConfig) and block.mlp.gated else 0
    return width * (o + gate)


def side_by_side_bytes(config: TransformerConfig, width: int, recompute: Recompute) -> int:
    """Of the copies of gate and up that compiled layers multiply with: all are kept for the backward, or, where layers
    are computed again, one at a time."""
    copies = [
        2 * width * config.d_model * block.mlp.width(config.d_model)
        for block in config.blocks
        if isinstance(block.mlp, MLPConfig | SwiGLUConfig)
        and (block.mlp.gated and not block.mlp.bias and block.mlp.activation in KINDS)
    ]
    return sum(copies) if recompute in KEEPS_ALL else max(copies, default=0)


def products_bytes(block: BlockConfig, d_model: int, width: int) -> int:
    """What selective recomputation keeps of a block, a token: what its linear layers return, and its attention."""
    built = TransformerBlock(block, d_model, device="meta")
    return width * (sum(m.out_features for m in built.modules() if isinstance(m, Linear)) + d_model)


def matrices(config: TransformerConfig) -> int:
    """The weights that multiply some token, those of the head among them."""
    idle = sum(block.mlp.idle_parameters(config.d_model) for block in config.blocks)
    return config.flops_per_token(0) // 6 + idle


def decoding_memory(
    config: TransformerConfig, batch_size: int, max_len: int | None = None, *, width: int = 2
) -> Memory:
    """Of batch_size sequences of up to max_len tokens (context_length if None), `width` bytes an element."""
    state = batch_size * config.state_bytes(max_len, width)
    return Memory(weights=weights_bytes(config, width), state=state)


def weights_bytes(config: TransformerConfig, width: int) -> int:
    """Of the weights in a model of `width` bytes an element, in which norms may be float32 nevertheless."""
    return width * config.num_parameters() + max(0, 4 - width) * _float32_parameters(config)


def _float32_parameters(config: TransformerConfig) -> int:
    if not config.float32_norms:
        return 0
    norms = config.final_norm.num_parameters(config.d_model) if config.final_norm else 0
    for block, count in Counter(config.blocks).items():
        modules = TransformerBlock(block, config.d_model, device="meta").modules()
        kept = (p for m in modules if isinstance(m, LayerNorm | RMSNorm) for p in m.parameters(recurse=False))
        norms += count * sum(p.numel() for p in kept)
    return norms
