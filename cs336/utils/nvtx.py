"""Ranges that Nsight and torch.profiler show: `with nvtx.annotate("forward"):` around phases, outside compiled ones."""

import contextlib
import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager


@functools.cache
def _annotate() -> Callable[[str], AbstractContextManager] | None:
    try:
        import nvtx
    except ImportError:
        return None
    return nvtx.annotate


def annotate(name: str) -> AbstractContextManager:
    """A range over the block. About 1 us when no profiler listens; Nsight needs the nvtx package."""
    torch = sys.modules.get("torch")  # not imported for this
    if torch is not None and torch.autograd._profiler_enabled():
        return torch.profiler.record_function(name)
    make = _annotate()
    return contextlib.nullcontext() if make is None else make(name)
