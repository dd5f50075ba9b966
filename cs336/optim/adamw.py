"""AdamW (Loshchilov & Hutter, arXiv:1711.05101): one fused pass, cs336.ops.adamw_, over the parameters of a group."""

import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cs336.ops import adamw_

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


class AdamW(torch.optim.Optimizer):
    """A torch.optim.Optimizer with torch.optim.AdamW's defaults; their state_dicts load into each other.

    Args:
        params: tensors or groups, float32, float16 or bfloat16, whose moments are float32; or float64 throughout.
        lr: learning rate; the decay of one step is lr * weight_decay. In a tensor on the parameters' device it can
            change without a new capture or compilation: `group["lr"].fill_(...)`.
        betas: of the first and the second moment, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: see also `param_groups`.

    Raises ValueError for numbers or dtypes that do not fit, and for a group with amsgrad or maximize.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, grad_scale: Tensor | None = None
    ) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the gradients and returns the loss, which step returns.
            grad_scale: one float32 element that multiplies the gradients on their way, e.g. clip_scale(norm, 1.0).

        Raises ValueError for sparse gradients, before any parameter of their group is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for (device, _), bucket in self._by_device(group).items():
                params, grads, exp_avgs, exp_avg_sqs, steps = (list(column) for column in zip(*bucket, strict=True))
                lr = group["lr"]
                counts = list({id(step): step for step in steps}.values())
                torch._foreach_add_(counts, 1)
                try:
                    adamw_(
                        params,
                        grads,
                        exp_avgs,
                        exp_avg_sqs,
                        lr=lr.to(device, torch.float32) if isinstance(lr, Tensor) else lr,
                        beta1=group["betas"][0],
                        beta2=group["betas"][1],
                        eps=group["eps"],
                        weight_decay=group["weight_decay"],
                        step=steps,
                        grad_scale=None if grad_scale is None else grad_scale.to(device),
                    )
                except ValueError:  # nothing has changed, so nothing is counted
                    torch._foreach_sub_(counts, 1)
                    raise
        return loss

    def _by_device(self, group: dict[str, Any]) -> Buckets:
        """(parameter, gradient, moments, step) of those that have a gradient, by device; float64 apart.

        Parameters that have made the same steps share the tensor that counts them: one addition instead of hundreds.
        """
        buckets: Buckets = defaultdict(list)
        first: dict[tuple[torch.device, bool], Tensor] = {}  # the count of those that make their first step
        paused: set[int] = set()
        for p in group["params"]:
            g = p.grad
            if g is None:
                if p in self.state:
                    paused.add(id(self.state[p]["step"]))
                continue
            if g.is_sparse:
                raise ValueError(
                    f"AdamW takes dense gradients, and the one of a parameter of shape {tuple(p.shape)} is sparse: "
                    "make it dense, e.g. Embedding(sparse=False)"
                )
            if not (g.is_contiguous() and p.is_contiguous()) and g.stride() != p.stride():
                g = torch.empty_like(p, dtype=g.dtype).copy_(g)
            state, place = self.state[p], (p.device, p.dtype == torch.float64)
            if not state:
                if place not in first:
                    first[place] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["step"] = first[place]
                state |= {name: torch.zeros_like(p, dtype=_moment_dtype(p)) for name in MOMENTS}
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
        """Load what this class or torch.optim.AdamW saved; the moments are copied, in float32.

        Raises ValueError, before anything is changed, for a state that is not AdamW's (amsgrad, maximize, other
        optimizers) or whose shapes do not fit.
        """
        groups, states = state_dict["param_groups"], state_dict["state"]
        for group in groups:
            _check_flags(group)
        indices = itertools.chain.from_iterable(group["params"] for group in groups)
        params = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        pairs = [(p, states[i]) for i, p in zip(indices, params, strict=False) if states.get(i)]
        for p, state in pairs:
            _check_state(state, p)
        ours = [{k: v for k, v in group.items() if k not in TORCH_ONLY} for group in groups]
        super().load_state_dict({**state_dict, "param_groups": ours})
        group_of = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
        counts: dict[tuple, Tensor] = {}
        for p, state in pairs:  # torch has cast the moments to the parameter's dtype
            step = float(state["step"])
            key = (group_of[p], p.device, step)
            if key not in counts:
                counts[key] = torch.tensor(step, dtype=torch.float32, device=p.device)
            self.state[p] = {"step": counts[key]}
            for name in MOMENTS:
                moment = torch.empty_like(p, dtype=_moment_dtype(p), requires_grad=False)
                self.state[p][name] = moment.copy_(state[name])


def _moment_dtype(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _check_flags(group: dict[str, Any]) -> None:
    for flag in ("amsgrad", "maximize"):
        if group.get(flag):
            raise ValueError(f"a group has {flag}=True, which this AdamW does not do: use torch.optim.AdamW")


def _check(group: dict[str, Any]) -> None:
    _check_flags(group)
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"{name} must not be negative, got {group[name]}")
    if not (len(group["betas"]) == 2 and all(0 <= beta < 1 for beta in group["betas"])):
        raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']}")
    for p in group["params"]:
        if p.dtype not in DTYPES:
            raise ValueError(
                f"parameters must be float32, float16, bfloat16 or float64, got {p.dtype} {tuple(p.shape)}"
            )


def _check_state(state: dict[str, Any], p: Tensor) -> None:
    if missing := {"step", *MOMENTS} - state.keys():
        raise ValueError(f"the state has no {', '.join(sorted(missing))}: it was not saved by AdamW")
    for name in MOMENTS:
        if state[name].shape != p.shape:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}, its parameter {tuple(p.shape)}")
