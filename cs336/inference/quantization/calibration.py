"""What the linear layers of a block read while it runs over calibration text.

M = d_model, K = in_features, R = rows.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cs336.nn import LayerNorm, RMSNorm
from cs336.nn.quantized import quantizable


@dataclass
class Inputs:
    """Of layers that read the same."""

    layers: list[str] = field(default_factory=list)
    """Their names."""
    hessian: Tensor | None = None
    """X^T X (K, K), float32 or wider."""
    magnitude: Tensor | None = None
    """sum |x| (K,)."""
    norm: nn.Module | None = None
    """Whose output it is, and which nothing else reads but these layers."""

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        x_RK = x.reshape(-1, x.shape[-1])
        x_RK = x_RK.to(torch.promote_types(x.dtype, torch.float32))
        if self.hessian is None or self.magnitude is None:
            K = x_RK.shape[1]
            self.hessian, self.magnitude = x_RK.new_zeros(K, K), x_RK.new_zeros(K)
        self.hessian.addmm_(x_RK.t(), x_RK)
        self.magnitude += x_RK.abs().sum(0)


class Watch:
    """Counts what each layer of a block that may be quantised reads; those that get one tensor share the count."""

    def __init__(self, block: nn.Module):
        self.inputs: list[Inputs] = []
        self._of: dict[str, Inputs] = {}
        self._seen: list[tuple[Tensor, Inputs]] = []
        self._normed: list[tuple[Tensor, nn.Module]] = []
        self._layers = quantizable(block)
        self._norms = [module for module in block.modules() if isinstance(module, RMSNorm | LayerNorm)]

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around one forward pass of the block."""
        hooks = [layer.register_forward_pre_hook(self._reader(name)) for name, layer in self._layers.items()]
        hooks += [norm.register_forward_hook(self._normer) for norm in self._norms]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._seen, self._normed = [], []

    def _reader(self, name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name not in self._of:
                self._of[name] = self._inputs(args[0])
                self._of[name].layers.append(name)
            inputs = self._of[name]
            if inputs.layers[0] == name:
                inputs.add(args[0])

        return hook

    def _inputs(self, x: Tensor) -> Inputs:
        """Of the layers that got this very tensor before, or new."""
        for seen, inputs in self._seen:
            if seen is x:
                return inputs
        inputs = Inputs(norm=next((norm for normed, norm in self._normed if normed is x), None))
        self._seen.append((x, inputs))
        self.inputs.append(inputs)
        return inputs

    def _normer(self, norm: nn.Module, args, output) -> None:
        self._normed.append((output[0] if isinstance(output, tuple) else output, norm))
