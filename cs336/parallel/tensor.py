"""Tensor parallel: the ranks of a group divide each matrix of every layer.     arXiv:1909.08053, arXiv:2205.05198

    column    rank r has rows r of W (out, in), and makes its part of the output features
    row       rank r has columns r of W, reads its part of the input features, and the ranks' products are summed

Attention is divided by heads (q, k, v by column, o by row), an MLP by its hidden features (gate, up by column, down by
row), so that a layer sends two sums forward and two backward. Between them, where norms and additions are, each rank
has all tokens, or with `sequence` its part of them, and a sum becomes an all-gather before and a reduce-scatter behind:
as many bytes, with 1/N of the activations there. The vocabulary is divided too: see vocabulary.py.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cs336 import ops
from cs336.models import Transformer, TransformerBlock
from cs336.nn import MLP, Attention, LayerNorm, Linear, RMSNorm, is_quantized
from cs336.nn.positions import AlibiSlopes
from cs336.parallel import differentiable
from cs336.parallel.differentiable import Group, check_parts, gathered, own_part
from cs336.parallel.vocabulary import (
    VocabularyEmbedding,
    vocabulary_linear_cross_entropy,
    vocabulary_linear_loss_sums,
)


@dataclass(frozen=True)
class Region:
    """Where the ranks of a group compute in parts; x is (..., S, M)."""

    group: Group = None
    sequence: bool = False
    """Outside, each rank has its part of the S tokens, not all of them."""

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    def enter(self, x: Tensor) -> Tensor:
        """All tokens, to be read in parts."""
        return differentiable.gather(x, -2, self.group) if self.sequence else differentiable.copy(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """The sum of the ranks' partial sums."""
        return differentiable.scatter(x, -2, self.group) if self.sequence else differentiable.sum_(x, self.group)


class ColumnLinear(Linear):
    """A Linear of which each rank makes its part of the output: x (..., S, in) -> (..., S, out / N).

    weight is (out / N, in), bias (out / N,). Raises ValueError where `out` does not divide.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        region: Region | None = None,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        region = region or Region()
        check_parts(out_features, region.size, "an output")
        super().__init__(in_features, out_features // region.size, bias=bias, device=device, dtype=dtype)
        self.region = region

    @classmethod
    def of(cls, linear: nn.Linear, region: Region) -> "ColumnLinear":
        """This rank's part of a whole one."""
        made = cls(linear.in_features, linear.out_features, region, bias=linear.bias is not None, device="meta")
        _take_rows(made, linear, region.group)
        return made

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.region.enter(x))


class RowLinear(Linear):
    """A Linear of which each rank reads its part of the input: x (..., S, in / N) -> (..., S, out), out of the region.

    weight is (out, in / N); bias (out,), whole, is added to the sum. Raises ValueError where `in` does not divide.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        region: Region | None = None,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        region = region or Region()
        check_parts(in_features, region.size, "an input")
        super().__init__(in_features // region.size, out_features, bias=bias, device=device, dtype=dtype)
        self.region = region

    @classmethod
    def of(cls, linear: nn.Linear, region: Region) -> "RowLinear":
        """This rank's part of a whole one."""
        bias = linear.bias is not None
        made = cls(linear.in_features, linear.out_features, region, bias=bias, device="meta")
        made.weight = _own(linear.weight, 1, region.group)
        if bias:
            made.bias = nn.Parameter(linear.bias.detach().clone(), linear.bias.requires_grad)
        return made

    def forward(self, x: Tensor) -> Tensor:
        y = self.region.leave(F.linear(x, self.weight))
        if self.bias is None:
            return y
        bias = differentiable.copy(self.bias, self.region.group) if self.region.sequence else self.bias
        return y + bias.to(y.dtype)


class OwnSlopes(AlibiSlopes):
    """The slopes of this rank's part of num_heads heads."""

    def __init__(self, num_heads: int, group: Group, device: torch.device):
        self.num_heads, self.group = num_heads, group
        super().__init__(num_heads, device=device)

    def reset_buffers(self) -> None:
        slopes = AlibiSlopes(self.num_heads, device=self.slopes.device).slopes
        self.slopes = own_part(slopes, 0, self.group).clone()


class PartialRMSNorm(RMSNorm):
    """An RMSNorm that ranks have alike and use on parts of the work: its gradient is the sum of theirs."""

    group: Group

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return ops.rms_norm(x, differentiable.copy(self.weight, self.group), self.eps, residual)


class PartialLayerNorm(LayerNorm):
    """A LayerNorm likewise."""

    group: Group

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        bias = None if self.bias is None else differentiable.copy(self.bias, self.group)
        return ops.layer_norm(x, differentiable.copy(self.weight, self.group), bias, self.eps, residual)


class TensorParallelTransformer(Transformer):
    """A Transformer that `tensor_parallel` has divided: called as before, with the same result on every rank."""

    region: Region
    divided: dict[str, int]
    """The parameters of which each rank has a part, by name, and the dim that is divided."""

    def _embed(self, token_ids_BS: Tensor, context: Any) -> Tensor:
        x_BSM = super()._embed(token_ids_BS, context)
        return differentiable.part(x_BSM, -2, self.region.group) if self.region.sequence else x_BSM

    def _normed(self, stream: Any) -> Tensor:
        x_BSM = super()._normed(stream)
        return differentiable.whole(x_BSM, -2, self.region.group) if self.region.sequence else x_BSM

    def logits(self, features_BSM: Tensor) -> Tensor:
        group = self.region.group
        return differentiable.whole(super().logits(differentiable.copy(features_BSM, group)), -1, group)

    def loss(self, features_BSM: Tensor, *args: Any, **options: Any) -> Any:
        return super().loss(differentiable.copy(features_BSM, self.region.group), *args, **options)

    def _fused_losses(self) -> tuple[Callable, Callable]:
        group = self.region.group
        sums = functools.partial(vocabulary_linear_loss_sums, group=group)
        return sums, functools.partial(vocabulary_linear_cross_entropy, group=group)


def tensor_parallel(model: Transformer, group: Group = None, *, sequence: bool = False) -> TensorParallelTransformer:
    """Divide a whole model, the same on every rank, among the ranks of a group, in place: return it.

    It is called as before, with the same arguments on every rank. Make optimizers, DDP and the like of it afterwards.

    sequence: between attention and MLPs each rank keeps its part of the tokens alone; their number must then divide.

    Raises ValueError, and leaves the model as it was, for what has no division: heads, hidden features or a vocabulary
    that do not divide, other mixers than attention, mixtures of experts, norms over all heads, dropout.
    """
    region = Region(group, sequence)
    if reason := why_not(model, region.size):
        raise ValueError(f"a model cannot be divided among {region.size} ranks: {reason}")
    before = {name: p.shape for name, p in model.named_parameters()}
    tied = model.head is None
    model.embedding = VocabularyEmbedding.of(model.embedding, group)
    if not tied:
        model.head = _columns(cast(nn.Linear, model.head), group)
    for layer in model.layers:
        _divide_block(cast(TransformerBlock, layer), region)
    if sequence and model.norm is not None:
        _share(model.norm, group)
    model.__class__ = TensorParallelTransformer
    divided = cast(TensorParallelTransformer, model)
    divided.region = region
    divided.divided = {
        name: next(i for i, (n, was) in enumerate(zip(p.shape, before[name], strict=True)) if n != was)
        for name, p in model.named_parameters()
        if p.shape != before[name]
    }
    return divided


def why_not(model: Transformer, N: int) -> str | None:
    """The reason why a model has no division among N ranks."""
    vocabulary = model.config.vocab_size
    if isinstance(model, TensorParallelTransformer):
        return "it has been divided before"
    if is_quantized(model):
        return "its weights are quantised: give the model that they were made of"
    if vocabulary % N != 0:
        return f"vocab_size {vocabulary} / {N} = {vocabulary / N:g}: pad it to {-(-vocabulary // N) * N}"
    if model.config.embedding_dropout:
        return "embedding_dropout draws something else on each rank: set it to 0"
    for i, block in enumerate(model.config.blocks):
        mixer, mlp = block.mixer, block.mlp
        if mixer.kind != "attention":
            return f"layer {i} has a mixer of kind {mixer.kind!r}, only attention is divided by its heads"
        if mlp.kind == "none":
            return f"layer {i} has no MLP to divide"
        if mlp.kind == "moe":
            return f"layer {i} is a mixture of experts: give ranks whole experts with expert_parallel"
        for name, count in (("num_heads", mixer.num_heads), ("num_kv_heads", mixer.kv_heads)):
            if count % N != 0:
                return f"layer {i}: {name} {count} / {N} = {count / N:g}, and a head is on one rank"
        if (width := mlp.width(model.config.d_model)) % N != 0:
            return f"layer {i}: d_ff {width} / {N} = {width / N:g}"
        if mixer.qk_norm == "all":
            return f"layer {i}: qk_norm 'all' is over all heads, which are on different ranks; true is over each head"
        if mixer.dropout or block.dropout or block.stochastic_depth:
            return f"layer {i}: dropout draws something else on each rank: set it to 0"
    return None


def _divide_block(block: TransformerBlock, region: Region) -> None:
    attention, mlp = cast(Attention, block.attention), cast(MLP, block.mlp)
    for module, columns, row in (
        (attention, ("q_proj", "k_proj", "v_proj"), "o_proj"),
        (mlp, ("gate_proj", "up_proj") if mlp.gated else ("up_proj",), "down_proj"),
    ):
        for name in columns:
            setattr(module, name, _columns(getattr(module, name), region.group))
        setattr(module, row, RowLinear.of(getattr(module, row), region))
        module.register_forward_pre_hook(_entering(region))
    if attention.alibi is not None:
        attention.alibi = OwnSlopes(attention.num_heads, region.group, attention.alibi.slopes.device)
    if attention.sinks is not None:
        attention.sinks = _own(attention.sinks, 0, region.group)
    attention.num_heads //= region.size
    attention.num_kv_heads //= region.size
    for norm in (attention.q_norm, attention.k_norm):
        if norm is not None:  # one weight for all heads
            _share(norm, region.group)
    if region.sequence:
        for outside in (block.attention_norm, block.attention_post_norm, block.mlp_norm, block.mlp_post_norm):
            if outside is not None:
                _share(outside, region.group)


def _entering(region: Region) -> Callable[..., Any]:
    def hook(_, args: tuple) -> tuple:
        return region.enter(args[0]), *args[1:]

    return hook


def _share(norm: nn.Module, group: Group) -> None:
    """Make a norm one that sums its gradient."""
    norm.__class__ = PartialRMSNorm if isinstance(norm, RMSNorm) else PartialLayerNorm
    cast(PartialRMSNorm, norm).group = group


def _columns(linear: nn.Linear, group: Group) -> Linear:
    """This rank's part of a whole one, of what is in the region already: several share what `region.enter` gave."""
    out, bias = linear.out_features // dist.get_world_size(group), linear.bias is not None
    made = Linear(linear.in_features, out, bias=bias, device="meta")
    _take_rows(made, linear, group)
    return made


def _take_rows(made: nn.Linear, whole: nn.Linear, group: Group) -> None:
    made.weight = _own(whole.weight, 0, group)
    if whole.bias is not None:
        made.bias = _own(whole.bias, 0, group)


def _own(p: Tensor, dim: int, group: Group) -> nn.Parameter:
    part = own_part(p.detach(), dim, group).clone(memory_format=torch.contiguous_format)
    return nn.Parameter(part, p.requires_grad)


@torch.no_grad()
def whole_state_dict(model: TensorParallelTransformer) -> dict[str, Tensor]:
    """The state_dict of the model before it was divided, on every rank, which all have to ask for."""
    state, dims = model.state_dict(), model.divided
    return {name: gathered(t, dims[name], model.region.group) if name in dims else t for name, t in state.items()}
