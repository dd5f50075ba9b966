"""The learning rate of each step, while the number of steps is planned, and planned anew.

A schedule must not jump where the plan changes: it is a function of a step's place in the first plan (see
cs336.training.budget). Until a time budget is first planned the rate warms up and stays; from there it goes in a
straight line to that of the plan.
"""

from typing import Any

from cs336.optim import ScheduleConfig, constant_schedule
from cs336.training.budget import Plan
from cs336.utils.counted import counted

UNPLANNED_WARMUP = 100  # steps, while a time budget still measures how many there will be
JOINING = 0.05  # of what is left then: the learning rate goes in a straight line to that of the plan


class LearningRate:
    """A function of the step, given a plan. `held` is the rate of a run that goes on under a budget not yet planned."""

    def __init__(self, schedule: ScheduleConfig, top: float, plan: Plan):
        self.schedule, self.top, self.plan = schedule, top, plan
        self.unplanned = 0.0  # the rate when a time budget was first planned
        self.held: float | None = None

    def at(self, step: int) -> float:
        """Of a step counted from 1, so that the first is above zero and the last is the lowest."""
        if self.plan.covers(step):
            decided, total = self.plan.decisions[0]
            place, joined = self.plan.place(step), decided + JOINING * (total - decided)
            if not decided or place >= joined:
                return self.schedule.lr(place, total, self.top)
            part = (place - decided) / (joined - decided)
            return (1 - part) * self.unplanned + part * self.schedule.lr(joined, total, self.top)
        if self.held is not None:
            return self.held
        warmup = self.schedule.warmup_steps
        return constant_schedule(step, max_lr=self.top, warmup_steps=UNPLANNED_WARMUP if warmup is None else warmup)

    def check(self) -> None:
        """Raises ValueError if the schedule cannot land. Later plans go along the first one's, however many steps."""
        total = self.plan.decisions[0][1] if self.plan.decisions else self.plan.total_steps
        if total is not None and self.schedule.warmup(total) >= total:
            raise ValueError(
                f"the schedule cannot land: {self.schedule.warmup(total)} warm-up steps, and the budget of "
                f"{self.plan.budget.text} makes {counted(total, 'step')}; set schedule.warmup_steps "
                "lower or give more budget"
            )
        if total is not None:
            self.schedule.lr(total, total, self.top)

    def done(self, step: int) -> float:
        """How far along the first plan a step is, 0 to 1; 0 while there is none."""
        return self.plan.place(step) / self.plan.first_total if self.plan.covers(step) else 0.0

    def highest_after(self, step: int) -> float:
        """Of the steps that are left; 0 if there are none or it is not known how many."""
        total = self.plan.total_steps or 0
        every = max(1, (total - step) // 256)
        return max(map(self.at, range(step + 1, total + 1, every)), default=0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"unplanned_lr": self.unplanned}

    def load_state_dict(self, state: dict[str, Any], held: float) -> None:
        self.unplanned, self.held = state["unplanned_lr"], held
