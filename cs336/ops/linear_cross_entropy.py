"""Cross-entropy of a linear layer's outputs, whose logits are never kept.  loss = cross_entropy(x weight^T + bias)

Tokens come in chunks: one matmul makes a chunk's logits, one kernel their losses, and with a sum or a mean also their
gradient, in their place, which two more matmuls turn into the chunk's share of the gradients of x and weight. So the
backward has nothing left to do but to scale them. Where each token's loss has a gradient of its own, the backward makes
the logits again. N = tokens, H = features, V = vocabulary. FLOPs: forward 2NHV, forward and backward 6NHV, or 8NHV for
losses of single tokens. A chunk's logits take CHUNK_BYTES; weight's gradient is summed over chunks in fp32, VH floats.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cs336.ops import dispatch, registry
from cs336.ops.checks import like
from cs336.ops.cross_entropy import (
    OPTIONS,
    check_options,
    check_reduction,
    check_targets,
    cross_entropy,
    reduced,
)
from cs336.ops.scale import scale_to

CHUNK_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}  # of logits, unless chunk_size says otherwise
ROW_UNIT = 256  # tokens that a chunk is a multiple of: whole tiles for the matmuls


def _chunks(num_tokens: int, chunk_size: int) -> list[slice]:
    return [slice(i, min(i + chunk_size, num_tokens)) for i in range(0, num_tokens, chunk_size)]


def default_chunk_size(num_tokens: int, V: int, width: int, device_type: str) -> int:
    """Tokens of a chunk, `width` bytes a logit: chunks of one size, as few as their limit allows."""
    limit = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cpu"])
    count = -(-num_tokens * V * width // limit)
    return max(1, -(-num_tokens // max(1, count * ROW_UNIT))) * ROW_UNIT


class _Logits:
    """The logits of one chunk after the other, in one place, rows at multiples of 16 bytes."""

    def __init__(self, x_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, chunk_size: int):
        self.x_NH, self.weight_VH, self.bias_V = x_NH, weight_VH, bias_V
        V, unit = weight_VH.shape[0], 16 // min(16, x_NH.element_size())
        rows = min(chunk_size, x_NH.shape[0])
        self.buffer = x_NH.new_empty(rows, -(-V // unit) * unit)[:, :V]

    def __getitem__(self, chunk: slice) -> Tensor:
        logits_CV = self.buffer[: chunk.stop - chunk.start]
        if registry.is_invariant():
            return logits_CV.copy_(dispatch.run("linear_invariant", self.x_NH[chunk], self.weight_VH, self.bias_V))
        if self.bias_V is None:
            return torch.mm(self.x_NH[chunk], self.weight_VH.t(), out=logits_CV)
        return torch.addmm(self.bias_V, self.x_NH[chunk], self.weight_VH.t(), out=logits_CV)


class _Gradients:
    """What chunks' gradients of the logits add to those of x, weight and bias; an empty tensor for one not wanted.

    They are fp32, to be scaled and then rounded; but weight's, which may be a GB, has the matmuls' dtype if all tokens
    are one chunk and that is not float16.
    """

    def __init__(self, logits: _Logits, wanted: Sequence[bool], dtype: torch.dtype):
        self.logits, self.wanted, self.dtype = logits, wanted, dtype
        self.dx_parts: list[Tensor] = []
        self.dweight_VH: Tensor | None = None
        self.dbias_V: Tensor | None = None

    def add(self, chunk: slice, dlogits_CV: Tensor) -> None:
        x_CH = self.logits.x_NH[chunk]
        if self.wanted[0]:
            self.dx_parts.append(_product(dlogits_CV, self.logits.weight_VH, _wide(x_CH)))
        if self.wanted[1]:
            self.dweight_VH = _add_product(self.dweight_VH, dlogits_CV, x_CH, self.dtype)
        if self.wanted[2]:
            dbias_V = dlogits_CV.sum(0, dtype=_wide(x_CH))
            self.dbias_V = dbias_V if self.dbias_V is None else self.dbias_V.add_(dbias_V)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        x_NH, (V, H) = self.logits.x_NH, self.logits.weight_VH.shape
        wide, dweight_VH, dbias_V = _wide(x_NH), self.dweight_VH, self.dbias_V
        dx_NH = torch.cat(self.dx_parts) if self.dx_parts else x_NH.new_empty(0, dtype=wide)
        if self.wanted[0] and not self.dx_parts:
            dx_NH = dx_NH.view(x_NH.shape)
        if dweight_VH is None:
            dweight_VH = x_NH.new_zeros((V, H) if self.wanted[1] else 0, dtype=self.dtype)
        if dbias_V is None:
            dbias_V = x_NH.new_zeros(V if self.wanted[2] else 0, dtype=wide)
        return dx_NH, dweight_VH, dbias_V


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in `dtype`, or wider than a and b: without rounding in between."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else a.to(dtype) @ b.to(dtype)  # torch has it on a GPU alone


def _add_product(total_VH: Tensor | None, d_CV: Tensor, x_CH: Tensor, dtype: torch.dtype) -> Tensor:
    """d^T x in `dtype`, or added to the total, in fp32 throughout."""
    if total_VH is None:
        return _product(d_CV.t(), x_CH, dtype)
    if dtype == d_CV.dtype:
        return total_VH.addmm_(d_CV.t(), x_CH)
    if d_CV.is_cuda:
        return torch.addmm(total_VH, d_CV.t(), x_CH, out_dtype=dtype, out=total_VH)
    return total_VH.add_(_product(d_CV.t(), x_CH, dtype))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# ---- raw ops: opaque to torch.compile, which would otherwise unroll the chunks ----


def _forward(x, weight, bias, targets, ignore_index, softcap, z_loss, label_smoothing, with_entropy, chunk_size):
    options = ignore_index, softcap, z_loss, label_smoothing
    logits, parts = _Logits(x, weight, bias, chunk_size), []
    with torch.autocast(x.device.type, enabled=False):
        for chunk in _chunks(x.shape[0], chunk_size):
            parts.append(dispatch.run("cross_entropy_fwd", logits[chunk], targets[chunk], *options, with_entropy))
    return _joined(parts, x, 3)


def _gradient(x, weight, bias, targets, scale, ignore_index, softcap, z_loss, label_smoothing, chunk_size, wanted):
    options = ignore_index, softcap, z_loss, label_smoothing
    logits, parts, chunks = _Logits(x, weight, bias, chunk_size), [], _chunks(x.shape[0], chunk_size)
    gradients = _Gradients(logits, wanted, _sum_dtype(x, len(chunks)))
    with torch.autocast(x.device.type, enabled=False):
        for chunk in chunks:
            logits_CV, targets_C = logits[chunk], targets[chunk]
            hit_C = _at(logits_CV, targets_C, softcap) if z_loss or label_smoothing else None  # before they are gone
            loss_C, lse_C = dispatch.run("cross_entropy_gradient_", logits_CV, targets_C, scale, *options)
            plain_C = lse_C[:0] if hit_C is None else (lse_C - hit_C).masked_fill(targets_C == ignore_index, 0.0)
            parts.append((loss_C, lse_C, plain_C))
            gradients.add(chunk, logits_CV)
    return *_joined(parts, x, 3), *gradients.result()


def _at(logits_CV: Tensor, targets_C: Tensor, softcap: float | None) -> Tensor:
    """The logit of each target, soft-capped; of some other where a target is none of them."""
    hit_C = logits_CV.gather(1, targets_C.clamp(0, logits_CV.shape[1] - 1)[:, None])[:, 0].to(_wide(logits_CV))
    return hit_C if softcap is None else softcap * torch.tanh(hit_C / softcap)


def _backward(
    x, weight, bias, targets, lse, entropy, dloss, dlse, dentropy,
    ignore_index, softcap, z_loss, label_smoothing, chunk_size, wanted,
):  # fmt: skip
    options = ignore_index, softcap, z_loss, label_smoothing
    logits, chunks = _Logits(x, weight, bias, chunk_size), _chunks(x.shape[0], chunk_size)
    gradients = _Gradients(logits, wanted, _sum_dtype(x, len(chunks)))
    with torch.autocast(x.device.type, enabled=False):
        for chunk in chunks:
            given = [None if t is None else t[chunk] for t in (dloss, dlse, dentropy)]
            kept = lse[chunk], entropy[chunk] if entropy.numel() else entropy
            args = logits[chunk], targets[chunk], *kept, *given, *options
            gradients.add(chunk, dispatch.run("cross_entropy_bwd", *args))  # unnamed: gone before the next chunk's
    return gradients.result()


def _joined(parts: list[tuple], x: Tensor, count: int) -> tuple[Tensor, ...]:
    if not parts:
        dtype = _wide(x)
        return tuple(x.new_empty(0, dtype=dtype) for _ in range(count))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _sum_dtype(x: Tensor, num_chunks: int) -> torch.dtype:
    """float16 is too narrow for a sum over tokens before it is scaled."""
    return x.dtype if num_chunks == 1 and x.dtype != torch.float16 else _wide(x)


def _fake_forward(x, weight, bias, targets, *options):
    wide = _wide(x)
    counts = x.shape[0], x.shape[0], x.shape[0] if options[-2] else 0
    return tuple(x.new_empty(count, dtype=wide) for count in counts)


def _fake_gradients(x, weight, chunk_size, wanted):
    wide = _wide(x)
    dtype = _sum_dtype(x, len(_chunks(x.shape[0], chunk_size)))
    return (
        x.new_empty(x.shape if wanted[0] else 0, dtype=wide),
        x.new_empty(weight.shape if wanted[1] else 0, dtype=dtype),
        x.new_empty(weight.shape[0] if wanted[2] else 0, dtype=wide),
    )


def _fake_gradient(x, weight, bias, targets, scale, *options):
    wide, N, (z_loss, label_smoothing) = _wide(x), x.shape[0], options[2:4]
    counts = N, N, N if z_loss or label_smoothing else 0
    return *(x.new_empty(count, dtype=wide) for count in counts), *_fake_gradients(x, weight, *options[-2:])


def _define(signature: str, implementation: Callable, fake: Callable) -> Callable:
    start = signature.index("(")
    name = signature[:start]
    torch.library.define(f"cs336::{name}", signature[start:], tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"cs336::{name}", "CompositeExplicitAutograd")(implementation)
    torch.library.register_fake(f"cs336::{name}", fake)
    return getattr(torch.ops.cs336, name).default


_LAYER = "Tensor x, Tensor weight, Tensor? bias, Tensor targets"
_forward_op = _define(
    f"linear_cross_entropy_fwd({_LAYER}, {OPTIONS}, bool with_entropy, int chunk_size) "
    "-> (Tensor loss, Tensor lse, Tensor entropy)",
    _forward,
    _fake_forward,
)
_gradient_op = _define(
    f"linear_cross_entropy_gradient({_LAYER}, Tensor scale, {OPTIONS}, int chunk_size, bool[] wanted) "
    "-> (Tensor loss, Tensor lse, Tensor plain, Tensor dx, Tensor dweight, Tensor dbias)",
    _gradient,
    _fake_gradient,
)
_backward_op = _define(
    f"linear_cross_entropy_bwd({_LAYER}, Tensor lse, Tensor entropy, Tensor dloss, Tensor? dlse, Tensor? dentropy, "
    f"{OPTIONS}, int chunk_size, bool[] wanted) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _backward,
    lambda x, weight, *args: _fake_gradients(x, weight, *args[-2:]),
)


# ---- autograd ----


class _Reduced(torch.autograd.Function):
    """The sum of scale * loss; its gradients are made in the forward, and scaled in the backward. And each token's loss
    without smoothing and z-loss, if there are any: without a gradient."""

    @staticmethod
    def forward(ctx, x_NH, weight_VH, bias_V, targets_N, scale, dtype, options, chunk_size):
        layer = [None if t is None else t.to(dtype) for t in (x_NH, weight_VH, bias_V)]
        # float16 would lose what a mean leaves of a probability: there the scale waits for the end
        now, later = (torch.ones_like(scale), scale) if dtype == torch.float16 else (scale, None)
        wanted = ctx.needs_input_grad[:3]
        loss_N, _, plain_N, *gradients = _gradient_op(*layer, targets_N, now, *options, chunk_size, wanted)
        ctx.save_for_backward(later, *gradients)
        ctx.mark_non_differentiable(plain_N)
        ctx.set_materialize_grads(False)
        ctx.spent = False
        ctx.wanted, ctx.dtypes = wanted, [None if t is None else t.dtype for t in (x_NH, weight_VH, bias_V)]
        return loss_N.sum() * scale, plain_N

    @staticmethod
    def backward(ctx, dloss, _):
        if dloss is None:
            return (None,) * 8
        _refuse_second_derivatives()
        if ctx.spent:
            raise RuntimeError(
                "the gradient of linear_cross_entropy's weight has been scaled in place by its first backward: call it "
                'again, or take reduction="none", for a second one'
            )
        later, *gradients = ctx.saved_tensors
        scale = dloss if later is None else dloss * later
        # the one that may be a GB, and has its own dtype already
        spent = [
            wanted and g.is_cuda and g.element_size() == 2 and g.dtype == dtype and not torch.compiler.is_compiling()
            for g, dtype, wanted in zip(gradients, ctx.dtypes, ctx.wanted, strict=True)
        ]
        ctx.spent = any(spent)
        scaled = [
            scale_to(g, scale, dtype, in_place=in_place) if wanted else None
            for g, dtype, wanted, in_place in zip(gradients, ctx.dtypes, ctx.wanted, spent, strict=True)
        ]
        return *scaled, None, None, None, None, None


class _PerToken(torch.autograd.Function):
    """Losses, log-sum-exps and entropies of each token; the backward makes the logits again."""

    @staticmethod
    def forward(ctx, x_NH, weight_VH, bias_V, targets_N, dtype, options, with_entropy, chunk_size):
        layer = [None if t is None else t.to(dtype) for t in (x_NH, weight_VH, bias_V)]
        outs = _forward_op(*layer, targets_N, *options, with_entropy, chunk_size)
        ctx.save_for_backward(x_NH, weight_VH, bias_V, targets_N, *outs[1:])
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.options, ctx.chunk_size, ctx.with_entropy = dtype, options, chunk_size, with_entropy
        return outs

    @staticmethod
    def backward(ctx, dloss_N, dlse_N, dentropy_N):
        _refuse_second_derivatives()
        *layer, targets_N, lse_N, entropy_N = ctx.saved_tensors
        dloss_N = torch.zeros_like(lse_N) if dloss_N is None else dloss_N
        dentropy_N = dentropy_N if ctx.with_entropy else None
        given = [None if g is None else g.contiguous() for g in (dloss_N, dlse_N, dentropy_N)]
        low = [None if t is None else t.to(ctx.dtype) for t in layer]
        wanted = ctx.needs_input_grad[:3]
        gradients = _backward_op(
            *low, targets_N, lse_N, entropy_N, *given, *ctx.options, ctx.chunk_size, wanted
        )  # fmt: skip
        gradients = [g.to(t.dtype) if w else None for g, t, w in zip(gradients, layer, wanted, strict=True)]
        return *gradients, None, None, None, None, None


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "linear_cross_entropy is differentiable once; create_graph=True needs cross_entropy of F.linear"
        )


# ---- public ----


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    chunk_size: int | None = None,
    return_lse: bool = False,
    return_entropy: bool = False,
) -> Any:
    """`cross_entropy(F.linear(x, weight, bias), targets)`, a chunk of tokens at a time.

    Args:
        x: (..., H) floating point.
        weight: (V, H) in x's dtype. Under autocast both become autocast's dtype, as F.linear's do.
        targets: (...) int64 or int32, each in [0, V) or ignore_index.
        bias: (V,) like weight; none if None.
        chunk_size: tokens of a chunk; by default as many as have 1 GiB of logits on a GPU, 64 MiB elsewhere.
        ignore_index, softcap, z_loss, label_smoothing, reduction, return_lse, return_entropy: see cross_entropy.

    A vocabulary split over devices: each takes its rows of weight, any target where another has it, reduction "none"
    and return_lse; the whole loss is the logsumexp of all lse minus the sum of lse - loss where they have the target.

    Returns what cross_entropy returns. A sum or mean alone costs three matmuls, forward and backward; a loss, or an lse
    or entropy, of each token four, and less memory. All are differentiable by x, weight and bias, but not twice.
    Raises ValueError for shapes, dtypes, devices, numbers or a reduction that do not fit, and IndexError on a CPU for a
    target outside the vocabulary; on a GPU that makes its token NaN.
    """
    _check(x, weight, targets, bias, chunk_size)
    check_options(softcap, z_loss, label_smoothing)
    check_reduction(reduction)
    extra = return_lse, return_entropy
    if dispatch.transformed():
        return cross_entropy(
            F.linear(x, weight, bias), targets, ignore_index=ignore_index, softcap=softcap, z_loss=z_loss,
            label_smoothing=label_smoothing, reduction=reduction, return_lse=return_lse, return_entropy=return_entropy,
        )  # fmt: skip
    targets_N, x_NH = targets.reshape(-1).long(), x.reshape(-1, x.shape[-1])
    check_targets(targets_N, weight.shape[0], ignore_index)
    dtype = _compute_dtype(x)
    size = chunk_size or default_chunk_size(x_NH.shape[0], weight.shape[0], dtype.itemsize, x.device.type)
    options, layer = (ignore_index, softcap, float(z_loss), float(label_smoothing)), (x_NH, weight, bias)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in layer)
    if reduction != "none" and not any(extra) and learns:
        scale = torch.ones((), dtype=torch.promote_types(dtype, torch.float32), device=x.device)
        if reduction == "mean":
            scale = scale / (targets_N != ignore_index).sum().clamp(min=1)
        return _Reduced.apply(*layer, targets_N, scale, dtype, options, size)[0]
    loss_N, *stats = _PerToken.apply(*layer, targets_N, dtype, options, return_entropy, size)
    loss = reduced(loss_N, targets, ignore_index, reduction)
    if not any(extra):
        return loss
    return loss, *(t.view(targets.shape) for t, wanted in zip(stats, extra, strict=True) if wanted)


def linear_loss_sums(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy(..., reduction="sum")`, and the sum of the cross-entropy alone, which has no gradient.

    What a run minimises and what it reports: of one pass where something learns, three matmuls, forward and backward.
    Arguments and errors: see linear_cross_entropy.
    """
    _check(x, weight, targets, None, chunk_size)
    check_options(softcap, z_loss, label_smoothing)
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not learns or dispatch.transformed():

        def total(z_loss: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
            return linear_cross_entropy(
                x, weight, targets, ignore_index=ignore_index, softcap=softcap, z_loss=z_loss,
                label_smoothing=label_smoothing, reduction="sum", chunk_size=chunk_size,
            )  # fmt: skip

        return total(z_loss, label_smoothing), total().detach()
    targets_N, x_NH = targets.reshape(-1).long(), x.reshape(-1, x.shape[-1])
    check_targets(targets_N, weight.shape[0], ignore_index)
    dtype = _compute_dtype(x)
    size = chunk_size or default_chunk_size(x_NH.shape[0], weight.shape[0], dtype.itemsize, x.device.type)
    options = ignore_index, softcap, float(z_loss), float(label_smoothing)
    scale = torch.ones((), dtype=torch.promote_types(dtype, torch.float32), device=x.device)
    loss, plain_N = _Reduced.apply(x_NH, weight, None, targets_N, scale, dtype, options, size)
    return loss, plain_N.sum() if z_loss or label_smoothing else loss.detach()


def linear_log_probs(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    chunk_size: int | None = None,
    return_entropy: bool = False,
) -> Any:
    """log softmax(x weight^T + bias) at the targets, (...) float32, and with return_entropy each row's entropy too.

    0 where a target is ignore_index. Arguments, errors and gradients: see linear_cross_entropy.
    """
    out = linear_cross_entropy(
        x, weight, targets, bias=bias, ignore_index=ignore_index, softcap=softcap, reduction="none",
        chunk_size=chunk_size, return_entropy=return_entropy,
    )  # fmt: skip
    return (-out[0], out[1]) if isinstance(out, tuple) else -out


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype inside torch.autocast, x's outside."""
    kind = x.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if autocast else x.dtype


def _check(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, chunk_size: int | None) -> None:
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be (..., H), floating point, got {like(x)}")
    H = x.shape[-1]
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != H or weight.device != x.device:
        raise ValueError(f"weight must be (V, {H}) on {x.device} with V >= 1, got {like(weight)}")
    mixed = weight.dtype != x.dtype and _compute_dtype(x) == x.dtype and not torch.is_autocast_enabled(x.device.type)
    if mixed or not weight.is_floating_point():
        raise ValueError(f"weight must have x's dtype {x.dtype}, got {weight.dtype}")
    if bias is not None and (bias.shape, bias.dtype, bias.device) != (weight.shape[:1], weight.dtype, weight.device):
        raise ValueError(f"bias must be ({weight.shape[0]},) {weight.dtype} on {weight.device}, got {like(bias)}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets must be int64 or int32 class indices, got {targets.dtype}")
    if targets.shape != x.shape[:-1] or targets.device != x.device:
        raise ValueError(f"targets must be {tuple(x.shape[:-1])} on {x.device} to fit x, got {like(targets)}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be 1 or more, got {chunk_size}")
