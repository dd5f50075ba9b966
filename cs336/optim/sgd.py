"""Stochastic gradient descent with momentum, as torch.optim.SGD defines it (Sutskever et al. 2013).

g = grad * grad_scale + weight_decay p        m = momentum m + g  (m = g at the first step)
p -= lr (g + momentum m)  with Nesterov, lr m  without
"""

from typing import Any

import torch
from torch import Tensor

from cs336.optim.adamw import DTYPES
from cs336.optim.optimizer import Optimizer, check_group, gradient


class SGD(Optimizer):
    """A torch.optim.Optimizer with torch.optim.SGD's state and semantics.

    Args:
        params: tensors or groups, of any float dtype; the state is of the same.
        lr: learning rate.
        momentum: in [0, 1); 0 keeps no state.
        nesterov: look one step ahead; needs momentum.
        weight_decay: added to the gradient, not decoupled.

    Raises ValueError for numbers or dtypes that do not fit.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_group(group, not_negative=("lr", "weight_decay"), dtypes=DTYPES)
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum must be in [0, 1), got {group['momentum']}")
        if group["nesterov"] and not group["momentum"]:
            raise ValueError("nesterov looks ahead along the momentum, and momentum is 0: set one")

    def _step_group(self, group: dict[str, Any], grad_scale: Tensor | None) -> None:
        momentum, decay = group["momentum"], group["weight_decay"]
        for p, g in [(p, g) for p in group["params"] if (g := gradient(p)) is not None]:
            d = g.to(p.dtype)
            if grad_scale is not None:
                d = (g * grad_scale.to(g.device)).to(p.dtype)
            if decay:
                d = d + decay * p
            if momentum:
                state = self.state[p]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = d.clone(memory_format=torch.preserve_format)
                else:
                    state["momentum_buffer"].mul_(momentum).add_(d)
                m = state["momentum_buffer"]
                d = d + momentum * m if group["nesterov"] else m
            p.sub_(group["lr"] * d)

    def state_bytes(self) -> int:
        return sum(p.nbytes for group in self.param_groups if group["momentum"] for p in group["params"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what this class or torch.optim.SGD saved. Raises ValueError, before anything is changed, for others."""
        for group in state_dict["param_groups"]:
            for flag in ("dampening", "maximize"):
                if group.get(flag):
                    raise ValueError(f"a group has {flag}={group[flag]}, which this SGD does not do")
        for i, state in state_dict["state"].items():
            if others := state.keys() - {"momentum_buffer"}:
                raise ValueError(f"the state of parameter {i} has {', '.join(sorted(others))}: it was not saved by SGD")
        known = self.defaults.keys() | {"params"}
        groups = [{k: v for k, v in g.items() if k in known} for g in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})
