"""The law of a ladder that spends every budget in one way: L(C) = E + A / C^gamma, C FLOPs of training.

Where all runs have one ratio of tokens to parameters the two grow together, and no fit can tell their terms apart; nor
need it, to say what the next budgets will buy. (Kaplan et al. 2020, arXiv:2001.08361, have E = 0.) For a given gamma,
E and A follow by least squares of the relative error, so the fit is a search over gamma alone.

Intervals are of the residual bootstrap: the law's losses times residuals drawn anew, which are those of seeds and
of rungs that the law does not meet. So a budget of one run still has its place in every resample.
"""

import math
from dataclasses import asdict, dataclass

import numpy as np

from cs336.scaling.points import Points

NUMBERS = 3  # of the law
LEAST_BUDGETS = 4
GAMMAS = np.geomspace(1e-3, 3, 400)  # neighbours differ by 2 %
CLOSER = 1.02 ** np.linspace(-1, 1, 33)  # around the best of these, then 1 / 16 of that twice: to 1e-5


@dataclass(frozen=True)
class ComputeLaw:
    """L(C) = E + A / C^gamma, C in FLOPs. Raises ValueError for numbers that are negative or not finite."""

    E: float
    """May be 0: runs that show no end of the fall."""
    A: float
    gamma: float

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 or more, and finite, got {value}")

    def loss(self, flops):
        """Of a number or an array."""
        return self.E + self.A * np.asarray(flops, dtype=np.float64) ** -self.gamma


@dataclass(frozen=True)
class ComputeFit:
    """A law, and the laws of resampled runs around it."""

    law: ComputeLaw
    resampled: tuple[ComputeLaw, ...]
    residuals: np.ndarray
    """(n,): log of the measured loss over the law's, widened by (n / (n - 3))^1/2 for the three numbers fitted."""

    def interval(self, name: str, confidence: float = 0.95) -> tuple[float, float]:
        """Of E, A or gamma: quantiles of the resampled laws'."""
        return quantiles([getattr(law, name) for law in self.resampled], confidence)

    def predict(self, flops: float, confidence: float = 0.95) -> tuple[float, tuple[float, float]]:
        """The loss of one run that was not made, and where it will be: the resampled laws' losses, each beside the
        residual of a run that was made."""
        at = np.array([law.loss(flops) for law in self.resampled])
        noise = np.random.default_rng(0).choice(self.residuals, (len(at), 20))
        return float(self.law.loss(flops)), quantiles((at[:, None] * np.exp(noise)).ravel(), confidence)


def fit_compute(points: Points, *, bootstrap: int = 400, seed: int = 0) -> ComputeFit:
    """Fit E, A and gamma.

    Args:
        points: runs of at least 4 budgets; several of one budget are seeds, and are averaged by the fit.
        bootstrap: resamples for the intervals; 0 for none.

    Raises ValueError for fewer budgets, and where loss does not fall with FLOPs.
    """
    if (found := len(points.by_budget())) < LEAST_BUDGETS:
        raise ValueError(f"a law of compute wants runs of at least {LEAST_BUDGETS} budgets of FLOPs; got {found}")
    if bootstrap < 0:
        raise ValueError(f"bootstrap must not be negative, got {bootstrap}")
    (law,) = _laws(points.flops, points.loss[None])
    if not law.A > 0:
        raise ValueError("no law fits these runs: their loss does not fall with FLOPs")
    n = len(points)
    residuals = np.log(points.loss / law.loss(points.flops)) * (n / (n - NUMBERS)) ** 0.5
    drawn_Bn = np.random.default_rng(seed).choice(residuals, (bootstrap, n))
    resampled = _laws(points.flops, law.loss(points.flops) * np.exp(drawn_Bn))
    return ComputeFit(law, tuple(law for law in resampled if law.A > 0), residuals)


def _laws(flops_n: np.ndarray, loss_Bn: np.ndarray) -> list[ComputeLaw]:
    """Of each row of losses the law with the least squares of relative errors among those with E and A not negative."""
    middle = np.exp(np.log(flops_n).mean())
    x_n = flops_n / middle
    laws = []
    for loss_n, gamma in zip(loss_Bn, _best(GAMMAS[None], x_n, loss_Bn)[2], strict=True):
        for power in (1, 1 / 16, 1 / 256):
            (E,), (A,), (gamma,) = _best(gamma * CLOSER[None] ** power, x_n, loss_n[None])
        laws.append(ComputeLaw(float(E), float(A * middle**gamma), float(gamma)))
    return laws


def _best(gamma_BG: np.ndarray, x_n: np.ndarray, loss_Bn: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E, A and gamma (B,) of each row's best gamma, loss = E + A x^-gamma; (1, G): the same gammas for all rows."""
    x_BGn = x_n ** -gamma_BG[..., None]
    w_Bn = loss_Bn**-2.0
    s0_B, s1_B = w_Bn.sum(1), (1 / loss_Bn).sum(1)
    x1_BG, x2_BG, y1_BG = (
        (a @ b[..., None])[..., 0] for a, b in ((x_BGn, w_Bn), (x_BGn**2, w_Bn), (x_BGn, 1 / loss_Bn))
    )
    det_BG = s0_B[:, None] * x2_BG - x1_BG**2
    E_BG = (x2_BG * s1_B[:, None] - x1_BG * y1_BG) / det_BG
    E_BG = np.maximum(E_BG, 0)
    A_BG = np.maximum((y1_BG - E_BG * x1_BG) / x2_BG, 0)
    error_BG = (
        E_BG**2 * s0_B[:, None] + A_BG**2 * x2_BG + 2 * E_BG * A_BG * x1_BG
        - 2 * E_BG * s1_B[:, None] - 2 * A_BG * y1_BG
    )  # fmt: skip
    best_B = error_BG.argmin(1)
    rows = np.arange(len(best_B))
    return E_BG[rows, best_B], A_BG[rows, best_B], np.broadcast_to(gamma_BG, error_BG.shape)[rows, best_B]


def quantiles(values, confidence: float) -> tuple[float, float]:
    if len(values) == 0:
        raise ValueError("an interval wants bootstrap > 0")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, as 0.95, got {confidence}")
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
