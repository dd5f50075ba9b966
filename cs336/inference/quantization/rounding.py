"""Weights rounded to the nearest whole numbers, q = round(w / scale): a group's largest |w| is the end of its scale.

N = out_features, K = in_features, G = groups of a row, E = weights of a group.
"""

import torch
from torch import Tensor, nn

from cs336.models import Transformer
from cs336.nn import QuantMethod, replace_linears


@torch.no_grad()
def round_to_nearest(weight_NK: Tensor, method: QuantMethod, group: int) -> tuple[Tensor, Tensor]:
    """(q, scales) as ops.linear_int8 and ops.linear_int4 take them; scales are like the weight.

    Raises ValueError for a weight that is not finite, and with int4 for an odd number of features or group.
    """
    N, K = weight_NK.shape
    if not weight_NK.isfinite().all():
        raise ValueError("the weight is not finite")
    if method == "int4" and (K % 2 or group % 2):
        raise ValueError(f"int4 weights lie two in a byte: in_features and group must be even, got {K} and {group}")
    half = 128 if method == "int8" else 8
    G = -(-K // group)
    w_NGE = nn.functional.pad(weight_NK.float(), (0, G * group - K)).view(N, G, group)
    scales_NG = (w_NGE.abs().amax(-1) / (half - 0.5)).to(weight_NK.dtype)
    scales_NG = scales_NG.masked_fill(scales_NG == 0, 1)
    q_NGE = (w_NGE / scales_NG.float()[..., None]).round().clamp(-half, half - 1).to(torch.int8)
    q_NK = q_NGE.view(N, -1)[:, :K].contiguous()
    if method == "int8":
        return q_NK, scales_NG
    low, high = (q_NK + 8).to(torch.uint8).view(N, K // 2, 2).unbind(-1)
    return low | high << 4, scales_NG


@torch.no_grad()
def quantize_(model: Transformer, method: QuantMethod, group: int = 128) -> Transformer:
    """Round the weights of the model's layers, in place: of all linear ones but routers and latent attention's
    kv_b_proj. Embedding and head stay as they are.

    Returns the model. Raises ValueError for an unknown method, a group that fits no layer, and a weight that is not
    finite, by its name.
    """
    for name, (old, new) in replace_linears(model.layers, method, group).items():
        try:
            new.packed, new.scales = round_to_nearest(old.weight, method, group)
        except ValueError as error:
            raise ValueError(f"layers.{name}: {error}") from None
        new.bias = None if old.bias is None else old.bias.detach().clone()
    return model
