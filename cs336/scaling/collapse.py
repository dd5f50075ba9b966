"""Do a ladder's training curves have one shape? A diagnostic of the ladder, beside the residuals of its law.

l(x) = (L(x) - E) / (L(1) - E), where x is the part of a run that is done and L(1) how it ends. Of runs whose tokens,
learning rate and batch grow with their size as they should, all l are one curve; a rung that leaves it was set
otherwise than its neighbours. Qiu et al. 2025, arXiv:2507.02119.
R = runs, P = parts of a run.
"""

import json
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PARTS = 20


@dataclass(frozen=True)
class Collapse:
    """Normalised curves."""

    curves_RP: np.ndarray

    @property
    def deviation_P(self) -> np.ndarray:
        """The standard deviation over runs, over the mean: the paper's Delta; 0 at the end, where all are 1."""
        return self.curves_RP.std(0) / self.curves_RP.mean(0)

    @property
    def off_R(self) -> np.ndarray:
        """How far each run is from the middle one of its place, relative: root mean square over the later half."""
        later_RP = self.curves_RP[:, self.curves_RP.shape[1] // 2 :]
        return np.sqrt(((later_RP / np.median(later_RP, 0) - 1) ** 2).mean(1))


def collapse(losses_RP: Sequence[Sequence[float]] | Sequence[np.ndarray] | np.ndarray, E: float) -> Collapse:
    """Curves of loss over equal parts of each run, normalised by a law's E.

    Raises ValueError for fewer than two runs or parts, and for a run that ends at E or below.
    """
    losses_RP = np.asarray(losses_RP, dtype=np.float64)
    if losses_RP.ndim != 2 or min(losses_RP.shape) < 2:
        raise ValueError(f"curves are (runs, parts), 2 of each at least; got shape {losses_RP.shape}")
    end_R1 = losses_RP[:, -1:] - E
    if (below := np.flatnonzero(~(end_R1[:, 0] > 0))).size:
        raise ValueError(f"run {below[0]} ends at {losses_RP[below[0], -1]:.4g}, which is not above E = {E:.4g}")
    return Collapse((losses_RP - E) / end_R1)


def curve(metrics: pathlib.Path, parts: int = PARTS, name: str = "train/loss") -> np.ndarray:
    """(parts,): means of a run's loss over equal parts of its steps, from its metrics.jsonl.

    Raises ValueError where a part has no row: log more often, or take fewer parts.
    """
    if parts < 2:
        raise ValueError(f"parts must be 2 or more, got {parts}")
    try:
        rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        found = np.array([(row["step"], row[name]) for row in rows if name in row], dtype=np.float64).reshape(-1, 2)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{metrics} holds no metrics of a run: {error!r}") from None
    if not len(found):
        raise ValueError(f"{metrics} has no {name}")
    places = np.clip((found[:, 0] - 1) * parts // found[-1, 0], 0, parts - 1).astype(int)
    counts = np.bincount(places, minlength=parts)
    if not counts.all():
        raise ValueError(f"{metrics} has {len(found)} rows of {name}, which leave one of {parts} parts empty")
    return np.bincount(places, found[:, 1], parts) / counts
