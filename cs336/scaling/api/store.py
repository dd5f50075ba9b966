"""The accounts and the runs of the API: DIRECTORY/api.sqlite, in WAL mode, for any number of processes of a machine.

    left(user) = the sum of the user's rows of `ledger`
    grant      + the budget
    reserve    - what a run takes at most, in the transaction that enters it
    refund     + what it did not take, in the transaction that ends it

Every movement is one transaction; the table takes no second entry of a kind for a run, and no change. Amounts are whole
numbers, of 10^6 FLOPs or of milliseconds, so that their sums are exact.

A run is claimed by a process that holds the lock of DIRECTORY/claims/ID, which the system frees when the process ends,
however it ends: a run that goes on and whose lock is free has lost its owner, and waits again under its reservation.

    waiting -> running -> done | failed | cancelled          running -> waiting where its owner stopped or died
"""

import contextlib
import hashlib
import hmac
import os
import pathlib
import re
import secrets
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass

from cs336.scaling.api.jobs import Job, Kind, Taken
from cs336.scaling.api.process import process_mark
from cs336.scaling.api.protocol import Account, State
from cs336.utils.database import Claim, Queue
from cs336.utils.locks import locked

FORMAT = 2
MOST_DEATHS = 3  # of a run's owners, one after the other: then it has failed
UNIT = {"flops": 1e6, "seconds": 0.001}  # of the ledger's whole numbers
MOST = 2**62  # of them, in one account: sums stay within 64 bits
SLACK = 1e-9  # of an account: what products of floats may be off, so that a grid that fills it fits
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

SCHEMA = """
CREATE TABLE IF NOT EXISTS users (
    name TEXT PRIMARY KEY,
    key_hash TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL CHECK (kind IN ('flops', 'seconds'))
) STRICT;
CREATE TABLE IF NOT EXISTS runs (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    user TEXT NOT NULL REFERENCES users,
    identity TEXT NOT NULL,
    job TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('waiting', 'running', 'done', 'failed', 'cancelled')),
    cancel INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0,
    deaths INTEGER NOT NULL DEFAULT 0,
    pid INTEGER, mark TEXT,
    reserved INTEGER NOT NULL, charged INTEGER,
    loss REAL, error TEXT,
    submitted REAL NOT NULL, started REAL, ended REAL
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS once ON runs (user, identity) WHERE state IN ('waiting', 'running', 'done');
CREATE TABLE IF NOT EXISTS ledger (
    number INTEGER PRIMARY KEY,
    user TEXT NOT NULL REFERENCES users,
    run TEXT REFERENCES runs (id),
    entry TEXT NOT NULL CHECK (entry IN ('grant', 'reserve', 'refund')),
    amount INTEGER NOT NULL CHECK ((entry = 'reserve') = (amount < 0) OR amount = 0),
    at REAL NOT NULL,
    UNIQUE (run, entry)
) STRICT;
CREATE TRIGGER IF NOT EXISTS written_once BEFORE UPDATE ON ledger
    BEGIN SELECT RAISE(ABORT, 'the ledger is not changed'); END;
CREATE TRIGGER IF NOT EXISTS kept BEFORE DELETE ON ledger
    BEGIN SELECT RAISE(ABORT, 'the ledger is not changed'); END;
CREATE TABLE IF NOT EXISTS submissions (
    user TEXT PRIMARY KEY REFERENCES users,
    prediction TEXT NOT NULL,
    at REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
"""


class DuplicateError(ValueError):
    """The user has this run already."""

    def __init__(self, run: str):
        super().__init__(f"you have this run already: {run}")
        self.run = run


class OverBudgetError(ValueError):
    """The account does not hold what a run takes."""

    def __init__(self, price: float, left: float, kind: Kind):
        unit = "FLOPs" if kind == "flops" else "seconds"
        super().__init__(f"the run takes {price:.6g} {unit}, and {left:.6g} are left of your budget")
        self.left = left


class FullError(RuntimeError):
    """The user has as many runs waiting as may."""


@dataclass(frozen=True)
class User:
    name: str
    kind: Kind


@dataclass(frozen=True)
class Entry:
    """A run. Amounts are in the unit of its user's account."""

    id: str
    user: str
    kind: Kind
    job: Job
    state: State
    cancel: bool
    attempts: int
    deaths: int
    """Of owners, since one last stopped in good order."""
    pid: int | None
    mark: str | None
    """See process_mark."""
    reserved: float
    charged: float | None
    loss: float | None
    error: str | None
    submitted: float
    started: float | None
    ended: float | None


class Store(Queue):
    """Every method is one transaction, and may be called from any process and thread.

    Raises ValueError for a file that is of another kind, OSError where it cannot be written.
    """

    def __init__(self, directory: str | os.PathLike):
        super().__init__(directory, "api.sqlite", "a training API's file", SCHEMA, FORMAT)

    def folder(self, run: str) -> pathlib.Path:
        """Where a run is made."""
        return self.directory / "runs" / run

    # ---- users ----

    def add_user(self, name: str, kind: Kind, amount: float) -> str:
        """Open an account of so many FLOPs or seconds, and return its key, of which only the hash is kept.

        Raises ValueError for a name that is taken or is none, and an amount that cannot be.
        """
        if not NAME.fullmatch(name):
            raise ValueError(f"a user's name is of up to 64 letters, digits, '.', '_', '-', got {name!r}")
        if not UNIT[kind] <= amount <= MOST * UNIT[kind]:
            most = MOST * UNIT[kind]
            raise ValueError(f"a budget must be from {UNIT[kind]:g} to {most:.3g} {kind}, got {amount}")
        key = f"cs336-{secrets.token_urlsafe(32)}"
        with self.transaction() as db:
            if db.execute("SELECT 1 FROM users WHERE name = ?", (name,)).fetchone():
                raise ValueError(f"there is a user {name!r} already")
            db.execute("INSERT INTO users VALUES (?, ?, ?)", (name, _hashed(key), kind))
            _enter(db, name, None, "grant", round(amount / UNIT[kind]))
        return key

    def user(self, key: str) -> User | None:
        """Whose key this is. Takes as long for every key."""
        given, found = _hashed(key), None
        with self.transaction(write=False) as db:
            for row in db.execute("SELECT * FROM users"):
                if hmac.compare_digest(given, row["key_hash"]):
                    found = User(row["name"], row["kind"])
        return found

    def accounts(self, name: str | None = None) -> list[Account]:
        """Of all users by name, or of one. Raises AssertionError if the ledger's invariant does not hold:

        granted = reserved by runs that wait or go on + charged for those that have ended + left, and left >= 0.
        """
        with self.transaction(write=False) as db:
            users = db.execute("SELECT * FROM users WHERE ? IN (name, '') ORDER BY name", (name or "",)).fetchall()
            return [_account(db, user) for user in users]

    # ---- runs ----

    def submit(self, user: User, job: Job, *, most_waiting: int = 1000) -> str:
        """Enter a run and reserve its price; its id.

        Raises DuplicateError, OverBudgetError, FullError, and FieldError where the price is not known.
        """
        price = job.price(user.kind)
        with self.transaction() as db:
            twin = db.execute(
                "SELECT id FROM runs WHERE user = ? AND identity = ? AND state IN ('waiting', 'running', 'done')",
                (user.name, job.identity),
            ).fetchone()
            if twin:
                raise DuplicateError(twin["id"])
            left, granted = _left(db, user.name), _granted(db, user.name)
            whole = max(1, round(price / UNIT[user.kind]))
            if left == 0 or whole - left > SLACK * granted:
                raise OverBudgetError(price, left * UNIT[user.kind], user.kind)
            whole = min(whole, left)
            (waiting,) = db.execute(
                "SELECT COUNT(*) FROM runs WHERE user = ? AND state = 'waiting'", (user.name,)
            ).fetchone()
            if waiting >= most_waiting:
                raise FullError(f"{waiting} of your runs are waiting, which is the most: come back later")
            id = secrets.token_hex(6)
            db.execute(
                "INSERT INTO runs (id, user, identity, job, state, reserved, submitted) "
                "VALUES (?, ?, ?, ?, 'waiting', ?, ?)",
                (id, user.name, job.identity, job.dumps(), whole, time.time()),
            )
            _enter(db, user.name, id, "reserve", -whole)
        return id

    def runs(self, user: str, *, state: State | None = None, limit: int = 1000, skip: int = 0) -> list[Entry]:
        """A user's, the newest first."""
        with self.transaction(write=False) as db:
            rows = db.execute(
                f"{SELECT} WHERE user = ? AND ? IN (state, '') ORDER BY number DESC LIMIT ? OFFSET ?",
                (user, state or "", limit, skip),
            )
            return [_entry(row) for row in rows]

    def run(self, user: str, id: str) -> Entry | None:
        """None for one that is not this user's."""
        with self.transaction(write=False) as db:
            row = db.execute(f"{SELECT} WHERE user = ? AND id = ?", (user, id)).fetchone()
            return _entry(row) if row else None

    def cancel(self, user: str, id: str, taken: Callable[[Entry], Taken]) -> None:
        """End a run that waits now, and one that goes on soon; one that has ended stays as it is."""
        with self.transaction() as db:
            row = db.execute(f"{SELECT} WHERE user = ? AND id = ?", (user, id)).fetchone()
            if row and row["state"] == "waiting":
                entry = _entry(row)
                _settle(db, entry, "cancelled", taken(entry))
            elif row and row["state"] == "running":
                db.execute("UPDATE runs SET cancel = 1 WHERE id = ?", (id,))

    # ---- the queue ----

    def claim(self) -> Claim[Entry] | None:
        """Take the next run: of the users with the fewest that go on, the one that has waited longest."""
        with contextlib.ExitStack() as held:  # let go of where the transaction fails
            with self.transaction() as db:
                entry = self._take(db, held)
            return None if entry is None else Claim(entry, held.pop_all())

    def _take(self, db: sqlite3.Connection, held: contextlib.ExitStack) -> Entry | None:
        waiting = db.execute(
            f"{SELECT} WHERE state = 'waiting' ORDER BY (SELECT COUNT(*) FROM runs AS other WHERE "
            "other.user = runs.user AND other.state = 'running'), number"
        ).fetchall()
        for row in waiting:
            try:
                held.enter_context(locked(self.claims, row["id"]))
            except RuntimeError:  # its last owner is about to let go
                continue
            pid = os.getpid()
            db.execute(
                "UPDATE runs SET state = 'running', pid = ?, mark = ?, attempts = attempts + 1, "
                "started = COALESCE(started, ?) WHERE id = ?",
                (pid, process_mark(pid), time.time(), row["id"]),
            )
            return _entry(db.execute(f"{SELECT} WHERE id = ?", (row["id"],)).fetchone())
        return None

    def cancelled(self, id: str) -> bool:
        """Whether a run that goes on shall end."""
        with self.transaction(write=False) as db:
            return bool(db.execute("SELECT 1 FROM runs WHERE id = ? AND cancel", (id,)).fetchone())

    def settle(
        self, claim: Claim[Entry], state: State, taken: Taken, *, loss: float | None = None, error: str | None = None
    ) -> None:
        """End a run, charge what it took, and give the rest back; or let it wait again, all of it still reserved."""
        try:
            with self.transaction() as db:
                _settle(db, claim.entry, state, taken, loss=loss, error=error)
        finally:
            claim.release()

    def recover(self, taken: Callable[[Entry], Taken]) -> list[Entry]:
        """Let runs whose owner is dead wait again, or end if that was asked or it is the third; those runs."""
        lost = []
        for entry in self.running():
            with contextlib.suppress(RuntimeError), locked(self.claims, entry.id), self.transaction() as db:
                row = db.execute(f"{SELECT} WHERE id = ? AND state = 'running'", (entry.id,)).fetchone()
                if row is None:
                    continue
                entry = _entry(row)
                state: State = "cancelled" if entry.cancel else "waiting"
                error, deaths = None, entry.deaths + 1
                if state == "waiting" and deaths >= MOST_DEATHS:
                    state, error = "failed", f"its process died {deaths} times"
                _settle(db, entry, state, taken(entry), error=error)
                db.execute("UPDATE runs SET deaths = ? WHERE id = ?", (deaths, entry.id))
                lost.append(entry)
        return lost

    def running(self) -> list[Entry]:
        with self.transaction(write=False) as db:
            return [_entry(row) for row in db.execute(f"{SELECT} WHERE state = 'running'")]

    def num_waiting(self) -> int:
        with self.transaction(write=False) as db:
            return db.execute("SELECT COUNT(*) FROM runs WHERE state = 'waiting'").fetchone()[0]


SELECT = "SELECT runs.*, (SELECT kind FROM users WHERE name = user) AS kind FROM runs"


def _hashed(key: str) -> str:
    """A key is 256 random bits: no salt and no slow hash makes it harder to guess."""
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()


def _enter(db: sqlite3.Connection, user: str, run: str | None, entry: str, amount: int) -> None:
    db.execute(
        "INSERT INTO ledger (user, run, entry, amount, at) VALUES (?, ?, ?, ?, ?)",
        (user, run, entry, amount, time.time()),
    )


def _left(db: sqlite3.Connection, user: str) -> int:
    return db.execute("SELECT SUM(amount) FROM ledger WHERE user = ?", (user,)).fetchone()[0]


def _granted(db: sqlite3.Connection, user: str) -> int:
    return db.execute("SELECT SUM(amount) FROM ledger WHERE user = ? AND entry = 'grant'", (user,)).fetchone()[0]


def _settle(
    db: sqlite3.Connection,
    entry: Entry,
    state: State,
    taken: Taken,
    *,
    loss: float | None = None,
    error: str | None = None,
) -> None:
    """In the transaction of `db`, in which the run was seen to be alive."""
    if state == "waiting":
        db.execute("UPDATE runs SET state = 'waiting', deaths = 0, pid = NULL, mark = NULL WHERE id = ?", (entry.id,))
        return
    (reserved,) = db.execute("SELECT reserved FROM runs WHERE id = ?", (entry.id,)).fetchone()
    charged = min(reserved, round(getattr(taken, entry.kind) / UNIT[entry.kind]))
    db.execute(
        "UPDATE runs SET state = ?, charged = ?, loss = ?, error = ?, pid = NULL, mark = NULL, ended = ? WHERE id = ?",
        (state, charged, loss, error, time.time(), entry.id),
    )
    _enter(db, entry.user, entry.id, "refund", reserved - charged)


def _account(db: sqlite3.Connection, user: sqlite3.Row) -> Account:
    name, kind = user["name"], user["kind"]
    granted, left = _granted(db, name), _left(db, name)
    reserved, charged = db.execute(
        "SELECT COALESCE(SUM(CASE WHEN charged IS NULL THEN reserved END), 0), COALESCE(SUM(charged), 0) "
        "FROM runs WHERE user = ?",
        (name,),
    ).fetchone()
    if granted != reserved + charged + left or left < 0:
        raise AssertionError(f"{name}: granted {granted}, reserved {reserved}, charged {charged}, left {left}")
    amounts = {"granted": granted, "reserved": reserved, "charged": charged, "left": left}
    return Account(user=name, unit=kind, **{what: amount * UNIT[kind] for what, amount in amounts.items()})


def _entry(row: sqlite3.Row) -> Entry:
    unit, facts = UNIT[row["kind"]], dict(row)
    for name in ("number", "identity"):
        del facts[name]
    facts |= {"job": Job.loads(row["job"]), "cancel": bool(row["cancel"]), "reserved": row["reserved"] * unit}
    return Entry(**facts | {"charged": None if row["charged"] is None else row["charged"] * unit})
