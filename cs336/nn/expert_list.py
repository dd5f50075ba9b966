"""Experts one by one: what moe.Experts keeps in stacks, as a linear layer each, where those of other kinds can stand.

N = tokens, R = rows, E = experts, M = d_model.
"""

import torch
from torch import Tensor, nn

from cs336.nn.linear import Linear
from cs336.nn.mlp import ACTIVATIONS, gate
from cs336.nn.moe import Experts

STACKS = ("gate_proj", "up_proj", "down_proj")


class ExpertList(nn.Module):
    """The experts of a mixture with their weights, and biases, as they are: lists up_proj, down_proj and, if gated,
    gate_proj."""

    gate_proj: nn.ModuleList | None
    up_proj: nn.ModuleList
    down_proj: nn.ModuleList
    waits = True
    """The host, for load_E."""

    def __init__(self, experts: Experts):
        super().__init__()
        self.activation, self.gated = experts.activation, experts.gated
        for name in STACKS:
            setattr(self, name, _apart(getattr(experts, name), getattr(experts, name.replace("proj", "bias"))))

    def forward(self, x_NM: Tensor, token_R: Tensor, load_E: Tensor) -> Tensor:
        """As moe.Experts: x (N, M); the token (R,) of each row, rows by expert, load_E (E,) are each's -> (R, M)."""
        parts = x_NM[token_R].split(load_E.tolist())
        return torch.cat([self._expert(e, part) for e, part in enumerate(parts)])

    def _expert(self, e: int, x: Tensor) -> Tensor:
        up = self.up_proj[e](x)
        if self.gate_proj is None:
            return self.down_proj[e](ACTIVATIONS[self.activation](up))
        return self.down_proj[e](gate(self.activation, self.gate_proj[e](x), up))


def _apart(stack_EOK: Tensor | None, bias: Tensor | None) -> nn.ModuleList | None:
    """A stack, with its biases (E O,), as linear layers."""
    if stack_EOK is None:
        return None
    E, O, K = stack_EOK.shape
    layers = nn.ModuleList(Linear(K, O, bias=bias is not None, device="meta") for _ in range(E))
    for layer, weight in zip(layers, stack_EOK.detach(), strict=True):
        layer.weight = nn.Parameter(weight)
    if bias is not None:
        for layer, part in zip(layers, bias.detach().view(E, O), strict=True):
            layer.bias = nn.Parameter(part)
    return layers


def unstack_experts(layers: nn.Module) -> None:
    """Put an ExpertList in the place of each stack of experts below a module."""
    for module in list(layers.modules()):
        for name, child in list(module.named_children()):
            if type(child) is Experts:
                setattr(module, name, ExpertList(child))
