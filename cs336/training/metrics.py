"""What a run writes while it goes: JSON lines on disk, and a bar or lines on the terminal."""

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from cs336.training.guard import NonFiniteStep
from cs336.utils.duration import duration


def json_line(value: Any, indent: int | None = None) -> str:
    """Valid JSON. A number that is not finite is the string "NaN", "Infinity" or "-Infinity", which float() reads."""
    return json.dumps(_finite(value), allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


class Meter:
    """Losses, gradient norms and speed between two rows.

    On a GPU the steps are ahead of the host: `settle` waits for them.
    """

    def __init__(self, tokens_per_step: int):
        self.tokens_per_step = tokens_per_step
        self.mark = 0.0
        """On the clock: when the device was last waited for, or a pause ended."""
        self._pending: list[dict[str, Tensor]] = []
        self._sums: dict[str, list[float]] = {}
        self._norm = 0.0
        self._steps, self._seconds = 0, 0.0

    def start(self) -> None:
        self.mark = time.perf_counter()

    def add(self, values: dict[str, Tensor]) -> None:
        """What a step returned, still on the device."""
        self._pending.append(values)

    def settle(self, step: int) -> None:
        """Wait for the device, `step` the last one done. Raises NonFiniteStep for the first that is not finite."""
        if not self._pending:
            return
        names = list(self._pending[0])
        rows = torch.stack([torch.stack([row[name] for name in names]) for row in self._pending]).tolist()
        now = time.perf_counter()
        for number, row in enumerate(rows, step - len(rows) + 1):
            values = dict(zip(names, row, strict=True))
            if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
                raise NonFiniteStep(number, values)
            self._norm = values.pop("grad_norm")
            for name, value in values.items():
                self._sums.setdefault(name, []).append(value)
        self._pending = []
        self._steps += len(rows)
        self._seconds += now - self.mark
        self.mark = now

    @contextlib.contextmanager
    def paused(self, step: int) -> Iterator[list[float]]:
        """Around what is not training; the list that is yielded gets its seconds, which are not the steps'."""
        self.settle(step)
        start = time.perf_counter()
        taken: list[float] = []
        yield taken
        self.mark = time.perf_counter()
        taken.append(self.mark - start)

    @property
    def empty(self) -> bool:
        """Whether no step was settled since the last row."""
        return not self._steps

    def row(self) -> dict[str, float]:
        """Means since the last row, the last gradient norm, and tokens a second of training alone."""
        rate = self._steps * self.tokens_per_step / self._seconds
        row = {f"train/{name}": math.fsum(values) / len(values) for name, values in self._sums.items()}
        self._sums, self._steps, self._seconds = {}, 0, 0.0
        return row | {"train/grad_norm": self._norm, "train/tok_per_sec": rate}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums, "norm": self._norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums = state["sums"] if "sums" in state else {"loss": state["losses"]}  # of checkpoint format 1
        self._norm = state["norm"]


class JsonLines:
    """A file of JSON objects, one a line with its "step", flushed line by line. See json_line for NaN.

    Rows after step `upto`, and a torn last line, are cut off first: a resumed run writes those anew, and the file reads
    as one unbroken run.
    """

    def __init__(self, path: str | os.PathLike, upto: int):
        self.path = pathlib.Path(path)
        self._file = open(self.path, "a+b")  # noqa: SIM115 (open as long as the run)
        self.cut(upto)

    def cut(self, upto: int) -> None:
        """Leave the rows up to a step."""
        self._file.truncate(self._end(upto))

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json_line(row).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until the rows are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _end(self, upto: int) -> int:
        self._file.seek(0)
        end = 0
        for line in self._file:
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > upto:
                    break
            except (ValueError, KeyError, TypeError):
                break
            end += len(line)
        return end


class DroppedLines:
    """JsonLines of a process that writes no files."""

    def cut(self, upto: int) -> None: ...

    def write(self, row: dict[str, Any]) -> None: ...

    def sync(self) -> None: ...


class _Terminal(Console):
    """Output that may lose its reader: `train | head`, a closed terminal."""

    lost = False

    def on_broken_pipe(self) -> None:
        """Leave nothing that a later print could fail on, and go on: rich would end the process."""
        self.lost = self.quiet = True
        if self.file is sys.stdout:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def _write_buffer(self) -> None:
        try:
            super()._write_buffer()
        except BrokenPipeError:
            raise
        except OSError:  # EIO of a terminal that was closed
            self.on_broken_pipe()


class Display:
    """The run on the terminal: a bar with the time left, or one line a row where output is not a terminal.

    silent: say nothing, as every process but one should.
    """

    def __init__(self, console: Console | None = None, *, silent: bool = False):
        self.console = console or _Terminal(highlight=False, soft_wrap=True, quiet=silent)
        columns = TextColumn("{task.fields[head]}"), BarColumn(), TextColumn("{task.fields[tail]}")
        self._bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self._task = self._bar.add_task("", total=None, head="starting", tail="")

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @property
    def lost(self) -> bool:
        """Whether nobody reads the output any more."""
        return getattr(self.console, "lost", False)

    def say(self, text: str) -> None:
        """A message, above the bar; on standard error where the output has lost its reader."""
        self.console.print(text, markup=False)
        if self.lost:
            with contextlib.suppress(OSError):  # it may be the same terminal
                print(text, file=sys.stderr, flush=True)

    def row(self, row: dict[str, Any], total_steps: int | None, seconds_left: float | None) -> None:
        """Show a row of training metrics, and the time that is left."""
        head = f"step {row['step']}/{total_steps or '?'}  loss {row['train/loss']:.4f}"
        if "reward" in row:
            head += f"  reward {row['reward']:.3f}"
        tail = f"lr {row['lr']:.2e}  norm {row['train/grad_norm']:.2f}  {row['train/tok_per_sec']:,.0f} tok/s"
        if "train/mfu" in row:
            tail += f"  MFU {row['train/mfu']:.1%}"
        if seconds_left is not None:
            tail += f"  {duration(seconds_left)} left"
        if self.console.is_terminal:
            self._bar.update(self._task, total=total_steps, completed=row["step"], head=head, tail=tail)
        else:
            self.say(f"{head}  {tail}")
