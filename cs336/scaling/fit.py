"""Chinchilla's third approach: the law's five numbers from all runs at once, with intervals from a bootstrap.

The residual is log L - log L(N, D), with log L(N, D) = log-sum-exp(a - alpha log N, b - beta log D, e), A = exp(a) and
so on; Huber's loss makes a run that failed count by its distance, not its square. Hoffmann et al. 2022,
arXiv:2203.15556, appendix D.3; intervals as in Besiroglu et al. 2024, arXiv:2404.10102.

Many problems are solved at once: K problems (starts, or resamples), n runs, P = 5 numbers a, b, e, alpha, beta.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from cs336.scaling.compute import quantiles
from cs336.scaling.laws import EPOCH, Allocation, ChinchillaLaw, DataConstrainedLaw
from cs336.scaling.points import Points

EXPONENTS = (0.1, 0.25, 0.4, 0.6, 0.9, 1.4)  # of the starts, alpha by beta
MOST_STEPS = 400
PATIENCE = 1e10  # of the damping: no step in sight lowers the loss


@dataclass(frozen=True)
class Fit:
    """A law, and the laws of resampled runs around it."""

    law: ChinchillaLaw
    resampled: tuple[ChinchillaLaw, ...]
    residuals: np.ndarray
    """(n,): log of the measured loss over the law's."""
    decays: tuple[float, float] = (DataConstrainedLaw.repeat_decay, DataConstrainedLaw.excess_decay)
    """Of tokens and parameters where unique tokens run out."""

    def interval(self, name: str, confidence: float = 0.95) -> tuple[float, float]:
        """Of E, A, B, alpha, beta or parameter_exponent: quantiles of the resampled laws'."""
        return quantiles([getattr(law, name) for law in self.resampled], confidence)

    def predict(
        self, parameters: float, tokens: float, confidence: float = 0.95, *, unique_tokens: float | None = None
    ) -> tuple[float, tuple[float, float]]:
        """The loss of a run that was not made, and where it will be: the resampled laws' losses, each beside the
        residual of a run that was made.

        unique_tokens: those there are; each law is then the data-constrained one over it.
        """

        def loss(law: ChinchillaLaw) -> float:
            constrained = law if unique_tokens is None else DataConstrainedLaw(law, unique_tokens, *self.decays)
            return float(constrained.loss(parameters, tokens))

        at = np.array([loss(law) for law in self.resampled])
        noise = np.random.default_rng(0).choice(self.residuals, len(at) * 20)
        return loss(self.law), quantiles(np.repeat(at, 20) * np.exp(noise), confidence)

    def optimum(self, flops: float, confidence: float = 0.95) -> tuple[Allocation, tuple[float, float]]:
        """How to spend a budget, and the interval of its parameters."""
        return self.law.optimum(flops), quantiles([law.optimum(flops).parameters for law in self.resampled], confidence)


E_ERROR = 0.03  # standard error of E in arXiv:2404.10102, table 1
EPOCH_FIT = Fit(
    EPOCH,
    tuple(replace(EPOCH, E=NormalDist(EPOCH.E, E_ERROR).inv_cdf((i + 0.5) / 200)) for i in range(200)),
    np.zeros(1),
)
"""The published law with the error of its E, the largest part of a large run's. Its corpus and its tokenizer are not
yours: E is another's there, which no interval tells."""


def fit_chinchilla(points: Points, *, huber_delta: float = 1e-3, bootstrap: int = 400, seed: int = 0) -> Fit:
    """Fit E, A, B, alpha and beta.

    Args:
        points: runs, at least 6, of 3 sizes and 3 numbers of tokens or more.
        huber_delta: residuals of log loss beyond which they count by their size (1e-3 in the paper).
        bootstrap: resamples of the runs for the intervals; 0 for none.

    Raises ValueError for fewer runs, and where no start converges.
    """
    if len(points) < 6 or min(len(set(points.parameters)), len(set(points.tokens))) < 3:
        raise ValueError(
            f"five numbers want at least 6 runs, of 3 model sizes and 3 numbers of tokens; got {len(points)} runs of "
            f"{len(set(points.parameters))} sizes and {len(set(points.tokens))} numbers of tokens"
        )
    if not huber_delta > 0:
        raise ValueError(f"huber_delta must be positive, got {huber_delta}")
    if bootstrap < 0:
        raise ValueError(f"bootstrap must not be negative, got {bootstrap}")
    x_n, y_n, z_n = np.log(points.parameters), np.log(points.tokens), np.log(points.loss)
    starts_KP = np.stack([_start(x_n, y_n, points.loss, p, q) for p in EXPONENTS for q in EXPONENTS])
    once = np.ones((len(starts_KP), len(points)))
    found_KP, cost_K = minimize(starts_KP, x_n, y_n, z_n, once, huber_delta)
    best_P = found_KP[np.argmin(cost_K)]
    if not (np.isfinite(best_P).all() and (best_P[3:] > 0).all()):
        raise ValueError("no law with positive exponents fits these runs: do larger models and more tokens lower loss?")
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(points), np.full(len(points), 1 / len(points)), bootstrap).astype(np.float64)
    resampled_KP, _ = minimize(np.tile(best_P, (bootstrap, 1)), x_n, y_n, z_n, drawn, huber_delta)
    return Fit(_law(best_P), tuple(_laws(resampled_KP)), z_n - _predict(best_P[None], x_n, y_n)[0][0])


def minimize(
    theta_KP: np.ndarray, x_n: np.ndarray, y_n: np.ndarray, z_n: np.ndarray, weight_Kn: np.ndarray, delta: float
) -> tuple[np.ndarray, np.ndarray]:
    """Levenberg and Marquardt's method on every problem at once, Huber's loss as squares weighted anew at each step.

    x, y, z: logs of parameters, tokens and losses. Returns the numbers (K, 5) and the losses (K,).
    """
    theta_KP, damping_K = theta_KP.copy(), np.full(len(theta_KP), 1e-2)
    prediction_Kn, jacobian_KPn = _predict(theta_KP, x_n, y_n)
    cost_K = huber(prediction_Kn - z_n, weight_Kn, delta)
    for _ in range(MOST_STEPS):
        residual_Kn = prediction_Kn - z_n
        scale_Kn = weight_Kn * np.minimum(1, delta / np.maximum(np.abs(residual_Kn), 1e-300))
        scaled_KPn = jacobian_KPn * scale_Kn[:, None]
        gradient_KP = (scaled_KPn @ residual_Kn[..., None])[..., 0]
        curvature_KPP = scaled_KPn @ jacobian_KPn.swapaxes(1, 2)
        diagonal_KP = np.einsum("kpp->kp", curvature_KPP)
        lifted_KPP = curvature_KPP.copy()
        np.einsum("kpp->kp", lifted_KPP)[:] += damping_K[:, None] * diagonal_KP + 1e-30
        step_KP = -np.linalg.solve(lifted_KPP, gradient_KP[..., None])[..., 0]
        tried_KP = theta_KP + step_KP
        tried_prediction, tried_jacobian = _predict(tried_KP, x_n, y_n)
        tried_cost = huber(tried_prediction - z_n, weight_Kn, delta)
        better_K = tried_cost < cost_K
        gain_K = np.where(better_K, (cost_K - tried_cost) / np.maximum(cost_K, 1e-300), 0)
        theta_KP[better_K], cost_K[better_K] = tried_KP[better_K], tried_cost[better_K]
        prediction_Kn[better_K], jacobian_KPn[better_K] = tried_prediction[better_K], tried_jacobian[better_K]
        damping_K = np.where(better_K, np.maximum(damping_K / 3, 1e-12), damping_K * 4)
        if ((better_K & (gain_K < 1e-10)) | (damping_K > PATIENCE)).all():
            break
    return theta_KP, cost_K


def _predict(theta_KP: np.ndarray, x_n: np.ndarray, y_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log losses (K, n) and their derivatives (K, 5, n)."""
    a, b, e, alpha, beta = theta_KP.T[:, :, None]
    with np.errstate(over="ignore", invalid="ignore"):  # a step too far is refused for its loss
        terms = np.stack(np.broadcast_arrays(a - alpha * x_n, b - beta * y_n, e), 1)
        top = terms.max(1)
        shares = np.exp(terms - top[:, None])
        total = shares.sum(1)
        shares /= total[:, None]
        slopes = np.stack([*shares.swapaxes(0, 1), -shares[:, 0] * x_n, -shares[:, 1] * y_n], 1)
        return top + np.log(total), slopes


def huber(residual_Kn: np.ndarray, weight_Kn: np.ndarray, delta: float) -> np.ndarray:
    """Of each problem: squares up to delta, beyond it straight lines. (K,), infinite where a residual is."""
    size = np.abs(residual_Kn)
    with np.errstate(over="ignore", invalid="ignore"):
        loss = np.where(size < delta, residual_Kn**2 / 2, delta * (size - delta / 2))
    total = (weight_Kn * loss).sum(1)
    return np.where(np.isfinite(total), total, np.inf)


def _start(x_n: np.ndarray, y_n: np.ndarray, loss_n: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """A, B and E by least squares of the relative error for given exponents: variable projection's inner problem."""
    columns = np.stack([np.exp(-alpha * (x_n - x_n.mean())), np.exp(-beta * (y_n - y_n.mean())), np.ones_like(x_n)], 1)
    found, *_ = np.linalg.lstsq(columns / loss_n[:, None], np.ones_like(loss_n), rcond=None)
    a, b, e = np.log(np.maximum(found, 1e-3 * loss_n.mean()))
    return np.array([a + alpha * x_n.mean(), b + beta * y_n.mean(), e, alpha, beta])


def _law(theta_P: np.ndarray) -> ChinchillaLaw:
    """Runs that show no end of the falling loss have an E of 0, or nearly: the smallest number stands for it."""
    (A, B, E), (alpha, beta) = np.maximum(np.exp(theta_P[:3]), np.finfo(np.float64).tiny), theta_P[3:]
    return ChinchillaLaw(E=float(E), A=float(A), B=float(B), alpha=float(alpha), beta=float(beta))


def _laws(thetas_KP: np.ndarray) -> Iterable[ChinchillaLaw]:
    """Of the resamples that have one; a draw without, say, small models may bend the other way."""
    return (_law(theta) for theta in thetas_KP if np.isfinite(theta).all() and (theta[3:] > 0).all())
