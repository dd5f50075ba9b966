"""Lion: the sign of a momentum (Chen et al. 2023, arXiv:2302.06675), half of AdamW's state.

u = sign(beta1 m + (1 - beta1) g)     g = grad * grad_scale
p -= lr (u + weight_decay p)          m = beta2 m + (1 - beta2) g

Every element moves by lr: the learning rate is 3 to 10 times smaller than AdamW's, the weight decay as much larger.
"""

import math
from typing import Any

import torch
from torch import Tensor

from cs336.optim.adamw import DTYPES
from cs336.optim.optimizer import Optimizer, check_group, gradient


class Lion(Optimizer):
    """A torch.optim.Optimizer with the state `exp_avg`, float32 (float64 of float64).

    Args:
        params: tensors or groups, of any float dtype.
        lr: learning rate: how far each element moves in a step.
        betas: of the momentum where it gives the update, and of what it becomes.
        weight_decay: decoupled: the decay of one step is lr * weight_decay.

    Raises ValueError for numbers or dtypes that do not fit.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def _check_group(self, group: dict[str, Any]) -> None:
        check_group(group, not_negative=("lr", "weight_decay"), dtypes=DTYPES)
        if not (len(group["betas"]) == 2 and all(0 <= beta < 1 for beta in group["betas"])):
            raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']}")

    def _step_group(self, group: dict[str, Any], grad_scale: Tensor | None) -> None:
        (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
        for p, g in [(p, g) for p in group["params"] if (g := gradient(p)) is not None]:
            state, wide = self.state[p], _wide(p)
            if not state:
                state["exp_avg"] = torch.zeros_like(p, dtype=wide)
            m, g = state["exp_avg"], g.to(wide)
            if grad_scale is not None:
                g = g * grad_scale.to(p.device, wide)
            before = p.to(wide)
            u = torch.lerp(m, g, 1 - beta1)
            sign = u.sign().masked_fill_(u.isnan(), math.nan)  # of NaN torch's is 0: a weight would rest for ever
            p.copy_(before - lr * (sign + decay * before))
            m.lerp_(g, 1 - beta2)

    def state_bytes(self) -> int:
        return sum(p.numel() * _wide(p).itemsize for group in self.param_groups for p in group["params"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what this class saved. Raises ValueError, before anything is changed, for others."""
        states = state_dict["state"]
        for i, state in states.items():
            if state.keys() != {"exp_avg"}:
                raise ValueError(f"the state of parameter {i} has {', '.join(sorted(state))}: it was not saved by Lion")
        super().load_state_dict(state_dict)
        indices = (i for group in state_dict["param_groups"] for i in group["params"])
        owners = (p for group in self.param_groups for p in group["params"])
        for i, p in zip(indices, owners, strict=True):
            if i in states:  # torch has cast it to the parameter's dtype
                m = torch.empty_like(p, dtype=_wide(p), requires_grad=False)
                self.state[p]["exp_avg"] = m.copy_(states[i]["exp_avg"])


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)
