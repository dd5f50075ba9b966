import itertools
import json

import pytest

from cs336.training import Budget
from cs336.training.budget import Plan


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("90m", "seconds", 5400),
        ("90min", "seconds", 5400),
        ("1.5h", "seconds", 5400),
        ("20s", "seconds", 20),
        ("2d", "seconds", 172_800),
        ("2e18flops", "flops", 2e18),
        ("3Eflops", "flops", 3e18),
        ("500Mtok", "tokens", 5e8),
        (" 10 Btokens ", "tokens", 1e10),
        ("1000steps", "steps", 1000),
        ("1step", "steps", 1),
        ("2.5ksteps", "steps", 2500),
    ],
)
def test_parse(text, kind, amount):
    assert Budget.parse(text) == Budget(kind, amount)


@pytest.mark.parametrize(
    "text", ["", "90", "90M", "m", "-5m", "1e999flops", "0steps", "5 apples", "500mtok", "nanm", "1m30s", "1kh"]
)
def test_parse_refuses(text):
    with pytest.raises(ValueError, match="budget"):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("text", "steps"), [("7steps", 7), ("1000tok", 15), ("64tok", 1), ("1e6flops", 100), ("1.9e4flops", 1)]
)
def test_steps_of_a_countable_budget(text, steps):
    plan = Plan(Budget.parse(text), tokens_per_step=64, flops_per_step=1e4)
    assert (plan.total_steps, plan.decisions) == (steps, [[0, steps]])
    assert not plan.measuring
    assert not plan.observe(3, 1e9)
    assert plan.total_steps == steps


def test_less_than_a_step_is_refused():
    with pytest.raises(ValueError, match="the budget is 63 tokens, and one step takes 64"):
        Plan(Budget.parse("63tok"), tokens_per_step=64, flops_per_step=1)


class Clock:
    """Runs a plan against a speed: a function step -> seconds of that step."""

    def __init__(self, budget, speed, interval=10):
        self.plan = Plan(Budget.parse(budget), tokens_per_step=1, flops_per_step=1)
        self.speed, self.interval, self.step, self.seconds = speed, interval, 0, 0.0

    def run(self, until=None):
        while (total := self.plan.total_steps) is None or self.step < (until or total):
            self.step += 1
            self.seconds += self.speed(self.step)
            if self.plan.measuring or self.step % self.interval == 0:
                self.plan.observe(self.step, self.seconds)
        return self


def test_a_steady_run_is_planned_once_and_lands():
    clock = Clock("100s", lambda step: 30.0 if step == 1 else 0.1).run()  # the first step compiles
    assert 98 < clock.seconds <= 100
    assert len(clock.plan.decisions) == 1
    assert clock.plan.decisions[0][0] < 15  # known early


@pytest.mark.parametrize(
    "speed",
    [
        lambda step: 0.1 if step < 300 else 0.2,
        lambda step: 0.1 if step < 300 else 0.03,
        lambda step: 0.1 + (3.0 if step % 50 == 0 else 0.0),  # validations
        lambda step: 0.1 + step * 0.0002,
        lambda step: 0.1 * (1 + (step * 7919 % 101) / 100),  # noise
    ],
)
def test_drift_is_planned_for(speed):
    clock = Clock("100s", speed).run()
    assert clock.seconds == pytest.approx(100, rel=0.05)
    assert len(clock.plan.decisions) <= 21
    totals = [total for _, total in clock.plan.decisions]
    assert clock.step == totals[-1]


@pytest.mark.parametrize("factor", [0.05, 0.4, 3.0, 20.0])
@pytest.mark.parametrize("change", [2, 30, 500])
def test_a_schedule_goes_on_smoothly_and_lands_when_the_speed_changes(factor, change):
    clock = Clock("100s", lambda step: 0.1 * (factor if step > change else 1), interval=1).run()
    plan = clock.plan
    (decided, total), *later = plan.decisions
    assert later or change == 2
    assert clock.seconds == pytest.approx(100, abs=2 + 2 * 0.1 * factor)
    places = [plan.place(step) for step in range(decided, clock.step + 1)]
    assert places[0] == decided
    assert places[-1] == total
    paces = [b - a for a, b in itertools.pairwise(places)]
    assert all(pace > 0 for pace in paces)
    # Within one plan the pace is one; a step is never longer than what the time it takes makes of the schedule.
    assert len({round(pace, 6) for pace in paces}) <= len(plan.decisions)
    assert max(paces) / total < 3 * 0.1 * max(factor, 1) / 100 + 0.02


@pytest.mark.parametrize("save", [0.5, 2.0, 5.0])
def test_decisions_that_take_long_do_not_follow_each_other(save):
    """A checkpoint is written for each: its time is that of no step, and the next plan has room for it."""
    plan = Plan(Budget.parse("60s"), tokens_per_step=1, flops_per_step=1)
    step, seconds, took = 0, 0.0, 0.0
    while plan.total_steps is None or step < plan.total_steps:
        step, seconds = step + 1, seconds + 0.05
        if (plan.measuring or step % 10 == 0) and plan.observe(step, seconds, took, took):
            took = save
            seconds += save
    assert len(plan.decisions) <= 3
    assert 60 - 2 * save - 1.5 <= seconds <= 60 - save + 1.5  # the last save is still to come


def test_a_countable_plan_is_its_own_schedule():
    plan = Plan(Budget.parse("777steps"), tokens_per_step=1, flops_per_step=1)
    assert [plan.place(step) for step in range(778)] == list(range(778))


def test_time_is_reserved_for_what_comes_after_the_last_step():
    plan = Clock("100s", lambda step: 0.1).run().plan
    assert plan.observe(800, 80.0, reserve=20.0)
    assert plan.total_steps == 800
    plan = Clock("100s", lambda step: 0.1).run(until=100).plan
    assert plan.observe(200, 20.0, reserve=1e9)
    assert plan.total_steps == pytest.approx(750, abs=1)  # no more than a quarter


def test_pauses_that_a_time_budget_bears():
    plan = Plan(Budget.parse("100s"), tokens_per_step=1, flops_per_step=1)
    assert [plan.affordable(20, seconds) for seconds in (0.0, 0.01, 0.5, 2.5, 6.0)] == [20, 20, 10, 2, 0]
    assert Plan(Budget.parse("5steps"), tokens_per_step=1, flops_per_step=1).affordable(20, 1e9) == 20


@pytest.mark.parametrize(("budget", "seconds"), [("1s", 5.0), ("10s", 3.0)])
def test_steps_longer_than_the_budget_allows_still_end(budget, seconds):
    clock = Clock(budget, lambda step: seconds).run()
    assert clock.step == -(-clock.plan.budget.amount // seconds)
    assert clock.plan.total_steps == clock.step


def test_a_budget_of_few_steps_is_planned_for():
    """Each takes more of it than the window over which the speed is measured."""
    clock = Clock("60s", lambda step: 4.0).run(until=5)
    assert clock.plan.decisions == [[5, 15]]


def test_decisions_survive_a_resume():
    clock = Clock("100s", lambda step: 0.1).run(until=200)
    state = json.loads(json.dumps(clock.plan.state_dict()))
    resumed = Clock("100s", lambda step: 0.1)
    resumed.plan.load_state_dict(state)
    assert resumed.plan.decisions == clock.plan.decisions
    resumed.step, resumed.seconds = 200, clock.seconds
    resumed.run()
    assert resumed.seconds == pytest.approx(100, rel=0.03)


def test_another_budget_voids_the_decisions():
    state = Clock("100s", lambda step: 0.1).run(until=50).plan.state_dict()
    plan = Plan(Budget.parse("200s"), tokens_per_step=1, flops_per_step=1)
    plan.load_state_dict(state)
    assert plan.measuring
    plan = Plan(Budget.parse("70steps"), tokens_per_step=1, flops_per_step=1)
    plan.load_state_dict(state)
    assert plan.total_steps == 70
