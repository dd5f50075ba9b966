"""AdamW whose gradients, state and work are divided among the ranks (ZeRO-1), in flat buckets: cs336.ops.sharded_adamw.

Parameters become views of the buckets. A bucket's gradients are summed over the ranks as soon as the backward has made
them all; each rank updates its part of every bucket and sends it to the others, on a stream of its own where `native`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cs336.ops import sharded_adamw_total_
from cs336.ops.sharded_adamw import DTYPES, SQUARES
from cs336.optim.adamw import MOMENTS, TORCH_ONLY, AdamW, check_state
from cs336.optim.optimizer import check_names
from cs336.optim.rounding import Rounding
from cs336.parallel import nccl
from cs336.parallel.collectives import broadcast_all, check_alike, describe
from cs336.parallel.ddp import Synchronizing, divide, when_complete
from cs336.parallel.flat_bucket import FlatBucket
from cs336.parallel.pieces import Piece
from cs336.parallel.sharded_optimizer import OWN, Divided

KEPT = {"params", "param_names", "rounding", *TORCH_ONLY}  # keys of a group that a saved one does not change
NOT_NEGATIVE = ("lr", "eps", "weight_decay")


class ShardedAdamW(Synchronizing, Divided):
    """AdamW and the averaging of gradients over the ranks in one; there is no DDP around the model.

        optimizer = ShardedAdamW(model.parameters(), lr=3e-4)
        loss(model(x), y).backward()                                   # buckets are summed meanwhile
        optimizer.step(grad_scale=clip_scale(optimizer.grad_norm(), 1.0))  # the host waits for nothing

    Parameters become rank 0's, and views of flat buckets: move or cast a model before. `.grad` is there until its
    bucket travels. A parameter that no rank has a gradient of is left alone, with its state; frozen ones never travel.
    Options in `param_groups` hold from the next step. Drop the optimizer, and gradients are each rank's own: a
    backward then warns.

    Args:
        params: tensors or groups, contiguous float32 or bfloat16 on one device, the same on every rank.
        lr, betas, eps, weight_decay: see cs336.optim.AdamW.
        rounding: of bfloat16 parameters: "nearest", or "remainder", which keeps the low halves of float32 weights.
        bucket_mb: buckets of at most so many 2**20 bytes; 0: one a parameter; None: one of each dtype.
        group: of processes; None is the default one.
        native: run the CUDA kernels on NCCL. Without it torch.distributed moves what they would.

    Raises ValueError, on every rank, naming the first parameter that is not alike on all.
    """

    _saved = "these are the pieces"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        rounding: Rounding = "nearest",
        bucket_mb: float | None = 25.0,
        group: dist.ProcessGroup | None = None,
        native: bool = False,
    ) -> None:
        if bucket_mb is not None and not bucket_mb >= 0:
            raise ValueError(f"bucket_mb must be 0 or more, or None for one bucket, got {bucket_mb}")
        self._group, self._native, self._bucket_mb = group, native, bucket_mb
        self._comm: nccl.Communicator | None = None
        self._buckets: list[FlatBucket] = []
        self._order: list[FlatBucket] = []  # in which they are stepped: as the next forward needs them
        self._steps = torch.zeros(0)  # of every parameter of every bucket
        self._places: dict[int, tuple[Tensor, slice]] = {}  # by index: what is in a bucket, its elements in our shards
        self._reduced = False
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        if rounding != "nearest":
            defaults["rounding"] = rounding
        super().__init__(params, defaults)

    @classmethod
    def of(
        cls, optimizer: torch.optim.Optimizer, group: dist.ProcessGroup | None = None, *, native: bool = False
    ) -> "ShardedAdamW":
        """One with the parameters and options of a cs336.optim.AdamW that has made no step."""
        return cls([dict(g) for g in optimizer.param_groups], group=group, native=native)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the parameters of one more group; every rank calls it, between a step and the next backward."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if any(bucket.launched for bucket in self._buckets):
                raise ValueError("a group must be added before the backward of a step, or after the step")
            self._check_ranks(group)  # so that what follows refuses the same on every rank
            check_names(self, group, AdamW.group_options)
            _check(group)
            trained = [p for p in group["params"] if p.requires_grad and p.numel()]
            device = self._comm.device if self._comm else trained[0].device if trained else None
            if strangers := [p.device for p in trained if p.device != device]:
                raise ValueError(f"parameters must be on one device, {device}, got one on {strangers[0]}")
            if trained and self._comm is None:
                self._comm = nccl.connect(self._group, device=trained[0].device, native=self._native)
        except (TypeError, ValueError, RuntimeError):
            self.param_groups.pop()
            raise
        broadcast_all(group["params"], 0, self._group)
        if trained:
            self._make_buckets(group, trained)

    def _check_ranks(self, group: dict[str, Any]) -> None:
        place = f"group {len(self.param_groups) - 1}"
        names = group.get("param_names", [f"parameter {i}" for i in range(len(group["params"]))])
        options = {k: float(v) if isinstance(v, Tensor) else v for k, v in group.items() if k not in OWN}
        what = [("bucket_mb", str(self._bucket_mb)), ("native", str(self._native)), (place, str(options))]
        for name, p in zip(names, group["params"], strict=True):
            kind = f"{describe(p)}{', trained' if p.requires_grad else ''}"
            what.append((f"{name} of {place}", kind if p.is_contiguous() else f"{kind}, stride {p.stride()}"))
        params = self._all()
        check_alike(what, params[0].device if params else torch.device("cpu"), self._group)

    def _make_buckets(self, group: dict[str, Any], trained: list[Tensor]) -> None:
        assert self._comm is not None
        before = self._buckets[-1].at.stop if self._buckets else 0
        first = before
        index = {p: i for i, p in enumerate(self._all())}
        for params in divide(trained[::-1], self._bucket_mb):
            bucket = FlatBucket(params, group, len(self._buckets), first, self._comm)
            self._buckets.append(bucket)
            first = bucket.at.stop
            for i, (p, (_, own)) in enumerate(zip(params, bucket.own_pieces(), strict=True)):
                when_complete(p, self._arrived, bucket.number, i)
                self._places[index[p]] = p, own
        self._order += [bucket for bucket in self._buckets[::-1] if bucket not in self._order]
        numbers = torch.zeros(first, dtype=torch.float32, device=self._comm.device)
        numbers[:before] = self._steps
        self._steps = numbers
        self._totals = numbers.new_zeros(1 + first)
        self._squares = numbers.new_zeros(len(self._buckets) * SQUARES, dtype=torch.float64)
        self._mean = numbers.new_full((), 1 / self._comm.size)
        if self._comm.native:
            for t in (self._totals, self._squares):
                t.record_stream(self._comm.stream())

    # ---- gradients ----

    def _arrived(self, number: int, i: int) -> None:
        """A gradient is complete: start every bucket whose turn it is."""
        bucket = self._buckets[number]
        if not bucket.holds(i):  # another optimizer has taken it over
            return
        if bucket.launched:
            raise RuntimeError(
                f"a second gradient of a parameter of shape {tuple(bucket.params[i].shape)} came after the first was "
                "sent: call step() after each backward, and run all but the last backward of a step under no_sync()"
            )
        with torch.no_grad():
            bucket.adopt(i)
        if not self._syncing:
            return
        bucket.ready.add(i)
        for b in self._buckets:
            if not b.launched:
                if len(b.ready) < len(b.params):
                    break
                b.launch(self._squares_of(b))

    def _squares_of(self, bucket: FlatBucket) -> Tensor:
        return self._squares[bucket.number * SQUARES :][:SQUARES]

    @torch.no_grad()
    def _finish_reduction(self) -> None:
        """Every rank's gradients are summed, and what has one is known, on the device."""
        if self._reduced or self._comm is None:
            return
        known = {p for bucket in self._buckets for p in bucket.params}
        if any(p.grad is not None and p not in known and p.numel() for p in self._all()):
            raise ValueError(
                "a parameter has a gradient that was frozen when its group was added: make a new optimizer"
            )
        for bucket in self._buckets:
            if not bucket.launched:
                bucket.launch(self._squares_of(bucket))
        self._totals.fill_(1)
        for bucket in self._buckets:
            for i in bucket.unused:
                self._totals[1 + bucket.at.start + i].zero_()
        self._comm.count("all_reduce", self._totals)
        sharded_adamw_total_(self._totals, self._squares, self._comm.number)
        self._reduced = True

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """The 2-norm of the mean gradient, a float32 scalar on the device; every rank calls it, before the step."""
        self._finish_reduction()
        if self._comm is None:
            return torch.zeros(())
        return self._totals[0].sqrt() * self._mean

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of this step, those that were sent too. After a backward: on every rank or none."""
        super().zero_grad(set_to_none)
        if any(bucket.launched or bucket.ready for bucket in self._buckets):
            self._finish_reduction()  # a sum that some ranks have begun and others not would meet the next one
        self._reduced = False
        for bucket in self._buckets:
            bucket.reset()

    # ---- the step ----

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, grad_scale: Tensor | None = None
    ) -> Any:
        """Update this rank's part of every bucket and gather the others'; every rank calls it. `.grad` is None then.

        Args:
            closure: computes the gradients and returns the loss, which step returns.
            grad_scale: one float32 element that multiplies the mean gradients, e.g. clip_scale(norm, 1.0).

        Raises ValueError for options that do not fit, and RuntimeError for a model that was moved, before anything
        is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._comm is None:
            return loss
        for group in self.param_groups:
            _check_options(group)
        self._check_in_place()
        self._finish_reduction()
        used = self._totals[1:]
        self._steps.add_(used > 0)
        scale = self._mean if grad_scale is None else self._mean * grad_scale.to(self._mean).reshape(())
        lrs = {id(group): self._number(group["lr"]) for group in self.param_groups}
        for bucket in self._order:
            bucket.step(lrs[id(bucket.group)], self._steps, used, scale)
            torch.autograd.graph.increment_version(bucket.params)
        self._reduced = False
        captures = self._captures()
        for bucket in self._buckets:
            if captures or not bucket.overlapped:
                bucket.wait()
        return loss

    def _number(self, value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(self._steps)
        return self._steps.new_full((), value)

    def _check_in_place(self) -> None:
        for bucket in self._buckets:
            for i, p in enumerate(bucket.params):
                if not bucket.holds(i):
                    raise RuntimeError(
                        f"a parameter of shape {tuple(p.shape)} is no longer where ShardedAdamW put it: move or cast a "
                        "model before its optimizer is made, and make one"
                    )

    def _captures(self) -> bool:
        assert self._comm is not None
        return self._comm.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def wait(self) -> None:
        """What follows on the current stream sees the parameters as the last step leaves them."""
        for bucket in self._buckets:
            bucket.wait()

    def overlap(self, module: nn.Module) -> None:
        """Let a step return while parameters are still gathered; the module's forward waits for each when it needs it.

        An element of an nn.ModuleList or nn.Sequential waits for its own parameters, the module itself, or the first of
        its other modules that is called, for those that are used outside of elements too, and for those of this
        optimizer that it does not have. Call `wait` before
        anything else reads parameters, or captures a CUDA graph; the module's state_dict() and load_state_dict() do so.
        For modules that run eagerly.
        """
        parts = [part for m in module.modules() if isinstance(m, nn.ModuleList | nn.Sequential) for part in m]
        of = {p: bucket for bucket in self._buckets for p in bucket.params}
        units = [_distinct([of[p] for p in part.parameters() if p in of]) for part in parts]
        within = {m for part in parts for m in part.modules()}
        outside = {p for m in module.modules() if m not in within for p in m.parameters(recurse=False)}
        inside = {p for part in parts for p in part.parameters()} - outside
        root = _distinct([bucket for p, bucket in of.items() if p not in inside])
        self._order = _distinct([*root, *(bucket for unit in units for bucket in unit)])
        around = [m for m in module.modules() if m not in within]  # which a method beside forward may call
        for part, needed in (*((m, root) for m in around), *zip(parts, units, strict=True)):
            part.register_forward_pre_hook(lambda module, args, needed=needed: self._before_forward(needed))
        module.register_state_dict_pre_hook(lambda *args: self.wait())
        module.register_load_state_dict_pre_hook(lambda *args: self.wait())
        for bucket in self._buckets:
            bucket.overlapped = True

    def _before_forward(self, needed: list[FlatBucket]) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError("overlap() is for modules that run eagerly, and this one is compiled")
        if any(bucket.gathering for bucket in needed) and self._captures():
            raise RuntimeError("parameters are still gathered by an earlier step: call wait() before the capture")
        for bucket in needed:
            bucket.wait()

    # ---- state ----

    def _stepped(self) -> Iterator[tuple[FlatBucket, dict[int, tuple[int, Tensor]]]]:
        """Each bucket, and of its parameters that have made a step (index, step)."""
        index = {p: i for i, p in enumerate(self._all())}
        for bucket in self._buckets:
            steps = self._steps[bucket.at].cpu()
            yield bucket, {i: (index[p], steps[i].clone()) for i, p in enumerate(bucket.params) if steps[i] > 0}

    def state_dict(self) -> dict[str, Any]:
        """This rank's pieces, flat, to be loaded by the same rank of as many; `consolidate` gives the whole."""
        state: dict[int, Any] = {}
        for bucket, stepped in self._stepped():
            for i, (piece, _) in enumerate(bucket.own_pieces()):
                if i in stepped:
                    index, step = stepped[i]
                    state[index] = {"step": step, **{name: t[piece].clone() for name, t in bucket.state.items()}}
        return {"state": state, "param_groups": self._packed_groups(), "shard": self._shard()}

    def pieces(self, named: dict[str, Tensor]) -> dict[str, Tensor | Piece]:
        """Of the tensors in `state_dict`, named INDEX.NAME, those of parameters of which this rank has elements, each
        with its place in the whole."""
        found: dict[str, Tensor | Piece] = {}
        for key, t in named.items():
            i, _, name = key.partition(".")
            p, own = self._places[int(i)]
            if own.start < own.stop:
                found[key] = t if name == "step" else Piece(t, p.shape, own.start)
        return found

    def part_of(self, i: int, name: str, whole: Tensor) -> Tensor:
        """What this rank keeps of a tensor of the whole state of the i-th parameter, as in `state_dict`."""
        p, own = self._places[i]
        return whole.reshape(-1)[own].clone() if name != "step" and whole.shape == p.shape else whole

    @torch.no_grad()
    def consolidate(self, to: int | None = 0) -> dict[str, Any] | None:
        """The state_dict of cs336.optim.AdamW over all parameters, on the CPU; every rank calls it.

        It loads there, into a ShardedOptimizer around it, and into a ShardedAdamW of any number of ranks.

        Args:
            to: the rank that receives it, the others receive None; None: all receive it.
        """
        mine = self._receives(to)
        whole: dict[int, Any] = {}
        for bucket, stepped in self._stepped():
            names = bucket.state if stepped else ()
            parts = {name: bucket.gathered(name) for name in names}
            for i, (index, step) in stepped.items() if mine else ():
                whole[index] = {"step": step, **{name: ts[i].cpu().clone() for name, ts in parts.items()}}
        return {"state": whole, "param_groups": self._packed_groups()} if mine else None

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this rank's own state_dict, or one of all: `consolidate`'s, or that of AdamW, ours or torch's.

        Raises ValueError, before anything is changed, for another rank's pieces and for what does not fit.
        """
        self._check_saved(state_dict)
        groups = state_dict["param_groups"]
        for group in groups:
            if group.get("amsgrad") or group.get("maximize"):
                raise ValueError("a saved group has amsgrad or maximize, which this AdamW does not do")
        indices = [i for group in groups for i in group["params"]]
        states = {p: state_dict["state"].get(i) or {} for p, i in zip(self._all(), indices, strict=True)}
        whole = state_dict.get("shard") is None
        for bucket in self._buckets:
            for p, (piece, _) in zip(bucket.params, bucket.own_pieces(), strict=True):
                if state := states[p]:
                    shape = p.shape if whole else torch.Size((piece.stop - piece.start,))
                    check_state(state, p, "AdamW", dict.fromkeys([*MOMENTS, *(state.keys() & {"remainder"})], shape))
        for bucket in self._buckets:
            self._steps[bucket.at] = torch.tensor([float(states[p].get("step", 0)) for p in bucket.params])
            for name, kept in bucket.state.items():
                kept.zero_()
                for p, (piece, own) in zip(bucket.params, bucket.own_pieces(), strict=True):
                    if name in states[p]:
                        value = states[p][name].reshape(-1)
                        kept[piece] = (value[own] if whole else value).to(kept)
        for group, other in zip(self.param_groups, groups, strict=True):
            group.update({name: other[name] for name in other.keys() - KEPT})


def _distinct(buckets: list[FlatBucket]) -> list[FlatBucket]:
    return list(dict.fromkeys(buckets))


def _check(group: dict[str, Any]) -> None:
    """Raises ValueError for parameters and options that do not fit."""
    _check_options(group)
    if group.get("rounding", "nearest") not in ("nearest", "remainder"):
        raise ValueError(f"rounding must be nearest or remainder, got {group['rounding']!r}")
    if group.get("state_dtype", "float32") != "float32":
        raise ValueError(f"state_dtype must be float32 here, got {group['state_dtype']}")
    for p in group["params"]:
        if p.dtype not in DTYPES or not p.is_contiguous():
            raise ValueError(
                f"parameters must be contiguous float32 or bfloat16, got {p.dtype} {tuple(p.shape)} with stride "
                f"{p.stride()}"
            )


def _check_options(group: dict[str, Any]) -> None:
    for name in NOT_NEGATIVE:
        if not isinstance(group[name], Tensor) and not group[name] >= 0:
            raise ValueError(f"{name} must not be negative, got {group[name]}")
    if not (len(group["betas"]) == 2 and all(0 <= beta < 1 for beta in group["betas"])):
        raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']}")
