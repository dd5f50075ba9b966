"""A model quantised block by block: each sees calibration text through the quantised ones before it.

The blocks take turns on the device, with the inputs of one and what its layers count; each is written to a file when it
is done, from which a later call goes on.

B = batch, S = tokens, M = d_model.
"""

import contextlib
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cs336.inference.quantization.calibration import Inputs, Watch
from cs336.models import Transformer
from cs336.nn import Context, QuantizedLinear, QuantizedWeight, QuantMethod, replace_linears
from cs336.nn.expert_list import unstack_experts
from cs336.utils.files import replacing
from cs336.utils.tensor_file import save_tensors


class Scheme(NamedTuple):
    """What stands in the place of each linear layer."""

    method: QuantMethod
    group: int | None
    zeros: bool = False
    order: bool = False

    def replace(self, block: nn.Module):
        return replace_linears(block, self.method, self.group, zeros=self.zeros, order=self.order)


QuantizeBlock = Callable[[nn.Module, list[Inputs]], str]
"""Quantise a block in place, from what its layers read; a line that says how it went."""


@torch.no_grad()
def quantize_blocks_(
    model: Transformer,
    batches: Sequence[Tensor],
    scheme: Scheme,
    quantize: QuantizeBlock,
    folder: pathlib.Path,
    *,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = print,
) -> None:
    """Quantise the layers of a model in place.

    Args:
        batches: token ids (B, S) int64 of the calibration text.
        scheme: what `quantize` leaves in a block.
        folder: NNN.safetensors of each block that is done; those that are there already are taken as they are.
        device: where blocks run and are quantised, one at a time; the model stays where it is.

    Raises ValueError for a file that does not fit the block.
    """
    folder.mkdir(parents=True, exist_ok=True)
    xs, context = _first_inputs(model, batches)
    for i, block in enumerate(model.layers):
        path, home = folder / f"{i:03}.safetensors", next(block.parameters()).device
        block.to(device)
        unstack_experts(block)
        if path.exists():
            _load(block, scheme, path)
            how = "done before"
        else:
            how = quantize(block, _watched(block, xs, context))
            with replacing(path, "wb") as file:
                save_tensors({n: t.contiguous() for n, t in block.state_dict().items()}, file.name)
        say(f"block {i + 1} of {len(model.layers)}: {how}")
        if i + 1 < len(model.layers):
            xs = [block(x.to(device), context).to(x.device) for x in xs]
        block.to(home)


def _watched(block: nn.Module, xs: Sequence[Tensor], context: Context) -> list[Inputs]:
    watch, device = Watch(block), next(block.parameters()).device
    for x in xs:
        with watch.forward():
            block(x.to(device), context)
    return watch.inputs


class _Reached(Exception):
    """The first block was about to run."""


def _first_inputs(model: Transformer, batches: Sequence[Tensor]) -> tuple[list[Tensor], Context]:
    """What the first block gets of each batch (B, S, M), and the context of all blocks."""
    found: list = []

    def take(block: nn.Module, args: tuple) -> None:
        found.append(args)
        raise _Reached

    hook = model.layers[0].register_forward_pre_hook(take)
    try:
        for ids_BS in batches:
            with contextlib.suppress(_Reached):
                model(ids_BS.to(model.device))
    finally:
        hook.remove()
    return [stream.value for stream, *_ in found], found[0][1]


def _load(block: nn.Module, scheme: Scheme, path: pathlib.Path) -> None:
    try:
        scheme.replace(block)
        block.load_state_dict(load_file(path, device=str(next(block.parameters()).device)), assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} is no block of this model: {error}") from None


def output_error(old: Tensor, new: QuantizedLinear, inputs: Inputs) -> tuple[float, float]:
    """||x (w' - w)^T||^2 and ||x w^T||^2 over the inputs, of a weight and what it was rounded to."""
    h, w = inputs.hessian, old.to(inputs.hessian.dtype)
    d = new.weight.to(h.dtype) - w
    return float(((d @ h) * d).sum()), float(((w @ h) * w).sum())


def fill_block(
    block: nn.Module,
    inputs: list[Inputs],
    scheme: Scheme,
    quantize: Callable[[Tensor, int, Inputs], QuantizedWeight],
) -> str:
    """Put in the place of each layer of a block what `quantize` makes of its weight, its group and what it reads.

    Returns how far the layers' outputs are off, relative to these. Raises ValueError by the name of the layer.
    """
    read = {name: each for each in inputs for name in each.layers}
    off = whole = 0.0
    for name, (old, new) in scheme.replace(block).items():
        try:
            new.fill(quantize(old.weight, new.group, read[name]), old.bias)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        errors = output_error(old.weight, new, read[name])
        off, whole = off + errors[0], whole + errors[1]
    return f"outputs are {(off / whole) ** 0.5 if whole else 0:.2%} off"
