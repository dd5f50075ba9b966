"""Finished runs as arrays: parameters, tokens, FLOPs, loss; read from CSV or JSON, or from a study's ledger."""

import csv
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from cs336.models import TransformerConfig  # and torch with it, which a client and a simulator's worker do without

# What others call the columns, in lower case.
NAMES = {
    "parameters": ("parameters", "params", "n", "num_parameters", "model size"),
    "tokens": ("tokens", "d", "num_tokens", "training tokens"),
    "flops": ("flops", "c", "compute", "compute_budget", "training flop"),
    "loss": ("loss", "final_loss", "val/loss", "val_loss"),
}
# The same without the token embedding and the output head.
INNER = ("parameters_without_embeddings", "non_embedding_parameters", "non_embedding_params", "n_non_embedding")
SAME_BUDGET = 0.01  # relative difference of FLOPs between neighbours of one budget


@dataclass(frozen=True)
class Counting:
    """What is counted as a run's parameters and FLOPs. Raises ValueError for other ways than these."""

    embeddings: bool = True
    """Whether the token embedding and the output head are among the parameters."""
    flops: Literal["exact", "6nd"] = "exact"
    """exact: as the model counts them, with attention and the head; 6nd: 6 parameters * tokens (arXiv:2001.08361)."""

    def __post_init__(self):
        if not isinstance(self.embeddings, bool) or self.flops not in ("exact", "6nd"):
            raise ValueError(
                f'embeddings must be true or false, flops "exact" or "6nd"; got {self.embeddings} and {self.flops!r}'
            )

    def of(self, model: "TransformerConfig", tokens: float) -> tuple[int, float]:
        """Parameters and FLOPs of a run."""
        parameters = model.num_parameters(self.embeddings)
        return parameters, tokens * (model.flops_per_token() if self.flops == "exact" else 6 * parameters)


COUNTING = Counting()


@dataclass(frozen=True)
class Points:
    """Runs, one or more: (n,) float64 arrays. Raises ValueError for none, for lengths that differ and values that are
    not positive."""

    parameters: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    flops: np.ndarray
    """6 parameters * tokens, unless it was counted in another way."""

    def __post_init__(self):
        for name in ("parameters", "tokens", "loss", "flops"):
            values = np.asarray(getattr(self, name), dtype=np.float64)
            object.__setattr__(self, name, values)
            if values.ndim != 1 or len(values) != len(self.parameters):
                raise ValueError(f"{name} must be one number a run, {len(self.parameters)}; got shape {values.shape}")
            check_all_positive(name, values)
        if not len(self.parameters):
            raise ValueError("there are no runs: expected one or more")

    @staticmethod
    def of(parameters, tokens, loss, flops=None) -> "Points":
        parameters, tokens = np.asarray(parameters, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
        return Points(parameters, tokens, np.asarray(loss), 6 * parameters * tokens if flops is None else flops)

    def __len__(self) -> int:
        return len(self.parameters)

    def take(self, which: np.ndarray) -> "Points":
        return Points(self.parameters[which], self.tokens[which], self.loss[which], self.flops[which])

    def by_budget(self) -> list["Points"]:
        """The runs of each budget, in its order: FLOPs within 1 % are one budget."""
        order = np.argsort(self.flops, kind="stable")
        flops = self.flops[order]
        ends = np.flatnonzero(np.diff(flops) > SAME_BUDGET * flops[:-1]) + 1
        return [self.take(part) for part in np.split(order, ends)]


def check_all_positive(name: str, values: np.ndarray) -> None:
    if bad := np.flatnonzero(~(np.isfinite(values) & (values > 0))).tolist():
        raise ValueError(f"{name} must be positive and finite; run {bad[0] + 1} of {len(values)} has {values[bad[0]]}")


def read_points(path: str | os.PathLike, counting: Counting = COUNTING) -> Points:
    """Runs from a CSV file with a header, a JSON list of objects, or JSON lines; or the finished runs of a study, whose
    directory this is.

    Columns: loss, and two of parameters, tokens and flops; the third follows from flops = 6 parameters * tokens
    (arXiv:2001.08361). Other usual names are understood: N, D, C, compute_budget, final_loss, val/loss. Counted without
    embeddings, the column non_embedding_parameters stands for parameters; counted as 6nd, a column of FLOPs is left.

    Raises ValueError that names the file, the row and what is missing.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return _of_study(path, counting)
    numbers, have = read_columns(path, NAMES if counting.embeddings else NAMES | {"parameters": INNER})
    if "loss" not in numbers or len(numbers) < 3 or not (counting.embeddings or "parameters" in numbers):
        parameters = "parameters" if counting.embeddings else INNER[1]
        raise ValueError(f"{path} must have loss and two of {parameters}, tokens and flops as columns; it has {have}")
    if "tokens" not in numbers:
        numbers["tokens"] = numbers["flops"] / (6 * numbers["parameters"])
    if "parameters" not in numbers:
        numbers["parameters"] = numbers["flops"] / (6 * numbers["tokens"])
    try:
        flops = numbers.get("flops") if counting.flops == "exact" else None
        return Points.of(numbers["parameters"], numbers["tokens"], numbers["loss"], flops)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_columns(path: str | os.PathLike, names: Mapping[str, Sequence[str]]) -> tuple[dict[str, np.ndarray], str]:
    """The columns of a CSV file with a header, a JSON list of objects, or JSON lines, that are called as `names` say,
    in any case; and what all its columns are called.

    Raises ValueError that names the file, the row and what is wrong.
    """
    path = pathlib.Path(path)
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    rows = _json_rows(text, path) if path.suffix in (".json", ".jsonl") else _csv_rows(text, path)
    if not rows:
        raise ValueError(f"{path} holds no runs")
    known = [_named(row, names) for row in rows]
    columns = {name: [row.get(name) for row in known] for name in names}
    present = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    return {name: _numbers(name, values, path) for name, values in present.items()}, ", ".join(map(str, rows[0]))[:200]


def _of_study(directory: pathlib.Path, counting: Counting) -> Points:
    from cs336.experiments import Ledger  # and torch with it
    from cs336.experiments.study import TRUNK, cost
    from cs336.training import TrainConfig

    if not (directory / "ledger.sqlite").exists():
        raise ValueError(f"{directory} holds no study: expected what `cs336 sweep` writes, or a file of runs")
    rows = []
    for entry in Ledger(directory).entries():
        if entry.state == "done" and TRUNK not in entry.options:  # a trunk's rate has not fallen yet
            config = TrainConfig.from_table(entry.config | {"run_dir": str(directory)})
            planned = cost(config).tokens
            tokens = entry.spent.tokens if planned is None else planned  # a budget of time says them when it is over
            assert tokens is not None  # a run that is done has said them
            parameters, flops = counting.of(config.model, tokens)
            rows.append((parameters, tokens, entry.score("val/loss"), flops))
    if not rows:
        raise ValueError(f"{directory} holds a study without a finished run")
    return Points(*map(np.array, zip(*rows, strict=True)))


def _csv_rows(text: str, path: pathlib.Path) -> list[dict[str, Any]]:
    try:
        return list(csv.DictReader(text.splitlines()))
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV: {error}") from None


def _json_rows(text: str, path: pathlib.Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()] if path.suffix == ".jsonl" else None
        rows = json.loads(text) if rows is None else rows
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f'{path} must hold a list of objects like {{"parameters": 1e6, "flops": 1e15, "loss": 4.2}}')
    return rows


def _named(row: dict[str, Any], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    lower = {str(key).strip().lower(): value for key, value in row.items()}
    return {
        name: next(lower[other] for other in others if other in lower)
        for name, others in names.items()
        if any(other in lower for other in others)
    }


def _numbers(name: str, values: list[Any], path: pathlib.Path) -> np.ndarray:
    numbers = []
    for row, value in enumerate(values, 1):
        try:
            numbers.append(float(value))
        except (TypeError, ValueError):
            raise ValueError(f"{path}, run {row}: {name} must be a number, got {value!r}") from None
    return np.array(numbers)
