"""torch.nn.functional.scaled_dot_product_attention on our attention, for cs336.enable() and backend="cs336"."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cs336.ops.attention import attention


def takes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Whether `sdpa` gives what torch's function would: a batch of four dims without mask and dropout.

    Torch's is_causal is aligned at the first query and key, ours at the last: they agree where there are as many.
    """
    return (
        attn_mask is None
        and dropout_p == 0.0
        and query.dim() == key.dim() == value.dim() == 4
        and query.dtype == key.dtype == value.dtype
        and query.device == key.device == value.device
        and query.is_floating_point()
        and query.numel() > 0
        and key.numel() > 0
        and value.numel() > 0
        and query.shape[0] == key.shape[0]
        and query.shape[-1] == key.shape[-1]
        and key.shape[:-1] == value.shape[:-1]
        and (query.shape[1] == key.shape[1] or (enable_gqa and query.shape[1] % key.shape[1] == 0))
        and (not is_causal or query.shape[2] == key.shape[2])
        and (scale is None or -math.inf < scale < math.inf)
    )


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `takes` accepts, with torch's arguments."""
    return attention(query, key, value, causal=is_causal, scale=scale)


def drop_in(original: Callable, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> Tensor:
    """Ours where it gives what torch's function would, else `original`, torch's."""
    plain = (
        all(type(t) in (Tensor, torch.nn.Parameter) and not t.is_nested for t in (query, key, value))
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0  # no forward mode
        and not torch.jit.is_tracing()
    )
    if plain and takes(query, key, value, *args, **kwargs):
        return sdpa(query, key, value, *args, **kwargs)
    return original(query, key, value, *args, **kwargs)
