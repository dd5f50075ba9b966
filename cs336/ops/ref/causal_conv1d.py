"""Plain torch; the formula is in ops/causal_conv1d.py."""

import torch
from torch import Tensor

from cs336.ops.ref.recurrent_step import put_
from cs336.ops.ref.wide import narrow, wide


def fwd(x_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, segments_BS: Tensor | None) -> Tensor:
    y_BSC = wide(x_BSC) * wide(weight_CK[:, -1])
    if bias_C is not None:
        y_BSC = y_BSC + wide(bias_C)
    for k, tap_C, seen in _taps(x_BSC, weight_CK, segments_BS)[1:]:
        seen_BSC = _seen(wide(x_BSC[:, : x_BSC.shape[1] - k]), seen) * tap_C
        y_BSC = torch.cat((y_BSC[:, :k], y_BSC[:, k:] + seen_BSC), 1)  # not in place: vmap may batch the segments alone
    return narrow(y_BSC, x_BSC)


def bwd(dy_BSC: Tensor, x_BSC: Tensor, weight_CK: Tensor, segments_BS: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x; dweight (C, K) and dbias (C,) in float32 or wider."""
    dy_BSC, S = wide(dy_BSC), x_BSC.shape[1]
    dx_BSC, dtaps = torch.zeros_like(dy_BSC), []
    for k, tap_C, seen in _taps(x_BSC, weight_CK, segments_BS):
        part = _seen(dy_BSC[:, k:], seen)
        dx_BSC = dx_BSC + torch.nn.functional.pad(part * tap_C, (0, 0, 0, k))
        dtaps.append((part * _seen(wide(x_BSC[:, : S - k]), seen)).sum((0, 1)))
    dtaps += [torch.zeros_like(dtaps[0])] * (weight_CK.shape[1] - len(dtaps))  # taps that reach before the first
    return dx_BSC.to(x_BSC.dtype), torch.stack(dtaps[::-1], -1), dy_BSC.sum((0, 1))


def step_(
    ring_NRC: Tensor,
    x_BC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    lengths_B: Tensor,
    places_B: Tensor | None,
    silu: bool,
) -> Tensor:
    """One token more of each row; token t is in slot t mod R."""
    place_B = torch.arange(len(x_BC), device=x_BC.device) if places_B is None else places_B.long()
    R, K, lengths_B = ring_NRC.shape[1], weight_CK.shape[1], lengths_B.long()
    read_B = place_B.clamp(0, max(len(ring_NRC) - 1, 0))
    y_BC = wide(x_BC) * wide(weight_CK[:, K - 1])
    for k in range(1, K):
        entry_BC = ring_NRC[read_B, (lengths_B - k) % R].masked_fill((lengths_B < k)[:, None], 0)
        y_BC = y_BC + wide(entry_BC) * wide(weight_CK[:, K - 1 - k])
    if bias_C is not None:
        y_BC = y_BC + wide(bias_C)
    put_(ring_NRC, place_B, lengths_B % R, x_BC)
    return (torch.nn.functional.silu(y_BC) if silu else y_BC).to(x_BC.dtype)


def _seen(values_BSC: Tensor, seen: Tensor | None) -> Tensor:
    """Zeros where another segment stands: a product with zero would let its NaN through."""
    return values_BSC if seen is None else torch.where(seen, values_BSC, 0)


def _taps(x_BSC: Tensor, weight_CK: Tensor, segments_BS: Tensor | None) -> list[tuple[int, Tensor, Tensor | None]]:
    """Of each shift k: its weights (C,), and which tokens, from the k-th on, see the one k before them."""
    K, S, taps = weight_CK.shape[1], x_BSC.shape[1], []
    for k in range(min(K, max(S, 1))):
        seen = None
        if segments_BS is not None and k:
            seen = (segments_BS[:, k:] == segments_BS[:, : S - k])[..., None]
        taps.append((k, wide(weight_CK[:, K - 1 - k]), seen))
    return taps
