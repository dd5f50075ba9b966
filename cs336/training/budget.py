"""How long a run is: "90m", "2e18flops", "500Mtok" or "1000steps", and the number of steps that makes.

A time budget is planned while the run goes: the first steps are timed, the number of steps is set so that the schedule
ends with the time, and it is set anew when the speed drifts. Each decision is to be saved before the next step, so that
a resumed run takes the same ones.

A schedule must not jump where the plan changes. So it is a function of a step's place in the first plan, which goes on
at one pace between decisions: after [s, T] what was left of the first plan takes T - s steps.
"""

import dataclasses
import math
import re
from collections import deque
from typing import Any

SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
PREFIX = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12, "P": 10**15, "E": 10**18}
KIND = {"tok": "tokens", "tokens": "tokens", "flop": "flops", "flops": "flops", "step": "steps", "steps": "steps"}
PATTERN = re.compile(
    rf"(\d+\.?\d*(?:[eE][+-]?\d+)?)\s*(?:({'|'.join(SECONDS)})|([{''.join(PREFIX)}]?)({'|'.join(KIND)}))"
)

UNTIMED = 2  # first steps of a process: they compile and allocate
MEASURED = 3  # at least so many steps, and
MEASURED_PART = 0.005  # such a part of the budget, are timed before the first decision
WINDOW_PART = 0.1  # of the budget: the speed is that of the latest steps
DRIFT = 0.02  # of the budget, off its end: plan again
BETWEEN_PART = 0.05  # of the budget: time between two decisions, if half of the steps that were left are not done
MOST_RESERVED = 0.25  # of the budget, for what comes after the last step
PAUSED_PART = 0.05  # of the budget, for each kind of pause: validations, samples, checkpoints


@dataclasses.dataclass(frozen=True)
class Budget:
    kind: str
    """"seconds", "tokens", "flops" or "steps"."""
    amount: float
    text: str = dataclasses.field(default="", compare=False)
    """As it was written."""

    @staticmethod
    def parse(text: str) -> "Budget":
        """Read "90m", "1.5h", "2e18flops", "500Mtok", "1000steps": a number, a prefix k M G/B T P E, a unit.

        Units: s, m or min, h, d (no prefix); tok, flops, steps. Raises ValueError for anything else, and for zero.
        """
        match = PATTERN.fullmatch(text.strip())
        if match is None:
            raise ValueError(
                f'budget {text!r} not understood: expected "90m", "1.5h", "2e18flops", "500Mtok", "1000steps"'
            )
        number, time, prefix, unit = match.groups()
        amount = float(number) * (SECONDS[time] if time else PREFIX[prefix])
        if not 0 < amount < math.inf:
            raise ValueError(f"budget {text!r} must be more than zero and finite")
        return Budget("seconds" if time else KIND[unit], amount, text.strip())


class Plan:
    """The number of steps of a run under a budget.

    total_steps is None while a time budget is still measuring. decisions holds [step, total_steps] pairs.
    Raises ValueError if the budget is less than one step.
    """

    def __init__(self, budget: Budget, *, tokens_per_step: int, flops_per_step: float):
        self.budget = budget
        self.total_steps: int | None = None
        self.decisions: list[list[int]] = []
        self._observed: deque[tuple[int, float]] = deque()
        self._untimed = UNTIMED
        self._decided_at = 0.0
        if budget.kind != "seconds":
            step_cost = {"tokens": tokens_per_step, "flops": flops_per_step, "steps": 1}[budget.kind]
            total = int(budget.amount / step_cost)
            if total < 1:
                raise ValueError(f"the budget is {budget.amount:g} {budget.kind}, and one step takes {step_cost:g}")
            self._decide(0, total)

    @property
    def measuring(self) -> bool:
        """Whether `observe` is wanted after each step."""
        return self.total_steps is None

    @property
    def first_total(self) -> int:
        """The number of steps that was first decided, along which schedules go; 0 while there is none."""
        return self.decisions[0][1] if self.decisions else 0

    def covers(self, step: int) -> bool:
        """Whether the step, counted from 1, was or will be made with a number of steps decided."""
        return bool(self.decisions) and step > self.decisions[0][0]

    def place(self, step: int) -> float:
        """Where a step stands in the first plan: 0 at its start, decisions[0][1] at its end; `step` while it holds."""
        (decided, total), *later = self.decisions
        place, end = float(decided), total
        for next_decided, next_total in later:
            if step <= next_decided:
                break
            place += (end - place) * (next_decided - decided) / (total - decided)
            decided, total = next_decided, next_total
        return place + (end - place) * (step - decided) / (total - decided) if step < total else end

    def affordable(self, times: int, seconds: float, steps: float = 0.0) -> int:
        """How often a pause may be made: `times`, or as often as the budget bears.

        seconds: what one takes, which matters in a time budget alone, so that other runs repeat exactly.
        steps: what one is expected to take, in steps of training.
        """
        if self.budget.kind == "seconds" and seconds:
            return min(times, int(PAUSED_PART * self.budget.amount / seconds))
        return min(times, int(PAUSED_PART * (self.total_steps or 0) / steps)) if steps else times

    def observe(self, step: int, seconds: float, reserve: float = 0.0, deciding: float = 0.0) -> bool:
        """Take note that `step` steps are done after `seconds` of the run; whether that changed total_steps.

        reserve: seconds that are needed after the last step.
        deciding: seconds that a decision takes, which is saved; the speed is then measured anew behind it.
        """
        if self.budget.kind != "seconds":
            return False
        end = self.budget.amount - min(reserve, MOST_RESERVED * self.budget.amount)
        if seconds >= end:
            return self._decide(step, step, seconds)
        if self._untimed > 1:
            self._untimed -= 1
            return False
        self._observed.append((step, seconds))
        while len(self._observed) > MEASURED + 1 and self._is_old(self._observed[1], step, seconds):
            self._observed.popleft()
        first_step, first_seconds = self._observed[0]
        if step - first_step < MEASURED or seconds - first_seconds < MEASURED_PART * self.budget.amount:
            return False
        rate = (seconds - first_seconds) / (step - first_step)
        if self.total_steps is not None:
            expected = seconds + (self.total_steps - step) * rate
            on_time = abs(expected - end) <= max(DRIFT * self.budget.amount, rate)
            if on_time or not self._may_decide(step, seconds):
                return False
        left = end - seconds
        return self._decide(step, step + int((left - min(deciding, MOST_RESERVED * left)) / rate), seconds)

    def _is_old(self, observed: tuple[int, float], step: int, seconds: float) -> bool:
        """Of no use for the speed: long ago, or before more steps than are left."""
        then, at = observed
        left = math.inf if self.total_steps is None else max(MEASURED, self.total_steps - step)
        return seconds - at > WINDOW_PART * self.budget.amount or step - then > left

    def _may_decide(self, step: int, seconds: float) -> bool:
        """Seldom, but before the end is near: a run that became fast would reach it at once."""
        decided, total = self.decisions[-1]
        return seconds - self._decided_at >= BETWEEN_PART * self.budget.amount or 2 * step >= decided + total

    def _decide(self, step: int, total_steps: int, seconds: float = 0.0) -> bool:
        self._decided_at = seconds
        if total_steps == self.total_steps:
            return False
        self.total_steps = total_steps
        self.decisions.append([step, total_steps])
        self._observed.clear()
        return True

    def state_dict(self) -> dict[str, Any]:
        budget = {"kind": self.budget.kind, "amount": self.budget.amount}
        return {"budget": budget, "decisions": self.decisions, "decided_at": self._decided_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the decisions of a saved run; those of another budget are void."""
        if Budget(**state["budget"]) != self.budget or not state["decisions"]:
            return
        self.decisions, self._decided_at = state["decisions"], state["decided_at"]
        self.total_steps = self.decisions[-1][1]
