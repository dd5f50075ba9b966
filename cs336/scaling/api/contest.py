"""Final submissions, the true run once it is revealed, and the board that scores them."""

import datetime
import json
import math
import time
from dataclasses import dataclass

from cs336.scaling.api.protocol import Leaderboard, Prediction, Score, Submission
from cs336.scaling.api.store import Store, User
from cs336.scaling.laws import check_positive


class ClosedError(ValueError):
    """A submission is not taken any more."""


@dataclass(frozen=True)
class Contest:
    """One submission a user, replaced until it is final or the deadline has passed or the true run is revealed."""

    store: Store
    target_flops: float | None = None
    """Of the run that is predicted."""
    deadline: str | None = None
    """ISO 8601; UTC without an offset."""

    def __post_init__(self):
        check_positive(target=self.target_flops)
        self._ends()

    def _ends(self) -> float:
        if self.deadline is None:
            return math.inf
        try:
            found = datetime.datetime.fromisoformat(self.deadline)
        except ValueError:
            raise ValueError(f"deadline must be like 2026-12-01T18:00, got {self.deadline!r}") from None
        return (found if found.tzinfo else found.replace(tzinfo=datetime.UTC)).timestamp()

    def submit(self, user: User, prediction: Prediction) -> Submission:
        """Raises ClosedError."""
        now = time.time()
        if now > self._ends():
            raise ClosedError(f"the deadline was {self.deadline}")
        with self.store.transaction() as db:
            before = db.execute("SELECT * FROM submissions WHERE user = ?", (user.name,)).fetchone()
            if before and json.loads(before["prediction"])["final"]:
                raise ClosedError("your submission is final")
            if db.execute("SELECT 1 FROM facts WHERE name = 'truth'").fetchone():
                raise ClosedError("the true run is revealed")
            text = prediction.model_dump_json()
            db.execute("INSERT OR REPLACE INTO submissions VALUES (?, ?, ?)", (user.name, text, now))
        return Submission(user=user.name, at=now, **prediction.model_dump())

    def of(self, user: User) -> Submission | None:
        return next((found for found in self._all() if found.user == user.name), None)

    def _all(self) -> list[Submission]:
        with self.store.transaction(write=False) as db:
            rows = db.execute("SELECT * FROM submissions ORDER BY at").fetchall()
        return [Submission(user=row["user"], at=row["at"], **json.loads(row["prediction"])) for row in rows]

    def board(self) -> Leaderboard:
        """By the error of the predicted loss; before the true run is revealed by time, without what was predicted."""
        loss, best = truth(self.store) or (None, None)
        rows = [Score(user=s.user, final=s.final) if loss is None else _scored(s, loss, best) for s in self._all()]
        rows.sort(key=lambda row: row.error or 0.0)
        return Leaderboard(
            target_flops=self.target_flops, deadline=self.deadline, true_loss=loss, true_parameters=best, rows=rows
        )


def _scored(made: Submission, loss: float, best: float | None) -> Score:
    ratio = None if best is None else made.parameters / best
    kept = {"user": made.user, "final": made.final, "loss": made.loss, "parameters": made.parameters}
    return Score.model_validate(kept | {"error": abs(made.loss / loss - 1), "size_ratio": ratio})


def reveal(store: Store, loss: float, parameters: float | None = None) -> int:
    """Say what the target's run reached, once; how many submissions there are. Raises ValueError."""
    check_positive(loss=loss, parameters=parameters)
    with store.transaction() as db:
        if db.execute("SELECT 1 FROM facts WHERE name = 'truth'").fetchone():
            raise ValueError("the true run is revealed already: it is not changed")
        db.execute("INSERT INTO facts VALUES ('truth', ?)", (json.dumps([loss, parameters]),))
        return db.execute("SELECT COUNT(*) FROM submissions").fetchone()[0]


def truth(store: Store) -> tuple[float, float | None] | None:
    """Loss, and parameters if they are known, of the true run; None before it is revealed."""
    with store.transaction(write=False) as db:
        row = db.execute("SELECT value FROM facts WHERE name = 'truth'").fetchone()
    return tuple(json.loads(row["value"])) if row else None
