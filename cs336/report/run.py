"""What a run directory holds, read without trusting it: a killed run leaves torn lines, a young one lacks files."""

import json
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cs336.utils.locks import is_locked


@dataclass
class Run:
    """The files of a run directory as plain data; what could not be read is named in `missing`."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    generated: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, Any] = field(default_factory=dict)
    failure: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    """Of a reward model."""
    full: dict[str, Any] = field(default_factory=dict)
    """Of a quickstart that went on to a model that answers: what each model can do."""
    finished: bool = False
    """There is an export."""
    running: bool = False
    """A process holds the directory."""
    missing: list[str] = field(default_factory=list)

    def column(self, name: str, against: str = "step") -> tuple[list[float], list[float]]:
        """(xs, ys) of the lines that hold both numbers; a NaN stays, so that a diverged run shows where it did."""
        rows = [(number(m.get(against)), number(m.get(name))) for m in self.metrics]
        both = [(x, y) for x, y in rows if x is not None and y is not None]
        return [x for x, _ in both], [y for _, y in both]

    def last(self, name: str) -> float | None:
        values = [y for y in self.column(name)[1] if math.isfinite(y)]
        return values[-1] if values else None

    @property
    def bits_per_byte(self) -> float | None:
        """Of the evaluation; without one, of the last validation."""
        return number(self.evaluation.get("bits_per_byte")) if self.evaluation else self.last("val/bpb")


def number(value: Any) -> float | None:
    """A number; one that is not finite is a string in the files, because JSON has none."""
    if value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf if value > 0 else -math.inf


def shown(value: Any) -> str:
    """A JSON value for a table."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def listing(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def read_run(run_dir: str | Path) -> Run:
    """Read what is there.

    Raises FileNotFoundError if run_dir is not a directory, ValueError if it holds nothing a run would have written.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a directory: give the run directory of a training run")
    run = Run(path.resolve())
    run.config = _read(run, "config.toml", "the configuration", tomllib.loads)
    run.facts = _read(run, "run.json", "versions, device and parameter count", json.loads)
    run.metrics = _one_a_step(_lines(run, "metrics.jsonl", "loss, throughput and every other curve"))
    run.samples = _lines(run, "samples.jsonl", "generated samples")
    run.generated = _lines(run, "generated.jsonl", "longer texts from the finished model")
    run.evaluation = _read(run, "evaluation.json", "the evaluation on held-out text", json.loads)
    run.tokenizer = _read(run, "tokenizer_stats.json", "tokenizer statistics", json.loads)
    run.stages = _read(run, "stages.json", "stage times", json.loads)
    if (path / "failure.json").exists():
        run.failure = _read(run, "failure.json", "why it stopped", json.loads)
    if (path / "calibration.json").exists():
        run.calibration = _read(run, "calibration.json", "how sure a reward model is", json.loads)
    run.finished = (path / "export" / "config.json").exists()
    run.running = is_locked(path)
    _measure_the_last_step_once(run)
    if (path / "full.json").exists():
        run.full = _read(run, "full.json", "what each model can do", json.loads)
    kinds = (run.config, run.facts, run.metrics, run.samples, run.generated, run.evaluation, run.tokenizer, run.stages)
    if not any(kinds):
        raise ValueError(f"{path} is not a run directory: it has neither metrics.jsonl nor any other file of a run")
    return run


def _measure_the_last_step_once(run: Run) -> None:
    """Put the evaluation of the finished model in place of the last validation, which read less of the same text."""
    step, loss = number(run.evaluation.get("step")), number(run.evaluation.get("loss"))
    if run.evaluation.get("text") or loss is None or not run.metrics:
        return
    validated = [row for row in run.metrics if "val/loss" in row]
    if validated and step in (None, validated[-1].get("step")):
        bits = number(run.evaluation.get("bits_per_byte"))
        validated[-1].update({"val/loss": loss} | ({} if bits is None else {"val/bpb": bits}))


def _read(run: Run, name: str, what: str, parse: Any) -> dict[str, Any]:
    file = run.path / name
    if not file.is_file():
        run.missing.append(f"{name} is not there yet: {what}")
        return {}
    try:
        value = parse(file.read_text(encoding="utf-8", errors="replace"))
    except ValueError as error:
        run.missing.append(f"{name} cannot be read ({error}): {what}")
        return {}
    return mapping(value)


def _lines(run: Run, name: str, what: str) -> list[dict[str, Any]]:
    file = run.path / name
    if not file.is_file():
        run.missing.append(f"{name} is not there yet: {what}")
        return []
    lines, torn = [], 0
    with file.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            try:
                value = json.loads(line)
            except ValueError:
                torn += bool(line.strip())
                continue
            if isinstance(value, dict):
                lines.append(value)
    if torn:
        run.missing.append(f"{torn} line{'s' * (torn > 1)} of {name} cannot be read (a killed run tears its last line)")
    return lines


def _one_a_step(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge the lines of each step, the later winning: a resumed run repeats the steps after its checkpoint."""
    steps: dict[float, dict[str, Any]] = {}
    for line in lines:
        step = number(line.get("step"))
        if step is not None and math.isfinite(step):
            steps.setdefault(step, {}).update(line)
    return [steps[step] for step in sorted(steps)]
