"""The ledger of a study: which runs there are, who is at them, what they took and what came of them.

DIRECTORY/ledger.sqlite is in WAL mode, so that any number of processes of one machine read and write it. A run is
claimed in a transaction by a process that holds the lock of DIRECTORY/claims/ID, which the system frees when the
process ends, however it ends: a run that is marked as running and whose lock is free has lost its owner.

    waiting -> running -> done | failed          running -> waiting where its owner stopped or died
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
import sqlite3
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cs336.experiments.study import Cost, Trial
from cs336.training import Budget
from cs336.training.metrics import json_line
from cs336.utils.database import Claim, Queue
from cs336.utils.locks import locked

State = Literal["waiting", "running", "done", "failed"]
Reached = Callable[[str], Cost]
FORMAT = 1
MOST_DEATHS = 3  # of a run's owners, one after the other: then it is not tried again
SLACK = 1e-9  # of a budget: what sums of floats may be off

SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    folder TEXT NOT NULL,
    options TEXT NOT NULL,
    seed INTEGER NOT NULL,
    rung INTEGER NOT NULL,
    config TEXT NOT NULL,
    wanted INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('waiting', 'running', 'done', 'failed')),
    owner TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,
    planned_flops REAL, planned_tokens REAL, planned_seconds REAL,
    flops REAL NOT NULL DEFAULT 0, tokens REAL NOT NULL DEFAULT 0, seconds REAL NOT NULL DEFAULT 0,
    result TEXT NOT NULL DEFAULT '{}',
    error TEXT,
    started REAL, ended REAL
) STRICT
"""


@dataclass(frozen=True)
class Entry:
    """A row of the ledger."""

    number: int
    id: str
    folder: str
    options: dict[str, Any]
    seed: int
    rung: int
    config: dict[str, Any]
    state: State
    owner: str | None
    """Host and process."""
    attempts: int
    planned: Cost
    spent: Cost
    """Of this row alone: a rung's is what it added."""
    result: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    started: float | None = None
    """On the clock of time.time."""

    @property
    def ended(self) -> bool:
        return self.state in ("done", "failed")

    def score(self, metric: str) -> float:
        """Infinity for a run that has failed, or has no such number."""
        value = self.result.get(metric)
        return float(value) if self.state == "done" and isinstance(value, int | float) else math.inf


def owner(pid: int | None = None) -> str:
    """How the ledger names a process, this one if None."""
    return f"{platform.node()}:{os.getpid() if pid is None else pid}"


class Ledger(Queue):
    """A study's runs. Every method is one transaction, and may be called from any process.

    Args:
        budget: of all runs together, as Budget.parse reads it: no run is claimed that would exceed it.

    Raises ValueError for a file that is not a ledger, OSError where it cannot be written.
    """

    def __init__(self, directory: str | os.PathLike, budget: str | None = None):
        self.budget = None if budget is None else Budget.parse(budget)
        super().__init__(directory, "ledger.sqlite", "a ledger", SCHEMA, FORMAT)

    # ---- what there is ----

    def want(self, trials: Sequence[Trial]) -> None:
        """These are the runs to train: new ones are entered, the others that wait are not claimed any more.

        What is there already is not trained again. What waits takes on how it is computed now.
        """
        rows = [
            (
                t.id,
                t.folder,
                json.dumps(t.options),
                t.seed,
                t.rung,
                json.dumps(t.table),
                *dataclasses.astuple(t.planned),
            )
            for t in trials
        ]
        with self.transaction() as db:
            db.execute("UPDATE runs SET wanted = 0")
            db.executemany(
                "INSERT INTO runs (id, folder, options, seed, rung, config, state, wanted, planned_flops, "
                "planned_tokens, planned_seconds) VALUES (?, ?, ?, ?, ?, ?, 'waiting', 1, ?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET wanted = 1, "
                "config = CASE state WHEN 'waiting' THEN excluded.config ELSE config END",
                rows,
            )

    def entries(self, *, wanted: bool = False) -> list[Entry]:
        """All runs in the order in which they were entered, or those that are wanted."""
        with self.transaction(write=False) as db:
            return [
                _entry(row) for row in db.execute("SELECT * FROM runs WHERE wanted >= ? ORDER BY number", (wanted,))
            ]

    def spent(self) -> Cost:
        """Of all runs, whatever came of them."""
        with self.transaction(write=False) as db:
            return Cost(*db.execute("SELECT TOTAL(flops), TOTAL(tokens), TOTAL(seconds) FROM runs").fetchone())

    # ---- a run's life ----

    def claim(self) -> Claim[Entry] | None:
        """Take the first run that is wanted, waits, and fits what is left of the budget; None if there is none."""
        for entry in self.entries(wanted=True):
            if entry.state != "waiting":
                continue
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(locked(self.claims, entry.id))
                except RuntimeError:  # another process is about to
                    continue
                if (taken := self._take(entry)) is not None:
                    return Claim(taken, stack.pop_all())
        return None

    def _take(self, entry: Entry) -> Entry | None:
        with self.transaction() as db:
            if not self._fits(db, entry):
                return None
            taken = db.execute(
                "UPDATE runs SET state = 'running', owner = ?, attempts = attempts + 1, started = ?, "
                "error = NULL WHERE id = ? AND state = 'waiting'",
                (owner(), time.time(), entry.id),
            )
            if not taken.rowcount:
                return None
            return _entry(db.execute("SELECT * FROM runs WHERE id = ?", (entry.id,)).fetchone())

    def finish(self, claim: Claim[Entry], result: dict[str, Any], reached: Cost) -> None:
        """A run is done. reached: FLOPs, tokens and seconds of its folder from the start."""
        self._end(claim, "done", reached, json_line(result), None)

    def fail(self, claim: Claim[Entry], error: str, reached: Cost) -> None:
        """A run has failed, which is kept with the error."""
        self._end(claim, "failed", reached, "{}", error)

    def stop(self, claim: Claim[Entry], reached: Cost) -> None:
        """A run is to be continued by whoever claims it next."""
        self._end(claim, "waiting", reached, "{}", None)

    def _end(self, claim: Claim[Entry], state: State, reached: Cost, result: str, error: str | None) -> None:
        try:
            with self.transaction() as db:
                self._settle(db, claim.entry, state, reached, result, error)
        finally:
            claim.release()

    def _settle(
        self, db: sqlite3.Connection, entry: Entry, state: State, reached: Cost, result: str, error: str | None
    ) -> None:
        before = db.execute(
            "SELECT TOTAL(flops), TOTAL(tokens), TOTAL(seconds) FROM runs WHERE folder = ? AND id != ?",
            (entry.folder, entry.id),
        ).fetchone()
        added = reached.minus(Cost(*before))
        db.execute(
            "UPDATE runs SET state = ?, flops = ?, tokens = ?, seconds = ?, result = ?, error = ?, owner = NULL, "
            "ended = ? WHERE id = ?",
            (state, added.flops or 0, added.tokens or 0, added.seconds or 0, result, error, time.time(), entry.id),
        )

    def recover(
        self, reached: Reached, *, of: str | None = None, spare: Collection[str] = (), error: str | None = None
    ) -> list[Entry]:
        """Find runs whose owner is dead: they wait again, or have failed if `error` says why, or if it is the third.

        Args:
            reached: gives what a folder has taken since it was begun.
            of: this owner's alone.
            spare: owners whose death somebody else is to notice.

        Returns the runs as they were.
        """
        lost = []
        for entry in self.entries():
            if entry.state != "running" or of not in (None, entry.owner) or entry.owner in spare:
                continue
            why = error or (f"its process died {entry.attempts} times" if entry.attempts >= MOST_DEATHS else None)
            with contextlib.suppress(RuntimeError), locked(self.claims, entry.id), self.transaction() as db:
                (state, attempts) = db.execute("SELECT state, attempts FROM runs WHERE id = ?", (entry.id,)).fetchone()
                if state == "running" and attempts == entry.attempts:
                    self._settle(db, entry, "failed" if why else "waiting", reached(entry.folder), "{}", why)
                    lost.append(entry)
        return lost

    def retry(self) -> int:
        """Let wanted runs that have failed wait again, from their newest checkpoint; how many."""
        with self.transaction() as db:
            change = "UPDATE runs SET state = 'waiting', attempts = 0 WHERE wanted AND state = 'failed'"
            return db.execute(change).rowcount

    # ---- the budget ----

    def affords(self, entry: Entry) -> bool:
        """Whether a run fits what is left of the budget now."""
        with self.transaction(write=False) as db:
            return self._fits(db, entry)

    def _fits(self, db: sqlite3.Connection, entry: Entry) -> bool:
        """What is spent, what is reserved by the runs that go on, and this one: within the budget."""
        if self.budget is None:
            return True
        kind = self.budget.kind
        rates = dict(zip(("flops", "tokens", "seconds"), db.execute(RATES).fetchone(), strict=True))
        used = 0.0
        others = db.execute(
            "SELECT * FROM runs WHERE id != ? AND (state = 'running' OR flops + tokens + seconds > 0)", (entry.id,)
        )
        for other in map(_entry, others):
            spent = getattr(other.spent, kind)
            used += max(spent, expected(other.planned, kind, rates)) if other.state == "running" else spent
        return used + expected(entry.planned, kind, rates) <= self.budget.amount * (1 + SLACK)


RATES = "SELECT TOTAL(flops), TOTAL(tokens), TOTAL(seconds) FROM runs WHERE state IN ('done', 'failed')"


def expected(planned: Cost, kind: str, ended: dict[str, float]) -> float:
    """What a run will take of a budget of `kind`: as planned, or at the pace of the runs that have ended.

    0 where neither is known: the first run of a study finds out.
    """
    value = getattr(planned, kind)
    if value is not None:
        return float(value)
    for known in ("flops", "tokens", "seconds"):
        amount = getattr(planned, known)
        if amount is not None and ended[known]:
            return float(amount) * ended[kind] / ended[known]
    return 0.0


def _entry(row: sqlite3.Row) -> Entry:
    return Entry(
        number=row["number"],
        id=row["id"],
        folder=row["folder"],
        options=json.loads(row["options"]),
        seed=row["seed"],
        rung=row["rung"],
        config=json.loads(row["config"]),
        state=row["state"],
        owner=row["owner"],
        attempts=row["attempts"],
        planned=Cost(row["planned_flops"], row["planned_tokens"], row["planned_seconds"]),
        spent=Cost(row["flops"], row["tokens"], row["seconds"]),
        result=json.loads(row["result"]),
        error=row["error"],
        started=row["started"],
    )
