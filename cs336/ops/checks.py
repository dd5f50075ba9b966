"""What the checks of ops share: how an error names a tensor, rows without gaps, the dtypes that kernels take."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def like(x: Tensor) -> str:
    """Shape, dtype and device, as an error names them."""
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"


def check_last_dims(**tensors: Tensor | None) -> None:
    """Raises ValueError for a tensor whose last dim is not contiguous."""
    for name, x in tensors.items():
        if x is not None and x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"{name} must have its last dim contiguous, got strides {x.stride()}")


def no_float64(x: Tensor, *_) -> str | None:
    """Why the kernels, which compute in float32, refuse an op whose first argument is x."""
    return None if x.dtype in FLOATS else f"{x.dtype} is computed by the reference alone"
