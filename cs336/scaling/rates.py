"""How the best learning rate and batch grow with a run: power laws through settings that were found best.

lr = c N^a D^b, batch = c D^b          Li et al. 2025, arXiv:2503.04715, whose numbers `step_law` has
B_crit = c D^b                         the critical batch: arXiv:2410.21676

By least squares of the logarithms; intervals are quantiles over resampled runs.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cs336.scaling.points import read_columns

NAMES = {
    "parameters": ("parameters", "params", "n", "num_parameters", "model size"),
    "tokens": ("tokens", "d", "num_tokens", "training tokens"),
    "lr": ("lr", "learning_rate", "learning rate", "optimizer.lr"),
    "batch_tokens": ("batch_tokens", "batch_size_tokens"),  # a "batch size" may be of sequences
}


@dataclass(frozen=True)
class PowerFit:
    """y = coefficient * x_1^e_1 * x_2^e_2 * ..."""

    coefficient: float
    exponents: dict[str, float]
    resampled: tuple[dict[str, float], ...]
    """coefficient and exponents of resampled runs, by name."""

    def __call__(self, **columns):
        """Of numbers or arrays, named as the exponents are."""
        powers = [np.asarray(columns[name], dtype=np.float64) ** power for name, power in self.exponents.items()]
        return self.coefficient * np.prod(np.broadcast_arrays(*powers), 0)

    def interval(self, name: str, confidence: float = 0.95) -> tuple[float, float]:
        """Of "coefficient", or of an exponent by its column's name."""
        if not self.resampled:
            raise ValueError("an interval wants bootstrap > 0")
        ends = [(1 - confidence) / 2, (1 + confidence) / 2]
        low, high = np.quantile([numbers[name] for numbers in self.resampled], ends)
        return float(low), float(high)


def fit_power(y, columns: Mapping[str, np.ndarray], *, bootstrap: int = 400, seed: int = 0) -> PowerFit:
    """Args:
        y: (n,) positive.
        columns: (n,) positive, by name; each of at least two values, and together more runs than numbers to fit.
        bootstrap: resamples of the runs for the intervals; 0 for none.

    Raises ValueError for fewer runs, and for columns that grow together, whose exponents cannot be told apart.
    """
    named = {name: np.asarray(values, dtype=np.float64) for name, values in {"y": y, **columns}.items()}
    for name, values in named.items():
        if bad := np.flatnonzero(~(np.isfinite(values) & (values > 0))).tolist():
            raise ValueError(f"{name} must be positive and finite; run {bad[0]} has {values[bad[0]]}")
    log_y_n = np.log(named.pop("y"))
    design_nK = np.stack([np.ones_like(log_y_n), *map(np.log, named.values())], 1)
    centre_K = design_nK.mean(0)
    centre_K[0] = 0
    weight_Bn = np.random.default_rng(seed).multinomial(
        len(log_y_n), np.full(len(log_y_n), 1 / len(log_y_n)), bootstrap
    )
    weight_Bn = np.concatenate([np.ones((1, len(log_y_n))), weight_Bn])  # the runs as they are, then resampled
    x_nK = design_nK - centre_K
    gram_BKK = np.einsum("bn,nk,nl->bkl", weight_Bn, x_nK, x_nK)
    told_apart = np.linalg.matrix_rank(gram_BKK) == len(centre_K)
    if len(design_nK) <= len(centre_K) or not told_apart[0]:
        raise ValueError(
            f"{len(centre_K)} numbers want more runs, whose {' and '.join(named)} differ and do not grow together; "
            f"got {len(design_nK)}"
        )
    moments_BK1 = np.einsum("bn,nk,n->bk", weight_Bn, x_nK, log_y_n)[told_apart, :, None]
    solved_BK = np.linalg.solve(gram_BKK[told_apart], moments_BK1)[..., 0]
    solved_BK[:, 0] = np.exp(solved_BK[:, 0] - solved_BK @ centre_K)
    found, *resampled = (dict(zip(("coefficient", *named), numbers, strict=True)) for numbers in solved_BK.tolist())
    return PowerFit(found.pop("coefficient"), found, tuple(resampled))


def fit_step_law(parameters, tokens, lr, batch_tokens, *, bootstrap: int = 400) -> tuple[PowerFit, PowerFit]:
    """The Step Law's two power laws, of the best learning rate in parameters and tokens, and of the best batch in
    tokens. Arguments are (n,), a run that was found best each; parameters without embeddings, as in the paper."""
    rate = fit_power(lr, {"parameters": parameters, "tokens": tokens}, bootstrap=bootstrap)
    return rate, fit_power(batch_tokens, {"tokens": tokens}, bootstrap=bootstrap)


def read_step_points(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """ "parameters", "tokens", "lr" and "batch_tokens" of a CSV or JSON file, for fit_step_law. Raises ValueError that
    names the file and what is missing."""
    columns, have = read_columns(path, NAMES)
    if missing := [name for name in NAMES if name not in columns]:
        raise ValueError(f"{path} must have {', '.join(NAMES)} as columns; {', '.join(missing)} is not among {have}")
    return columns
