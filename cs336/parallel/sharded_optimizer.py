"""ZeRO-1 (Rajbhandari et al., arXiv:1910.02054): every rank steps its share of the parameters and sends them around.

A share is whole parameters, so that any optimizer works that updates each on its own (Muon's matrices, too). They are
dealt by what their steps cost: by the optimizer's `step_cost`, of cs336.optim's, else by elements. See `deal`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cs336.parallel.collectives import broadcast, broadcast_all, check_alike, describe, gather_json

OWN = ("params", "param_names")  # keys of a group that are not options


def deal(costs: Sequence[int], loads: list[int]) -> list[int]:
    """The rank of each parameter: the costliest first, each to the rank that has the least, the first of several.

    loads: what each rank has already; raised here. The rank with the most gets at most 4/3 of what the best deal would
    give it (Graham 1969).
    """
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners


class Divided(torch.optim.Optimizer):
    """An optimizer whose state is divided among the ranks of `_group`."""

    _group: dist.ProcessGroup | None
    _saved = "this is the share"
    """What state_dict gives, in an error."""

    def _all(self) -> list[Tensor]:
        """Every parameter; its index is its name in a state_dict."""
        return [p for group in self.param_groups for p in group["params"]]

    def _packed_groups(self) -> list[dict[str, Any]]:
        index = {p: i for i, p in enumerate(self._all())}
        return [{**group, "params": [index[p] for p in group["params"]]} for group in self.param_groups]

    def _shard(self) -> dict[str, int]:
        return {"rank": dist.get_rank(self._group), "world_size": dist.get_world_size(self._group)}

    def _receives(self, to: int | None) -> bool:
        """Whether this rank is `to`, or that is None. Raises ValueError for what is no rank."""
        here = self._shard()
        if to is not None and not 0 <= to < here["world_size"]:
            raise ValueError(f"to must be a rank, 0 to {here['world_size'] - 1}, or None for all, got {to}")
        return to in (None, here["rank"])

    def _check_saved(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError for another rank's share, and for groups of other sizes."""
        here = self._shard()
        if (shard := state_dict.get("shard") or here) != here:
            raise ValueError(
                f"{self._saved} of rank {shard['rank']} of {shard['world_size']}, loaded on rank {here['rank']} of "
                f"{here['world_size']}: save what consolidate() returns to load it elsewhere"
            )
        saved, want = ([len(g["params"]) for g in gs] for gs in (state_dict["param_groups"], self.param_groups))
        if saved != want:
            raise ValueError(f"the saved groups have {saved} parameters, this optimizer's {want}")


class ShardedOptimizer(Divided):
    """An optimizer whose state is divided among the ranks.

        optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3)

    `step` expects the same gradients on every rank (see DDP) and leaves the same parameters on every rank.
    `param_groups` are those of all parameters; what a schedule changes in them holds from the next step.
    `state` is of this rank's share.

    Args:
        params: tensors or groups, the same on every rank.
        optimizer_cls: updates each parameter by its own gradient and state: torch.optim.AdamW, cs336.optim.Muon, ...
        group: of processes; None is the default one.
        kwargs: of optimizer_cls.

    Raises ValueError, on every rank, naming the first parameter that is not alike on all, and for LBFGS.
    """

    def __init__(
        self,
        params: Any,
        optimizer_cls: Callable[..., torch.optim.Optimizer],
        *,
        group: dist.ProcessGroup | None = None,
        **kwargs: Any,
    ) -> None:
        self._inner = optimizer_cls(params, **kwargs)  # of all, so that it refuses the same on every rank
        if isinstance(self._inner, torch.optim.LBFGS):
            raise ValueError("LBFGS looks at all gradients at once, and here each rank steps a share: take another one")
        self._group = group
        self._shares: list[list[Tensor]] = [[] for _ in range(dist.get_world_size(group))]
        self._loads = [0] * len(self._shares)  # what their steps cost
        super().__init__([dict(g) for g in self._inner.param_groups], self._inner.defaults)
        self.state = self._inner.state

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, group: dist.ProcessGroup | None = None) -> "ShardedOptimizer":
        """One around an optimizer that has no state yet."""
        return cls(optimizer.param_groups, lambda _: optimizer, group=group)

    @property
    def _rank(self) -> int:
        return dist.get_rank(self._group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Deal the parameters of one more group; every rank calls it. The shares of the others stay."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if len(self._inner.param_groups) < len(self.param_groups):
                self._inner.add_param_group({k: v for k, v in group.items() if k != "param_names"})
            inner = self._inner.param_groups[len(self.param_groups) - 1]
            self._check(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            del self._inner.param_groups[len(self.param_groups) :]
            raise
        group.update(_options(inner))
        step_cost = getattr(self._inner, "step_cost", lambda p, group: p.numel())
        costs = [step_cost(p, group) for p in group["params"]]
        for p, owner in zip(group["params"], deal(costs, self._loads), strict=True):
            self._shares[owner].append(p)
        mine = set(self._shares[self._rank])
        inner.pop("param_names", None)
        inner["params"] = [p for p in group["params"] if p in mine]
        for p in set(group["params"]) - mine:
            self._inner.state.pop(p, None)  # Adagrad has made it already

    def _check(self, group: dict[str, Any]) -> None:
        place = f"group {len(self.param_groups) - 1}"
        names = group.get("param_names", [f"parameter {i}" for i in range(len(group["params"]))])
        what = [(f"{name} of {place}", describe(p)) for name, p in zip(names, group["params"], strict=True)]
        device = self.param_groups[0]["params"][0].device if self.param_groups[0]["params"] else torch.device("cpu")
        check_alike(what, device, self._group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Update this rank's share and receive the others'; kwargs are of the optimizer's own step (grad_scale)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner.update(_options(group))
        self._inner.step(**kwargs)
        self._take_options()
        for owner, share in enumerate(self._shares):
            broadcast_all(share, owner, self._group)
        return loss

    def _take_options(self) -> None:
        for group, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            group.update(_options(inner))

    def share(self) -> list[int]:
        """The index, among all parameters, of each that this rank steps."""
        index = {p: i for i, p in enumerate(self._all())}
        return [index[p] for group in self._inner.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """Of this rank's share, to be loaded by the same rank of as many; `consolidate` gives that of all."""
        return {"state": self._share_state(), "param_groups": self._packed_groups(), "shard": self._shard()}

    def _share_state(self) -> dict[int, Any]:
        share = self.share()
        return {share[i]: state for i, state in self._inner.state_dict()["state"].items()}

    @torch.no_grad()
    def consolidate(self, to: int | None = 0) -> dict[str, Any] | None:
        """The state_dict of optimizer_cls over all parameters, on the CPU; every rank calls it.

        It loads into optimizer_cls without ranks, and into a ShardedOptimizer of any number of ranks.

        Args:
            to: the rank that receives it, the others receive None; None: all receive it.

        Raises TypeError for a state that holds other things than tensors, numbers, strings and None.
        """
        receives = self._receives(to)
        params, mine = self._all(), self._share_state()
        device = params[0].device if params else torch.device("cpu")
        entries = [[i, key, *_described(value)] for i, state in mine.items() for key, value in state.items()]
        whole: dict[int, Any] = {}
        for owner, theirs in enumerate(gather_json(entries, device, self._group)):
            for i, key, dtype, value in theirs:
                if dtype is not None:
                    shape, dtype, place = value, getattr(torch, dtype), params[i].device
                    if owner == self._rank:
                        value = mine[i][key].detach().to(place, copy=True).contiguous()
                    else:
                        value = torch.empty(shape, dtype=dtype, device=place)
                    if value.numel():
                        broadcast(value.view(-1).view(torch.uint8), owner, self._group)
                if receives:
                    whole.setdefault(i, {})[key] = value.cpu() if isinstance(value, Tensor) else value
        return {"state": whole, "param_groups": self._packed_groups()} if receives else None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this rank's own state_dict, or one of all: `consolidate`'s, or that of optimizer_cls without ranks.

        Raises ValueError for another rank's share, and for groups of other sizes.
        """
        self._check_saved(state_dict)
        groups = state_dict["param_groups"]
        names = [i for group in groups for i in group["params"]]
        states = [state_dict["state"].get(names[i]) for i in self.share()]
        packed = self._inner.state_dict()["param_groups"]
        self._inner.load_state_dict(
            {
                "state": {i: state for i, state in enumerate(states) if state},
                "param_groups": [{**_options(g), "params": p["params"]} for g, p in zip(groups, packed, strict=True)],
            }
        )
        self.state = self._inner.state
        self._take_options()


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k not in OWN}


def _described(value: Any) -> tuple[str | None, Any]:
    """(dtype, shape) of a tensor, (None, itself) of another value."""
    if isinstance(value, Tensor):
        return str(value.dtype).removeprefix("torch."), list(value.shape)
    return None, value
