"""Drop-in: torch's own functions run ours.

    cs336.enable()                            # until cs336.disable()
    with cs336.backend.Backend(): model(x)    # inside the block

Both swap attributes of torch.nn.functional, which torch's modules look up at each call: every thread sees them, eager
and under torch.compile, and no other torch function becomes slower. Arguments that our op does not take go to torch.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cs336 import ops

_ORIGINAL: dict[str, Callable] = {}
_depth = 0


def _plain(*tensors: Tensor | None) -> bool:
    return all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def _floats(*tensors: Tensor | None) -> bool:
    return all(t is None or t.dtype in (torch.float32, torch.float16, torch.bfloat16) for t in tensors)


def _normalises(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether our norms take these arguments and return what torch would."""
    return (
        weight is not None
        and _plain(input, weight, bias)
        and tuple(normalized_shape) == tuple(input.shape[-1:]) == tuple(weight.shape)
        and input.numel() > 0
        and _floats(input)
        and all(p is None or p.dtype == input.dtype and p.shape == weight.shape for p in (weight, bias))
        and not torch.is_autocast_enabled(input.device.type)
    )


def _rms_norm(original, input, normalized_shape, weight=None, eps=None):
    if not _normalises(input, normalized_shape, weight, None):
        return original(input, normalized_shape, weight, eps)
    return ops.rms_norm(input, weight, torch.finfo(input.dtype).eps if eps is None else eps)


def _layer_norm(original, input, normalized_shape, weight=None, bias=None, eps=1e-5):
    if not _normalises(input, normalized_shape, weight, bias):
        return original(input, normalized_shape, weight, bias, eps)
    return ops.layer_norm(input, weight, bias, eps)


REPLACEMENTS: dict[str, Callable] = {"rms_norm": _rms_norm, "layer_norm": _layer_norm}


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
