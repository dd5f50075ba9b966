"""A model's blocks one after the other over calibration text: what each gets, what its layers read, what it gives.

B = batch, S = tokens, M = d_model, K = in_features.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from cs336.models import Transformer
from cs336.nn import Context, Linear
from cs336.nn.quantized import is_quantized

KEPT = ("router", "shared_gate", "kv_b_proj")
# A router's choice hangs on few weights; latent attention takes the last one apart.


class _Reached(Exception):
    """The first block was about to run."""


class Walk:
    """Blocks in order: `inputs` are what the next one gets of each batch (B, S, M).

    batches: token ids (B, S) int64. Raises ValueError for a quantised model, and without a batch.
    """

    def __init__(self, model: Transformer, batches: Sequence[Tensor]):
        refuse_quantized(model)
        if not batches:
            raise ValueError("there is no calibration text: give it at least one window")
        self._blocks: list[nn.Module] = list(model.layers)
        found: list[tuple[Tensor, Context]] = []

        def take(block: nn.Module, args: tuple) -> None:
            found.append((args[0].value, args[1]))
            raise _Reached

        hook = model.layers[0].register_forward_pre_hook(take)
        try:
            with torch.no_grad():
                for ids_BS in batches:
                    with contextlib.suppress(_Reached):
                        model(ids_BS.to(model.device))
        finally:
            hook.remove()
        self.inputs = [x_BSM for x_BSM, _ in found]
        self._context = found[0][1]

    @torch.no_grad()
    def outputs(self, block: nn.Module) -> list[Tensor]:
        return [block(x_BSM, self._context) for x_BSM in self.inputs]

    def __iter__(self) -> Iterator[nn.Module]:
        """Each block, whose successor sees what it gives once the caller is done with it."""
        for block in self._blocks:
            yield block
            self.inputs = self.outputs(block)

    def squares(self, block: nn.Module, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
        """Of what these of its layers read, the sum of squares over all tokens: (K,) float64, by name."""
        sums: dict[str, Tensor] = {}

        def add(name: str):
            def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
                squares_K = args[0].double().flatten(0, -2).square().sum(0)
                sums[name] = sums[name] + squares_K if name in sums else squares_K

            return hook

        hooks = [layer.register_forward_pre_hook(add(name)) for name, layer in layers.items()]
        try:
            self.outputs(block)
        finally:
            for hook in hooks:
                hook.remove()
        return sums


def refuse_quantized(model: Transformer) -> None:
    if is_quantized(model):
        raise ValueError("the model is quantised: prune it first, then quantise what is left")


def prunable(block: nn.Module) -> dict[str, Linear]:
    """The linear layers of a block but the KEPT, by name; a mixture's experts are tensors of their own, and none."""
    found = {name: module for name, module in block.named_modules() if type(module) is Linear}
    return {name: module for name, module in found.items() if name.rpartition(".")[2] not in KEPT}
