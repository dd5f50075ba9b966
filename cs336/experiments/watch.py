"""A study on the terminal: a table that is live, or a line a run where output is not a terminal."""

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cs336.experiments import space
from cs336.experiments.ledger import Entry, Ledger, expected
from cs336.experiments.study import Cost, Here, Runs
from cs336.experiments.train import reached
from cs336.utils.duration import duration

EVERY = 1.0  # seconds between two looks
MOST_ROWS = 20
MARKS = {"waiting": ("·", "dim"), "running": (">", "cyan"), "done": ("+", "green"), "failed": ("x", "red")}


@dataclass(frozen=True)
class Progress:
    """How far a study is."""

    counts: dict[str, int]
    """State -> runs."""
    done: dict[str, float]
    """Id of a run that goes on -> the part of it that is done, 0 to 1."""
    seconds_left: float | None
    """None while no run shows a pace."""


def progress(entries: Sequence[Entry], now: dict[str, Cost], workers: int) -> Progress:
    """How far a study is. now: of runs that go on, by id, what their folders have taken."""
    counts = {state: sum(entry.state == state for entry in entries) for state in MARKS}
    folders: dict[str, Cost] = {}
    for entry in entries:
        if entry.ended:
            folders[entry.folder] = _plus(folders.get(entry.folder, Cost(0, 0, 0)), entry.spent)
    running = {e.id: now[e.id].minus(folders.get(e.folder, Cost(0, 0, 0))) for e in entries if e.id in now}
    seen = [entry.spent for entry in entries if entry.ended] + list(running.values())
    pace = {kind: sum(getattr(cost, kind) or 0.0 for cost in seen) for kind in ("flops", "tokens", "seconds")}
    left, done = 0.0, {}
    for entry in entries:
        if entry.ended:
            continue
        taken = running.get(entry.id, entry.spent)
        done[entry.id] = _part(taken, entry.planned)
        left += max(0.0, expected(entry.planned, "seconds", pace) * (1 - done[entry.id]))
    known = pace["seconds"] > 0
    return Progress(counts, {id: done[id] for id in running}, left / max(1, workers) if known else None)


def _part(taken: Cost, planned: Cost) -> float:
    for kind in ("flops", "tokens", "seconds"):
        if getattr(planned, kind):
            return min(1.0, (getattr(taken, kind) or 0.0) / getattr(planned, kind))
    return 0.0


def _plus(a: Cost, b: Cost) -> Cost:
    return Cost((a.flops or 0) + (b.flops or 0), (a.tokens or 0) + (b.tokens or 0), (a.seconds or 0) + (b.seconds or 0))


class Watch:
    """Shows a study within the block."""

    def __init__(self, study: Runs, ledger: Ledger, console: Console | None = None):
        self.study, self.ledger = study, ledger
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.workers = 1 if isinstance(study.where, Here) else getattr(study.where, "num_workers", 1)
        self._told: set[str] = {entry.id for entry in ledger.entries() if entry.ended}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        with contextlib.ExitStack() as stack:
            live = None
            if self.console.is_terminal:
                live = stack.enter_context(Live(console=self.console, auto_refresh=False))
            while True:
                last = self._over.wait(EVERY)
                entries = self.ledger.entries(wanted=True)
                if live is not None:
                    live.update(self.table(entries), refresh=True)
                else:
                    self._tell(entries)
                if last:
                    return

    def _tell(self, entries: Sequence[Entry]) -> None:
        """A line for each run that has ended since the last time."""
        for entry in entries:
            if entry.ended and entry.id not in self._told:
                self._told.add(entry.id)
                found = self._progress(entries)
                left = "" if found.seconds_left is None else f", about {duration(found.seconds_left)} left"
                ended = found.counts["done"] + found.counts["failed"]
                seed = f", seed {entry.seed}" if len({other.seed for other in entries}) > 1 else ""
                line = f"{ended}/{len(entries)}  {name(entry)}{seed}: {said(entry, self.study.metric)}{left}"
                self.console.print(line, markup=False)

    def _progress(self, entries: Sequence[Entry]) -> Progress:
        running = (entry for entry in entries if entry.state == "running")
        now = {entry.id: reached(self.study.runs / entry.folder) for entry in running}
        return progress(entries, now, self.workers)

    def table(self, entries: Sequence[Entry]) -> Group:
        """The runs, those that go on and the best first."""
        found, metric = self._progress(entries), self.study.metric
        table = Table(box=None, pad_edge=False, header_style="dim")
        for head in ("", "run", "seed", metric, "", "time"):
            table.add_column(head, justify="left" if head in ("", "run") else "right", no_wrap=head != "run")
        order = {"running": 0, "done": 1, "failed": 2, "waiting": 3}
        ordered = sorted(entries, key=lambda e: (order[e.state], e.score(metric), e.number))
        for entry in ordered[:MOST_ROWS]:
            mark, style = MARKS[entry.state]
            part = f"{found.done[entry.id]:.0%}" if entry.id in found.done else ""
            score = f"{entry.score(metric):.4f}" if entry.state == "done" else ""
            told = entry.error or part if entry.state != "done" else ""
            seconds = entry.spent.seconds if entry.ended else None
            cells = (mark, name(entry), str(entry.seed), score, told[:60], duration(seconds) if seconds else "")
            table.add_row(*(Text(cell) for cell in cells), style=style)
        counts = ", ".join(f"{number} {state}" for state, number in found.counts.items() if number)
        left = "" if found.seconds_left is None else f"; about {duration(found.seconds_left)} left"
        more = f" ({len(ordered) - MOST_ROWS} more)" if len(ordered) > MOST_ROWS else ""
        return Group(table, Text(f"{counts}{left}{more}", style="bold"))


def name(entry: Entry) -> str:
    """What a run has that others have not."""
    return space.label(entry.options) + (f", rung {entry.rung}" if entry.rung else "")


def said(entry: Entry, metric: str) -> str:
    """What came of a run, in a few words."""
    if entry.state == "failed":
        return f"failed, {entry.error}"
    seconds = duration(entry.spent.seconds or 0.0)
    return f"{metric} {entry.score(metric):.4f}, {seconds}" if entry.state == "done" else entry.state
