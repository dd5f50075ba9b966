"""Low-rank adaptation (arXiv:2106.09685): a frozen linear layer learns as W + (alpha / rank) B A.

    apply_lora(model, LoRAConfig(rank=8))       # the model's linear layers, in place; nothing else learns any more
    ...
    save_pretrained(merged(model), directory)   # W + (alpha / rank) B A, as if it had been trained whole

A is (rank, in), normal; B is (out, rank), 0 at first: the model begins as it was.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from cs336.models import Transformer
from cs336.nn import Linear, is_quantized
from cs336.nn.linear import linear

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers adapt, and how much they can."""

    rank: int = 16
    alpha: float = 32.0
    """The product's weight is alpha / rank."""
    targets: tuple[str, ...] = TARGETS
    """Last names of the linear layers; those that a model lacks are passed over, but for all of them."""

    def __post_init__(self):
        if self.rank < 1 or not 0 < self.alpha < math.inf or not self.targets:
            raise ValueError(
                f"a LoRA takes rank 1 or more, alpha above 0 and targets, got {self.rank}, {self.alpha}, "
                f"{list(self.targets)}"
            )


class LoRALinear(nn.Linear):
    """(..., in) -> (..., out): x W^T + bias + scale (x A^T) B^T, where W and bias are those of `base`, frozen."""

    def __init__(self, base: nn.Linear, config: LoRAConfig):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale = config.alpha / config.rank
        place: dict[str, Any] = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_a = nn.Parameter(torch.randn(config.rank, base.in_features, **place) / base.in_features**0.5)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, config.rank, **place))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias) + self.scale * linear(linear(x, self.lora_a), self.lora_b)

    def merge(self) -> Linear:
        """A plain layer of the same function, but for rounding; the product is taken in float32."""
        plain = Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        product = self.scale * self.lora_b.detach().float() @ self.lora_a.detach().float()
        plain.weight = nn.Parameter((self.weight.detach().float() + product).to(self.weight.dtype))
        plain.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())
        return plain


def apply_lora(model: nn.Module, config: LoRAConfig) -> nn.ParameterDict:
    """Put a LoRALinear in the place of each linear layer that is named, freeze all else, and return what learns.

    Names in the dictionary are the layers' with "/" for ".", and "a" or "b": what a checkpoint holds.
    Raises ValueError where no layer has such a name, and for a quantised model.
    """
    if is_quantized(model):
        raise ValueError("the model is quantised: adapt the model that it was made of, then quantise it merged")
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in config.targets
    ]
    if not found:
        have = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(f"lora.targets {', '.join(config.targets)} name no linear layer: this model has {have}")
    model.requires_grad_(False)
    learned = nn.ParameterDict()
    for name, module in found:
        parent, _, last = name.rpartition(".")
        layer = LoRALinear(cast(nn.Linear, module), config)
        setattr(model.get_submodule(parent), last, layer)
        learned[f"{name.replace('.', '/')}/a"], learned[f"{name.replace('.', '/')}/b"] = layer.lora_a, layer.lora_b
    return learned


def merged(model: Transformer) -> Transformer:
    """A copy of the model with plain layers, as save_pretrained takes it; the model itself where it has no LoRA."""
    if not any(isinstance(module, LoRALinear) for module in model.modules()):
        return model
    out = copy.deepcopy(model)
    for name, module in list(out.named_modules()):
        if isinstance(module, LoRALinear):
            parent, _, last = name.rpartition(".")
            setattr(out.get_submodule(parent), last, module.merge())
    return out.requires_grad_(True)
