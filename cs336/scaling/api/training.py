"""Runs that are trained, on the operator's data."""

import contextlib
import math
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cs336.experiments.study import cost, identity
from cs336.experiments.train import train_run
from cs336.scaling import run_plan
from cs336.scaling.api.jobs import FieldError, Interrupted, Job
from cs336.scaling.api.protocol import HIGHEST_LR, LOWEST_LR, RunRequest
from cs336.scaling.laws import step_law
from cs336.training import TrainConfig
from cs336.training.config import FREE
from cs336.utils import config as configs
from cs336.utils import stages

# What a user may not say: where things are, and how they are computed.
OPERATORS = (FREE | {"init_from", "branch_from"}) - {"budget", "micro_batch_size", "gradient_checkpointing"}
STOP_POLL = 0.5  # seconds between two looks whether a run shall stop
NEAREST = 1.25  # what a size that is asked for may be off the shape's that it is given


@dataclass(frozen=True)
class Training:
    """A Backend."""

    base: dict[str, Any]
    """Of `cs336 train`, but for run_dir: data and model, for a size that a user asks for; the rest is what users leave
    out."""
    kind: Literal["train"] = "train"

    @staticmethod
    def load(path: str | os.PathLike) -> "Training":
        """Read a TOML file. Raises ValueError, naming the file and the key, for what cannot be trained."""
        table = {name: value for name, value in configs.read_table(path).items() if name != "run_dir"}
        try:
            TrainConfig.from_table(table | {"run_dir": "."})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return Training(table)

    def plan(self, asked: RunRequest) -> Job:
        if asked.config is not None:
            return plan_config(asked.config, self.base)
        assert asked.parameters is not None
        assert asked.tokens is not None
        base = TrainConfig.from_table(self.base | {"run_dir": "."})
        wanted = asked.parameters
        shape = min(
            run_plan.shapes(base.model.vocab_size, base.model.context_length),
            key=lambda shape: abs(math.log(shape.num_parameters() / wanted)),
        )
        if not 1 / NEAREST < shape.num_parameters() / wanted < NEAREST:
            raise FieldError("parameters", f"no shape has {wanted:g}: the nearest has {shape.num_parameters():,}")
        lr, batch = step_law(shape.num_parameters(embeddings=False), asked.tokens)
        lr, batch = asked.learning_rate or min(run_plan.HIGHEST_LR, lr), asked.batch_tokens or batch
        table: dict[str, Any] = {"model": configs.to_table(shape), "budget": f"{asked.tokens:.0f}tok"}
        table |= {"batch_size": max(1, round(batch / base.model.context_length)), "seed": asked.seed}
        table["optimizer"] = self.base.get("optimizer", {}) | {"lr": lr}
        return plan_config(table, self.base)

    def run(self, job: Job, folder: pathlib.Path, stopped: Callable[[], bool]) -> float:
        if stopped():
            raise Interrupted
        assert job.config is not None
        try:
            with _signalled(stopped):
                result = train_run(TrainConfig.from_table(job.config | {"run_dir": str(folder)}))
        except stages.Interrupted:
            raise Interrupted from None
        loss = float(result["val/loss"] if "val/loss" in result else result["train/loss"])
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        return loss


@contextlib.contextmanager
def _signalled(stopped: Callable[[], bool]) -> Iterator[None]:
    """Raise SIGTERM, which a trainer listens to, once it is stopped."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(STOP_POLL):
            if stopped():
                signal.raise_signal(signal.SIGTERM)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def plan_config(given: Mapping[str, Any], base: Mapping[str, Any]) -> Job:
    """A user's configuration over the operator's: a key replaces the base's. Raises FieldError that names the key."""
    if theirs := sorted(set(given) & OPERATORS):
        raise FieldError(f"config.{theirs[0]}", f"{theirs[0]} is the operator's: leave it out")
    try:
        config = TrainConfig.from_table({**base, **given, "run_dir": "."})
        if not LOWEST_LR <= (lr := config.optimizer.lr) <= HIGHEST_LR:
            raise ValueError(f"optimizer.lr must be from {LOWEST_LR:g} to {HIGHEST_LR:g}, got {lr:g}")
        planned = cost(config)
        return Job(
            identity(config),
            parameters=float(config.model.num_parameters()),
            flops_per_token=float(config.model.flops_per_token()),
            tokens=None if planned.tokens is None else float(planned.tokens),
            seconds=planned.seconds,
            learning_rate=lr,
            batch_tokens=float(config.batch_size * config.model.context_length),
            seed=config.seed,
            config={name: value for name, value in configs.to_table(config).items() if name != "run_dir"},
        )
    except (ValueError, OverflowError, RecursionError) as error:
        raise FieldError("config", str(error)) from None
