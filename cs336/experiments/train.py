"""One run of a study: trained without a word, and what came of it as a row of numbers."""

import json
import os
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console

from cs336.experiments.study import Cost
from cs336.training import TrainConfig, Trainer
from cs336.training.metrics import Display
from cs336.utils.rows import newest_row, read_rows
from cs336.utils.stages import Interrupted

TAIL = 0.1  # of a run: its training loss is the mean over the last rows
Result = dict[str, Any]
Train = Callable[[TrainConfig], Result]


def train_run(config: TrainConfig) -> Result:
    """Train, or continue, the run in config.run_dir.

    Returns its last validation ("val/loss", "val/bpb"), "train/loss" of the last tenth, "train/tok_per_sec" (median),
    "parameters", "step", and on a GPU "peak_memory_bytes". Raises Interrupted where a signal stopped it, and what
    Trainer raises.
    """
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with open(os.devnull, "w") as nowhere:
        trainer = Trainer(config, display=Display(Console(file=nowhere)))
        done = trainer.train()
    if not done.finished:
        raise Interrupted
    rows = [row for row in read_rows(config.run_dir) if "train/loss" in row]
    last = [row["train/loss"] for row in rows[-max(1, round(TAIL * len(rows))) :]]
    result: Result = {"parameters": config.model.num_parameters(), "step": done.step, **done.val}
    if rows:
        result |= {"train/loss": statistics.fmean(last)}
        result |= {"train/tok_per_sec": statistics.median(row["train/tok_per_sec"] for row in rows)}
    if trainer.learner.device.type == "cuda":
        result["peak_memory_bytes"] = torch.cuda.max_memory_allocated(trainer.learner.device)
    return result


def reached(run_dir: pathlib.Path) -> Cost:
    """What a run has taken since it was begun, or has left its trunk, by its rows."""
    newest = newest_row(run_dir)
    if newest is None:
        return Cost(0, 0, 0)
    try:
        facts = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        facts = {}
    tokens, budgets = newest.get("tokens", 0), facts.get("budgets")
    if budgets and (begun := budgets[0]["from_step"]):
        tokens -= begun * tokens // newest["step"]
    return Cost(tokens * facts.get("flops_per_token", 0), tokens, newest.get("seconds", 0))
