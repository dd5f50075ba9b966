"""What a run of the API is to do, what it has taken so far, and the two backends' common face."""

import json
import math
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from cs336.scaling.api.protocol import RunRequest
from cs336.utils.rows import newest_row, read_rows

Kind = Literal["flops", "seconds"]
MOST_POINTS = 200  # of a loss curve that is answered


class FieldError(ValueError):
    """A request that cannot be met, by the field that is to blame."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


class Interrupted(Exception):
    """A run was asked to stop: it can be continued."""


@dataclass(frozen=True)
class Job:
    """A run as it will be made, every default filled in."""

    identity: str
    """The same for requests that would make the same run."""
    parameters: float
    flops_per_token: float
    tokens: float | None
    """None: as many as the seconds allow."""
    seconds: float | None
    """None: not known before it has run."""
    learning_rate: float
    batch_tokens: float
    """Tokens a step."""
    seed: int
    config: dict[str, Any] | None = None
    """Of `cs336 train`, but for run_dir."""

    @property
    def flops(self) -> float | None:
        return None if self.tokens is None else self.tokens * self.flops_per_token

    def price(self, kind: Kind) -> float:
        """What it takes of an account at most. Raises FieldError where that is not known beforehand."""
        amount = self.flops if kind == "flops" else self.seconds
        if amount is None:
            unit = {"flops": "FLOPs: say it in flops, tok or steps", "seconds": "seconds: say it as 90s or 10m"}[kind]
            raise FieldError("config.budget", f"the budget of a run must be in the account's unit, which is {unit}")
        if not math.isfinite(amount):
            raise FieldError("tokens", "parameters times tokens is no finite number")
        return amount

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def loads(text: str) -> "Job":
        return Job(**json.loads(text))


@dataclass(frozen=True)
class Taken:
    """By a run since it was begun; what a crash lost, and was done again, counts once."""

    flops: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0


class Backend(Protocol):
    """Where runs come from."""

    def plan(self, asked: RunRequest) -> Job:
        """Fill in what a request leaves out. Raises FieldError for what cannot be run."""

    def run(self, job: Job, folder: pathlib.Path, stopped: Callable[[], bool]) -> float:
        """Make a run, or continue it, and return its loss. Raises Interrupted once it is stopped."""


def taken(job: Job, folder: pathlib.Path) -> Taken:
    """By its newest row."""
    row = newest_row(folder) or {}
    tokens = float(row.get("tokens", 0))
    return Taken(tokens * job.flops_per_token, tokens, float(row.get("seconds", 0)))


def _has_loss(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("train/loss"), int | float)


def curve(folder: pathlib.Path) -> list[tuple[float, float]]:
    """(tokens, loss) along a run, thinned to MOST_POINTS, the newest kept."""
    points = [(row["tokens"], row["train/loss"]) for row in read_rows(folder) if _has_loss(row)]
    step = -(-len(points) // MOST_POINTS) or 1
    return points[::-1][::step][::-1]


def newest_loss(folder: pathlib.Path) -> float | None:
    """The last of a curve."""
    row = newest_row(folder, _has_loss)
    return None if row is None else row["train/loss"]
