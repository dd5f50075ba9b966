"""SiLU, or swish.  silu(x) = x * sigmoid(x)                                      arXiv:1606.08415, arXiv:1710.05941"""

import torch.nn.functional as F
from torch import Tensor

from cs336.ops import registry
from cs336.ops.ref import silu as ref


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x), element by element. x: any shape, floating point; else ValueError."""
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")
    return ref.fwd(x) if registry.forced() == "ref" else F.silu(x)
