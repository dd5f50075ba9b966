"""Muon: momentum whose matrices are orthogonalized (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    m += (1 - momentum) (g - m)           g = grad * grad_scale
    u  = g + momentum (m - g)             Nesterov; u = m without
    o  = u v^T of u = u s v^T             by a few steps of x <- a x + b (x x^T) x + c (x x^T)^2 x
    p -= lr weight_decay p + lr 0.2 sqrt(max(rows, columns)) o

The last factor gives o the size that AdamW's updates have, about 0.2 an element, so that one learning rate and weight
decay serve both (Moonlight, Liu et al. 2025, arXiv:2502.16982). Matrices of one shape, or of one shape turned, are
orthogonalized together. Embeddings, the head and vectors are AdamW's: see `muon_param_groups`.
"""

from collections import defaultdict
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cs336 import ops
from cs336.optim.adamw import AdamW, keeps_remainder, store_, widened
from cs336.optim.optimizer import gradient
from cs336.optim.rounding import Rounding

Orthogonalization = Literal["newton_schulz", "polar_express"]
QUINTIC = (3.4445, -4.7750, 2.0315)
"""Steepest at 0; singular values that have come up stay between 0.68 and 1.21 (Jordan et al.)."""
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""Each the best polynomial for what the ones before it leave of [0.001, 1] (Amsel et al. 2025, arXiv:2505.16932)."""
SAFETY = 1.01  # of Polar Express: rounding may push a singular value above 1, where its steep polynomials diverge
RMS = 0.2  # of an AdamW update (arXiv:2502.16982)
HEADS = ("head", "lm_head", "embed_out", "output")
MOST = 1 << 28  # elements orthogonalized together: what a bfloat16 copy of them takes is 512 MiB


def orthogonalize(x: Tensor, steps: int = 5, method: Orthogonalization = "newton_schulz", eps: float = 1e-7) -> Tensor:
    """The nearest (semi-)orthogonal matrix to each, about: singular values become 1 or near it, vectors stay.

    Args:
        x: (..., rows, columns), any float dtype; computed in it. bfloat16 is enough for Muon.
        steps: of the iteration, each three matrix products, two of them symmetric: see ops.gram.
        method: "newton_schulz" leaves singular values between 0.68 and 1.21, "polar_express" nearer to 1.
        eps: added to the norm, so that zeros stay zeros.

    Raises ValueError for what is no matrix, and for a method that there is not.
    """
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"x must be (..., rows, columns), floating point, got {x.dtype} {tuple(x.shape)}")
    if not x.numel():
        return x.clone()
    if x.shape[-2] > x.shape[-1]:
        return orthogonalize(x.mT, steps, method, eps).mT
    shape, safety = x.shape, SAFETY if method == "polar_express" else 1.0
    x = x.reshape(-1, *shape[-2:])
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    x = x / (norm * safety + eps).to(x.dtype)
    for a, b, c in _coefficients(method, steps):
        square = ops.gram(x)  # symmetric, and so is its own square
        x = torch.baddbmm(x, ops.gram(square, square, alpha=c, beta=b), x, beta=a)
    return x.view(shape)


def _coefficients(method: Orthogonalization, steps: int) -> list[tuple[float, float, float]]:
    if method == "newton_schulz":
        return [QUINTIC] * steps
    if method == "polar_express":
        *first, last = POLAR_EXPRESS
        safe = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in first]
        return (safe + [last] * steps)[:steps]
    raise ValueError(f"method must be newton_schulz or polar_express, got {method!r}")


def muon_param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for Muon, by the module that a parameter belongs to.

    Muon: the weights of linear layers, and stacks of them (..., out, in), such as experts. AdamW: the head, a linear
    layer called "head", "lm_head", "embed_out" or "output"; embeddings, convolutions, and other parameters that are no
    matrices; of these, vectors do not decay.
    """
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    seen: set[Tensor] = set()
    heads = {id(m) for name, m in model.named_modules() if name.rpartition(".")[2] in HEADS}
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}  # a head may be tied to one
    for module in model.modules():
        for p in module.parameters(recurse=False):
            if p.requires_grad and p not in seen:
                seen.add(p)
                free = id(module) not in heads and p not in embeddings
                (matrices if free and _is_matrix(module, p) else others).append(p)
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "use_muon": True},
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": weight_decay, "use_muon": False},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0, "use_muon": False},
    ]
    return [group for group in groups if group["params"]]


def _is_matrix(module: nn.Module, p: Tensor) -> bool:
    if isinstance(module, nn.Linear):
        return p.dim() == 2
    return p.dim() >= 3 and min(p.shape[-2:]) > 1 and not isinstance(module, nn.modules.conv._ConvNd)


class Muon(AdamW):
    """A torch.optim.Optimizer: matrices by Muon, the rest by AdamW, under one learning rate.

        optimizer = Muon(muon_param_groups(model, weight_decay=0.1), lr=2e-3)

    Args:
        params: tensors or groups, float32, float16, bfloat16 or float64. In a group, `use_muon` says whether matrices
            (two dims, or stacks of them) are Muon's, True if it is left out; vectors are AdamW's anyway.
        lr, weight_decay: of all.
        momentum: of the matrices, in [0, 1); the buffer is float32 (float64 for float64).
        nesterov: look one step ahead.
        method, ns_steps: see `orthogonalize`.
        ns_dtype: that it is computed in. None: bfloat16 on a GPU, float32 (float64 for float64) elsewhere.
        betas, eps, state_dtype, rounding: of AdamW; rounding of the matrices too.

    Raises ValueError for numbers or dtypes that do not fit.
    """

    own_options = frozenset({"use_muon", "momentum", "nesterov", "method", "ns_steps", "ns_dtype"})

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        method: Orthogonalization = "newton_schulz",
        ns_steps: int = 5,
        ns_dtype: torch.dtype | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        state_dtype: torch.dtype = torch.float32,
        rounding: Rounding = "nearest",
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            state_dtype=state_dtype,
            rounding=rounding,
            use_muon=True,
            momentum=momentum,
            nesterov=nesterov,
            method=method,
            ns_steps=ns_steps,
            ns_dtype=None if ns_dtype is None else str(ns_dtype).removeprefix("torch."),
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum must be in [0, 1), got {group['momentum']}")
        if not group["ns_steps"] >= 1:
            raise ValueError(f"ns_steps must be at least 1, got {group['ns_steps']}")
        _coefficients(group["method"], 1)

    def _step_group(self, group: dict[str, Any], grad_scale: Tensor | None) -> None:
        matrices = [p for p in group["params"] if _is_muons(p, group)]
        others = [p for p in group["params"] if not _is_muons(p, group)]
        buckets = defaultdict(list)
        for p in matrices:
            g = gradient(p)
            if g is not None and p.numel():
                buckets[p.device, p.dtype, *sorted(p.shape[-2:])].append((p, g))
        super()._step_group({**group, "params": others}, grad_scale)
        for bucket in buckets.values():
            at_once = max(1, MOST // max(p.numel() for p, _ in bucket))
            for first in range(0, len(bucket), at_once):
                self._step_matrices(group, bucket[first : first + at_once], grad_scale)

    def _step_matrices(
        self, group: dict[str, Any], bucket: list[tuple[Tensor, Tensor]], grad_scale: Tensor | None
    ) -> None:
        """Of one device and dtype, and of one shape but for turning."""
        params = [p for p, _ in bucket]
        device, dtype = params[0].device, torch.promote_types(params[0].dtype, torch.float32)
        grads = [g.to(dtype) for _, g in bucket]
        if grad_scale is not None:
            grads = list(torch._foreach_mul(grads, grad_scale.to(device, dtype)))
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=dtype)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, buffers, group["momentum"]) if group["nesterov"] else buffers

        lying = [u.mT if _stands(p) else u for p, u in zip(params, updates, strict=True)]
        ns_dtype = getattr(torch, group["ns_dtype"]) if group["ns_dtype"] else _default_dtype(device, dtype)
        x_BMN = torch.cat([u.to(ns_dtype).reshape(-1, *u.shape[-2:]) for u in lying])
        o_BMN = orthogonalize(x_BMN, group["ns_steps"], group["method"])
        lr = group["lr"]  # rounded alike as a number and as a tensor
        lr = lr.to(device, dtype) if isinstance(lr, Tensor) else torch.full((), lr, dtype=dtype, device=device)
        size = lr * (RMS * o_BMN.shape[-1] ** 0.5)

        targets = [widened(p, self.state[p], group.get("rounding", "nearest")) for p in params]
        torch._foreach_mul_(targets, 1 - lr * group["weight_decay"])
        counts = [u.shape[:-2].numel() for u in lying]
        for p, target, u, o in zip(params, targets, lying, o_BMN.split(counts), strict=True):
            o = o.view(u.shape)
            target.addcmul_(o.mT if _stands(p) else o, size, value=-1)  # in one pass, whatever o's dtype
            store_(p, target, self.state[p], group.get("rounding", "nearest"))

    def step_cost(self, p: Tensor, group: dict[str, Any]) -> int:
        """Three products a step of the iteration: x x^T, its square, and that times x. Counted whole."""
        cost = super().step_cost(p, group)
        if not _is_muons(p, group) or not p.numel():
            return cost
        short, long = sorted(p.shape[-2:])
        return cost + group["ns_steps"] * p.numel() // (short * long) * (4 * short**2 * long + 2 * short**3)

    def _bytes_of(self, p: Tensor, group: dict[str, Any]) -> int:
        if not _is_muons(p, group):
            return super()._bytes_of(p, group)
        remainder = 2 if keeps_remainder(p, group.get("rounding", "nearest")) else 0
        return p.numel() * (torch.promote_types(p.dtype, torch.float32).itemsize + remainder)

    def _check_state(self, state: dict[str, Any], p: Tensor, group: dict[str, Any]) -> None:
        if not _is_muons(p, group):
            super()._check_state(state, p, group)
        elif "momentum_buffer" not in state:
            raise ValueError("the state of a matrix has no momentum_buffer: it was not saved by Muon")
        elif state["momentum_buffer"].shape != p.shape:
            shape = tuple(state["momentum_buffer"].shape)
            raise ValueError(f"momentum_buffer has shape {shape}, its parameter {tuple(p.shape)}")


def _is_muons(p: Tensor, group: dict[str, Any]) -> bool:
    return group["use_muon"] and p.dim() >= 2


def _stands(p: Tensor) -> bool:
    return p.shape[-2] > p.shape[-1]


def _default_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" and dtype != torch.float64 else dtype
