"""AWQ: features that are large where a layer reads them are kept larger while it is rounded.           arXiv:2306.00978

A layer's weight times s, rounded, reads inputs over s, which costs nothing where what makes these is linear in a weight
of its own: a norm, the value projection before attention's output, the up projection of a gated MLP. s is the mean |x|
to a power p from 0 to 0.95, or to one from 0 to 1 over the mean size of the weights to 1 - p: of the 41 the one with
the least error of the layers' outputs on calibration text. Then the largest weights of each group are cut off where
what the group adds to them has the least error: a finer grid for the others.

N = out_features, K = in_features, G = groups of a row, E = weights of a group.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cs336.inference.quantization.calibration import Inputs
from cs336.inference.quantization.layerwise import Scheme, fill_block
from cs336.inference.quantization.rounding import nearest, wide
from cs336.models import TransformerBlock
from cs336.nn import MLP, Attention, LayerNorm, MoE, QuantizedWeight, RMSNorm
from cs336.nn.expert_list import ExpertList
from cs336.nn.quantized import BITS

POWERS = 20
CUTS = 10


class _Fold(NamedTuple):
    maker: RMSNorm | LayerNorm | nn.Linear
    """Of the inputs."""
    inputs: list[Inputs]
    """Of all its readers that are rounded."""
    others: tuple[nn.Linear, ...] = ()
    """The readers that are not."""


@torch.no_grad()
def awq_block(block: TransformerBlock, inputs: list[Inputs], scheme: Scheme) -> str:
    """Scale the layers of a block, and round them: see layerwise.fill_block."""
    for fold in _folds(block, inputs):
        s_K = _search(block, fold, scheme)
        fold.maker.weight.div_(s_K if fold.maker.weight.dim() == 1 else s_K[:, None])
        if fold.maker.bias is not None:
            fold.maker.bias.div_(s_K)
        readers = [_linear(block, name) for each in fold.inputs for name in each.layers]
        for reader in (*readers, *fold.others):
            reader.weight.mul_(s_K)
        for each in fold.inputs:
            each.divide(s_K)

    def quantize(weight_NK: Tensor, group: int, read: Inputs) -> QuantizedWeight:
        bits, w_NK = BITS[scheme.method], wide(weight_NK)
        cut_NK = cut(w_NK, read.hessian, bits, group, asymmetric=scheme.zeros).to(weight_NK.dtype)
        return nearest(cut_NK, bits, group, asymmetric=scheme.zeros)

    return fill_block(block, inputs, scheme, quantize)


def cut(w_NK: Tensor, hessian_KK: Tensor, bits: int, group: int, *, asymmetric: bool) -> Tensor:
    """A weight whose groups have no |w| beyond a share of their largest, from 1 down to 0.55: the one of CUTS with the
    least error of x w^T over the group's features once it is rounded. hessian_KK: x^T x."""
    N, K = w_NK.shape
    G = -(-K // group)
    more = G * group - K
    w_NGE = nn.functional.pad(w_NK, (0, more)).view(N, G, group)
    h_GEE = nn.functional.pad(hessian_KK, (0, more, 0, more)).view(G, group, G, group).diagonal(dim1=0, dim2=2)
    h_GEE = h_GEE.permute(2, 0, 1).contiguous()
    largest_NG1 = w_NGE.abs().amax(-1, keepdim=True)
    best_NGE, least_NG = w_NGE, w_NK.new_full((N, G), float("inf"))
    for i in range(CUTS):
        most_NG1 = largest_NG1 * (1 - i / (2 * CUTS))
        cut_NGE = w_NGE.clamp(-most_NG1, most_NG1)
        rounded = nearest(cut_NGE.view(N, -1), bits, group, asymmetric=asymmetric)
        d_NGE = rounded.dequantized(group).view(N, G, group) - w_NGE
        off_NG = (torch.einsum("nge,gef->ngf", d_NGE, h_GEE) * d_NGE).sum(-1)
        best_NGE = torch.where((off_NG < least_NG)[..., None], cut_NGE, best_NGE)
        least_NG = torch.minimum(least_NG, off_NG)
    return best_NGE.view(N, -1)[:, :K]


def _search(block: nn.Module, fold: _Fold, scheme: Scheme) -> Tensor:
    """s (K,) in float32, whose largest and least are one another's inverse."""
    magnitude_K = torch.stack([each.magnitude for each in fold.inputs]).sum(0)
    weights = [(each, wide(_linear(block, name).weight)) for each in fold.inputs for name in each.layers]
    group = len(magnitude_K) if scheme.group is None else scheme.group
    size_K = torch.cat([_sizes(w_NK, group) for _, w_NK in weights]).mean(0)
    tried = [magnitude_K.pow(i / POWERS) for i in range(POWERS)]
    tried += [magnitude_K.pow(i / POWERS) / (size_K.pow(1 - i / POWERS) + 1e-4) for i in range(POWERS + 1)]
    best, least = torch.ones_like(magnitude_K), float("inf")
    for s_K in tried:
        s_K = s_K.clamp(min=1e-4)
        s_K = s_K / (s_K.max() * s_K.min()).sqrt()
        off = 0.0
        for each, w_NK in weights:
            rounded = nearest(w_NK * s_K, BITS[scheme.method], group, asymmetric=scheme.zeros)
            d_NK = rounded.dequantized(group) / s_K - w_NK
            off += float(((d_NK @ each.hessian) * d_NK).sum())
        if off < least:
            best, least = s_K, off
    return best


def _sizes(w_NK: Tensor, group: int) -> Tensor:
    """|w| as shares of the largest of its group."""
    N, K = w_NK.shape
    size_NGE = nn.functional.pad(w_NK.abs(), (0, -K % group)).view(N, -1, group)
    return (size_NGE / (size_NGE.amax(-1, keepdim=True) + 1e-6)).view(N, -1)[:, :K]


def _folds(block: TransformerBlock, inputs: list[Inputs]) -> Iterator[_Fold]:
    read = {name: each for each in inputs for name in each.layers}
    mixtures = {name: module for name, module in block.named_modules() if isinstance(module, MoE)}
    joins = () if block.config.placement in ("pre", "sandwich") else (block.attention_norm, block.mlp_norm)
    for norm in dict.fromkeys(each.norm for each in inputs if each.norm is not None):
        if norm in joins or not norm.learned:  # what joins the stream is read by all behind it
            continue
        readers = [each for each in inputs if each.norm is norm]
        names = [name for each in readers for name in each.layers]
        read_by = [moe for at, moe in mixtures.items() if any(name.startswith(f"{at}.") for name in names)]
        yield _Fold(norm, readers, tuple(router for moe in read_by for router in moe.routers))
    for at, module in block.named_modules():
        if isinstance(module, Attention) and module.num_heads == module.num_kv_heads:
            yield _Fold(module.v_proj, [read[f"{at}.o_proj"]])
        if not isinstance(module, MLP | ExpertList) or not module.gated or module.activation == "clamped_gelu":
            continue  # which bounds up
        if isinstance(module, MLP):
            yield _Fold(module.up_proj, [read[f"{at}.down_proj"]])
        else:
            for e in range(len(module.up_proj)):
                yield _Fold(_linear(module, f"up_proj.{e}"), [read[f"{at}.down_proj.{e}"]])


def _linear(block: nn.Module, name: str) -> nn.Linear:
    layer = block.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer
