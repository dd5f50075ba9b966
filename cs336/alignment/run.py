"""The loop of a stage: one process, a run directory that can be killed at any moment, and go on bit for bit on a CPU.

The files are those of cs336.training.run_dir; metrics have TRL's names, but for train/loss and train/grad_norm.
"""

import contextlib
import dataclasses
import datetime
import math
import pathlib
import platform
import shlex
import sys
import time
from typing import Any

import torch

from cs336 import __version__
from cs336.alignment.stage import FREE, Stage, StageConfig, slow_rate
from cs336.training import checkpoint
from cs336.training.budget import Budget
from cs336.training.config import differences
from cs336.training.decisions import Decisions, Pause
from cs336.training.guard import NonFiniteError
from cs336.training.identity import check_budget
from cs336.training.loggers import Logger, check_installed, open_loggers
from cs336.training.metrics import Display
from cs336.training.rate import LearningRate
from cs336.training.run_dir import RunDir
from cs336.training.signals import stop_requests
from cs336.utils import config as configs
from cs336.utils.commit import commit
from cs336.utils.counted import counted
from cs336.utils.duration import duration
from cs336.utils.files import write_text

EVALUATIONS = 10  # a run, where the configuration does not say


@dataclasses.dataclass(frozen=True)
class StageResult:
    finished: bool
    """False: stopped by a signal, to be continued."""
    step: int
    seconds: float
    metrics: dict[str, float]
    """The last evaluation's."""
    export: pathlib.Path | None
    """Of a finished run: the model in the Hugging Face layout."""


class StageRun:
    """Repeats a stage as its configuration says, and continues the run that is in config.run_dir, if one is.

    Raises ValueError where the run that is there was of another configuration, model or data.
    """

    def __init__(self, config: StageConfig, stage: Stage, display: Display | None = None):
        self.config, self.stage, self.display = config, stage, display or Display()
        self.run = RunDir(config.run_dir, config.keep_checkpoints)
        check_installed(config.loggers)
        _check_same_config(self.run, config, stage.verb)
        self.evaluation = Pause("evaluate", config.eval_interval, EVALUATIONS)
        self.decisions = Decisions(
            config,
            tokens_per_step=1,
            flops_per_step=1,
            pauses=[self.evaluation],
            saved_bytes=sum(t.nbytes for t in stage.module.state_dict().values()) + stage.optimizer.state_bytes(),
        )
        self.rate = LearningRate(config.schedule, config.optimizer.lr, self.decisions.plan)
        self.rate.check()
        self._check_budget()
        self.step, self.tokens, self.metrics = 0, 0, dict[str, float]()
        self._pending: dict[str, list[float]] = {}  # values since the last row
        self._loggers: list[Logger] = []
        self._seconds_before, self._started, self._mark = 0.0, 0.0, (0.0, 0)
        self._cpu_before, self._cpu_started = 0.0, time.process_time()

    @property
    def seconds(self) -> float:
        return self._seconds_before + (time.perf_counter() - self._started if self._started else 0.0)

    @property
    def cpu_seconds(self) -> float:
        """Processor time of this process, which others that are at work on the machine do not lengthen."""
        return self._cpu_before + time.process_time() - self._cpu_started

    def train(self) -> StageResult:
        """Run until the budget is used up or a signal asks to stop, and leave a checkpoint either way.

        Raises NonFiniteError, before the weights change, where a loss or gradient is not finite; OSError where
        something cannot be written; RuntimeError where another process is at this run.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.run.held())
            self._restore()
            self.run.say_lost(self.display.say, self.step)
            self.run.clear_failure()
            self._write_setup()
            stack.enter_context(self.run.open_rows(upto=self.step or -1))
            stack.enter_context(self.run.saving())
            self._loggers = open_loggers(self.config.loggers, self.run.path, configs.to_table(self.config), self.step)
            for logger in self._loggers:
                stack.callback(logger.close)
            stack.enter_context(self.display)
            signalled = stack.enter_context(stop_requests())
            self._started = time.perf_counter()
            self._mark = self.seconds, self.tokens
            self._say_what_runs()
            if not self.step:
                self._evaluate()
            stop = False
            while not (self.decisions.finished(self.step) or stop):
                self._update()
                stop = self.decisions.stop(lambda: signalled() or self.display.lost)
                self._after_step(stop)
            return self._conclude()

    def _update(self) -> None:
        step = self.step + 1
        for group in self.stage.optimizer.param_groups:
            group["lr"] = self.rate.at(step) * group.get("lr_scale", 1.0)
        try:
            values = self.stage.update(step)
        except FloatingPointError as error:
            cause, kept = str(error), self.run.newest()
            saved = None if kept is None else str(kept)
            raise NonFiniteError(f"step {step}: {cause}", step=step, cause=cause, checkpoint=saved) from None
        self.step, self.tokens = step, self.tokens + int(values.pop("tokens"))
        for name, value in values.items():
            self._pending.setdefault(name, []).append(value)

    def _after_step(self, stop: bool) -> None:
        decisions = self.decisions
        if decisions.plan.measuring:
            self.rate.unplanned = self._lr
        planned = decisions.observe(self.step, self.seconds)
        if self.step % self.config.log_interval == 0 or decisions.finished(self.step):
            self._log()
        if decisions.due(self.evaluation, self.step):
            self._evaluate()
        # A decision of the plan is saved before it is acted on: a run that is killed must not decide otherwise. Without
        # checkpoints it begins anew.
        planned &= decisions.saves
        if planned or stop or decisions.due(decisions.save, self.step):
            self._save()

    def _log(self) -> None:
        since, before = self._mark
        self._mark = self.seconds, self.tokens
        speed = (self.tokens - before) / max(self.seconds - since, 1e-9)
        means = {name: math.fsum(values) / len(values) for name, values in self._pending.items()}
        self._pending = {}
        row = {f"train/{name}" if name in ("loss", "grad_norm") else name: value for name, value in means.items()}
        row |= {"train/tok_per_sec": speed, "lr": self._lr}
        self._write(row)
        total, left = self.decisions.plan.total_steps, None
        if total is not None:
            left = self.decisions.seconds_left(self.step, self.seconds, self.seconds / self.step)
        self.display.row(self._position() | row, total, left)

    def _evaluate(self) -> None:
        start = time.perf_counter()
        found = self.stage.evaluate()
        self.decisions.took(self.evaluation, time.perf_counter() - start)
        self._mark = self.seconds, self.tokens
        self.metrics = dict(found.metrics)
        if found.metrics:
            self._write(found.metrics)
        for sample in found.samples:
            self.run.samples.write({"step": self.step} | sample)
        if found.text:
            self.display.say(f"step {self.step}: {found.text}")

    @property
    def _lr(self) -> float:
        return self.stage.optimizer.param_groups[0]["lr"]

    def _position(self) -> dict[str, Any]:
        return {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 3)}

    def _write(self, row: dict[str, Any]) -> None:
        self.run.metrics.write(self._position() | row)
        for logger in self._loggers:
            logger.log(self._position() | row)

    # ---- state ----

    def _check_budget(self) -> None:
        """Raises ValueError, before anything is written, for one that the run has used up already."""
        path, plan = self.run.newest(), self.decisions.plan
        with contextlib.suppress(checkpoint.DamagedError):
            extra = {} if path is None else checkpoint.read_extra(path)
            if path is not None and plan.budget != Budget(**extra["plan"]["budget"]):
                step = checkpoint.load_checkpoint(path)
                check_budget(plan.budget, plan.total_steps, step, extra["seconds"], self.run.path)

    def _save(self) -> None:
        start = time.perf_counter()
        extra = {
            "stage": self.stage.state_dict(), "plan": self.decisions.plan.state_dict(), "rng": checkpoint.rng_state(),
            "seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "tokens": self.tokens, "pending": self._pending,
            "metrics": self.metrics,
            "made_from": self.stage.fingerprints,
        } | self.rate.state_dict()  # fmt: skip
        self.run.save(self.stage.module, self.stage.optimizer, self.step, extra)
        self.decisions.took(self.decisions.save, time.perf_counter() - start)

    def _restore(self) -> None:
        path = self.run.load_newest(self.stage.module, self.stage.optimizer, self.display.say)
        if path is not None:
            self.step, extra = checkpoint.load_checkpoint(path), checkpoint.read_extra(path)
            made_from = extra["made_from"]
            if others := [name for name, digest in self.stage.fingerprints.items() if made_from.get(name) != digest]:
                raise ValueError(
                    f"{self.run.path} holds a run with another {' and '.join(others)}: use another run_dir, or the "
                    "same to continue it"
                )
            self.stage.load_state_dict(extra["stage"])
            self.decisions.plan.load_state_dict(extra["plan"])
            self.rate.load_state_dict(extra, held=self._lr)
            self._seconds_before, self.tokens, self._pending = extra["seconds"], extra["tokens"], extra["pending"]
            self._cpu_before = extra.get("cpu_seconds", 0.0)  # runs of before had none
            self.metrics = extra["metrics"]
            checkpoint.set_rng_state(extra["rng"])
        self.stage.begin()

    # ---- beginning and end ----

    def _write_setup(self) -> None:
        saved = dataclasses.replace(self.config, init_from=self.config.init_from.resolve())
        write_text(self.run.path / "config.toml", configs.dumps(saved))
        before, policy = self.run.facts() if self.step else {}, self.stage.policy
        device = policy.device
        on_cpu = f"CPU, {torch.get_num_threads()} threads"
        facts = {
            "stage": self.stage.verb,
            "device": on_cpu if device.type == "cpu" else torch.cuda.get_device_name(device),
            "parameters": policy.model.config.num_parameters(),
            "learned_parameters": sum(p.numel() for p in self.stage.module.parameters() if p.requires_grad),
            "precision": "bfloat16" if policy.low else "float32",
            "made_from": self.stage.fingerprints,
            "command": shlex.join(sys.argv),
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "cs336": __version__,
            "commit": commit(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        self.run.write_facts(before | facts)

    def _say_what_runs(self) -> None:
        there = {*self.stage.policy.model.parameters(), *self.stage.module.parameters()}  # heads and critics too
        learned = sum(p.numel() for p in self.stage.module.parameters() if p.requires_grad)
        total = self.decisions.plan.total_steps
        steps = "as many steps as fit" if total is None else counted(total, "step")
        self.display.say(
            f"{learned:,} of {sum(p.numel() for p in there):,} parameters learn on "
            f"{self.stage.policy.device}; {self.stage.describe()}; budget {self.config.budget}: {steps}"
        )
        if self.step:
            self.display.say(f"continuing after step {self.step}")
        elif hint := slow_rate(self.config, self.stage.policy.model.config.num_parameters()):
            self.display.say(hint)

    def _conclude(self) -> StageResult:
        self.run.wait()
        finished, export = self.decisions.finished(self.step), None
        if finished:
            export = self.run.export
            self.stage.export(export, self.step)
            took = {"seconds": round(self.seconds, 2), "cpu_seconds": round(self.cpu_seconds, 2)}
            self.run.write_facts(self.run.facts() | took)
            self.display.say(f"finished {counted(self.step, 'step')} in {duration(self.seconds)}: {export}")
        else:
            self.display.say(f"stopped after step {self.step}; to continue, run the same command again")
        return StageResult(finished, self.step, self.seconds, self.metrics, export)


def _check_same_config(run: RunDir, config: StageConfig, verb: str) -> None:
    """Raises ValueError where the run that is there cannot go on as this one."""
    if not run.goes_on(verb):
        return
    saved = configs.load(type(config), run.path / "config.toml")
    if changed := differences(saved, config, FREE):
        raise ValueError(
            f"{run.path} holds a run with another configuration ({'; '.join(changed)}): use another run_dir, or the "
            "same configuration to continue it"
        )
