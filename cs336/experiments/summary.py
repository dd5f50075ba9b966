"""What the runs of a study say together: the best configuration, and which keys matter."""

import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cs336.experiments import space
from cs336.experiments.ledger import Entry
from cs336.experiments.study import Study
from cs336.training import TrainConfig
from cs336.training.metrics import json_line
from cs336.utils import config as configs
from cs336.utils.files import write_text


@dataclass(frozen=True)
class Group:
    """The runs of one configuration, which differ in their seeds."""

    options: space.Options
    rung: int
    entries: tuple[Entry, ...]
    scores: tuple[float, ...]
    """Of those that are done."""

    @property
    def mean(self) -> float:
        """Infinity where none is done."""
        return statistics.fmean(self.scores) if self.scores else math.inf


def groups(entries: Sequence[Entry], metric: str) -> list[Group]:
    """The configurations, those of the highest rung first, the best of a rung first."""
    found: dict[tuple[str, int], list[Entry]] = {}
    for entry in entries:
        found.setdefault((json.dumps(entry.options, sort_keys=True), entry.rung), []).append(entry)
    made = []
    for (_, rung), members in found.items():
        scores = tuple(s for e in members if math.isfinite(s := e.score(metric)))
        made.append(Group(members[0].options, rung, tuple(members), scores))
    return sorted(made, key=lambda group: (-group.rung, group.mean))


@dataclass(frozen=True)
class Sensitivity:
    """How much of the differences between configurations one key explains."""

    key: str
    share: float
    """Of the variance of the means: between the key's values, or along a parabola over its range. From 0 to 1."""
    spread: float
    """Of the means at its values, or along the parabola: the highest less the lowest."""
    best: Any
    """The value with the lowest mean, or the lowest place of the parabola."""


def sensitivities(axes: Mapping[str, space.Axis], found: Sequence[Group]) -> list[Sensitivity]:
    """Of each key that varies, the strongest first; none where fewer than three configurations are done.

    One key at a time: what two do together is in neither's share.
    """
    done = [group for group in found if group.scores]
    y = np.array([group.mean for group in done])
    if len(done) < 3 or not y.var() > 0:
        return []
    measured = [_effect(key, axis, [group.options[key] for group in done], y) for key, axis in axes.items()]
    return sorted(measured, key=lambda s: -s.share)


def _effect(key: str, axis: space.Axis, values: list[Any], y: np.ndarray) -> Sensitivity:
    if isinstance(axis, space.Range):
        x = np.array([math.log(value) if axis.log else float(value) for value in values])
        degree = min(2, len(set(values)) - 1)
        fit = np.polynomial.Polynomial.fit(x, y, degree)
        along = np.linspace(x.min(), x.max(), 101)
        curve = fit(along)
        lowest = float(along[int(np.argmin(curve))])
        place = float(f"{math.exp(lowest) if axis.log else lowest:.4g}")
        explained = 1 - float(((y - fit(x)) ** 2).mean()) / y.var()
        return Sensitivity(key, _unit(explained), float(curve.max() - curve.min()), place)
    names = [json.dumps(value, sort_keys=True) for value in values]
    means = {name: y[[n == name for n in names]].mean() for name in names}
    between = float(np.mean([(means[name] - y.mean()) ** 2 for name in names])) / y.var()
    best = min(means, key=lambda name: means[name])
    return Sensitivity(key, _unit(between), float(max(means.values()) - min(means.values())), values[names.index(best)])


def _unit(value: float) -> float:
    return float(min(1.0, max(0.0, value)))


def best_config(study: Study, found: Sequence[Group]) -> TrainConfig | None:
    """Of the best configuration, with the first seed; None while no run is done."""
    done = [group for group in found if group.scores]
    if not done:
        return None
    first = min(done[0].entries, key=lambda entry: entry.number)
    return TrainConfig.from_table(first.config | {"run_dir": str(study.directory / "best")})


def save(study: Study, entries: Sequence[Entry]) -> pathlib.Path | None:
    """Write study.json, which the report reads, and best.toml, which `cs336 train` runs; its path, if a run is done."""
    found = groups(entries, study.metric)
    rungs = sorted({group.rung for group in found})
    everyone = [group for group in found if group.rung == 0]  # at one budget
    best = best_config(study, found)
    summary = {
        "metric": study.metric,
        "search": configs.to_table(study.search),
        "budget": study.budget,
        "axes": {key: _axis(axis) for key, axis in study.axes.items()},
        "rungs": len(rungs),
        "groups": [
            {
                "options": group.options,
                "rung": group.rung,
                "mean": group.mean,
                "scores": group.scores,
                "states": [entry.state for entry in group.entries],
                "errors": [entry.error for entry in group.entries if entry.error],
                "seconds": sum(entry.spent.seconds or 0 for entry in group.entries),
                "flops": sum(entry.spent.flops or 0 for entry in group.entries),
                "tokens": sum(entry.spent.tokens or 0 for entry in group.entries),
                "folders": [entry.folder for entry in group.entries],
            }
            for group in found
        ],
        "sensitivities": [dataclasses.asdict(s) for s in sensitivities(study.axes, everyone)],
        "best": None if best is None else best.to_toml(),
    }
    write_text(study.directory / "study.json", json_line(summary, indent=1))
    if best is None:
        return None
    best.save(study.directory / "best.toml")
    return study.directory / "best.toml"


def _axis(axis: space.Axis) -> dict[str, Any]:
    if isinstance(axis, space.Range):
        return {"low": axis.low, "high": axis.high, "log": axis.log}
    return {"values": list(axis)}
