"""ZeRO-2 and ZeRO-3 (Rajbhandari et al., arXiv:1910.02054): each rank keeps a piece of every parameter, of its gradient
and of its optimizer state; a unit's parameters are whole only while they are needed.

    forward of unit i    wait for its all-gather, start that of unit i + 1; afterwards let go of it
    backward of unit i   wait for its all-gather, start that of unit i - 1 and, when that of
                         unit i + 2 has arrived, the reduce-scatter of unit i + 1

So two units are whole at a time, and the gradients of one on their way, beside the root: what belongs to no unit. A
unit is an element of an nn.ModuleList. Every rank runs the same units in the same order. N = ranks, C = elements of a
rank's pieces of a unit.
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cs336.parallel.collectives import all_gather, all_reduce, broadcast_all, check_alike, describe
from cs336.parallel.pieces import Piece, bounds
from cs336.parallel.unit import Unit

NOT_WHOLE = (
    "whole parameters are not kept: take full_state_dict(), local_state() of this rank's pieces, or the module's own "
    "inside gathered()"
)


class FSDP(nn.Module):
    """A module whose parameters are split among the ranks.

        model = FSDP(model, compute_dtype=torch.bfloat16)
        optimizer = AdamW(model.parameters(), lr=3e-4)  # of this rank's pieces
        loss(model(x), y).backward()
        model.finish_gradient_synchronization()
        clip = clip_scale(model.grad_norm(), 1.0)
        optimizer.step(grad_scale=clip)

    `parameters()` are this rank's pieces, flat, in the dtype the module had: the masters. Gradients are means over the
    ranks. An optimizer must update each element by itself, as AdamW and SGD do. Buffers are whole on every rank.
    Works with torch.utils.checkpoint inside; not under torch.compile.

    Args:
        module: the same on every rank, on the device it trains on. Its parameters become rank 0's.
        compute_dtype: of the whole parameters and so of forward and backward, where it is a floating one; gradients are
            summed in the masters' dtype. None: as they are.
        computed: the parameters that compute_dtype is of: those that autocast would cast, say. None: all.
        reshard: let go of a unit after its forward and gather it again for its backward (ZeRO-3). False keeps whole
            parameters from one step to the next (ZeRO-2).
        group: of processes; None is the default one.

    Raises ValueError, on every rank, naming the first parameter, buffer or option that is not alike on all, for a
    compute_dtype that is no floating one, and for `computed` without it.
    """

    def __init__(
        self,
        module: nn.Module,
        compute_dtype: torch.dtype | None = None,
        *,
        computed: Iterable[Tensor] | None = None,
        reshard: bool = True,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        named = [*module.named_parameters(), *module.named_buffers()]
        device = named[0][1].device if named else torch.device("cpu")
        floating = isinstance(compute_dtype, torch.dtype) and compute_dtype.is_floating_point
        if compute_dtype is not None and not floating:
            raise ValueError(f"compute_dtype must be a floating torch.dtype or None, got {compute_dtype!r}")
        if computed is not None and compute_dtype is None:
            raise ValueError("computed says of which parameters compute_dtype is: give that too")
        some = None if computed is None else set(computed)

        def dtype_of(p: Tensor) -> torch.dtype:
            casts = p.dtype.is_floating_point and (some is None or p in some)
            return compute_dtype if casts and compute_dtype is not None else p.dtype

        what = [("compute_dtype", str(compute_dtype)), ("reshard", str(reshard))]
        cast = {t: f", computed in {str(dtype_of(t)).removeprefix('torch.')}" for t in some or ()}
        what += [(n, f"{describe(t)}{', trained' if t.requires_grad else ''}{cast.get(t, '')}") for n, t in named]
        check_alike(what, device, group)
        broadcast_all([t for _, t in named], 0, group)

        self.module, self.group, self.reshard = module, group, reshard
        self._syncing, self._whole = True, False
        self._in_backward = False
        self._sent: Unit | None = None  # the last unit whose gradients were sent
        parts = [layer for m in module.modules() if isinstance(m, nn.ModuleList) for layer in m]
        inner = {id(sub) for part in parts for sub in part.modules() if sub is not part}
        parts = [part for part in parts if id(part) not in inner]  # of nested lists the outer ones
        owners = _owners(module)
        self._units = [Unit(_alone(part, owners), owners, dtype_of, group) for part in parts]
        taken = {p for unit in self._units for p in unit.originals()}
        rest = [p for p in module.parameters() if p not in taken]
        self._root = Unit(rest, owners, dtype_of, group)
        for i, part in enumerate(parts):
            part.register_forward_pre_hook(functools.partial(self._before_forward, i))
            part.register_forward_hook(functools.partial(self._after_forward, i))
        module.register_forward_pre_hook(self._before_all)
        module.register_forward_hook(self._after_all)
        module.register_state_dict_pre_hook(self._check_whole)
        for unit in self._all():
            unit.split()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def _all(self) -> list[Unit]:
        return [self._root, *self._units]

    # ---- forward ----

    def _before_all(self, module: nn.Module, args: Any) -> None:
        if not self._whole:
            self._root.start()
            self._root.wait()
            if self._units:
                self._units[0].start()

    def _before_forward(self, i: int, module: nn.Module, args: Any) -> None:
        if self._whole:
            return
        self._units[i].start()
        self._units[i].wait()
        if not self._in_backward and i + 1 < len(self._units):
            self._units[i + 1].start()

    def _after_forward(self, i: int, module: nn.Module, args: Any, output: Any) -> None:
        if self._whole or self._in_backward:  # recomputed: its backward comes next
            return
        trained = self._when_backward(output, functools.partial(self._before_backward, i))
        if self.reshard and not (trained and i == len(self._units) - 1):
            self._units[i].release()

    def _after_all(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._whole or self._in_backward:
            return
        trained = self._when_backward(output, self._begin_backward)
        if self.reshard and not trained:
            for unit in self._all():
                unit.release()

    def _when_backward(self, output: Any, call: Any) -> bool:
        """Call it when a gradient reaches the output; whether one ever will."""
        tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        for t in tensors:
            t.register_hook(lambda grad: call())
        return bool(tensors) and torch.is_grad_enabled()

    # ---- backward ----

    def _begin_backward(self) -> None:
        if self._in_backward or self._whole:
            return
        self.finish_gradient_synchronization()
        self._in_backward = True
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
        self._root.start()
        self._root.wait()

    def _before_backward(self, i: int) -> None:
        if self._whole:
            return
        self._begin_backward()
        for later in reversed(self._units[i + 1 :]):  # the engine is through with them
            self._leave(later)
        unit = self._units[i]
        unit.left = False  # it may have been: by a second forward of this backward, or a layer that runs twice
        unit.start()
        unit.wait()
        if i:
            self._units[i - 1].start()

    def _leave(self, unit: Unit) -> None:
        """A unit whose backward is over."""
        if not unit.left:
            unit.left = True
            if self.reshard:  # first: what is sent needs room
                unit.release()
            if self._syncing:
                if self._sent is not None:
                    self._sent.arrive()
                unit.reduce()
                self._sent = unit

    def _end_backward(self) -> None:
        for unit in [*reversed(self._units), self._root]:
            self._leave(unit)
        for unit in self._all():
            unit.left = False
        self._in_backward = False

    def finish_gradient_synchronization(self) -> None:
        """Wait until every `.grad` of a piece is the mean over the ranks. Call it after backward, before the step."""
        for unit in [*reversed(self._units), self._root]:
            unit.finish()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside add to whole gradients on each rank, which take their memory; the next one outside averages
        the sums."""
        before, self._syncing = self._syncing, False
        try:
            yield
        finally:
            self._syncing = before

    def grad_norm(self) -> Tensor:
        """The 2-norm of all gradients together, those of the other ranks' pieces too: a float32 scalar."""
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        squares = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) ** 2 for g in grads]
        device = next(self.parameters()).device
        total = torch.stack(squares).sum() if squares else torch.zeros((), device=device)
        all_reduce(total, self.group)
        return total.sqrt()

    # ---- what belongs to whom ----

    @contextlib.contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """The module with whole parameters, to be read; every rank enters it. Backwards inside are each rank's own."""
        for unit in self._all():
            unit.start()
            unit.wait()
        before, self._whole = self._whole, True
        try:
            yield self.module
        finally:
            self._whole = before
            if self.reshard and not before:
                for unit in self._all():
                    unit.release()

    def named_parameters(  # type: ignore[override]
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's pieces under the module's names."""
        shards = self._shards()
        for name, p in self.module.named_parameters(prefix, recurse, remove_duplicate):
            yield name, shards[p]

    def _shards(self) -> dict[Tensor, nn.Parameter]:
        """Whole parameter -> this rank's piece."""
        return {p: shard for unit in self._all() for p, shard in unit.pairs()}

    def split(self, optimizer: torch.optim.Optimizer, module: nn.Module | None = None) -> None:
        """Give an optimizer of the module's parameters, which has no state yet, this rank's pieces instead: its groups
        were made by the shapes of the whole. module: one whose parameters have the same names, in place of it."""
        pieces = dict(self.named_parameters())
        names = {id(p): name for name, p in (module or self.module).named_parameters()}
        for group in optimizer.param_groups:
            group["params"] = [pieces[names[id(p)]] for p in group["params"]]

    def local_state(self) -> tuple[dict[str, Tensor | Piece], dict[str, str]]:
        """This rank's part of state_dict, and name -> name of what is tied. Rank 0 has the buffers."""
        shards = self._shards()
        found: dict[str, Tensor | Piece] = {}
        tied: dict[str, str] = {}
        first: dict[Tensor, str] = {}
        for name, t in self.module.state_dict(keep_vars=True).items():
            if t in first:
                tied[name] = first[t]
                continue
            first[t] = name
            if t in shards:
                found[name] = Piece(shards[t].detach(), t.shape, self._start(t))
            elif dist.get_rank(self.group) == 0:
                found[name] = t.detach()
        return found, tied

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: see `full_state_dict` and `local_state`."""
        raise RuntimeError(NOT_WHOLE)

    def _check_whole(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Names and shapes may be read of what has no memory now, values not."""
        if not (self._whole or keep_vars):
            raise RuntimeError(NOT_WHOLE)

    def full_state_dict(self, to: int | None = 0) -> dict[str, Tensor] | None:
        """The module's state_dict in the masters' dtype, on the CPU of rank `to`, of all if None; None on the others.

        Every rank calls it. A parameter at a time is whole.
        """
        shards, whole = self._shards(), {}
        mine = to in (None, dist.get_rank(self.group))
        for name, t in self.module.state_dict(keep_vars=True).items():
            value = _whole(shards[t].detach(), t.shape, self.group) if t in shards else t.detach()
            if mine:
                whole[name] = value.cpu()
        return whole if mine else None

    @torch.no_grad()
    def load_whole(self, tensors: Mapping[str, Tensor]) -> None:
        """Take this rank's pieces of a state_dict of the module. No rank waits for another.

        Raises RuntimeError, as load_state_dict does, for missing or unexpected names and other shapes.
        """
        shards, done = self._shards(), set()
        state = self.module.state_dict(keep_vars=True)
        missing = [name for name, t in state.items() if name not in tensors]
        loaded = {t for name, t in state.items() if name in tensors}
        missing = [name for name in missing if state[name] not in loaded]  # but for those that are tied
        unexpected = [name for name in tensors if name not in state]
        if missing or unexpected:
            raise RuntimeError(f"missing {missing}, unexpected {unexpected}")
        for name, t in state.items():
            if name in tensors and t not in done:
                value = tensors[name]
                if value.shape != t.shape:
                    raise RuntimeError(f"{name} has shape {list(value.shape)}, expected {list(t.shape)}")
                target = shards.get(t)
                target.copy_(self._slice(value)) if target is not None else t.copy_(value)
                done.add(t)

    def optimizer_pieces(self, optimizer: torch.optim.Optimizer, named: dict[str, Tensor]) -> dict[str, Any]:
        """The tensors of an optimizer's state, named INDEX.NAME: pieces where they have the shape of a piece."""
        whole = {id(shard): p for p, shard in self._shards().items()}
        params = [p for group in optimizer.param_groups for p in group["params"]]

        def piece(name: str, t: Tensor) -> Tensor | Piece:
            shard = params[int(name.partition(".")[0])]
            if t.shape != shard.shape:
                return t
            return Piece(t, whole[id(shard)].shape, self._start(whole[id(shard)]))

        return {name: piece(name, t) for name, t in named.items()}

    def part_of(self, optimizer: torch.optim.Optimizer, i: int, whole: Tensor) -> Tensor:
        """What this rank keeps of a tensor of the whole state of the i-th parameter."""
        of = {id(shard): p for p, shard in self._shards().items()}
        shard = [p for group in optimizer.param_groups for p in group["params"]][i]
        return self._slice(whole).clone() if whole.shape == of[id(shard)].shape else whole

    def _slice(self, whole: Tensor) -> Tensor:
        first, end = bounds(whole.numel(), dist.get_world_size(self.group), dist.get_rank(self.group))
        return whole.reshape(-1)[first:end]

    def _start(self, whole: Tensor) -> int:
        return bounds(whole.numel(), dist.get_world_size(self.group), dist.get_rank(self.group))[0]


def _owners(module: nn.Module) -> dict[Tensor, list[tuple[nn.Module, str]]]:
    """Every place of each parameter; a tied one has several."""
    owners: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for m in module.modules():
        for name, p in m._parameters.items():
            if p is not None:
                owners.setdefault(p, []).append((m, name))
    return owners


def _alone(part: nn.Module, owners: dict[Tensor, list[tuple[nn.Module, str]]]) -> list[Tensor]:
    """The parameters of a part that belong to nothing outside it."""
    inside = {id(m) for m in part.modules()}
    return [p for p in part.parameters() if all(id(m) in inside for m, _ in owners[p])]


def _whole(shard: Tensor, shape: torch.Size, group: dist.ProcessGroup | None) -> Tensor:
    ranks = dist.get_world_size(group)
    size = -(-shape.numel() // ranks)
    padded = shard.new_zeros(size)
    padded[: shard.numel()] = shard
    out = shard.new_empty(ranks * size)
    all_gather(out, padded, group)
    return out[: shape.numel()].view(shape)
