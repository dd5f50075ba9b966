"""AdamW divided over N ranks (ZeRO-1): gradients are summed as they come, each rank steps its part, parts are gathered.

A bucket holds parameters of one dtype one behind the other, each padded to a multiple of ALIGN elements, and is divided
into N equal shards; rank r owns the r-th. Its gradients lie alike in a second bucket, its state in shards:

    sharded_adamw_reduce_   gradients of a bucket: the own shard becomes the sum of the ranks'; squares its squares
    sharded_adamw_total_    the squares of all buckets, and which parameters have gradients, summed over the ranks
    sharded_adamw_step_     AdamW on the own shard of a bucket (cs336/ops/adamw.py), then the shards of all ranks
    sharded_adamw_wait_     what follows sees the bucket whole

The native variant queues what moves on a stream of its own, through NCCL, and never waits on the host; the others do
each thing at once, between torch.distributed's collectives. `comm` is the number of a communicator: see
cs336.parallel.nccl. Every rank makes the same calls in the same order. A parameter that no rank has a gradient of
(`used` is 0) stays as it is, with its state.

Bytes that must move on a GPU for each parameter of a shard: 22 with bfloat16 parameters, 26 with remainders, 28 with
float32; a rank sends S (N-1)/N bytes of gradients and as many of parameters for a bucket of S bytes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cs336.ops import communicator, registry
from cs336.ops.adamw import _check_element, _check_numbers
from cs336.ops.ref import sharded_adamw as ref

ALIGN = 16  # elements: 32 bytes of bfloat16, so that parameters and shards begin where vectors do
SQUARES = 256  # partial sums that a bucket's squares are kept as
DTYPES = (torch.float32, torch.bfloat16)


def _check_flat(name: str, t: Tensor, numel: int | None, dtypes: Sequence[torch.dtype], device: torch.device) -> None:
    if t.dtype not in dtypes or t.device != device or t.dim() != 1 or not t.is_contiguous():
        expected = " or ".join(str(dtype) for dtype in dtypes)
        got = f"{tuple(t.shape)} {t.dtype} on {t.device}"
        raise ValueError(f"{name} must be a contiguous vector of {expected} on {device}, got {got}")
    if numel is not None and t.numel() != numel:
        raise ValueError(f"{name} must have {numel} elements, got {t.numel()}")


def _check_bucket(name: str, t: Tensor, comm: int) -> int:
    """Elements of a shard."""
    size = communicator.get(comm).size
    _check_flat(name, t, None, DTYPES, t.device)
    if not t.numel() or t.numel() % (size * ALIGN):
        raise ValueError(
            f"{name} must have a multiple of {size} ranks x {ALIGN} elements, above 0, got {t.numel()}: pad it"
        )
    return t.numel() // size


def _check_reduce(grad: Tensor, squares: Tensor, comm: int) -> None:
    _check_bucket("grad", grad, comm)
    _check_flat("squares", squares, SQUARES, (torch.float64,), grad.device)


def _check_total(totals: Tensor, squares: Tensor, comm: int) -> None:
    communicator.get(comm)
    _check_flat("totals", totals, None, (torch.float32,), totals.device)
    _check_flat("squares", squares, None, (torch.float64,), totals.device)
    if not totals.numel():
        raise ValueError("totals must have an element for the squares, got none")


def _check_step(
    param, grad, remainder, exp_avg, exp_avg_sq, steps, used, numels, lr, grad_scale, beta1, beta2, eps, weight_decay,
    comm,
) -> None:  # fmt: skip
    shard, device = _check_bucket("param", param, comm), param.device
    _check_flat("grad", grad, param.numel(), (param.dtype,), device)
    if remainder is not None:
        if param.dtype != torch.bfloat16:
            raise ValueError(f"remainder must be None where param is not bfloat16, and it is {param.dtype}")
        _check_flat("remainder", remainder, shard, (torch.int16,), device)
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _check_flat(name, moment, shard, (torch.float32,), device)
    for name, numbers in (("steps", steps), ("used", used)):
        _check_flat(name, numbers, len(numels), (torch.float32,), device)
    if any(n < 0 or n % ALIGN for n in numels) or sum(numels) > param.numel():
        raise ValueError(
            f"numels must be multiples of {ALIGN} whose sum is at most {param.numel()}, got {list(numels)[:8]}"
        )
    _check_element("lr", lr, device)
    if grad_scale is not None:
        _check_element("grad_scale", grad_scale, device)
    _check_numbers(beta1, beta2, eps=eps, weight_decay=weight_decay)


def _check_wait(param: Tensor, comm: int) -> None:
    _check_bucket("param", param, comm)


def _needs_nccl(*args) -> str | None:
    if communicator.get(comm := args[-1]).native:
        return None
    return f"communicator {comm} was made without NCCL: connect with native=True"


def _define(schema: str, check: Callable[..., None]) -> None:
    function = schema[: schema.index("(")].removeprefix("sharded_adamw_")
    registry.define(
        schema,
        fake=lambda *args: None,
        ref=getattr(ref, function),
        triton=f"sharded_adamw.{function}",
        check=check,
        supports={"native": _needs_nccl},
    )


_define("sharded_adamw_reduce_(Tensor(a!) grad, Tensor(b!) squares, int comm) -> ()", _check_reduce)
_define("sharded_adamw_total_(Tensor(a!) totals, Tensor squares, int comm) -> ()", _check_total)
_define(
    "sharded_adamw_step_(Tensor(a!) param, Tensor grad, Tensor(b!)? remainder, Tensor(c!) exp_avg, "
    "Tensor(d!) exp_avg_sq, Tensor steps, Tensor used, int[] numels, Tensor lr, Tensor? grad_scale, float beta1, "
    "float beta2, float eps, float weight_decay, int comm) -> ()",
    _check_step,
)
_define("sharded_adamw_wait_(Tensor(a!) param, int comm) -> ()", _check_wait)


def _call(name: str, check: Callable[..., None], *args) -> None:
    try:
        registry.call(name, *args)
    except RuntimeError:  # native ops check for themselves, faster; this check tells more
        check(*args)
        raise


@torch.no_grad()
def sharded_adamw_reduce_(grad: Tensor, squares: Tensor, comm: int) -> None:
    """Begin to sum a bucket's gradients over the ranks; until sharded_adamw_total_ nothing else may touch them.

    Args:
        grad: (N shards,) float32 or bfloat16. This rank's shard becomes the sum; the others are undefined afterwards.
        squares: (SQUARES,) float64; their sum becomes that of the squares of the shard.

    Raises ValueError that names the argument that does not fit.
    """
    _call("sharded_adamw_reduce_", _check_reduce, grad, squares, comm)


@torch.no_grad()
def sharded_adamw_total_(totals: Tensor, squares: Tensor, comm: int) -> None:
    """Sum over the ranks what the step has to know of all of them; ends what sharded_adamw_reduce_ began.

    Args:
        totals: (1 + parameters,) float32. The first element becomes the sum of squares, the others what they sum up to:
            1 where this rank has a gradient of the parameter, else 0.
        squares: (buckets * SQUARES,) float64: what sharded_adamw_reduce_ left for each bucket.
    """
    _call("sharded_adamw_total_", _check_total, totals, squares, comm)


@torch.no_grad()
def sharded_adamw_step_(
    param: Tensor,
    grad: Tensor,
    remainder: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    steps: Tensor,
    used: Tensor,
    numels: Sequence[int],
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    comm: int,
    grad_scale: Tensor | None = None,
) -> None:
    """AdamW on this rank's shard of a bucket, in place, and begin to gather the shards of all ranks.

    Args:
        param: (N shards,) float32 or bfloat16; before sharded_adamw_wait_ nothing else may touch it.
        grad: like param, after sharded_adamw_reduce_ and sharded_adamw_total_; only this rank's shard is read.
        remainder: (shard,) int16, what bfloat16 leaves of this rank's float32 weights (cs336.optim.rounding), or None.
        exp_avg, exp_avg_sq: (shard,) float32: the moments, zeros before the first step.
        steps, used: (K,) float32: of each parameter the number of this step, from 1, and 0 if it has no gradient.
        numels: K multiples of ALIGN: the elements of each parameter in the bucket, with its padding.
        lr: not negative; a number, or a tensor of one float32 element, which is not checked.
        beta1, beta2, eps, weight_decay, grad_scale: see cs336.ops.adamw_.

    Raises ValueError, before anything is changed, that names the argument that does not fit.
    """
    if not isinstance(lr, Tensor):
        _check_numbers(beta1, beta2, lr=lr)
        lr = torch.full((), lr, dtype=torch.float32, device=param.device)
    numbers = (steps, used, list(numels), lr, grad_scale, beta1, beta2, eps, weight_decay, comm)
    _call("sharded_adamw_step_", _check_step, param, grad, remainder, exp_avg, exp_avg_sq, *numbers)


@torch.no_grad()
def sharded_adamw_wait_(param: Tensor, comm: int) -> None:
    """Whatever is queued on the current stream from here on sees the bucket as sharded_adamw_step_ leaves it."""
    _call("sharded_adamw_wait_", _check_wait, param, comm)
