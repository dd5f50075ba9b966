"""What families with mixtures of experts share: their loss, and experts written one by one that are stacks here."""

from collections.abc import Mapping

import torch
from torch import Tensor

from cs336.models.config import TransformerConfig
from cs336.models.huggingface.decoder import NAMES
from cs336.models.huggingface.family import Rule, renamed
from cs336.models.huggingface.fields import Fields
from cs336.nn import MoEConfig


def balance_loss(fields: Fields, top_k: int) -> float:
    """Of theirs, which counts a token once for each of its experts and takes the mean of the layers, not the sum."""
    return fields.number("router_aux_loss_coef", 0.001) * top_k / fields.count("num_hidden_layers")


def coefficient(config: TransformerConfig, mlp: MoEConfig) -> float:
    return mlp.balance_loss * config.num_layers / mlp.top_k if mlp.balance == "loss" else 0.0


def rules(
    shapes: Mapping[str, torch.Size], block: str, names: Mapping[str, str], others: Mapping[str, str] | None = None
) -> list[Rule]:
    """block: their name of the mixture within a layer; names: of ours in a stack, theirs in an expert; others: of what
    else the family names in its own way, as in `renamed`."""
    found = renamed(
        (name for name in shapes if ".mlp.experts." not in name),
        {".mlp.router.": f"model.layers.{{layer}}.{block}.gate."} | dict(others or {}) | NAMES,
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
