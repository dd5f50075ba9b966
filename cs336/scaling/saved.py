"""A fit on disk: what `cs336 scaling fit --out` writes."""

import json
import pathlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from cs336.scaling.compute import ComputeFit, ComputeLaw
from cs336.scaling.fit import Fit
from cs336.scaling.laws import ChinchillaLaw
from cs336.scaling.points import Counting
from cs336.scaling.rates import PowerFit

T = TypeVar("T")


def load_fit(path: pathlib.Path) -> Fit:
    """Raises ValueError that names the file where it holds no Chinchilla law."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        law = ChinchillaLaw(**{name: saved[name] for name in ("E", "A", "B", "alpha", "beta")})
        resampled = tuple(ChinchillaLaw(*numbers) for numbers in saved["resampled"])
        fit = Fit(law, resampled, np.array(saved["residuals"], dtype=np.float64))
        decays = [
            float(saved.get(f"{name}_decay", old)) for name, old in zip(("repeat", "excess"), fit.decays, strict=True)
        ]
        return replace(fit, decays=(decays[0], decays[1]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} holds no fitted law: expected what `cs336 scaling fit POINTS --law chinchilla --out FILE` writes "
            f"({type(error).__name__}: {error})"
        ) from None


def load_compute_fit(path: pathlib.Path) -> ComputeFit | None:
    """None for a file of another law. Raises ValueError that names the file where its numbers are none."""

    def made(saved: dict[str, Any]) -> ComputeFit:
        laws = [ComputeLaw(*map(float, numbers)) for numbers in saved["resampled"]]
        law = ComputeLaw(*(float(saved[name]) for name in ("E", "A", "gamma")))
        return ComputeFit(law, tuple(laws), np.array(saved["residuals"], dtype=np.float64))

    return _load(path, "compute", made)


def load_critical_batch(path: pathlib.Path) -> PowerFit | None:
    """As load_compute_fit, of the critical batch in "tokens"."""

    def made(saved: dict[str, Any]) -> PowerFit:
        numbers = ([saved["critical_batch"][name] for name in ("coefficient", "tokens")], *saved["resampled"])
        law, *laws = (PowerFit(float(c), {"tokens": float(power)}, (), np.zeros(0)) for c, power in numbers)
        resampled = tuple({"coefficient": other.coefficient, **other.exponents} for other in laws)
        return replace(law, resampled=resampled, residuals=np.array(saved["residuals"], dtype=np.float64))

    return _load(path, "critical-batch", made)


def _load(path: pathlib.Path, law: str, made: Callable[[dict[str, Any]], T]) -> T | None:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return made(saved) if isinstance(saved, dict) and saved.get("law") == law else None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} holds no fitted law ({type(error).__name__}: {error})") from None


def load_counting(path: pathlib.Path) -> Counting:
    """How the runs were counted that a fit on disk is of. Raises ValueError that names the file if it does not say."""
    counting = json.loads(path.read_text(encoding="utf-8")).get("counting", {})
    try:
        return Counting(**counting)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} does not say how its runs were counted ({error})") from None
