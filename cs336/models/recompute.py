"""What of a layer is kept for the backward, and what is computed again there (Chen et al. 2016, arXiv:1604.06174).

False, "none"     everything
"selective"       the products: what linear layers and attention return (Korthikanti et al. 2022, arXiv:2205.05198)
True, "full"      the layer's inputs: a third more work
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from cs336.models.block import Stream
from cs336.nn import Context
from cs336.ops.registry import OPS

Recompute = bool | Literal["none", "selective", "full"]
KEEPS_ALL = (False, "none")


def call_layer(how: Recompute, layer: Callable[..., Stream], flat: tuple, context: Context) -> tuple:
    """A layer's stream from that before it, both flat, of which the backward makes again what `how` says."""
    stream = Stream.of(flat)
    return (layer(stream, context) if how in KEEPS_ALL else recomputed(how, layer, stream, context)).flat()


def recomputed(how: Recompute, layer: Callable[..., Any], *args: Any) -> Any:
    """layer(*args), which the backward calls again. Raises ValueError for an unknown way."""
    if how in (True, "full"):
        return checkpoint(layer, *args, use_reentrant=False)
    if how != "selective":
        raise ValueError(f"gradient_checkpointing must be none, selective or full, got {how!r}")
    return checkpoint(layer, *args, use_reentrant=False, context_fn=_contexts)


def _contexts() -> Any:
    """A function of its own, which torch.compile does not trace."""
    return create_selective_checkpoint_contexts(_products())


@functools.cache
def _products() -> list[Any]:
    """Ops whose results are kept: much work for what they take."""
    aten = torch.ops.aten
    attention = [
        getattr(aten, name).default
        for name in dir(aten)
        if name.startswith("_scaled_dot_product") and not name.endswith("backward") and "math" not in name
    ]
    ours = [
        overload
        for name, op in OPS.items()
        if name.startswith("attention") and name.endswith("_fwd")
        for overload in op.overloads.values()
    ]
    return [aten.mm.default, aten.addmm.default, aten.bmm.default, aten._scaled_mm.default, *attention, *ours]
