"""What an adapter of a family is: its fields and its weights, in both directions.

    config = family.read(Fields(config_json))            raises where the model is another
    fields = family.write(config)                        None where the family has no such model
    family.rules(our_shapes)                             how weights are named and laid out

A written configuration counts only if it is read as the same model: so an adapter cannot lose a field.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cs336.models.block import BlockConfig
from cs336.models.config import TransformerConfig
from cs336.models.huggingface.fields import Fields
from cs336.nn import (
    AttentionConfig,
    GELUConfig,
    LatentAttentionConfig,
    MLPConfig,
    MoEConfig,
    RopeConfig,
    SwiGLUConfig,
)

Convert = Callable[[list[Tensor]], Sequence[Tensor]]


def _same(tensors: list[Tensor]) -> list[Tensor]:
    return tensors


@dataclass(frozen=True)
class Rule:
    """Weights of ours and theirs that are made of each other."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    read: Convert = _same
    """Theirs -> ours."""
    write: Convert = _same
    """Ours -> theirs."""
    stacked: bool = False
    """Ours, one above the other, are the rows of theirs."""

    @property
    def renames(self) -> bool:
        """Whether one weight of ours is one of theirs as it is."""
        return self.read is _same and len(self.ours) == len(self.theirs) == 1


@dataclass(frozen=True)
class Family:
    model_type: str
    architecture: str
    read: Callable[[Fields], TransformerConfig]
    write: Callable[[TransformerConfig], dict[str, Any] | None]
    rules: Callable[[Mapping[str, torch.Size]], list[Rule]]
    """Of our names, with their shapes."""
    prefix: str = "model."
    """Before the names of all weights but the head, where a file has the head."""
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)
    """Ends of the names of weights that files hold and nobody needs."""
    keeps_pairs: bool = False
    """Rotary pairs may be neighbours here too: a field says it."""

    def config(self, table: Mapping[str, Any]) -> TransformerConfig:
        """Raises ValueError, naming the field, for a model that is not ours."""
        fields = Fields(table)
        config = self.read(fields)
        fields.finish()
        return config.short_form() or config

    def table(self, config: TransformerConfig) -> dict[str, Any] | None:
        """config.json of the model; None where the family has none like it."""
        try:
            table = self.write(config)
            if table is None:
                return None
            table = {"architectures": [self.architecture], "model_type": self.model_type} | table
            again = self.config(table)
            loses = config.float32_norms and not again.float32_norms
            return table if resolved(again) == resolved(config) and not loses else None
        except ValueError:  # no config of ours can be what the family would make of it
            return None


def resolved(config: TransformerConfig) -> TransformerConfig:
    """The same model with every default said, whatever the names of its kinds, and rotary pairs half-split: which, with
    their rows reordered, are the same. Dropout and the routers' losses, of which a
    family may have no field, are left out: no logit knows them."""
    plain = {f.name: f.default for f in dataclasses.fields(TransformerConfig) if f.default is not dataclasses.MISSING}
    kept = ("logit_softcap", "tie_embeddings", "init_std", "position_embedding", "embedding_scale", "logit_scale")
    changes = plain | {name: getattr(config, name) for name in kept}
    layers = tuple(_resolved(block, config.d_model) for block in config.blocks)
    return dataclasses.replace(config, **changes | {"layers": layers, "pattern": None})


def _resolved(block: BlockConfig, d_model: int) -> BlockConfig:
    changes: dict[str, Any] = {"dropout": 0.0, "stochastic_depth": 0.0}
    if isinstance(block.mixer, AttentionConfig):
        D, mixer = block.mixer.head_size(d_model), block.mixer
        scale = D**-0.5 if mixer.scale is None else mixer.scale
        changes["mixer"] = dataclasses.replace(mixer, num_kv_heads=mixer.kv_heads, head_dim=D, scale=scale, dropout=0.0)
    if isinstance(block.mixer, LatentAttentionConfig):
        latent, Q = block.mixer, block.mixer.head_dim + block.mixer.rope_head_dim
        scale = Q**-0.5 if latent.scale is None else latent.scale
        changes["mixer"] = dataclasses.replace(latent, value_dim=latent.value_size, scale=scale)
    if isinstance(block.mlp, SwiGLUConfig | GELUConfig | MLPConfig):
        mlp = block.mlp
        changes["mlp"] = MLPConfig(mlp.activation, mlp.gated, mlp.width(d_model), mlp.bias)
    if isinstance(block.positions, RopeConfig):
        changes["positions"] = dataclasses.replace(block.positions, interleaved=False)
    if isinstance(block.mlp, MoEConfig):
        routed = dataclasses.replace(block.mlp, d_ff=block.mlp.width(d_model), balance_loss=0.0, z_loss=0.0)
        balance: Literal["bias", "none"] = "bias" if routed.balance == "bias" else "none"
        changes["mlp"] = dataclasses.replace(routed, balance=balance, bias_rate=1.0)
    return dataclasses.replace(block, **changes)


def renamed(names: Iterable[str], prefixes: Mapping[str, str]) -> list[Rule]:
    """Ours by theirs, each by the prefix of ours that it begins with; the first that fits."""
    rules = []
    for name in names:
        layer, rest = _split(name)
        ours, theirs = next((o, t) for o, t in prefixes.items() if rest.startswith(o))
        rules.append(Rule((name,), (theirs.format(layer=layer) + rest[len(ours) :],)))
    return rules


def _split(name: str) -> tuple[str, str]:
    """The number of the layer, and the name within it, which begins with a dot; "" and the name outside of layers."""
    parts = name.split(".", 2)
    return (parts[1], f".{parts[2]}") if parts[0] == "layers" else ("", name)


def layer_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by the number of their layer, "" for those outside."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_split(name)[0], []).append(name)
    return found
