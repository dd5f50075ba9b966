"""What tokens that are read again are worth: the two decays of the data-constrained law, from runs that repeat.

The law without repetition stays as it was fitted to other runs, as in Muennighoff et al. 2023, arXiv:2305.16264. The
two numbers are looked for on a grid of their logarithms, which closes in on its best point.
"""

from dataclasses import dataclass

import numpy as np

from cs336.scaling.compute import quantiles
from cs336.scaling.fit import huber
from cs336.scaling.laws import ChinchillaLaw, DataConstrainedLaw, worth
from cs336.scaling.points import Points

CENTRE, REACH = np.log(5.0), np.log(200.0)  # of the grid: decays between 0.025 and 1,000
PLACES, ROUNDS, CLOSER = 5, 20, 0.55  # REACH * CLOSER^ROUNDS is 3e-5
HUBER = 1e-3
PUBLISHED = DataConstrainedLaw.repeat_decay, DataConstrainedLaw.excess_decay


@dataclass(frozen=True)
class Repeats:
    """Decays of tokens and of parameters, and those of resampled runs."""

    repeat_decay: float
    excess_decay: float
    resampled_B2: np.ndarray
    excess: bool
    """Whether runs tell of excess_decay; else it is the published one."""

    def interval(self, name: str, confidence: float = 0.95) -> tuple[float, float]:
        """Of repeat_decay or excess_decay: quantiles over the resampled runs."""
        values = self.resampled_B2[:, ("repeat_decay", "excess_decay").index(name)]
        return quantiles(values, confidence)


def fit_repeats(points: Points, unique_tokens, base: ChinchillaLaw, *, bootstrap: int = 100, seed: int = 0) -> Repeats:
    """Args:
        points: runs, some of which read their tokens more than once.
        unique_tokens: (n,): those that each run had.
        base: the law of runs that do not repeat.

    Where no run has more parameters than its unique tokens deserve, excess_decay stays the published one.
    Raises ValueError where no run repeats, or there are fewer than three.
    """
    unique_n = np.broadcast_to(np.asarray(unique_tokens, dtype=np.float64), points.tokens.shape)
    if not (np.isfinite(unique_n) & (unique_n > 0)).all():
        raise ValueError("unique_tokens must be positive and finite")
    if len(points) < 3 or not (points.tokens > unique_n).any():
        raise ValueError(
            f"two decays want at least 3 runs, of which some have more tokens than unique_tokens; got {len(points)}"
        )
    deserved_n = np.array([base.matched_parameters(u) for u in unique_n])
    excess = bool((points.parameters > deserved_n).any())

    def cost_K(repeat_K: np.ndarray, excess_K: np.ndarray, weight_n: np.ndarray) -> np.ndarray:
        N_Kn = worth(points.parameters, deserved_n, excess_K[:, None])
        D_Kn = worth(points.tokens, unique_n, repeat_K[:, None])
        residual_Kn = np.log(points.loss) - np.log(base.loss(N_Kn, D_Kn))
        return huber(residual_Kn, np.broadcast_to(weight_n, residual_Kn.shape), HUBER)

    def found(weight_n: np.ndarray) -> tuple[float, float]:
        place, reach = np.array([CENTRE, CENTRE if excess else np.log(PUBLISHED[1])]), REACH
        for _ in range(ROUNDS):
            step = reach * np.linspace(-1, 1, PLACES)
            a, b = (axis.ravel() for axis in np.meshgrid(step, step if excess else [0.0]))
            tried = place + np.stack([a, b], 1)
            repeat_K, excess_K = np.exp(tried).T
            place = tried[np.argmin(cost_K(repeat_K, excess_K, weight_n))]
            reach *= CLOSER
        return float(np.exp(place[0])), float(np.exp(place[1]))

    n = len(points)
    drawn_Bn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), bootstrap)
    whole = found(np.ones(n))
    return Repeats(*whole, np.array([found(weight_n) for weight_n in drawn_Bn]).reshape(-1, 2), excess)
