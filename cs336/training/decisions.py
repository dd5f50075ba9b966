"""What a run decides while it goes: how many steps it has, when to pause for something else, when to stop.

Decisions follow from the clock and from signals, which differ from process to process: rank 0's clock is that of all,
and a signal to any of them stops all.
"""

from collections.abc import Callable
from typing import Protocol

from cs336.parallel.launch import agreed, any_rank
from cs336.training.budget import Budget, Plan

LOOK_PART = 0.01  # of a time budget: the longest time without a look at the clock
CHECKPOINTS = 10  # a run, where the configuration does not say
SAVED_PER_SECOND = 4e8  # bytes, until a save has been measured: 1.5 GB took 3.9 s, flushed and with checksums


class Pause:
    """Something that is done between steps, now and then: how often, and how long it takes.

    interval: steps between two, 0 for only at the end; None: `times` a run, fewer where they would take too much of it.
    steps: what one takes in steps of training, given those of the run: believed until it has been measured.
    """

    def __init__(self, name: str, interval: int | None, times: int, steps: Callable[[int], float] = lambda total: 0.0):
        self.name, self.interval, self.times, self.steps = name, interval, times, steps
        self.taken: list[float] = []
        """Seconds of each that this process made."""

    @property
    def seconds(self) -> float | None:
        """Of the latest."""
        return self.taken[-1] if self.taken else None

    def expected(self, plan: Plan, seconds_per_step: float) -> float:
        """Seconds of the next one."""
        return self.steps(plan.first_total) * seconds_per_step if self.seconds is None else self.seconds

    def every(self, plan: Plan) -> int:
        """Steps between two under a plan; 0: never but at the end."""
        total = plan.total_steps
        if self.interval is not None or not total:
            return self.interval or 0
        times = plan.affordable(self.times, self.seconds or 0.0, self.steps(plan.first_total))
        return max(1, total // times) if times else 0

    def left(self, plan: Plan, step: int) -> int:
        """How many are to come after a step, the one at the end included."""
        total, every = plan.total_steps, self.every(plan)
        if total is None or step >= total:
            return 0
        inside = (total - 1) // every - step // every if every else 0
        return inside + 1


class Paced(Protocol):
    """What of a configuration decides the pace of a run."""

    @property
    def budget(self) -> str: ...
    @property
    def log_interval(self) -> int: ...
    @property
    def checkpoint_interval(self) -> int | None: ...


class Decisions:
    """The plan, the pauses and the stop of a run.

    saved_bytes: of a checkpoint. Raises ValueError if the budget is less than one step.
    """

    def __init__(
        self,
        config: Paced,
        *,
        tokens_per_step: int,
        flops_per_step: float,
        pauses: list[Pause],
        saved_bytes: int = 0,
    ):
        self.log_interval = config.log_interval
        budget = Budget.parse(config.budget)
        self.plan = Plan(budget, tokens_per_step=tokens_per_step, flops_per_step=flops_per_step)
        self.save = Pause("checkpoint", config.checkpoint_interval, CHECKPOINTS)
        self.pauses = [*pauses, self.save]
        self._last_save = saved_bytes / SAVED_PER_SECOND  # seconds of one in the foreground, as the last one is

    @property
    def saves(self) -> bool:
        """Whether checkpoints are written before the end; a run without them begins anew when it was killed."""
        return self.save.interval != 0

    def finished(self, step: int) -> bool:
        return self.plan.total_steps is not None and step >= self.plan.total_steps

    def stop(self, requested: Callable[[], bool]) -> bool:
        return any_rank(requested())

    def look(self, step: int, waited: float) -> bool:
        """Whether to wait for the device after this step, `waited` seconds after the last time."""
        if self.finished(step) or step % self.log_interval == 0 or self.plan.measuring:
            return True
        budget = self.plan.budget
        return budget.kind == "seconds" and agreed(waited > LOOK_PART * budget.amount)

    def observe(self, step: int, seconds: float) -> bool:
        """Take note of the time; whether the number of steps changed."""
        reserve = self._last_save + sum(p.seconds or 0.0 for p in self.pauses if p is not self.save)
        return self.plan.observe(step, agreed(seconds), reserve, self._last_save if self.saves else 0.0)

    def due(self, pause: Pause, step: int) -> bool:
        every = pause.every(self.plan)
        return self.finished(step) or (every > 0 and step % every == 0)

    def took(self, pause: Pause, seconds: float, background: bool = False) -> None:
        """background: most of it is still being done."""
        pause.taken.append(agreed(seconds))
        if pause is self.save and not background:
            self._last_save = pause.taken[-1]

    def seconds_left(self, step: int, seconds: float, seconds_per_step: float) -> float:
        """Of the steps and all that is scheduled between them."""
        if self.plan.budget.kind == "seconds":
            return self.plan.budget.amount - seconds
        assert self.plan.total_steps is not None  # known from the start
        pauses = sum(p.left(self.plan, step) * p.expected(self.plan, seconds_per_step) for p in self.pauses)
        return (self.plan.total_steps - step) * seconds_per_step + pauses
