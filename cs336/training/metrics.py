"""What a run writes while it goes: JSON lines on disk, and a bar or lines on the terminal."""

import json
import os
import pathlib
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


class JsonLines:
    """A file of JSON objects, one a line with its "step", flushed line by line.

    Rows after step `upto`, and a torn last line, are cut off first: a resumed run writes those anew, and the file reads
    as one unbroken run.
    """

    def __init__(self, path: str | os.PathLike, upto: int):
        self.path = pathlib.Path(path)
        self._file = open(self.path, "a+b")  # noqa: SIM115 (open as long as the run)
        self._file.truncate(self._end(upto))

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row).encode() + b"\n")
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


class Display:
    """The run on the terminal: a bar with the time left, or one line a row where output is not a terminal."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False, soft_wrap=True)
        columns = TextColumn("{task.fields[head]}"), BarColumn(), TextColumn("{task.fields[tail]}")
        self._bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self._task = self._bar.add_task("", total=None, head="starting", tail="")

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """A message, above the bar."""
        self.console.print(text, markup=False)

    def row(self, row: dict[str, Any], total_steps: int | None, seconds_left: float | None) -> None:
        """Show a row of training metrics, and the time that is left."""
        head = f"step {row['step']}/{total_steps or '?'}  loss {row['train/loss']:.4f}"
        tail = f"lr {row['lr']:.2e}  norm {row['train/grad_norm']:.2f}  {row['train/tok_per_sec']:,.0f} tok/s"
        if "train/mfu" in row:
            tail += f"  MFU {row['train/mfu']:.1%}"
        if seconds_left is not None:
            tail += f"  {duration(seconds_left)} left"
        if self.console.is_terminal:
            self._bar.update(self._task, total=total_steps, completed=row["step"], head=head, tail=tail)
        else:
            self.say(f"{head}  {tail}")


def duration(seconds: float) -> str:
    """43 s, 2 min 05 s, 3 h 07 min."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
