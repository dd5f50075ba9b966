"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024, arXiv:2409.11321, algorithm 3).

    g' = Ql^T g Qr       m += (1 - beta1) (g - m)       v += (1 - beta2) (g'^2 - v)       g = grad * grad_scale
    p -= lr weight_decay p + lr / bias1 * Ql [Ql^T m Qr / (sqrt(v / bias2) + eps)] Qr^T
    L += (1 - beta2) (g g^T - L)        R += (1 - beta2) (g^T g - R)
    every `frequency` steps: Ql = QR(L Ql), Qr = QR(R Qr), one step of the power iteration towards their eigenvectors

The first gradient only sets the bases, by a whole eigendecomposition, as in the authors' code: an update in a basis
made of that same gradient would be all ones. A side longer than max_dim keeps the identity as its basis. Matrices of
one shape are updated together; embeddings, the head and vectors are AdamW's, grouped as for Muon.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from cs336.optim.adamw import AdamW, check_state
from cs336.optim.optimizer import gradient

SIDES = ("rows", "columns")


class SOAP(AdamW):
    """A torch.optim.Optimizer: matrices by SOAP, the rest by AdamW, under one learning rate.

        optimizer = SOAP(muon_param_groups(model, weight_decay=0.1), lr=3e-3)

    Args:
        params: tensors or groups. In a group, `use_muon` says whether its matrices (two dims) are SOAP's, True if it is
            left out: the groups of `muon_param_groups` serve both optimizers.
        lr, betas, eps, weight_decay: of all.
        frequency: steps between two updates of the bases.
        max_dim: a side longer than this has no basis of its own.

    The state of a matrix of M x N elements is 2 M N + 2 M^2 + 2 N^2 numbers, float32 (float64 for float64).
    Raises ValueError for numbers or dtypes that do not fit.
    """

    capturable = False  # it counts on the host

    own_options = frozenset({"use_muon", "frequency", "max_dim"})

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        frequency: int = 10,
        max_dim: int = 8192,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, use_muon=True, frequency=frequency, max_dim=max_dim)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for name in ("frequency", "max_dim"):
            if not group[name] >= 1:
                raise ValueError(f"{name} must be at least 1, got {group[name]}")

    def _step_group(self, group: dict[str, Any], grad_scale: Tensor | None) -> None:
        buckets = defaultdict(list)
        for p in group["params"]:
            if _is_soaps(p, group) and (g := gradient(p)) is not None and p.numel():
                state, wide = self.state.get(p), torch.promote_types(p.dtype, torch.float32)
                g = g.to(wide)
                if grad_scale is not None:
                    g = g * grad_scale.to(p.device, wide)
                if not state:
                    self._begin(p, g, group)
                else:
                    buckets[p.device, p.dtype, p.shape, float(state["step"])].append((p, g))
        super()._step_group({**group, "params": [p for p in group["params"] if not _is_soaps(p, group)]}, grad_scale)
        for bucket in buckets.values():
            self._step_matrices(group, bucket)

    def _begin(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        """Set the bases by the first gradient. One that has none, as it is not finite, leaves no state behind."""
        step = torch.zeros((), dtype=torch.float32)  # on the host, which asks it when the bases are due
        state = {"step": step, **{name: torch.zeros_like(p, dtype=g.dtype) for name in ("exp_avg", "exp_avg_sq")}}
        for side, turned in zip(SIDES, (g, g.mT), strict=True):
            if turned.shape[0] <= group["max_dim"]:
                covariance = turned @ turned.mT * (1 - group["betas"][1])
                state[f"{side}_covariance"] = covariance
                state[f"{side}_basis"] = torch.linalg.eigh(covariance)[1].flip(-1).contiguous()
        self.state[p] = state

    def _step_matrices(self, group: dict[str, Any], bucket: list[tuple[Tensor, Tensor]]) -> None:
        """Of one device, dtype and shape, at the same step."""
        (beta1, beta2), lr = group["betas"], group["lr"]
        params, states = [p for p, _ in bucket], [self.state[p] for p, _ in bucket]
        sides = [side for side in SIDES if f"{side}_basis" in states[0]]
        names = ["exp_avg", "exp_avg_sq", *(f"{side}_{part}" for side in sides for part in ("covariance", "basis"))]
        kept = {name: torch.stack([state[name] for state in states]) for name in names}
        g_BMN = torch.stack([g for _, g in bucket])
        step = float(states[0]["step"]) + 1
        for state in states:
            state["step"] += 1
        left, right = (kept.get(f"{side}_basis") for side in SIDES)

        kept["exp_avg"].lerp_(g_BMN, 1 - beta1)
        kept["exp_avg_sq"].lerp_(_rotated(g_BMN, left, right).square(), 1 - beta2)
        denominator = (kept["exp_avg_sq"] / (1 - beta2**step)).sqrt() + group["eps"]
        update = _rotated_back(_rotated(kept["exp_avg"], left, right) / denominator, left, right)
        for side in sides:
            turned = g_BMN if side == "rows" else g_BMN.mT
            covariance = kept[f"{side}_covariance"].lerp_(turned @ turned.mT, 1 - beta2)
            if step % group["frequency"] == 0:
                kept[f"{side}_basis"] = torch.linalg.qr(covariance @ kept[f"{side}_basis"])[0]
        for name, values in kept.items():
            torch._foreach_copy_([state[name] for state in states], list(values))

        rate = lr.to(update.device, update.dtype) if isinstance(lr, Tensor) else lr
        for p, u in zip(params, update * (rate / (1 - beta1**step)), strict=True):
            p.copy_(p.to(u.dtype) * (1 - rate * group["weight_decay"]) - u)

    def step_cost(self, p: Tensor, group: dict[str, Any]) -> int:
        """For each side that has a basis: three rotations and the covariance, and every `frequency` steps a product and
        a QR decomposition with its Q, 8/3 n^3."""
        cost = super().step_cost(p, group)
        if not _is_soaps(p, group):
            return cost
        sides = [side for side in p.shape if side <= group["max_dim"]]
        return cost + sum(8 * side * p.numel() + 14 * side**3 // (3 * group["frequency"]) for side in sides)

    def _bytes_of(self, p: Tensor, group: dict[str, Any]) -> int:
        if not _is_soaps(p, group):
            return super()._bytes_of(p, group)
        bases = sum(2 * side**2 for side in p.shape if side <= group["max_dim"])
        return torch.promote_types(p.dtype, torch.float32).itemsize * (2 * p.numel() + bases)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what this class saved. Raises ValueError, before anything is changed, for what does not fit."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for p in group["params"]:
                if _is_soaps(p, group) and p in self.state:  # each counts for itself
                    self.state[p]["step"] = self.state[p]["step"].to("cpu", copy=True)

    def _copied(self, name: str, value: Tensor, p: Tensor, group: dict[str, Any]) -> Tensor:
        return value.to(p.device, copy=True) if _is_soaps(p, group) else super()._copied(name, value, p, group)

    def _check_state(self, state: dict[str, Any], p: Tensor, group: dict[str, Any]) -> None:
        if not _is_soaps(p, group):
            super()._check_state(state, p, group)
            return
        shapes = {"exp_avg": p.shape, "exp_avg_sq": p.shape}
        for side, length in zip(SIDES, p.shape, strict=True):
            if length <= group["max_dim"]:
                shapes |= {f"{side}_{part}": torch.Size((length, length)) for part in ("covariance", "basis")}
        check_state(state, p, "SOAP", shapes)


def _is_soaps(p: Tensor, group: dict[str, Any]) -> bool:
    return group["use_muon"] and p.dim() == 2


def _rotated(x_BMN: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    x_BMN = x_BMN if left is None else left.mT @ x_BMN
    return x_BMN if right is None else x_BMN @ right


def _rotated_back(x_BMN: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    x_BMN = x_BMN if left is None else left @ x_BMN
    return x_BMN if right is None else x_BMN @ right.mT
