"""What the linear layers of a block read while it runs over calibration text.

M = d_model, K = in_features, R = rows.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cs336.nn import LayerNorm, MoE, RMSNorm
from cs336.nn.quantized import quantizable


@dataclass
class Inputs:
    """Of layers that read the same."""

    hessian: Tensor
    """X^T X (K, K), float32 or wider."""
    magnitude: Tensor
    """sum |x| (K,)."""
    layers: list[str] = field(default_factory=list)
    """Their names."""
    norm: RMSNorm | LayerNorm | None = None
    """Whose output it is; of a mixture's experts, which read some rows of it."""

    @classmethod
    def like(cls, x: Tensor, norm: RMSNorm | LayerNorm | None) -> "Inputs":
        """Nothing read yet, of tensors like x (..., K)."""
        K, dtype = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
        return cls(x.new_zeros(K, K, dtype=dtype), x.new_zeros(K, dtype=dtype), norm=norm)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        x_RK = x.reshape(-1, x.shape[-1])
        x_RK = x_RK.to(self.hessian.dtype)
        self.hessian.addmm_(x_RK.t(), x_RK)
        self.magnitude += x_RK.abs().sum(0)

    def divide(self, s_K: Tensor) -> None:
        """As if x / s had been read."""
        self.hessian /= s_K[:, None] * s_K
        self.magnitude /= s_K


class Watch:
    """Counts what each layer of a block that may be quantised reads; those that get one tensor share the count."""

    def __init__(self, block: nn.Module):
        self.inputs: list[Inputs] = []
        self._of: dict[str, Inputs] = {}
        self._layers = quantizable(block)
        self._norms = [module for module in block.modules() if isinstance(module, RMSNorm | LayerNorm)]
        self._mixtures = {name: module for name, module in block.named_modules() if isinstance(module, MoE)}
        # of one forward pass
        self._seen: list[tuple[Tensor, Inputs]] = []
        self._normed: list[tuple[Tensor, RMSNorm | LayerNorm]] = []
        self._routed: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around one forward pass of the block."""
        hooks = [layer.register_forward_pre_hook(self._reader(name)) for name, layer in self._layers.items()]
        hooks += [norm.register_forward_hook(self._normer) for norm in self._norms]
        hooks += [moe.register_forward_pre_hook(self._router(name)) for name, moe in self._mixtures.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._seen, self._normed, self._routed = [], [], {}

    def _reader(self, name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name not in self._of:
                self._of[name] = self._inputs(name, args[0])
                self._of[name].layers.append(name)
            inputs = self._of[name]
            if inputs.layers[0] == name:
                inputs.add(args[0])

        return hook

    def _inputs(self, name: str, x: Tensor) -> Inputs:
        """Of the layers that got this very tensor before, or new."""
        for seen, inputs in self._seen:
            if seen is x:
                return inputs
        source = x
        for mixture, whole in self._routed.items():
            if name.startswith(f"{mixture}.") and "down_proj" not in name.split("."):
                source = whole
        inputs = Inputs.like(x, next((norm for normed, norm in self._normed if normed is source), None))
        self._seen.append((x, inputs))
        self.inputs.append(inputs)
        return inputs

    def _normer(self, norm, args, output) -> None:
        self._normed.append((output[0] if isinstance(output, tuple) else output, norm))

    def _router(self, name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._routed[name] = args[0]

        return hook
