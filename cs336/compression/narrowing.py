"""Smaller models out of a larger one: layers that are dropped, MLP neurons and heads that are taken out.

    layer     1 - cos(x, y), of what a block gets and what it gives, mean over tokens      arXiv:2403.03853
    neuron    ||h_j||_2, of what down_proj reads, over all tokens                          arXiv:2407.14679
    heads     ||o_g||_2, of what o_proj reads of key-value head g and its query heads

The least important go, and the others keep their order and their weights. M = d_model, F = d_ff, G = key-value heads,
L = layers.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cs336.compression.blocks import Walk
from cs336.models import BlockConfig, Transformer
from cs336.nn import MLP, Attention

NEURONS = 8  # d_ff is left a multiple of it, for tensor cores


def block_influence(model: Transformer, batches: Sequence[Tensor]) -> Tensor:
    """(L,) float64: how much each block turns its tokens, from 0, not at all, to 2. batches: token ids (B, S)."""
    walk, found = Walk(model, batches), []
    for block in walk:
        pairs = zip(walk.inputs, walk.outputs(block), strict=True)
        cosines = [nn.functional.cosine_similarity(x.double(), y.double(), dim=-1).flatten() for x, y in pairs]
        found.append(1 - torch.cat(cosines).mean())
    return torch.stack(found)


def drop_layers(model: Transformer, keep: Sequence[int]) -> Transformer:
    """A model of these layers, in their order, with weights of its own.

    Raises ValueError for layers that the model has not, or out of order, and for none.
    """
    keep, count = list(keep), len(model.layers)
    if not keep or keep != sorted(set(keep)) or not 0 <= keep[0] <= keep[-1] < count:
        raise ValueError(f"keep must be layers in 0..{count - 1}, each once and in order, got {keep}")
    weights = {}
    for name, tensor in model.state_dict().items():
        first, _, rest = name.partition(".")
        if first != "layers":
            weights[name] = tensor
            continue
        number, _, rest = rest.partition(".")
        if int(number) in keep:
            weights[f"layers.{keep.index(int(number))}.{rest}"] = tensor
    return _made(model, [model.config.blocks[i] for i in keep], weights)


def prune_depth(model: Transformer, sparsity: float, batches: Sequence[Tensor]) -> Transformer:
    """A model without the share of its layers, rounded down, that has the least influence.

    Raises ValueError for a sparsity that leaves all layers or none.
    """
    count = len(model.layers)
    fewer = int(sparsity * count + 1e-9)
    if not 0 < fewer < count:
        one = math.ceil(100 / count) / 100
        raise ValueError(
            f"a sparsity of {sparsity!r} takes {fewer} of {count} layers: take 1 to {count - 1}, the first at {one}"
        )
    gone = block_influence(model, batches).argsort(stable=True)[:fewer].tolist()
    return drop_layers(model, [i for i in range(count) if i not in gone])


@torch.no_grad()
def prune_width(
    model: Transformer, sparsity: float, batches: Sequence[Tensor], *, head_sparsity: float = 0.0
) -> Transformer:
    """A model whose dense MLPs lack a share of their neurons, and whose attention a share of its key-value heads with
    their query heads; what is left is rounded up to a multiple of NEURONS and to whole heads.

    Raises ValueError for shares outside [0, 1), and where nothing would go.
    """
    for name, share in (("sparsity", sparsity), ("head_sparsity", head_sparsity)):
        if not 0 <= share < 1:
            raise ValueError(f"{name} must be a share from 0 to below 1, got {share!r}")
    weights, blocks, walk = dict(model.state_dict()), [], Walk(model, batches)
    for i, (block, config) in enumerate(zip(walk, model.config.blocks, strict=True)):
        read = {"mlp": block.mlp.down_proj} if isinstance(block.mlp, MLP) else {}
        read |= {"attention": block.attention.o_proj} if isinstance(block.attention, Attention) else {}
        squares = walk.squares(block, dict(read))
        if isinstance(block.mlp, MLP):
            d_ff = config.mlp.width(model.config.d_model)
            kept_F = _kept(squares["mlp"], min(d_ff, NEURONS * math.ceil((1 - sparsity) * d_ff / NEURONS - 1e-9)))
            _take(weights, f"layers.{i}.mlp", {"gate_proj": kept_F, "up_proj": kept_F}, {"down_proj": kept_F})
            mlp = dataclasses.replace(config.mlp, d_ff=len(kept_F))  # type: ignore[arg-type]
            config = dataclasses.replace(config, mlp=mlp)
        if isinstance(block.attention, Attention) and head_sparsity:
            config = _fewer_heads(block.attention, config, weights, i, squares["attention"], head_sparsity)
        blocks.append(config)
    if tuple(blocks) == model.config.blocks:
        raise ValueError(f"nothing is pruned by a sparsity of {sparsity} and a head_sparsity of {head_sparsity}")
    return _made(model, blocks, weights)


def _fewer_heads(
    attention: Attention, config: BlockConfig, weights: dict[str, Tensor], i: int, squares: Tensor, sparsity: float
) -> BlockConfig:
    G, D = attention.num_kv_heads, attention.head_dim
    if attention.alibi is not None or attention.qk_norm == "all":
        raise ValueError(f"layers.{i}: a head's slope, or a norm over all heads, depends on how many there are")
    kept_G = _kept(squares.view(G, -1).sum(1), math.ceil((1 - sparsity) * G - 1e-9))
    queries = attention.num_heads // G
    q = (kept_G[:, None] * queries * D + torch.arange(queries * D, device=kept_G.device)).flatten()
    kv = (kept_G[:, None] * D + torch.arange(D, device=kept_G.device)).flatten()
    _take(weights, f"layers.{i}.attention", {"q_proj": q, "k_proj": kv, "v_proj": kv}, {"o_proj": q})
    if attention.sinks is not None:
        heads = (kept_G[:, None] * queries + torch.arange(queries, device=kept_G.device)).flatten()
        weights[f"layers.{i}.attention.sinks"] = weights[f"layers.{i}.attention.sinks"].index_select(0, heads)
    shape: dict[str, Any] = {"num_heads": len(kept_G) * queries, "num_kv_heads": len(kept_G), "head_dim": D}
    return dataclasses.replace(config, mixer=dataclasses.replace(config.mixer, **shape))


def _kept(importance: Tensor, count: int) -> Tensor:
    """The indices of the `count` largest, in order."""
    return importance.argsort(descending=True, stable=True)[:count].sort().values


def _take(weights: dict[str, Tensor], prefix: str, outputs: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
    """Leave these outputs of layers, and these inputs of others."""
    for name, index in outputs.items():
        for kind in ("weight", "bias"):
            if (key := f"{prefix}.{name}.{kind}") in weights:
                weights[key] = weights[key].index_select(0, index)
    for name, index in inputs.items():
        weights[f"{prefix}.{name}.weight"] = weights[f"{prefix}.{name}.weight"].index_select(1, index)


def _made(model: Transformer, blocks: Sequence[BlockConfig], weights: dict[str, Tensor]) -> Transformer:
    config = model.config.with_blocks(tuple(blocks))
    made = Transformer(config.short_form() or config, device=model.device, dtype=model.embedding.weight.dtype)
    made.load_state_dict(weights)
    made.special_ids, made.generation_config = model.special_ids, model.generation_config
    made.chat_template = model.chat_template
    return made.train(model.training)
