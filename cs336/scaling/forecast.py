"""Forecasts that were written down before the run, and their grades after it: JSON lines, one forecast each.

A grade replaces nothing that was forecast: it adds the measured loss, once.
"""

import datetime
import json
import math
import pathlib
from dataclasses import asdict, dataclass, replace

from cs336.scaling.compute import ComputeFit
from cs336.scaling.fit import Fit
from cs336.scaling.laws import check_positive
from cs336.utils.files import write_json_lines
from cs336.utils.locks import in_turn


@dataclass(frozen=True)
class Forecast:
    """Of one run. Losses are in nats a token. Raises ValueError for numbers that are none."""

    name: str
    parameters: float
    tokens: float
    loss: float
    low: float
    high: float
    confidence: float
    made: str
    """UTC, ISO 8601."""
    measured: float | None = None
    graded: str | None = None
    flops: float | None = None
    """As the law counts them; None of a law of parameters and tokens."""

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"name must be text by which the run is graded later, got {self.name!r}")
        numbers = {name: getattr(self, name) for name in ("parameters", "tokens", "loss", "low", "high", "confidence")}
        numbers |= {name: getattr(self, name) for name in ("measured", "flops") if getattr(self, name) is not None}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if not self.confidence < 1:
            raise ValueError(f"confidence must be below 1, got {self.confidence}")
        if self.low > self.high:  # the loss itself may lie outside of resampled ones
            raise ValueError(f"low must be at most high, got {self.low} and {self.high}")

    @property
    def error(self) -> float | None:
        """The measured loss over the predicted, less 1; None before the grade."""
        return None if self.measured is None else self.measured / self.loss - 1

    @property
    def covered(self) -> bool | None:
        """Whether the measured loss is within the interval; None before the grade."""
        return None if self.measured is None else self.low <= self.measured <= self.high


def read(log: pathlib.Path) -> list[Forecast]:
    """A log; none where there is no file. Raises ValueError that names the line which is no forecast."""
    if not log.exists():
        return []
    found = []
    for number, line in enumerate(log.read_bytes().splitlines(), 1):
        try:
            found.append(Forecast(**json.loads(line.decode())))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{log}:{number} is no forecast: {error}") from None
    return found


def forecast(
    log: pathlib.Path,
    fit: Fit | ComputeFit,
    name: str,
    parameters: float,
    tokens: float,
    *,
    flops: float | None = None,
    unique_tokens: float | None = None,
    confidence: float = 0.95,
) -> Forecast:
    """Predict a run and write it down.

    flops: of a law of compute, 6 parameters * tokens if not given.

    Raises ValueError for a name that the log has. Processes that write one log take turns.
    """
    whole = 6 * parameters * tokens if flops is None else flops
    check_positive(parameters=parameters, tokens=tokens, flops=whole)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if isinstance(fit, ComputeFit):
        if unique_tokens is not None:
            raise ValueError("a law of compute does not tell tokens that are read again: leave unique_tokens out")
        loss, (low, high) = fit.predict(whole, confidence)
    else:
        loss, (low, high) = fit.predict(parameters, tokens, confidence, unique_tokens=unique_tokens)
    counted = whole if isinstance(fit, ComputeFit) else None
    new = Forecast(name, parameters, tokens, loss, low, high, confidence, _now(), flops=counted)
    log.parent.mkdir(parents=True, exist_ok=True)
    with in_turn(log):
        made = read(log)
        if any(name == other.name for other in made):
            raise ValueError(f"{log} has a forecast of {name!r}: a forecast is not changed; name another")
        _write(log, [*made, new])
    return new


def grade(log: pathlib.Path, name: str, measured: float) -> Forecast:
    """Write down what a run reached. Raises ValueError without its forecast, and where it was graded before."""
    check_positive(**{"a measured loss": measured})
    if not log.parent.is_dir():
        raise ValueError(f"{log} has no forecast of {name!r}: there are none")
    with in_turn(log):
        made = read(log)
        places = [i for i, other in enumerate(made) if other.name == name]
        if not places:
            known = ", ".join(f.name for f in made) or "none"
            raise ValueError(f"{log} has no forecast of {name!r}: there are {known}")
        before = made[places[0]]
        if before.measured is not None:
            raise ValueError(f"{name!r} was graded at {before.graded}, with {before.measured}")
        made[places[0]] = replace(before, measured=measured, graded=_now())
        _write(log, made)
    return made[places[0]]


def score(forecasts: list[Forecast]) -> tuple[float, float] | None:
    """The mean size of the errors, and the share of intervals that held; None while nothing is graded."""
    errors = [abs(f.error) for f in forecasts if f.error is not None]
    if not errors:
        return None
    return sum(errors) / len(errors), sum(f.covered is True for f in forecasts) / len(errors)


def _write(log: pathlib.Path, forecasts: list[Forecast]) -> None:
    write_json_lines(log, map(asdict, forecasts))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
