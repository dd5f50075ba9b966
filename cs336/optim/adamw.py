"""AdamW (Loshchilov & Hutter, arXiv:1711.05101): one fused pass, cs336.ops.adamw_, over the parameters of a group."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from cs336.ops import adamw_
from cs336.optim.optimizer import Optimizer, check_group, gradient
from cs336.optim.rounding import ROUNDINGS, Rounding, join, split, stochastic_round

MOMENTS = ("exp_avg", "exp_avg_sq")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TORCH_ONLY = {  # keys of torch.optim.AdamW's groups that change nothing here
    "amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay",
}  # fmt: skip

Buckets = dict[tuple[torch.device, bool], list[tuple[Tensor, ...]]]  # by device, and whether it is float64


def param_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for AdamW: matrices (2 dims or more, embeddings too) decay; gains and biases do not."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def scaled_groups(groups: list[dict[str, Any]], model: torch.nn.Module) -> list[dict[str, Any]]:
    """Groups, each split by what the model's `lr_scales`, if it has that, says of its parameters. A part's `lr_scale`
    is for whoever sets learning rates; its weight decay is divided by it, so that their product is not changed."""
    scales: dict[str, float] = getattr(model, "lr_scales", dict)()
    of = {model.get_parameter(name): scale for name, scale in scales.items()}
    split: list[dict[str, Any]] = []
    for group in groups if of else ():
        parts: dict[float, list[Tensor]] = {}
        for p in group["params"]:
            parts.setdefault(of.get(p, 1.0), []).append(p)
        split += [
            group | {"params": params, "lr_scale": scale, "weight_decay": group["weight_decay"] / scale}
            for scale, params in sorted(parts.items(), key=lambda part: part[0] != 1)
        ]
    return split or groups


class AdamW(Optimizer):
    """A torch.optim.Optimizer with torch.optim.AdamW's defaults; their state_dicts load into each other.

    Args:
        params: tensors or groups, float32, float16 or bfloat16, whose moments are float32; or float64 throughout.
        lr: learning rate; the decay of one step is lr * weight_decay. In a tensor on the parameters' device it can
            change without a new capture or compilation: `group["lr"].fill_(...)`.
        betas: of the first and the second moment, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: see also `param_groups`.
        state_dtype: bfloat16 halves the moments, which are then rounded stochastically: to nearest, a second moment
            with beta2 0.999 would never fall.
        rounding: of bfloat16 parameters. "remainder" keeps the other 16 bits of a float32 weight in the state, so that
            a step is that of float32 weights; "stochastic" keeps nothing. See cs336.optim.rounding.

    Raises ValueError for numbers or dtypes that do not fit, and for a group with amsgrad or maximize. Other options of
    torch.optim.AdamW (fused, foreach, ...) change nothing; what neither has is a TypeError; in a group a
    name misspelt alone is, since others there are the caller's own.
    """

    group_options = frozenset(TORCH_ONLY | {"state_dtype", "rounding"})

    own_options: frozenset[str] = frozenset()
    """What a subclass keeps in its groups beside them."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        state_dtype: torch.dtype = torch.float32,
        rounding: Rounding = "nearest",
        **others: Any,
    ) -> None:
        if unknown := sorted(others.keys() - TORCH_ONLY - self.own_options):
            raise TypeError(f"{type(self).__name__} has no option {', '.join(unknown)}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay} | others
        if state_dtype != torch.float32:  # groups are torch.optim.AdamW's where they can be
            defaults["state_dtype"] = str(state_dtype).removeprefix("torch.")
        if rounding != "nearest":
            defaults["rounding"] = rounding
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        _check(group)

    def _step_group(self, group: dict[str, Any], grad_scale: Tensor | None) -> None:
        lr = group["lr"]
        for (device, in_double), whole in self._by_device(group).items():
            counts = list(dict.fromkeys(step for *_, step in whole))  # tensors are hashed by identity
            torch._foreach_add_(counts, 1)
            wide = torch.float64 if in_double else torch.float32
            numbers = {
                "lr": lr.to(device, wide) if isinstance(lr, Tensor) else lr,
                "beta1": group["betas"][0],
                "beta2": group["betas"][1],
                "eps": group["eps"],
                "weight_decay": group["weight_decay"],
                "grad_scale": None if grad_scale is None else grad_scale.to(device, wide),
            }
            rounded = "state_dtype" in group or "rounding" in group
            parts = list(_parts(whole)) if rounded else [whole]
            for i, part in enumerate(parts):
                try:
                    if rounded:
                        self._step_rounded(part, group.get("rounding", "nearest"), numbers)
                    else:
                        params, grads, exp_avgs, exp_avg_sqs, steps = (
                            list(column) for column in zip(*part, strict=True)
                        )
                        adamw_(params, grads, exp_avgs, exp_avg_sqs, step=steps, **numbers)
                except ValueError:  # neither this part has changed nor those after it
                    self._uncount(itertools.chain.from_iterable(parts[i:]))
                    raise

    def _uncount(self, rows: Iterable[tuple[Tensor, ...]]) -> None:
        """Take a step back from the counts of some parameters; others may share the tensors, and keep them."""
        counts: dict[Tensor, Tensor] = {}
        for p, *_, step in rows:
            self.state[p]["step"] = counts.setdefault(step, step - 1)

    def _step_rounded(self, bucket: list[tuple[Tensor, ...]], rounding: Rounding, numbers: dict[str, Any]) -> None:
        """In float32 copies, which are rounded back; on a GPU with remainders in one pass."""
        params, grads, exp_avgs, exp_avg_sqs, steps = (list(column) for column in zip(*bucket, strict=True))
        if all(keeps_remainder(p, rounding) and m.dtype == torch.float32 and p.is_cuda for p, _, m, *_ in bucket):
            remainders = [remainder_of(p, self.state[p]) for p in params]
            adamw_(params, grads, exp_avgs, exp_avg_sqs, step=steps, remainders=remainders, **numbers)
            return
        kept = [*exp_avgs, *exp_avg_sqs]
        wide = [widened(p, self.state[p], rounding) for p in params]
        moments = [m.to(torch.promote_types(m.dtype, torch.float32)) for m in kept]
        adamw_(wide, grads, moments[: len(params)], moments[len(params) :], step=steps, **numbers)
        for p, w in zip(params, wide, strict=True):
            store_(p, w, self.state[p], rounding)
        for m, w in zip(kept, moments, strict=True):
            if m.dtype == torch.bfloat16:
                m.copy_(stochastic_round(w))

    def state_bytes(self) -> int:
        return sum(self._bytes_of(p, group) for group in self.param_groups for p in group["params"])

    def _bytes_of(self, p: Tensor, group: dict[str, Any]) -> int:
        remainder = 2 if keeps_remainder(p, group.get("rounding", "nearest")) else 0
        return p.numel() * (2 * _moment_dtype(p, group).itemsize + remainder)

    def _by_device(self, group: dict[str, Any]) -> Buckets:
        """(parameter, gradient, moments, step) of those that have a gradient, by device; float64 apart.

        Parameters that have made the same steps share the tensor that counts them: one addition instead of hundreds.
        """
        buckets: Buckets = defaultdict(list)
        first: dict[tuple[torch.device, bool], Tensor] = {}  # the count of those that make their first step
        paused: set[int] = set()
        for p in group["params"]:
            g = gradient(p)
            if g is None:
                if p in self.state:
                    paused.add(id(self.state[p]["step"]))
                continue
            state, place = self.state[p], (p.device, p.dtype == torch.float64)
            if not state:
                if place not in first:
                    first[place] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["step"] = first[place]
                state |= {name: torch.zeros_like(p, dtype=_moment_dtype(p, group)) for name in MOMENTS}
            buckets[place].append((p, g, state["exp_avg"], state["exp_avg_sq"], state["step"]))
        if paused:
            self._leave_behind(paused, buckets)
        return buckets

    def _leave_behind(self, paused: set[int], buckets: Buckets) -> None:
        """Give those that step a count of their own where they shared it with those that pause."""
        counts: dict[int, Tensor] = {}
        for bucket in buckets.values():
            for i, (p, *others, step) in enumerate(bucket):
                if id(step) in paused:
                    count = counts.setdefault(id(step), step.clone())
                    self.state[p]["step"] = count
                    bucket[i] = (p, *others, count)

    def state_dict(self) -> dict[str, Any]:
        """torch.optim.AdamW's layout: a count for each parameter, which it may then raise one by one."""
        whole = super().state_dict()
        states = whole["state"].items()
        return {**whole, "state": {i: {**s, "step": s["step"].clone()} if "step" in s else s for i, s in states}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what this class or torch.optim.AdamW saved; the moments are copied, in the dtype of this one's.

        Raises ValueError, before anything is changed, for a state that is not AdamW's (amsgrad, maximize, other
        optimizers) or whose shapes do not fit.
        """
        groups, states = state_dict["param_groups"], state_dict["state"]
        for group in groups:
            _check_flags(group)
        indices = itertools.chain.from_iterable(group["params"] for group in groups)
        owners = [(p, i) for i, group in enumerate(self.param_groups) for p in group["params"]]
        pairs = [(p, of, states[i]) for i, (p, of) in zip(indices, owners, strict=False) if states.get(i)]
        for p, of, state in pairs:
            self._check_state(state, p, {**self.param_groups[of], **_numbers(groups[of])})
        mine = [_numbers(group) for group in self.param_groups] + [{}] * len(groups)
        ours = [m | {k: v for k, v in g.items() if k not in TORCH_ONLY} for m, g in zip(mine, groups, strict=False)]
        super().load_state_dict({**state_dict, "param_groups": ours})
        counts: dict[tuple, Tensor] = {}
        for p, of, state in pairs:  # torch has cast the state to the parameter's dtype
            self.state[p] = {}
            if "step" in state:
                key = (of, p.device, step := float(state["step"]))
                if key not in counts:
                    counts[key] = torch.tensor(step, dtype=torch.float32, device=p.device)
                self.state[p]["step"] = counts[key]
            for name, value in state.items():
                if name != "step":
                    self.state[p][name] = self._copied(name, value, p, self.param_groups[of])

    def _copied(self, name: str, value: Tensor, p: Tensor, group: dict[str, Any]) -> Tensor:
        """A tensor of a saved state, as that of a parameter is kept."""
        dtype = _moment_dtype(p, group) if name in MOMENTS else value.dtype
        if value.shape == p.shape:
            return torch.empty_like(p, dtype=dtype, requires_grad=False).copy_(value)
        return value.to(p.device, dtype, copy=True)

    def _check_state(self, state: dict[str, Any], p: Tensor, group: dict[str, Any]) -> None:
        check_state(state, p, "AdamW", dict.fromkeys(MOMENTS, p.shape))


def check_state(state: dict[str, Any], p: Tensor, kind: str, shapes: dict[str, torch.Size]) -> None:
    """Raises ValueError if the saved state of a parameter lacks a tensor, or one has another shape."""
    if missing := {"step", *shapes} - state.keys():
        raise ValueError(f"the state has no {', '.join(sorted(missing))}: it was not saved by {kind}")
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}, its parameter {tuple(p.shape)}")


def keeps_remainder(p: Tensor, rounding: Rounding) -> bool:
    return rounding == "remainder" and p.dtype == torch.bfloat16


def widened(p: Tensor, state: dict[str, Any], rounding: Rounding) -> Tensor:
    """A parameter in float32, to be updated and given to `store_`; float32 ones are themselves."""
    if not keeps_remainder(p, rounding):
        return p.to(torch.promote_types(p.dtype, torch.float32))
    return join(p, remainder_of(p, state))


def remainder_of(p: Tensor, state: dict[str, Any]) -> Tensor:
    if "remainder" not in state:
        state["remainder"] = torch.zeros_like(p, dtype=torch.int16)
    return state["remainder"]


def store_(p: Tensor, wide: Tensor, state: dict[str, Any], rounding: Rounding) -> None:
    """Write what `widened` gave back to the parameter."""
    if wide is p:
        return
    if keeps_remainder(p, rounding):
        rounded, remainder = split(wide)
        state["remainder"].copy_(remainder)
        p.copy_(rounded)
    else:
        p.copy_(stochastic_round(wide) if rounding == "stochastic" and p.dtype == torch.bfloat16 else wide)


def _parts(bucket: list[tuple[Tensor, ...]], elements: int = 1 << 26) -> Iterator[list[tuple[Tensor, ...]]]:
    """So many at a time that their float32 copies stay small beside the model."""
    part: list[tuple[Tensor, ...]] = []
    for row in bucket:
        part.append(row)
        if sum(p.numel() for p, *_ in part) >= elements:
            yield part
            part = []
    if part:
        yield part


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _moment_dtype(p: Tensor, group: dict[str, Any]) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else getattr(torch, group.get("state_dtype", "float32"))


def _check_flags(group: dict[str, Any]) -> None:
    for flag in ("amsgrad", "maximize"):
        if group.get(flag):
            raise ValueError(f"a group has {flag}=True, which this AdamW does not do: use torch.optim.AdamW")


def _check(group: dict[str, Any]) -> None:
    _check_flags(group)
    check_group(group, not_negative=("lr", "eps", "weight_decay"), dtypes=DTYPES)
    if not (len(group["betas"]) == 2 and all(0 <= beta < 1 for beta in group["betas"])):
        raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']}")
    if group.get("state_dtype", "float32") not in ("float32", "bfloat16"):
        raise ValueError(f"state_dtype must be torch.float32 or torch.bfloat16, got torch.{group['state_dtype']}")
    if group.get("rounding", "nearest") not in ROUNDINGS:
        raise ValueError(f"rounding must be {', '.join(ROUNDINGS)}, got {group['rounding']!r}")
