"""The training loop: one process or several, and a run directory that can be killed at any moment.

Several processes, that torchrun started, make the steps of one: each takes its share of a batch on its own device, all
decide alike (see cs336.training.decisions), and rank 0 alone writes.

A step follows from the configuration and the checkpoint before it alone, so that a run continued from its newest
checkpoint repeats the lost steps bit for bit. On a GPU the host waits for the device only at rows, validations,
samples and checkpoints. The files are those of cs336.training.run_dir.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cs336.data import TokenDataset, TokenLoader
from cs336.models import Transformer, save_pretrained
from cs336.parallel.launch import agreed, connect, from_ranks, on_first, rank, together, world_size
from cs336.parallel.watch import watching
from cs336.training import checkpoint
from cs336.training.budget import Budget
from cs336.training.config import TrainConfig
from cs336.training.decisions import Decisions
from cs336.training.evaluators import Evaluator, Sample, Samples, Validation
from cs336.training.facts import announcement, describe, measured, memory_used, peak_memory
from cs336.training.guard import NonFiniteError, NonFiniteStep, SpikeError, StepError, StepGuard, steepest
from cs336.training.identity import (
    check_budget,
    check_ranks,
    check_same_config,
    check_same_data,
    fingerprints,
    kept_tokenizer,
)
from cs336.training.learner import Learner
from cs336.training.loggers import Logger, check_installed, open_loggers
from cs336.training.metrics import Display, Meter
from cs336.training.objectives import Batch
from cs336.training.rate import LearningRate
from cs336.training.run_dir import RunDir
from cs336.training.signals import stop_requests
from cs336.utils.config import to_table
from cs336.utils.counted import counted
from cs336.utils.duration import duration
from cs336.utils.nvtx import annotate

if TYPE_CHECKING:
    from cs336.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TrainResult:
    finished: bool
    """False: stopped by a signal, to be continued."""
    step: int
    tokens: int
    seconds: float
    val: dict[str, float]
    """The last validation: "val/loss" in nats per token and "val/bpb"; empty without validation data."""
    checkpoint: pathlib.Path
    export: pathlib.Path | None
    """Of a finished run."""
    pauses: dict[str, float]
    """Seconds of this process between steps, by what was done: validate, sample, checkpoint."""


class Trainer:
    """Trains a Transformer as a TrainConfig says, and continues the run that is in config.run_dir, if one is.

    Under torchrun every process makes one and calls `train`.

    Args:
        tokenizer: of the data; checked against them and exported with the model. None: the one beside the shards.
        sample: called with the model in eval mode; returns rows like {"prompt": ..., "text": ...}.

    Raises ValueError for data, a schedule or a configuration that cannot work, or that is not that of every process,
    before anything is written.
    """

    step: int
    """Optimizer steps done."""
    val: dict[str, float]
    """The last validation."""
    _started: float  # on the clock; 0 before `train`
    _seconds_before: float  # of the processes that this one continues
    _restored: pathlib.Path | None  # the checkpoint this continues
    _newest: pathlib.Path | None  # the one last written or seen, whole or not
    _rebudgeted: bool  # the run that is continued had another budget
    _suspect: NonFiniteStep | None  # the step up to which steps are being repeated

    def __init__(
        self,
        config: TrainConfig,
        *,
        tokenizer: "Tokenizer | None" = None,
        sample: Sample | None = None,
        display: Display | None = None,
    ):
        connect(config.device)
        self.config, self.display = config, display or Display(silent=rank() > 0)
        self.run = RunDir(config.run_dir, config.keep_checkpoints)
        self.loggers: list[Logger] = []
        self.tokenizer = kept_tokenizer(config.data.train) if tokenizer is None else tokenizer
        together(self._open)
        check_ranks(config, self.fingerprints)
        self._repeated: set[int] = set()  # steps that were not finite once
        self._refused: str | None = None  # why the latest step was left out
        self.evaluators: list[Evaluator] = []
        if self.val_data is not None:
            self.evaluators.append(Validation(self.val_data, config))
        if sample is not None:
            self.evaluators.append(Samples(sample, config))
        self.tokens_per_step = config.batch_size * config.model.context_length
        self._restore()
        self.rate.check()

    def _open(self) -> None:
        """What is there already, and the data."""
        check_same_config(self.run.saved_config(), self.config)
        check_installed(self.config.loggers)
        self.train_data = self._data(self.config.data.train)
        self.val_data = None if self.config.data.val is None else self._data(self.config.data.val)
        self.fingerprints = fingerprints(self.train_data, self.val_data)

    @property
    def tokens(self) -> int:
        return self.step * self.tokens_per_step

    @property
    def seconds(self) -> float:
        """Wall time of training so far, of this process and of those it continues."""
        return self._seconds_before + (time.perf_counter() - self._started if self._started else 0.0)

    def train(self) -> TrainResult:
        """Train until the budget is used up or a signal asks to stop, and leave a checkpoint either way.

        Raises NonFiniteError if the loss or a gradient stops being finite and does so again when the steps are
        repeated, OSError if something cannot be written, RuntimeError if another process is at this run.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.run.held())
            stack.enter_context(watching(self.config.parallel.timeout, self.run.record_failure))
            went_on = self._started > 0 or self.run.newest() != self._newest  # an earlier call, or another process
            if agreed(went_on):
                self._restore()
            self.run.say_lost(self.display.say, self.step)
            on_first(self._write_setup)
            together(lambda: stack.enter_context(self.run.open_rows(self.step, self.config.parallel.log_ranks)))
            stack.enter_context(self.run.saving())
            on_first(lambda: self._open_loggers(stack))
            stack.enter_context(self.display)
            signalled = stack.enter_context(stop_requests())
            self._started = time.perf_counter()
            self.meter.start()
            self._announce()
            stop = False
            while not (self.decisions.finished(self.step) or stop):
                try:
                    if self._suspect is not None and self.step + 1 == self._suspect.step:
                        self._examine(self._suspect)
                    self._update()
                    stop = self.decisions.stop(lambda: signalled() or self.display.lost)
                    self._after_step(stop)
                except NonFiniteStep as bad:
                    self._go_back(bad)
                    stop = False
            return self._conclude()

    def _open_loggers(self, stack: contextlib.ExitStack) -> None:
        self.loggers = open_loggers(self.config.loggers, self.run.path, to_table(self.config), self.step)
        for logger in self.loggers:
            stack.callback(logger.close)

    # ---- a step, and what comes after it ----

    def _update(self) -> None:
        with annotate("step"):
            step, batch, self._refused = self.step + 1, next(self.loader), None
            accept = functools.partial(self._accept, batch) if self.config.guard.reads_each_step else None
            values = self.learner.update(batch, self.rate.at(step), self.rate.done(step), accept)
            if self._refused is None:
                self.guard.skipped = 0
                self.meter.add(values)
            else:
                self.meter.settle(self.step)
                self.display.say(f"step {step} is left out: {self._refused}")
        self.step += 1

    def _after_step(self, stop: bool) -> None:
        decisions, planned = self.decisions, False
        if decisions.look(self.step, time.perf_counter() - self.meter.mark):
            self.meter.settle(self.step)
            planned = self._plan()
            self._log()
        for evaluator in self.evaluators:
            if decisions.due(evaluator.pause, self.step):
                self._evaluate(evaluator)
        # A decision of the plan is saved before it is acted on: a run that is killed must not decide otherwise, unless
        # it begins anew.
        planned &= decisions.saves
        if planned or stop or decisions.due(decisions.save, self.step):
            self._save(background=not (planned or stop))

    def _plan(self) -> bool:
        """Look at the time; whether the number of steps changed. Steps that are repeated keep their plan."""
        if self._suspect is not None and self.step < self._suspect.step:
            return False
        plan = self.decisions.plan
        if plan.measuring:
            self.rate.unplanned = self._lr
        planned = self.decisions.observe(self.step, self.seconds)
        if planned and len(plan.decisions) == 1:
            self.rate.check()
            self._announce_rate()
        return planned

    def _log(self) -> None:
        if self.meter.empty:  # all were left out
            return
        row = self._position() | self.meter.row() | {"lr": self._lr}
        speed = row["train/tok_per_sec"]
        if self.learner.peak_flops:
            row["train/mfu"] = speed * self.config.model.flops_per_token() / self.learner.peak_flops / world_size()
        self._write(row)
        if self.config.parallel.log_ranks:
            for number, own in enumerate(from_ranks(measured(self.learner))):
                self.run.ranks.write(self._position() | {"rank": number} | own)
        left = self.decisions.seconds_left(self.step, self.seconds, self.tokens_per_step / speed)
        self.display.row(row, self.decisions.plan.total_steps, left)

    def _evaluate(self, evaluator: Evaluator) -> None:
        with self.meter.paused(self.step) as taken, annotate(evaluator.pause.name):
            found = evaluator(self.learner, self.decisions.plan.first_total)
        self.decisions.took(evaluator.pause, taken[0])
        if found.metrics:
            self.val = self.val | found.metrics
            self._write(self._position() | found.metrics)
        for sample in found.samples:
            self.run.samples.write({"step": self.step} | sample)
        if found.text:
            self.display.say(f"step {self.step}: {found.text}")

    def _position(self) -> dict[str, Any]:
        return {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 3)}

    @property
    def _lr(self) -> float:
        """Of the latest step."""
        return self.learner.optimizer.param_groups[0]["lr"]

    def _write(self, row: dict[str, Any]) -> None:
        self.run.metrics.write(row)
        for logger in self.loggers:
            logger.log(row)

    # ---- a step that is not like the others ----

    def _accept(self, batch: Batch, values: dict[str, Tensor]) -> bool:
        """Whether a step is made, as [guard] says; if not, why is in _refused."""
        guard, step = self.config.guard, self.step + 1
        numbers = dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))
        if not (math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])):
            if guard.non_finite == "stop":
                return True  # found by the meter
            cause = self.learner.first_non_finite(batch) or "nothing when it is made again: a fault of the device?"
            self._refused = f"loss {numbers['loss']:.4g}, gradient norm {numbers['grad_norm']:.4g}; the first that is "
            self._refused += f"not finite is {cause}"
        elif guard.spike != "keep" and (spike := self.guard.spike(numbers)):
            self._refused = f"a spike, {spike}; {steepest(self.learner.division.trained)}"
            if guard.spike == "stop":
                raise SpikeError(f"step {step}: {self._refused}", step=step, cause=self._refused)
        if self._refused is None:
            return True
        self.guard.skipped += 1
        if self.guard.skipped > guard.most_skipped:
            message = f"{self.guard.skipped} steps in a row would be left out; the last, {step}: {self._refused}"
            raise StepError(message, step=step, cause=self._refused)
        return False

    def _go_back(self, bad: NonFiniteStep) -> None:
        """Return to the newest checkpoint, to repeat the steps from there up to the bad one as they were."""
        if bad.step in self._repeated:
            self._fail(bad, "its modules were finite one by one, and it was not when it was made again")
        self._repeated.add(bad.step)
        plan, unplanned, spent = self.decisions.plan.state_dict(), self.rate.unplanned, self.seconds
        self._restore()
        self._seconds_before = spent  # of a time budget, the steps that are lost too
        self.decisions.plan.load_state_dict(plan)  # also where no checkpoint has it
        self.rate.unplanned = unplanned
        self._suspect = bad
        self._started = time.perf_counter()
        self.meter.start()
        self.run.metrics.cut(self.step)
        self.run.samples.cut(self.step)
        self.run.ranks.cut(self.step)
        self.display.say(f"{bad}: repeating the steps from {self.step + 1} on to find the cause")

    def _examine(self, bad: NonFiniteStep) -> None:
        """Look for what first stops being finite in the step that is about to be repeated; if nothing, go on."""
        self._suspect = None
        found = self.learner.first_non_finite(self.loader.batch(self.loader.step))
        if found:
            self._fail(bad, f"the first that is not finite is {found}")
        self.display.say(f"step {bad.step} is finite now that it is repeated (a fault of the device?): going on")

    def _fail(self, bad: NonFiniteStep, cause: str) -> None:
        values = {f"train/{name}": value for name, value in bad.values.items()}
        seconds = round(self.seconds, 3)
        self._write({"step": bad.step, "tokens": bad.step * self.tokens_per_step, "seconds": seconds} | values)
        raise NonFiniteError(
            f"{bad}; {cause}. Last good checkpoint: {self._restored or 'none yet'}. "
            "A lower optimizer.lr or a longer schedule.warmup_steps in a new run_dir may avoid it.",
            step=bad.step,
            cause=cause,
            checkpoint=None if self._restored is None else str(self._restored),
        ) from None

    # ---- state ----

    def _save(self, *, background: bool) -> None:
        with self.meter.paused(self.step) as taken, annotate("checkpoint"):
            extra = {
                "loader": self.loader.state_dict(),
                "plan": self.decisions.plan.state_dict(),
                "rng": self._random_state(),
                "seconds": self.seconds,
                "val": self.val,
                "data": self.fingerprints,
            }
            extra |= self.rate.state_dict() | self.meter.state_dict() | {"guard": self.guard.state_dict()}
            asked = self.config.async_checkpoints
            background &= self.learner.device.type == "cuda" if asked is None else asked
            division = self.learner.division
            state = division.trained, division.optimizer, self.step, extra
            self._newest = self.run.save(*state, background=background, parts=division.parts)
        self.decisions.took(self.decisions.save, taken[0], background)

    def _restore(self) -> None:
        """Become what the seed, init_from or branch_from give, or what the newest whole checkpoint holds."""
        self.run.wait()
        vars(self).pop("learner", None)  # room for the new one
        config, self.learner = self.config, Learner(self.config)
        division = self.learner.division
        mine, ranks = division.row_place
        self.loader = TokenLoader(
            self.train_data,
            self.learner.config.batch_size,
            seed=config.seed,
            device=self.learner.device,
            rank=mine,
            world=ranks,
        )
        flops = config.model.flops_per_token() * self.tokens_per_step
        need = self.learner.predicted_memory()
        self.decisions = Decisions(
            config,
            tokens_per_step=self.tokens_per_step,
            flops_per_step=flops,
            pauses=[evaluator.pause for evaluator in self.evaluators],
            saved_bytes=need.weights + need.optimizer,
        )
        self.rate = LearningRate(config.schedule, config.optimizer.lr, self.decisions.plan)
        self.meter, self.guard = Meter(self.tokens_per_step), StepGuard(config.guard)
        self.step, self.val = 0, {}
        self._seconds_before = self._started = 0.0
        self._suspect, self._rebudgeted = None, False
        self._restored = self.run.load_newest(division.trained, division.optimizer, self.display.say, division.parts)
        self._newest = self.run.newest()
        if self._restored is not None:
            self._continue(self._restored)
        elif config.branch_from is not None:
            trunk, into = config.branch_from, (division.trained, division.optimizer)
            together(lambda: checkpoint.load_checkpoint(trunk, *into, parts=division.parts))
            self._continue(trunk)
            self._seconds_before = 0.0  # the trunk's are its own
        elif config.init_from is not None:
            source = config.init_from
            together(lambda: self.learner.load_weights(source))

    def _continue(self, path: pathlib.Path) -> None:
        """Take over from a checkpoint what its weights and the optimizer do not say."""
        self.step, extra = together(lambda: (checkpoint.load_checkpoint(path), checkpoint.read_extra(path)))
        check_same_data(extra.get("data"), self.fingerprints, self.run.saved_config(), self.config)
        self.loader.load_state_dict(extra["loader"])
        self.decisions.plan.load_state_dict(extra["plan"])
        self.rate.load_state_dict(extra, held=self._lr)
        self.meter.load_state_dict(extra)
        if "guard" in extra:
            self.guard.load_state_dict(extra["guard"])
        self._set_random_state(extra["rng"])
        self._seconds_before, self.val = extra["seconds"], extra["val"]
        plan, saved = self.decisions.plan, Budget(**extra["plan"]["budget"])
        self._rebudgeted = plan.budget != saved
        if self._rebudgeted:
            check_budget(plan.budget, plan.total_steps, self.step, self.seconds, self.run.path)

    def _random_state(self) -> dict[str, Any]:
        """Rank 0's, and those of the others after it."""
        first, *others = from_ranks(checkpoint.rng_state(self.learner.device))
        return first | ({"others": others} if others else {})

    def _set_random_state(self, state: dict[str, Any]) -> None:
        """On more ranks than were saved the others keep what the seed gives them."""
        states = [state, *state.get("others", [])]
        if rank() < len(states):
            checkpoint.set_rng_state(states[rank()], self.learner.device)

    def _data(self, path: pathlib.Path) -> TokenDataset:
        fingerprint = None if self.tokenizer is None else self.tokenizer.fingerprint
        model = self.config.model
        return TokenDataset(path, model.context_length, vocab_size=model.vocab_size, tokenizer=fingerprint)

    # ---- beginning and end ----

    def _write_setup(self) -> None:
        """config.toml and run.json, which keeps every budget that the run has been given, and the rate it began at."""
        self.run.clear_failure()
        facts = describe(self.config, self.learner, self.train_data.num_tokens, self.fingerprints)
        before = self.run.facts() if self.step else {}
        budgets = before.get("budgets", [])
        if not budgets or budgets[-1]["budget"] != self.config.budget:
            highest = self.rate.highest_after(self.step)
            budgets.append(
                {"budget": self.config.budget, "from_step": self.step, "lr": self._lr, "highest_lr": highest}
            )
        sources = {name: getattr(self.config, name) for name in ("init_from", "branch_from")}
        whole = {name: path and path.resolve() for name, path in sources.items()}  # to go on from any directory
        saved = dataclasses.replace(self.config, **whole)
        saved.save(self.run.path / "config.toml")
        self.run.write_facts(before | facts | {"budgets": budgets})

    def _announce(self) -> None:
        plan = self.decisions.plan
        self.display.say(announcement(self.config, self.learner, plan, self.train_data.num_tokens))
        if self.config.parallel.native_step and world_size() == 1:
            self.display.say("parallel.native_step changes nothing here: one process makes its steps by itself")
        keeps = hasattr(self.config.optimizer, "rounding")  # which says what becomes of the other 16 bits
        if self.config.precision == "bf16_weights" and not keeps:
            self.display.say(
                f'precision = "bf16_weights" loses what {self.config.optimizer.kind} adds below a 256th of a weight; '
                'adamw and muon keep it, as does precision = "bf16"'
            )
        if self.tokenizer is None:
            self.display.say("no tokenizer lies beside the shards, and none was given: the export will have none")
        if self.step:
            self.display.say(f"continuing after step {self.step}")
            self._announce_rate()

    def _announce_rate(self) -> None:
        """A schedule that is stretched to a larger budget may lead up again."""
        highest = self.rate.highest_after(self.step)
        if self._rebudgeted and highest > 1.01 * self._lr:
            self.display.say(
                f"the new budget of {self.config.budget} stretches the schedule: the learning rate goes up again, from "
                f"{self._lr:.3g} to {highest:.3g}, before it falls"
            )

    def _conclude(self) -> TrainResult:
        self.run.wait()
        seconds, export = self.seconds, None
        pauses = {pause.name: sum(pause.taken) for pause in self.decisions.pauses}
        kept = checkpoint.step_path(self.run.checkpoints, self.step)
        if self.decisions.finished(self.step):
            export = self.run.export
            with self.learner.division.whole(torch.device("cpu")) as model:
                on_first(lambda: self._export(export, model))
            if used := memory_used(self.learner):
                self.display.say(used)
            between = f"{duration(sum(pauses.values()))} of it between steps"
            done = f"{counted(self.step, 'step')}, {self.tokens:,} tokens in {duration(seconds)}, {between}"
            self.display.say(f"finished {done}: {export}")
        else:
            self.display.say(f"stopped after step {self.step}, saved {kept}; to continue, run the same command again")
        return TrainResult(
            self.decisions.finished(self.step), self.step, self.tokens, seconds, self.val, kept, export, pauses
        )

    def _export(self, path: pathlib.Path, model: Transformer) -> None:
        save_pretrained(model, path, tokenizer=self.tokenizer, step=self.step)
        facts, peak = self.run.facts(), peak_memory(self.learner.device)
        self.run.write_facts(facts | {"peak_memory_bytes": max(peak, facts.get("peak_memory_bytes", 0))})
