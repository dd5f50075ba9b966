"""The training loop: one process, one device, a run directory that can be killed at any moment.

    RUN/config.toml, run.json    what runs, and on what
    RUN/metrics.jsonl            a row each log_interval and each validation
    RUN/samples.jsonl            what the `sample` function returned
    RUN/checkpoints/step_*       see cs336.training.checkpoint
    RUN/export/                  the finished model, in the Hugging Face layout

A step follows from the configuration and the checkpoint before it alone, so that a run continued from its newest
checkpoint repeats the lost steps bit for bit. On a GPU the host waits for the device only at rows, validations,
samples and checkpoints.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cs336 import __version__
from cs336.data import TokenDataset, TokenLoader
from cs336.models import Transformer, save_pretrained
from cs336.optim import constant_schedule, cosine_schedule
from cs336.training import checkpoint
from cs336.training.budget import Budget, Plan
from cs336.training.config import TrainConfig, differences
from cs336.training.guard import NonFiniteError
from cs336.training.learner import Learner
from cs336.training.metrics import Display, JsonLines, duration
from cs336.training.session import locked, stop_requests
from cs336.utils.files import replacing
from cs336.utils.nvtx import annotate
from cs336.utils.terminal import visible

if TYPE_CHECKING:
    from cs336.tokenizer import Tokenizer

Sample = Callable[[Transformer], list[dict[str, Any]]]

UNPLANNED_WARMUP = 100  # steps, while a time budget still measures how many there will be
JOINING = 0.05  # of what is left then: the learning rate goes in a straight line to that of the plan
LOOK_PART = 0.01  # of a time budget: the longest time without a look at the clock
EVALS, SAMPLES, CHECKPOINTS = 20, 10, 10  # a run, where the configuration does not say


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


class Trainer:
    """Trains a Transformer as a TrainConfig says, and continues the run that is in config.run_dir, if one is.

    Args:
        tokenizer: of the data; checked against them and exported with the model.
        sample: called with the model in eval mode; returns rows like {"prompt": ..., "text": ...}.

    Raises ValueError for data, a schedule or a configuration that cannot work, before anything is written.
    """

    step: int
    """Optimizer steps done."""
    val: dict[str, float]
    """The last validation."""
    _restored: pathlib.Path | None  # the checkpoint this continues
    _started: float  # on the clock; 0 before `train`
    _pending: list[tuple[Tensor, Tensor]]  # loss and gradient norm of the steps the host has not waited for
    _losses: list[float]  # of the steps since the last row
    _unplanned_lr: float  # the learning rate when a time budget was first planned
    _paused: dict[str, float]  # seconds of the latest validation, sample and checkpoint
    _row_steps: int
    _row_seconds: float  # training alone, without validation and the like

    def __init__(
        self,
        config: TrainConfig,
        *,
        tokenizer: "Tokenizer | None" = None,
        sample: Sample | None = None,
        display: Display | None = None,
    ):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("this trainer runs one process on one device: start it without torchrun")
        self.config, self.tokenizer, self.sample = config, tokenizer, sample
        self.display = display or Display()
        self.run_dir = pathlib.Path(config.run_dir)
        self.checkpoints = self.run_dir / "checkpoints"
        self._check_run()
        self.train_data = self._data(config.data.train)
        self.val_data = None if config.data.val is None else self._data(config.data.val)
        self.tokens_per_step = config.batch_size * config.model.context_length
        self.flops_per_token = config.model.flops_per_token()
        self._restore()
        self._check_schedule()

    @property
    def tokens(self) -> int:
        return self.step * self.tokens_per_step

    @property
    def seconds(self) -> float:
        """Wall time of training so far, of this process and of those it continues."""
        return self._seconds_before + (time.perf_counter() - self._started if self._started else 0.0)

    def train(self) -> TrainResult:
        """Train until the budget is used up or a signal asks to stop, and leave a checkpoint either way.

        Raises NonFiniteError if the loss or a gradient stops being finite, OSError if something cannot be written,
        RuntimeError if another process is at this run.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self.run_dir))
            if self._started or self._newest() != self._restored:  # an earlier call, or another process, went on
                del self.learner
                self._restore()
            self._write_setup()
            self._metrics, self._samples = (
                stack.enter_context(contextlib.closing(JsonLines(self.run_dir / name, upto=self.step)))
                for name in ("metrics.jsonl", "samples.jsonl")
            )
            stack.enter_context(self.display)
            stop_requested = stack.enter_context(stop_requests())
            self._started = self._mark = time.perf_counter()
            self._announce()
            stop = False
            while not (self._finished or stop):
                with annotate("step"):
                    self._pending.append(self._update())
                stop = stop_requested()
                self._after_step(stop)
            return self._conclude()

    # ---- a step ----

    def _update(self) -> tuple[Tensor, Tensor]:
        result = self.learner.update(*next(self.loader), self._lr(self.step + 1))
        self.step += 1
        return result

    def _lr(self, step: int) -> float:
        """Of a step counted from 1, so that the first is above zero and the last is the lowest."""
        if not self.plan.measuring:
            decided, total = self.plan.decisions[0]
            place, joined = self.plan.place(step), decided + JOINING * (total - decided)
            if not decided or place >= joined:
                return self._planned_lr(place, total)
            part = (place - decided) / (joined - decided)
            return (1 - part) * self._unplanned_lr + part * self._planned_lr(joined, total)
        if self._restored:  # a longer time budget: as it was, until it is planned
            return self._current_lr
        warmup = self.config.schedule.warmup_steps
        top, warmup = self.config.optimizer.lr, UNPLANNED_WARMUP if warmup is None else warmup
        return constant_schedule(step, max_lr=top, warmup_steps=warmup)

    def _planned_lr(self, place: float, total: int) -> float:
        top, warmup = self.config.optimizer.lr, self._warmup_steps(total)
        low = top * self.config.schedule.min_lr_ratio
        return cosine_schedule(place, max_lr=top, min_lr=low, warmup_steps=warmup, total_steps=total)

    def _warmup_steps(self, total: int) -> int:
        return total // 20 if self.config.schedule.warmup_steps is None else self.config.schedule.warmup_steps

    @property
    def _current_lr(self) -> float:
        return self.learner.optimizer.param_groups[0]["lr"]

    @property
    def _finished(self) -> bool:
        return self.plan.total_steps is not None and self.step >= self.plan.total_steps

    # ---- between steps ----

    def _after_step(self, stop: bool) -> None:
        planned = False
        if self._finished or self.step % self.config.log_interval == 0 or self._must_look():
            self._settle()
            if self.plan.measuring:
                self._unplanned_lr = self._current_lr
            planned = self.plan.observe(self.step, self.seconds, reserve=sum(self._paused.values()))
            if planned and len(self.plan.decisions) == 1:
                self._check_schedule()
            self._log()
        if self.val_data is not None and self._due("validate", self.config.eval_interval, EVALS):
            self._validate(self.val_data)
        if self.sample is not None and self._due("sample", self.config.sample_interval, SAMPLES):
            self._write_samples(self.sample)
        # A decision of the plan is saved before it is acted on: a run that is killed must not decide otherwise.
        if planned or stop or self._due("checkpoint", self.config.checkpoint_interval, CHECKPOINTS):
            self._save()

    def _must_look(self) -> bool:
        """Whether a time budget wants to know what the time is."""
        budget = self.plan.budget
        late = budget.kind == "seconds" and time.perf_counter() - self._mark > LOOK_PART * budget.amount
        return self.plan.measuring or late

    def _due(self, phase: str, interval: int | None, times: int) -> bool:
        total = self.plan.total_steps
        if interval is None:
            times = self.plan.affordable(times, self._paused.get(phase, 0.0))
            interval = max(1, total // times) if total and times else 0
        return self._finished or (interval > 0 and self.step % interval == 0)

    def _settle(self) -> None:
        """Wait for the device, and take the losses of the steps since the last time."""
        if not self._pending:
            return
        values = torch.stack([torch.stack(pair) for pair in self._pending]).tolist()
        now = time.perf_counter()
        for step, (loss, norm) in enumerate(values, self.step - len(values) + 1):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._fail(step, loss, norm)
            self._losses.append(loss)
            self._norm = norm
        self._pending = []
        self._row_steps += len(values)
        self._row_seconds += now - self._mark
        self._mark = now

    @contextlib.contextmanager
    def _pause(self, phase: str) -> Iterator[None]:
        """Around what is not training: its time does not count as throughput."""
        self._settle()
        start = time.perf_counter()
        with annotate(phase):
            yield
        self._mark = time.perf_counter()
        self._paused[phase] = self._mark - start

    def _log(self) -> None:
        rate = self._row_steps * self.tokens_per_step / self._row_seconds
        row = self._position() | {
            "train/loss": math.fsum(self._losses) / len(self._losses),
            "train/grad_norm": self._norm,
            "train/tok_per_sec": rate,
            "lr": self._current_lr,
        }
        if self.learner.peak_flops:
            row["train/mfu"] = rate * self.flops_per_token / self.learner.peak_flops
        self._metrics.write(row)
        self.display.row(row, self.plan.total_steps, self._seconds_left(rate))
        self._losses, self._row_steps, self._row_seconds = [], 0, 0.0

    def _seconds_left(self, tokens_per_second: float) -> float | None:
        if self.plan.budget.kind == "seconds":
            return self.plan.budget.amount - self.seconds
        assert self.plan.total_steps is not None  # known from the start
        return (self.plan.total_steps - self.step) * self.tokens_per_step / tokens_per_second

    def _position(self) -> dict[str, Any]:
        return {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 3)}

    def _validate(self, data: TokenDataset) -> None:
        with self._pause("validate"):
            self.val = self.learner.evaluate(data)
        self._metrics.write(self._position() | self.val)
        bpb = f", {self.val['val/bpb']:.4f} bits per byte" if "val/bpb" in self.val else ""
        self.display.say(f"step {self.step}: validation loss {self.val['val/loss']:.4f}{bpb}")

    def _write_samples(self, sample: Sample) -> None:
        with self._pause("sample"), self.learner.evaluating() as model:
            rows = sample(model)
        for row in rows:
            self._samples.write({"step": self.step} | row)
        if rows:
            self.display.say(visible(f"step {self.step}: {rows[0].get('prompt', '')}{rows[0].get('text', '')}"))

    # ---- state ----

    def _save(self) -> None:
        with self._pause("checkpoint"):
            self._metrics.sync()
            self._samples.sync()
            extra = {
                "loader": self.loader.state_dict(),
                "plan": self.plan.state_dict(),
                "rng": checkpoint.rng_state(),
                "seconds": self.seconds,
                "unplanned_lr": self._unplanned_lr,
                "losses": self._losses,
                "norm": self._norm,
                "val": self.val,
            }
            path = checkpoint.step_path(self.checkpoints, self.step)
            checkpoint.save_checkpoint(self.learner.model, self.learner.optimizer, self.step, path, extra=extra)
            checkpoint.prune_checkpoints(self.checkpoints, self.config.keep_checkpoints)

    def _restore(self) -> None:
        """Become what the seed gives, or what the newest checkpoint holds."""
        self.learner = Learner(self.config)
        self.loader = TokenLoader(
            self.train_data, self.config.batch_size, seed=self.config.seed, device=self.learner.device
        )
        flops_per_step = self.flops_per_token * self.tokens_per_step
        budget = Budget.parse(self.config.budget)
        self.plan = Plan(budget, tokens_per_step=self.tokens_per_step, flops_per_step=flops_per_step)
        self.step, self.val = 0, {}
        self._seconds_before = self._started = self._mark = 0.0
        self._pending, self._losses, self._norm = [], [], 0.0
        self._unplanned_lr, self._paused = 0.0, {}
        self._row_steps, self._row_seconds = 0, 0.0
        self._restored = self._newest()
        if self._restored:
            self.step = checkpoint.load_checkpoint(self._restored, self.learner.model, self.learner.optimizer)
            extra = checkpoint.read_extra(self._restored)
            self.loader.load_state_dict(extra["loader"])
            self.plan.load_state_dict(extra["plan"])
            checkpoint.set_rng_state(extra["rng"])
            self._seconds_before, self.val = extra["seconds"], extra["val"]
            self._losses, self._norm = extra["losses"], extra["norm"]
            self._unplanned_lr = extra["unplanned_lr"]

    def _newest(self) -> pathlib.Path | None:
        return next(reversed(checkpoint.list_checkpoints(self.checkpoints)), None)

    def _fail(self, step: int, loss: float, norm: float) -> None:
        """Repeat the steps since the newest checkpoint to find out what stopped being finite first, and raise."""
        position = {"step": step, "tokens": step * self.tokens_per_step, "seconds": round(self.seconds, 3)}
        self._metrics.write(position | {"train/loss": loss, "train/grad_norm": norm})
        self.display.say(f"step {step}: loss {loss}, gradient norm {norm}; repeating the last steps to find the cause")
        del self.learner  # room for the new one
        self._restore()
        while self.step < step - 1:
            self._update()
        found = self.learner.first_non_finite(*next(self.loader))
        cause = f"the first that is not finite is {found}" if found else "it did not happen again when repeated"
        raise NonFiniteError(
            f"step {step}: loss {loss}, gradient norm {norm}; {cause}. "
            f"Last good checkpoint: {self._restored or 'none yet'}. "
            "A lower optimizer.lr or a longer schedule.warmup_steps in a new run_dir may avoid it."
        )

    # ---- beginning and end ----

    def _data(self, path: pathlib.Path) -> TokenDataset:
        fingerprint = None if self.tokenizer is None else self.tokenizer.fingerprint
        model = self.config.model
        return TokenDataset(path, model.context_length, vocab_size=model.vocab_size, tokenizer=fingerprint)

    def _check_run(self) -> None:
        saved = self.run_dir / "config.toml"
        if not (self._newest() and saved.exists()):
            return
        if changed := differences(TrainConfig.from_toml(saved), self.config):
            raise ValueError(
                f"{self.run_dir} holds a run with another configuration ({'; '.join(changed)}): "
                "use another run_dir, or the same configuration to continue it"
            )

    def _check_schedule(self) -> None:
        """A time budget's later plans go along the first one's schedule, however many steps they have."""
        total = self.plan.decisions[0][1] if self.plan.decisions else self.plan.total_steps
        if total is not None and self._warmup_steps(total) >= total:
            raise ValueError(
                f"the schedule cannot land: {self._warmup_steps(total)} warm-up steps, and the budget of "
                f"{self.config.budget} makes {total} steps; set schedule.warmup_steps lower or give more budget"
            )

    def _write_setup(self) -> None:
        self.config.save(self.run_dir / "config.toml")
        device = self.learner.device
        name = f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
        facts = {
            "device": name,
            "parameters": self.config.model.num_parameters(),
            "flops_per_token": self.flops_per_token,
            "peak_flops": self.learner.peak_flops,
            "tokens_per_step": self.tokens_per_step,
            "train_tokens": self.train_data.num_tokens,
            "precision": str(self.learner.dtype).removeprefix("torch."),
            "compiled": self.learner.compiled,
            "cs336": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        with replacing(self.run_dir / "run.json") as file:
            json.dump(facts, file, indent=2)

    def _announce(self) -> None:
        total, learner = self.plan.total_steps, self.learner
        how = f"{str(learner.dtype).removeprefix('torch.')}{', compiled' if learner.compiled else ''}"
        steps = "as many steps as fit" if total is None else f"{total:,} steps, {total * self.tokens_per_step:,} tokens"
        self.display.say(
            f"{self.config.model.num_parameters():,} parameters on {learner.device} ({how}), "
            f"{self.train_data.num_tokens:,} tokens of data, budget {self.config.budget}: {steps}"
        )
        if self.step:
            self.display.say(f"continuing after step {self.step}")

    def _conclude(self) -> TrainResult:
        seconds, export = self.seconds, None
        kept = checkpoint.step_path(self.checkpoints, self.step)
        if self._finished:
            export = self.run_dir / "export"
            save_pretrained(self.learner.model, export, tokenizer=self.tokenizer)
            self.display.say(f"finished {self.step:,} steps, {self.tokens:,} tokens in {duration(seconds)}: {export}")
        else:
            self.display.say(f"stopped after step {self.step}, saved {kept}; to continue, run the same command again")
        return TrainResult(self._finished, self.step, self.tokens, seconds, self.val, kept, export)
