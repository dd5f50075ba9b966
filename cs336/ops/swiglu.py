"""SwiGLU's gate.  swiglu(gate, up) = silu(gate) * up                                Shazeer 2020, arXiv:2002.05202

Bytes that must move: 3 numel elements; about 5 FLOPs an element: memory-bound on every device.
"""

import torch.nn.functional as F
from torch import Tensor

from cs336.ops import registry
from cs336.ops.ref import swiglu as ref


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, element by element.

    gate, up: one shape (any), one floating-point dtype. Returns a tensor like them.
    Raises ValueError for shapes or dtypes that do not fit.
    """
    if not gate.is_floating_point():
        raise ValueError(f"gate must be floating point, got {gate.dtype}")
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(f"up must be like gate, {tuple(gate.shape)} {gate.dtype}, got {tuple(up.shape)} {up.dtype}")
    return ref.fwd(gate, up) if registry.forced() == "ref" else F.silu(gate) * up
