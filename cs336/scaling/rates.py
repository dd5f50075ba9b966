"""How the best learning rate and batch grow with a run: power laws through settings that were found best.

lr = c N^a D^b, batch = c D^b          Li et al. 2025, arXiv:2503.04715, whose numbers `step_law` has
B_crit = B_0 D^beta                    Zhang et al. 2024, arXiv:2410.21676: the critical batch, whatever the size

By least squares of the logarithms. Intervals are of the residual bootstrap; each law's distance is divided by the size
of the residuals that it leaves and multiplied by the size of the runs' (bootstrap-t), without which those of few runs
are too narrow. At 95 % they hold an exponent of one column in 93 to 96 % of draws of 6 runs or more, 91 % of 4 and 67
% of 3.
"""

import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from cs336.scaling.compute import quantiles
from cs336.scaling.points import check_all_positive, read_columns

NAMES = {
    "parameters": ("parameters", "params", "n", "num_parameters", "model size"),
    "tokens": ("tokens", "d", "num_tokens", "training tokens"),
    "lr": ("lr", "learning_rate", "learning rate", "optimizer.lr"),
    "batch_tokens": ("batch_tokens", "batch_size_tokens"),  # a "batch size" may be of sequences
}
CRITICAL = {
    "tokens": NAMES["tokens"],
    "critical_batch": ("critical_batch", "critical_batch_tokens", "b_crit"),
    "parameters": NAMES["parameters"],
}


@dataclass(frozen=True)
class PowerFit:
    """y = coefficient * x_1^e_1 * x_2^e_2 * ..."""

    coefficient: float
    exponents: dict[str, float]
    resampled: tuple[dict[str, float], ...]
    """coefficient and exponents of resampled residuals, by name."""
    residuals: np.ndarray
    """(n,): log of what was measured over the law's, widened by (n / (n - K))^1/2 for the K numbers fitted."""

    def __post_init__(self):
        if not (0 < self.coefficient < math.inf and all(map(math.isfinite, self.exponents.values()))):
            raise ValueError(f"coefficient must be positive, exponents finite: {self.coefficient}, {self.exponents}")

    def __call__(self, **columns):
        """Of numbers or arrays, named as the exponents are."""
        powers = [np.asarray(columns[name], dtype=np.float64) ** power for name, power in self.exponents.items()]
        return self.coefficient * np.prod(np.broadcast_arrays(*powers), 0)

    def interval(self, name: str, confidence: float = 0.95) -> tuple[float, float]:
        """Of "coefficient", or of an exponent by its column's name."""
        return quantiles([numbers[name] for numbers in self.resampled], confidence)

    def predict(self, confidence: float = 0.95, **columns: float) -> tuple[float, tuple[float, float]]:
        """Of one run that was not made, and where it will be: the resampled laws' values, each beside the residual of
        a run that was made."""
        names = ("coefficient", *self.exponents)
        numbers_BK = np.array([[numbers[name] for name in names] for numbers in self.resampled]).reshape(-1, len(names))
        at = numbers_BK[:, 0] * np.prod([columns[name] for name in self.exponents] ** numbers_BK[:, 1:], 1)
        noise = np.random.default_rng(0).choice(self.residuals, (len(at), 20))
        return float(self(**columns)), quantiles((at[:, None] * np.exp(noise)).ravel(), confidence)


def fit_power(y, columns: Mapping[str, np.ndarray], *, bootstrap: int = 400, seed: int = 0) -> PowerFit:
    """Args:
        y: (n,) positive.
        columns: (n,) positive, by name; each of at least two values, and together more runs than numbers to fit.
        bootstrap: resamples of the residuals for the intervals; 0 for none.

    Raises ValueError for fewer runs, and for columns that grow together, whose exponents cannot be told apart.
    """
    named = {name: np.asarray(values, dtype=np.float64) for name, values in {"y": y, **columns}.items()}
    for name, values in named.items():
        check_all_positive(name, values)
    log_y_n = np.log(named.pop("y"))
    design_nK = np.stack([np.ones_like(log_y_n), *map(np.log, named.values())], 1)
    centre_K = design_nK.mean(0)
    centre_K[0] = 0
    x_nK = design_nK - centre_K
    if len(x_nK) <= len(centre_K) or np.linalg.matrix_rank(x_nK.T @ x_nK) < len(centre_K):
        apart = " and do not grow together" if len(named) > 1 else ""
        raise ValueError(
            f"{len(centre_K)} numbers want at least {len(centre_K) + 1} runs, whose {' and '.join(named)} differ"
            f"{apart}; got {len(x_nK)}"
        )
    solve_Kn = np.linalg.pinv(x_nK)
    law_K = solve_Kn @ log_y_n
    residual_n = log_y_n - x_nK @ law_K
    drawn_Bn = np.random.default_rng(seed).choice(residual_n, (bootstrap, len(residual_n)))
    off_BK = drawn_Bn @ solve_Kn.T
    error, error_B = np.linalg.norm(residual_n), np.linalg.norm(drawn_Bn - off_BK @ x_nK.T, axis=1)
    error_B = np.maximum(error_B, np.finfo(np.float64).tiny)
    kept = error_B >= 1e-9 * error  # a draw of one residual alone is met exactly, and tells nothing
    solved_BK = law_K + np.concatenate([np.zeros((1, len(law_K))), off_BK[kept] * (error / error_B[kept])[:, None]])
    solved_BK[:, 0] = np.exp(solved_BK[:, 0] - solved_BK @ centre_K)
    found, *resampled = (dict(zip(("coefficient", *named), numbers, strict=True)) for numbers in solved_BK.tolist())
    widened = (len(x_nK) / (len(x_nK) - len(law_K))) ** 0.5
    return PowerFit(found.pop("coefficient"), found, tuple(resampled), residual_n * widened)


def fit_step_law(parameters, tokens, lr, batch_tokens, *, bootstrap: int = 400) -> tuple[PowerFit, PowerFit]:
    """The Step Law's two power laws, of the best learning rate in parameters and tokens, and of the best batch in
    tokens. Arguments are (n,), a run that was found best each; parameters without embeddings, as in the paper."""
    rate = fit_power(lr, {"parameters": parameters, "tokens": tokens}, bootstrap=bootstrap)
    return rate, fit_power(batch_tokens, {"tokens": tokens}, bootstrap=bootstrap)


def fit_critical_batch(
    tokens, critical_batch, parameters=None, *, bootstrap: int = 400
) -> tuple[PowerFit, PowerFit | None]:
    """The critical batch in tokens, B_0 D^beta. Arguments are (n,), a measurement each.

    With parameters also the law that has them beside the tokens, whose exponent of them should be about 0: None where
    the runs cannot tell, for they are three, or size and length grow together in them.
    """
    law = fit_power(critical_batch, {"tokens": tokens}, bootstrap=bootstrap)
    if parameters is None:
        return law, None
    check_all_positive("parameters", np.asarray(parameters, dtype=np.float64))
    try:
        return law, fit_power(critical_batch, {"tokens": tokens, "parameters": parameters}, bootstrap=bootstrap)
    except ValueError:  # all numbers are positive: it is that these exponents cannot be told apart
        return law, None


def read_step_points(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """ "parameters", "tokens", "lr" and "batch_tokens" of a CSV or JSON file, for fit_step_law. Raises ValueError that
    names the file and what is missing."""
    return _read(path, NAMES, NAMES)


def read_critical_batches(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """ "tokens", "critical_batch" in tokens and, where it is there, "parameters" of a CSV or JSON file; or of what
    `cs336 batch-size` wrote in this directory and in those right below it, each place of a run a point. Left out are
    places whose critical batch is the smallest or the largest that was tried: it may lie beyond.

    Raises ValueError that names the file and what is missing.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        return _read(path, CRITICAL, ("tokens", "critical_batch"))
    rows = []
    for file in sorted([*path.glob("batch_size.json"), *path.glob("*/batch_size.json")]):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            rows += [
                (point["tokens"], point["critical"] * found["context_length"], found["parameters"])
                for point in found["points"]
                if found["batch_size"] < point["critical"] and not point["at_least"]
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is not what `cs336 batch-size` writes, which may be called again "
                f"({type(error).__name__}: {error})"
            ) from None
    if not rows:
        raise ValueError(
            f"{path} holds no critical batch between the smallest and the largest that `cs336 batch-size` tried"
        )
    return dict(zip(CRITICAL, np.array(rows, dtype=np.float64).T, strict=True))


def _read(
    path: str | os.PathLike, names: Mapping[str, tuple[str, ...]], needed: Iterable[str]
) -> dict[str, np.ndarray]:
    columns, have = read_columns(path, names)
    if missing := [name for name in needed if name not in columns]:
        raise ValueError(f"{path} must have {', '.join(needed)} as columns; {', '.join(missing)} is not among {have}")
    for name, values in columns.items():
        check_all_positive(f"{path}: {name}", values)
    return columns
