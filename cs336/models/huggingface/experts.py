"""What families with mixtures of experts share: their loss, and experts written one by one that are stacks here."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cs336.models.config import TransformerConfig
from cs336.models.huggingface import decoder
from cs336.models.huggingface.family import Rule, renamed
from cs336.models.huggingface.fields import Fields
from cs336.nn import MoEConfig

NAMES = {name: name for name in ("gate_proj", "down_proj", "up_proj")}


def in_every_layer(fields: Fields) -> None:
    """Raises ValueError where some of Qwen's layers have none."""
    fields.only("decoder_sparse_step", 1)
    fields.only("mlp_only_layers", [])
    fields.take("intermediate_size")  # of layers without experts


def balance_loss(fields: Fields, top_k: int, default: float = 0.001) -> float:
    """Of theirs, which counts a token once for each of its experts and takes the mean of the layers, not the sum."""
    return fields.number("router_aux_loss_coef", default) * top_k / fields.count("num_hidden_layers")


def coefficient(config: TransformerConfig, mlp: MoEConfig) -> float:
    return mlp.balance_loss * config.num_layers / mlp.top_k if mlp.balance == "loss" else 0.0


def mixture(fields: Fields, d_ff: Any, num_experts: Any, top_k: int, loss: float = 0.001, **options: Any) -> MoEConfig:
    """As the Qwens and OLMoE say it, but for the names of its sizes. loss: its coefficient where it is left out."""
    return MoEConfig(
        num_experts,
        top_k,
        d_ff,
        activation=decoder.activation(fields),
        normalize=fields.flag("norm_topk_prob"),
        balance_loss=balance_loss(fields, top_k, loss),
        **options,
    )


def written(config: TransformerConfig, d_ff: str) -> dict[str, Any] | None:
    """What `mixture` reads, and the fields that decoders share; d_ff: the name of the experts' width."""
    fields, mlp = decoder.written(config), config.blocks[0].mlp
    if fields is None or not isinstance(mlp, MoEConfig):
        return None
    return fields | {
        d_ff: mlp.width(config.d_model),
        "hidden_act": decoder.THEIR_ACTIVATIONS.get(mlp.activation),
        "num_experts": mlp.num_experts,
        "num_experts_per_tok": mlp.top_k,
        "norm_topk_prob": mlp.normalize,
        "router_aux_loss_coef": coefficient(config, mlp),
    }


def rules(
    shapes: Mapping[str, torch.Size], block: str, names: Mapping[str, str], others: Mapping[str, str] | None = None
) -> list[Rule]:
    """block: their name of the mixture within a layer; names: of ours in a stack, theirs in an expert; others: of what
    else the family names in its own way, as in `renamed`."""
    found = renamed(
        (name for name in shapes if ".mlp.experts." not in name),
        {".mlp.router.": f"model.layers.{{layer}}.{block}.gate."} | dict(others or {}) | decoder.NAMES,
    )
    for name, shape in shapes.items():
        if ".mlp.experts." in name:
            layer, ours = name.split(".")[1], name.rpartition(".")[2]
            stem = f"model.layers.{layer}.{block}.experts"
            theirs = tuple(f"{stem}.{e}.{names[ours]}.weight" for e in range(shape[0]))
            found.append(Rule((name,), theirs, _stacked, _apart))
    return found


def _stacked(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.stack(tensors)]


def _apart(tensors: list[Tensor]) -> list[Tensor]:
    return list(tensors[0].unbind())
