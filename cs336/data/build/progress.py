"""How far a stage is, with the time that is left: a bar on a terminal, a line now and then elsewhere."""

import contextlib
import threading
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from cs336.utils.duration import duration

LINE_SECONDS = 15.0


class Progress:
    """Counts bytes of units. `advance` may be called from several threads."""

    def __init__(self, console: Console, name: str, total: int):
        self._console, self._name, self._total = console, name, total
        self._bar = Bar(
            TextColumn("    " + name),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=total)
        self._lock = threading.Lock()
        self._done = self._before = 0
        self._start = self._said = time.monotonic()

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def advance(self, size: int, *, done: bool = False) -> None:
        """done: by an earlier process, which says nothing of the speed."""
        with self._lock, contextlib.suppress(ZeroDivisionError):
            self._done += size
            self._before += size if done else 0
            self._bar.update(self._task, completed=self._done)
            now = time.monotonic()
            if self._console.is_terminal or now - self._said < LINE_SECONDS:
                return
            self._said = now
            left = (self._total - self._done) * (now - self._start) / (self._done - self._before)
            share = f"{self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB"
            self._console.print(f"    {self._name}  {share}, {duration(left)} left")
