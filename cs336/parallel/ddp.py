"""Data parallel: every rank holds the whole model, sees its own rows, and averages gradients while the backward runs.

A bucket is one flat buffer whose views are the gradients of its parameters, and behind them one element a parameter: a
flag that says whether this rank has a gradient. Flags travel in the same all-reduce; so a parameter that no rank used
keeps no gradient, as in one process, and no other message is needed. Buckets start in one order on every rank,
whichever parameters a rank uses: a bucket waits for those before it.
"""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from cs336.parallel.collectives import MB, all_reduce, broadcast_all, buckets, check_alike, describe


class _Bucket:
    """Gradients of one dtype and device, that are averaged in one all-reduce."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params = params
        sizes = [p.numel() for p in params]
        self.buffer = torch.zeros(sum(sizes) + len(params), dtype=params[0].dtype, device=params[0].device)
        *parts, self.flags = self.buffer.split([*sizes, len(params)])
        self.views = [part.view(p.shape) for part, p in zip(parts, params, strict=True)]
        self.reset()

    def reset(self) -> None:
        self.ready: set[int] = set()
        self.work: dist.Work | None = None
        self.launched = False

    @torch.no_grad()
    def adopt(self, i: int) -> None:
        """Make the i-th parameter's gradient a view of the buffer."""
        p, view = self.params[i], self.views[i]
        if p.grad is not view:
            assert p.grad is not None
            view.copy_(p.grad)
            p.grad = view

    @torch.no_grad()
    def launch(self, group: dist.ProcessGroup | None) -> None:
        self.flags.fill_(1)
        for i, p in enumerate(self.params):
            if p.grad is None:
                self.views[i].zero_()
                self.flags[i].zero_()
            else:
                self.adopt(i)
        self.buffer.div_(dist.get_world_size(group))
        self.work = all_reduce(self.buffer, group, async_op=True)
        self.launched = True

    def finish(self) -> None:
        assert self.work is not None
        self.work.wait()
        unused = [i for i, p in enumerate(self.params) if p.grad is None]
        flags = self.flags.tolist() if unused else []  # the only wait for the device
        for i in unused:
            if flags[i] > 0:  # another rank used it
                self.params[i].grad = self.views[i]
        self.reset()


class Synchronizing:
    """What averages gradients over the ranks while the backward runs."""

    _syncing = True

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside add to each rank's own gradients; the next one outside averages the sums."""
        before, self._syncing = self._syncing, False
        try:
            yield
        finally:
            self._syncing = before


class DDP(Synchronizing, nn.Module):
    """A module whose gradients are averaged over the ranks.

        model = DDP(model)
        loss(model(x), y).backward()
        model.finish_gradient_synchronization()
        optimizer.step()

    Parameters and buffers become rank 0's here; afterwards buffers are each rank's own. Tied parameters travel once,
    frozen ones never. `.module` is the wrapped module: save `.module.state_dict()`. Gradients are averaged as long as
    the wrapper is kept; a backward after that warns.

    Args:
        module: the same on every rank, on the device it trains on.
        bucket_mb: 0: an all-reduce a parameter, as soon as it has its gradient; None: one, of all, when the backward
            is through; otherwise buckets of at most so many 2**20 bytes, in the reverse order of the parameters, that
            travel while the backward goes on.
        group: of processes; None is the default one.
        ignored: parameters that each rank has for itself: neither sent here nor averaged.

    Raises ValueError, on every rank, naming the first parameter, buffer or option that is not alike on all.
    """

    def __init__(
        self,
        module: nn.Module,
        bucket_mb: float | None = 25.0,
        *,
        group: dist.ProcessGroup | None = None,
        ignored: Iterable[Tensor] = (),
    ) -> None:
        super().__init__()
        if bucket_mb is not None and not bucket_mb >= 0:
            raise ValueError(f"bucket_mb must be 0 or more, or None for one bucket, got {bucket_mb}")
        self.module = module
        self.group = group
        self._known = set(ignored)
        named = [(n, t) for n, t in (*module.named_parameters(), *module.named_buffers()) if t not in self._known]
        device = named[0][1].device if named else torch.device("cpu")
        what = [(name, f"{describe(t)}{', trained' if t.requires_grad else ''}") for name, t in named]
        check_alike([("bucket_mb", str(bucket_mb)), *what], device, group)
        broadcast_all([t for _, t in named], 0, group)

        trained = [p for p in module.parameters() if p.requires_grad and p.numel() and p not in self._known]
        self._buckets = [_Bucket(params) for params in divide(trained[::-1], bucket_mb)]
        self._known |= {p for bucket in self._buckets for p in bucket.params}
        for number, bucket in enumerate(self._buckets):
            for i, p in enumerate(bucket.params):
                when_complete(p, self._arrived, number, i)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def _arrived(self, number: int, i: int) -> None:
        """A gradient is complete: start every bucket whose turn it is."""
        bucket = self._buckets[number]
        if bucket.launched:
            raise RuntimeError(
                f"a second gradient of a parameter of shape {tuple(bucket.params[i].shape)} came after the first was "
                "sent: call finish_gradient_synchronization() after each backward, and run all but the last backward "
                "of a step under no_sync()"
            )
        bucket.adopt(i)
        if not self._syncing:
            return
        bucket.ready.add(i)
        for b in self._buckets:
            if not b.launched:
                if len(b.ready) < len(b.params):
                    break
                b.launch(self.group)

    def finish_gradient_synchronization(self) -> None:
        """Wait until every `.grad` is the mean over the ranks. Call it on every rank, after backward, before the step.

        Raises ValueError if a parameter has a gradient that was frozen, or not there, when DDP was made.
        """
        for name, p in self.module.named_parameters():
            if p.grad is not None and p.numel() and p not in self._known:
                raise ValueError(f"{name} was frozen or not there when DDP was made: wrap the module again")
        for bucket in self._buckets:
            if not bucket.launched:
                bucket.launch(self.group)
        for bucket in self._buckets:
            bucket.finish()


Hook = tuple[weakref.WeakMethod, RemovableHandle]
_HOOKS = WeakTensorKeyDictionary()  # Tensor -> list[Hook], of when_complete


def when_complete(p: Tensor, method: Callable[..., None], *args: Any) -> None:
    """Call an object's method each time that a backward has made p's gradient, for as long as there is the object.

    A hook that held the object would keep it, and p with it, for good: no garbage collector looks into such hooks.
    Where several processes train, a gradient that comes when the object is gone warns, unless another has p by then.
    """
    weak, name = weakref.WeakMethod(method), method.__qualname__.partition(".")[0]

    def hook(_: Tensor) -> None:
        if (alive := weak()) is not None:
            alive(*args)
        elif dist.is_initialized() and dist.get_world_size() > 1:
            warnings.warn(
                f"the {name} that averaged this model's gradients over the ranks is gone, and they are this rank's own "
                f"now: keep the {name} for as long as the model trains",
                RuntimeWarning,
                stacklevel=2,
            )

    before: list[Hook] = _HOOKS.get(p, [])
    for other, handle in before:
        if other() is None:
            handle.remove()
    living = [(other, handle) for other, handle in before if other() is not None]
    _HOOKS[p] = [*living, (weak, p.register_post_accumulate_grad_hook(hook))]


def divide(params: Sequence[Tensor], bucket_mb: float | None) -> Iterator[list[Tensor]]:
    """Runs of one dtype and device, as they come; with None all of one dtype and device."""
    if bucket_mb is None:
        kinds = dict.fromkeys((p.dtype, p.device) for p in params)
        yield from ([p for p in params if (p.dtype, p.device) == kind] for kind in kinds)
        return
    for run in buckets(params, bucket_mb * MB):
        for dtype in dict.fromkeys(p.dtype for p in run):
            yield [p for p in run if p.dtype == dtype]
