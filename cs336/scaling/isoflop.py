"""Chinchilla's first two approaches: the best size at each budget, and a power law through them.

Approach 1 takes the lower envelope of training curves, approach 2 the valley of each IsoFLOP profile. Hoffmann et al.
2022, arXiv:2203.15556, section 3. A parabola in log N is only the valley's first term: off-centre grids move its
minimum (arXiv:2603.22339), which is why the measured minimum is the other choice.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cs336.scaling.points import Points, check_all_positive


@dataclass(frozen=True)
class PowerLaw:
    """y = coefficient x^exponent."""

    coefficient: float
    exponent: float

    def __call__(self, x):
        return self.coefficient * np.asarray(x, dtype=np.float64) ** self.exponent

    @staticmethod
    def through(x, y) -> "PowerLaw":
        """By least squares of log y. Raises ValueError for fewer than two x, and for numbers that are not positive."""
        check_all_positive("x", np.asarray(x, dtype=np.float64))
        check_all_positive("y", np.asarray(y, dtype=np.float64))
        if len(set(np.asarray(x).tolist())) < 2:
            raise ValueError("a power law wants at least two budgets")
        exponent, constant = np.polyfit(np.log(x), np.log(y), 1)
        return PowerLaw(float(np.exp(constant)), float(exponent))


@dataclass(frozen=True)
class IsoFlopFit:
    """The best size at each budget, and the laws through them."""

    flops: np.ndarray
    """(budgets,), ascending."""
    parameters: np.ndarray
    """(budgets,): the size with the least loss."""
    loss: np.ndarray
    """(budgets,): that loss."""
    parameter_law: PowerLaw
    """Of the optimal parameters, in FLOPs."""
    token_law: PowerLaw
    """Of the optimal tokens, FLOPs / (6 parameters)."""


def fit_isoflop(points: Points, minimum: Literal["parabola", "lowest"] = "parabola") -> IsoFlopFit:
    """Approach 2, over runs whose FLOPs come in groups.

    minimum: of a profile: a parabola's through log parameters and loss, or the lowest run.

    Raises ValueError for fewer than two budgets, for a profile of fewer than three sizes, and for a parabola that has
    no valley, each with its FLOPs.
    """
    if minimum not in ("parabola", "lowest"):
        raise ValueError(f'minimum must be "parabola" or "lowest", got {minimum!r}')
    profiles = points.by_budget()
    valleys = [_parabola(p) if minimum == "parabola" else _lowest(p) for p in profiles]
    return _through(np.array([p.flops.mean() for p in profiles]), *np.array(valleys).T)


def fit_envelope(points: Points, budgets: int = 100) -> IsoFlopFit:
    """Approach 1, over points along training curves: for budgets spread evenly in their logarithm, the curve that is
    lowest there, each interpolated between its own points."""
    grid = np.geomspace(points.flops.min(), points.flops.max(), budgets)
    best, sizes = np.full(budgets, np.inf), np.zeros(budgets)
    for size in np.unique(points.parameters):
        curve = points.take(points.parameters == size)
        order = np.argsort(curve.flops)
        x, y = np.log(curve.flops[order]), np.log(curve.loss[order])
        inside = (np.log(grid) >= x[0]) & (np.log(grid) <= x[-1])
        loss = np.where(inside, np.exp(np.interp(np.log(grid), x, y)), np.inf)
        sizes, best = np.where(loss < best, size, sizes), np.minimum(loss, best)
    known = np.isfinite(best)
    return _through(grid[known], sizes[known], best[known])


def _through(flops: np.ndarray, parameters: np.ndarray, loss: np.ndarray) -> IsoFlopFit:
    tokens = flops / (6 * parameters)
    return IsoFlopFit(flops, parameters, loss, PowerLaw.through(flops, parameters), PowerLaw.through(flops, tokens))


def _parabola(profile: Points) -> tuple[float, float]:
    """Size and loss at the bottom."""
    if len(set(profile.parameters)) < 3:
        raise ValueError(
            f"the profile at {profile.flops[0]:.3g} FLOPs has {len(set(profile.parameters))} sizes: a parabola wants 3"
        )
    x = np.log(profile.parameters)
    middle = x.mean()
    c2, c1, c0 = np.polyfit(x - middle, profile.loss, 2)
    if not c2 > 0:
        raise ValueError(
            f"the profile at {profile.flops[0]:.3g} FLOPs has no valley: add sizes on both sides of its best, or take "
            'minimum="lowest"'
        )
    bottom = -c1 / (2 * c2)
    return float(np.exp(bottom + middle)), float(c0 - c1**2 / (4 * c2))


def _lowest(profile: Points) -> tuple[float, float]:
    best = np.argmin(profile.loss)
    return float(profile.parameters[best]), float(profile.loss[best])
