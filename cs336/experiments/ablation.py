"""An ablation: arms of one size, each trained with several seeds, and whether they differ by more than chance."""

import dataclasses
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cs336.experiments.arms import Arm, Match
from cs336.experiments.ledger import Entry
from cs336.experiments.significance import holm, mean, welch
from cs336.experiments.study import Local, Outcome, Trial, Where
from cs336.models.memory import training_memory
from cs336.training.metrics import json_line
from cs336.utils.files import write_text

CACHE_BYTES = 2  # of an element of a decoding state: bfloat16


@dataclass(frozen=True)
class Ablation:
    """What `run_study` trains: every arm with the same seeds, seed by seed, so that a budget cuts all alike."""

    directory: pathlib.Path
    key: str
    """What differs."""
    arms: Sequence[Arm]
    seeds: int = 3
    """How many, from the base's on."""
    match: Match = "params"
    budget: str | None = None
    metric: str = "val/loss"
    where: Where = field(default_factory=Local)

    def __post_init__(self):
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        if self.metric.startswith("val/") and any(arm.config.data.val is None for arm in self.arms):
            raise ValueError(f"metric {self.metric} needs data.val")

    @property
    def runs(self) -> pathlib.Path:
        return self.directory / "runs"

    def trials(self, ended: Iterable[Outcome] = ()) -> list[Trial]:
        return [
            Trial.of(dataclasses.replace(arm.config, seed=arm.config.seed + i), {self.key: arm.name})
            for i in range(self.seeds)
            for arm in self.arms
        ]


@dataclass(frozen=True)
class Row:
    """What came of an arm."""

    name: str
    scores: tuple[float, ...]
    """Of the seeds that are done."""
    mean: float | None
    half_width: float | None
    """Of the 95 % interval; None with fewer than two seeds."""
    difference: float | None
    """Of the mean to the reference's."""
    p: float | None
    """Of Welch's test against the reference, corrected for the number of arms by Holm's method."""
    parameters: int
    flops_per_token: int
    residual: float
    d_ff: int | None
    tokens_per_second: float | None
    """Median over the runs' medians."""
    memory_bytes: int
    """Of a training step: the most that a GPU's allocator gave, or what is predicted on a CPU."""
    measured: bool
    """Whether memory_bytes was."""
    state_bytes: int
    """Of a sequence of context_length tokens while decoding, in bfloat16."""
    failures: tuple[str, ...]

    @property
    def significant(self) -> bool:
        return self.p is not None and self.p < 0.05


def rows(ablation: Ablation, entries: Sequence[Entry]) -> list[Row]:
    """A row an arm, the reference first, as in ablation.arms."""
    of = {arm.name: [e for e in entries if e.options == {ablation.key: arm.name}] for arm in ablation.arms}
    scores = {
        name: tuple(e.score(ablation.metric) for e in members if ablation.metric in e.result and e.state == "done")
        for name, members in of.items()
    }
    reference = scores[ablation.arms[0].name]
    tests = {arm.name: welch(scores[arm.name], reference) for arm in ablation.arms[1:]}
    known = {name: p for name, p in tests.items() if p is not None}
    corrected = dict(zip(known, holm(list(known.values())), strict=True))
    found = []
    for arm in ablation.arms:
        mine = scores[arm.name]
        middle = mean(mine) if mine else None
        results = [entry.result for entry in of[arm.name] if entry.state == "done"]
        speeds = [result["train/tok_per_sec"] for result in results if "train/tok_per_sec" in result]
        peaks = [result["peak_memory_bytes"] for result in results if "peak_memory_bytes" in result]
        compare = arm is not ablation.arms[0] and mine and reference
        found.append(
            Row(
                name=arm.name,
                scores=mine,
                mean=None if middle is None else middle.value,
                half_width=None if middle is None else middle.half_width,
                difference=statistics.fmean(mine) - statistics.fmean(reference) if compare else None,
                p=corrected.get(arm.name),
                parameters=arm.config.model.num_parameters(),
                flops_per_token=arm.config.model.flops_per_token(),
                residual=arm.residual,
                d_ff=arm.d_ff,
                tokens_per_second=statistics.median(speeds) if speeds else None,
                memory_bytes=max(peaks) if peaks else _predicted(arm),
                measured=bool(peaks),
                state_bytes=arm.config.model.state_bytes(width=CACHE_BYTES),
                failures=tuple(e.error for e in of[arm.name] if e.error),
            )
        )
    return found


def _predicted(arm: Arm) -> int:
    """Of a step in float32 with AdamW, as a CPU trains it: what compares arms where nothing was measured."""
    return training_memory(arm.config.model, arm.config.micro_batch_size or arm.config.batch_size).total


def save(ablation: Ablation, entries: Sequence[Entry]) -> list[Row]:
    """Write ablation.json, which the report reads."""
    found = rows(ablation, entries)
    summary: dict[str, Any] = {
        "key": ablation.key,
        "match": ablation.match,
        "metric": ablation.metric,
        "seeds": ablation.seeds,
        "budget": ablation.arms[0].config.budget,
        "rows": [dataclasses.asdict(row) | {"significant": row.significant} for row in found],
        "folders": {row.name: _folders(ablation, entries, row.name) for row in found},
    }
    write_text(ablation.directory / "ablation.json", json_line(summary, indent=1))
    return found


def _folders(ablation: Ablation, entries: Sequence[Entry], name: str) -> list[str]:
    return [entry.folder for entry in entries if entry.options == {ablation.key: name} and entry.state == "done"]
