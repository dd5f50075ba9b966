"""Drop-in: torch's own functions run ours.

    cs336.enable()                            # until cs336.disable()
    with cs336.backend.Backend(): model(x)    # inside the block

Both swap attributes of torch.nn.functional, which torch's modules look up at each call: every thread sees them, eager
and under torch.compile, and no other torch function becomes slower. Arguments that our op does not take go to torch.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from cs336 import ops
from cs336.ops import sdpa, torch_cross_entropy
from cs336.ops.checks import FLOATS

_ORIGINAL: dict[str, Callable] = {}
_depth = 0

# (function, device) where autocast runs torch's function in float32
_AUTOCAST_TO_FLOAT32 = {
    (name, device)
    for name, device in itertools.product(("rms_norm", "layer_norm"), ("cpu", "cuda"))
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", f"Autocast{device.upper()}")
}


def _normalises(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether our norms take these arguments, and then return what torch would."""
    return (
        weight is not None
        and all(type(t) in (Tensor, torch.nn.Parameter) for t in (input, weight, bias) if t is not None)
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0  # no forward mode
        and not torch.jit.is_tracing()
        and tuple(normalized_shape) == input.shape[-1:] == weight.shape
        and input.numel() > 0
        and input.device == weight.device
        and input.dtype in FLOATS
        and weight.dtype in (input.dtype, torch.float32)
        and (bias is None or (bias.shape, bias.dtype, bias.device) == (weight.shape, weight.dtype, weight.device))
    )


def _in_float32(name: str, device: str) -> bool:
    return (name, device) in _AUTOCAST_TO_FLOAT32 and torch.is_autocast_enabled(device)


def _rms_norm(original, input, normalized_shape, weight=None, eps=None):
    if not _normalises(input, normalized_shape, weight, None):
        return original(input, normalized_shape, weight, eps)
    if _in_float32("rms_norm", input.device.type):
        input, weight = input.float(), weight.float()
    if eps is None:
        eps = torch.finfo(torch.float32).eps  # torch's is that of the dtype it computes in
    return ops.rms_norm(input, weight, eps)


def _layer_norm(original, input, normalized_shape, weight=None, bias=None, eps=1e-5):
    if not _normalises(input, normalized_shape, weight, bias):
        return original(input, normalized_shape, weight, bias, eps)
    if _in_float32("layer_norm", input.device.type):
        input, weight, bias = input.float(), weight.float(), None if bias is None else bias.float()
    return ops.layer_norm(input, weight, bias, eps)


REPLACEMENTS: dict[str, Callable] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "scaled_dot_product_attention": sdpa.drop_in,
    "cross_entropy": torch_cross_entropy.drop_in,
}


def enable() -> None:
    """Run cs336's ops where torch would run its own. Calls nest: each needs its own `disable()`."""
    global _depth
    _depth += 1
    if _depth > 1:
        return
    for name, replacement in REPLACEMENTS.items():
        _ORIGINAL[name] = getattr(F, name)
        setattr(F, name, functools.wraps(_ORIGINAL[name])(functools.partial(replacement, _ORIGINAL[name])))


def disable() -> None:
    """Undo the last `enable()`."""
    global _depth
    if _depth == 0:
        raise RuntimeError("cs336.disable() without a cs336.enable() before it")
    _depth -= 1
    if _depth == 0:
        for name, original in _ORIGINAL.items():
            setattr(F, name, original)


class Backend:
    """`with Backend():` enables inside the block."""

    def __enter__(self) -> "Backend":
        enable()
        return self

    def __exit__(self, *exc) -> None:
        disable()
