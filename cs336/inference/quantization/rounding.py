"""Weights rounded to the nearest whole numbers of a grid a group, q = round(w / scale) + zero, or floats of eight bits.

A symmetric grid has no zeros, and a group's largest |w| is the end of its scale; of an asymmetric one the group's least
and largest weights are.

N = out_features, K = in_features, G = groups of a row, E = weights of a group.
"""

import torch
from torch import Tensor, nn

from cs336.models import Transformer
from cs336.nn import QuantizedWeight, QuantMethod, replace_linears
from cs336.nn.checks import check_flags
from cs336.nn.quantized import BITS, FP8, TOKEN
from cs336.ops.ref.linear_quantized import pack_int4


def grids(w_NGE: Tensor, bits: int, asymmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scales (N, G) in a dtype, and zeros (N, G) int16 of asymmetric grids, of q from -2^(bits - 1) up."""
    half = 2 ** (bits - 1)
    if not asymmetric:
        scales_NG = (w_NGE.abs().amax(-1) / (half - 0.5)).to(dtype)
        return scales_NG.masked_fill(scales_NG == 0, 1), None
    low_NG, high_NG = w_NGE.amin(-1).clamp(max=0), w_NGE.amax(-1).clamp(min=0)
    scales_NG = ((high_NG - low_NG) / (2 * half - 1)).to(dtype)
    scales_NG = scales_NG.masked_fill(scales_NG == 0, 1)
    return scales_NG, (-half - (low_NG / scales_NG)).round().clamp(-half, half - 1).to(torch.int16)


def on_grid(w_NGE: Tensor, scales_NG: Tensor, zeros_NG: Tensor | None, bits: int) -> Tensor:
    """q of each weight, in its dtype."""
    q_NGE = (w_NGE / scales_NG.to(w_NGE.dtype)[..., None]).round()
    q_NGE = q_NGE if zeros_NG is None else q_NGE + zeros_NG[..., None]
    return q_NGE.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@torch.no_grad()
def nearest(weight_NK: Tensor, bits: int, group: int, *, asymmetric: bool = False) -> QuantizedWeight:
    """Each weight to the nearest number of its group's grid; scales are like the weight.

    Raises ValueError for a weight that is not finite.
    """
    N, K = weight_NK.shape
    check_finite(weight_NK)
    G = -(-K // group)
    w_NGE = nn.functional.pad(wide(weight_NK), (0, G * group - K)).view(N, G, group)
    scales_NG, zeros_NG = grids(w_NGE, bits, asymmetric, weight_NK.dtype)
    q_NK = on_grid(w_NGE, scales_NG, zeros_NG, bits).view(N, -1)[:, :K]
    return QuantizedWeight(q_NK.to(torch.int8).contiguous(), scales_NG, zeros_NG)


@torch.no_grad()
def nearest_fp8(weight_NK: Tensor, group: int) -> QuantizedWeight:
    """Each weight to the nearest float8_e4m3fn, a group's largest |w| to the largest; scales are like the weight.

    Raises ValueError for a weight that is not finite.
    """
    N, K = weight_NK.shape
    check_finite(weight_NK)
    G, most = -(-K // group), torch.finfo(FP8).max
    w_NGE = nn.functional.pad(wide(weight_NK), (0, G * group - K)).view(N, G, group)
    scales_NG = (w_NGE.abs().amax(-1) / most).to(weight_NK.dtype)
    scales_NG = scales_NG.clamp(torch.finfo(scales_NG.dtype).tiny)  # float16's below are coarse, or 0
    q_NGE = (w_NGE / scales_NG.to(w_NGE.dtype)[..., None]).clamp(-most, most).to(FP8)
    return QuantizedWeight(q_NGE.view(N, -1)[:, :K].contiguous(), scales_NG)


def round_to_nearest(weight_NK: Tensor, method: QuantMethod, group: int) -> tuple[Tensor, Tensor]:
    """(q, scales) as ops.linear_int8, ops.linear_int4 and ops.linear_fp8 take them; scales are like the weight.

    Raises ValueError for a weight that is not finite, and with int4 for an odd number of features or group.
    """
    K = weight_NK.shape[1]
    if method == "fp8":
        return nearest_fp8(weight_NK, group)[:2]
    if method == "int4" and (K % 2 or group % 2):
        raise ValueError(f"int4 weights lie two in a byte: in_features and group must be even, got {K} and {group}")
    q_NK, scales_NG, *_ = nearest(weight_NK, BITS[method], group)
    return (q_NK if method == "int8" else pack_int4(q_NK)), scales_NG


@torch.no_grad()
def quantize_(
    model: Transformer,
    method: QuantMethod,
    group: int | None = 128,
    *,
    asymmetric: bool = False,
    activations: bool = False,
) -> Transformer:
    """Round the weights of the model's layers, in place: of all linear ones, a mixture's experts among them, but
    routers, latent attention's kv_b_proj and Hyena's filters. Embedding and head stay as they are.

    group: neighbours in a row that share a scale; None: the whole row. asymmetric: a grid has a zero besides.
    activations: of fp8, what the layers read is rounded to it too, as it comes, with a scale a token.
    Returns the model. Raises ValueError for an unknown method, a group that fits no layer, and a weight that is not
    finite, by its name.
    """
    check_flags(asymmetric=asymmetric, activations=activations)
    if activations and method != "fp8":
        raise ValueError(f"activations are rounded to fp8 beside weights in fp8, got {method}: leave activations out")
    x_group = TOKEN if activations else None
    for name, (old, new) in replace_linears(model.layers, method, group, zeros=asymmetric, x_group=x_group).items():
        try:
            if method == "fp8":
                new.fill(nearest_fp8(old.weight, new.group), old.bias)
            else:
                new.fill(nearest(old.weight, BITS[method], new.group, asymmetric=asymmetric), old.bias)
        except ValueError as error:
            raise ValueError(f"layers.{name}: {error}") from None
    return model


def check_finite(weight: Tensor) -> None:
    if not weight.isfinite().all():
        raise ValueError("the weight is not finite")


def wide(x: Tensor) -> Tensor:
    """In float32, or wider if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
