import functools
import itertools
import math

import pytest

from cs336.optim import constant_schedule, cosine_schedule, linear_schedule, wsd_s_schedule, wsd_schedule

RANGE = {"max_lr": 1.0, "min_lr": 0.1}
COSINE = functools.partial(cosine_schedule, **RANGE, warmup_steps=4, total_steps=12)
LINEAR = functools.partial(linear_schedule, **RANGE, warmup_steps=4, total_steps=13)
WSD = functools.partial(wsd_schedule, **RANGE, warmup_steps=4, decay_steps=4, total_steps=12)
WSD_LINEAR = functools.partial(WSD, decay="linear")
WSD_COSINE = functools.partial(WSD, decay="cosine")
WSD_S = functools.partial(wsd_s_schedule, **RANGE, warmup_steps=4, ends=(12, 20), decay_part=0.5)
CONSTANT = functools.partial(constant_schedule, max_lr=1.0, warmup_steps=4)


@pytest.mark.parametrize(
    ("schedule", "step", "lr"),
    [
        (COSINE, 4, 1.0),
        (COSINE, 6, 0.1 + 0.5 * (1 + math.sqrt(0.5)) * 0.9),
        (COSINE, 8, 0.55),
        (COSINE, 10, 0.1 + 0.5 * (1 - math.sqrt(0.5)) * 0.9),
        (COSINE, 12, 0.1),
        (COSINE, 1000, 0.1),
        (LINEAR, 4, 1.0),
        (LINEAR, 5, 0.9),
        (LINEAR, 12, 0.2),
        (LINEAR, 13, 0.1),
        (LINEAR, 1000, 0.1),
        (WSD, 4, 1.0),
        (WSD, 7, 1.0),
        (WSD, 8, 1.0),
        (WSD, 9, 0.55),
        (WSD, 10, 0.1 + 0.9 * (1 - math.sqrt(0.5))),
        (WSD, 12, 0.1),
        (WSD, 1000, 0.1),
        (WSD_LINEAR, 8, 1.0),
        (WSD_LINEAR, 10, 0.55),
        (WSD_LINEAR, 11, 0.325),
        (WSD_COSINE, 9, 0.1 + 0.5 * (1 + math.sqrt(0.5)) * 0.9),
        (WSD_COSINE, 12, 0.1),
        (WSD_S, 4, 1.0),
        (WSD_S, 6, 1.0),
        (WSD_S, 7.5, 0.55),
        (WSD_S, 12, 0.1),
        (WSD_S, 12.01, 1.0),
        (WSD_S, 16, 1.0),
        (WSD_S, 17, 0.55),
        (WSD_S, 20, 0.1),
        (WSD_S, 1000, 0.1),
        (CONSTANT, 4, 1.0),
        (CONSTANT, 10**9, 1.0),
    ],
)
def test_by_hand(schedule, step, lr):
    assert schedule(step) == pytest.approx(lr, rel=1e-14)


def test_positional_arguments():
    assert cosine_schedule(8, 1.0, 0.1, 4, 12) == COSINE(8)
    assert linear_schedule(8, 1.0, 0.1, 4, 13) == LINEAR(8)
    assert wsd_schedule(9, 1.0, 0.1, 4, 4, 12) == WSD(9)
    assert wsd_s_schedule(17, 1.0, 0.1, 4, (12, 20), 0.5) == WSD_S(17)
    assert constant_schedule(2, 1.0, 4) == CONSTANT(2)


@pytest.mark.parametrize("schedule", [COSINE, LINEAR, WSD, WSD_S, CONSTANT])
def test_warm_up(schedule):
    assert [schedule(step) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("schedule", [COSINE, LINEAR, WSD, WSD_LINEAR, WSD_COSINE])
def test_falls_once_warm(schedule):
    lrs = [schedule(step / 8) for step in range(4 * 8, 14 * 8)]
    assert all(a >= b for a, b in itertools.pairwise(lrs))
    assert all(0.1 <= lr <= 1.0 for lr in lrs)


@pytest.mark.parametrize("schedule", [cosine_schedule, linear_schedule, functools.partial(wsd_schedule, decay_steps=0)])
def test_edges(schedule):
    assert schedule(0, **RANGE, warmup_steps=0, total_steps=5) == 1.0
    assert schedule(5, **RANGE, warmup_steps=0, total_steps=5) == 0.1
    assert schedule(0, **RANGE, warmup_steps=0, total_steps=0) == 0.1
    assert schedule(4, **RANGE, warmup_steps=5, total_steps=5) == pytest.approx(0.8)
    assert schedule(5, **RANGE, warmup_steps=5, total_steps=5) == 0.1
    assert schedule(3, max_lr=0.5, min_lr=0.5, warmup_steps=0, total_steps=5) == 0.5
    assert schedule(3, max_lr=0.0, min_lr=0.0, warmup_steps=0, total_steps=5) == 0.0


@pytest.mark.parametrize("schedule", [cosine_schedule, linear_schedule, functools.partial(wsd_schedule, decay_steps=2)])
@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("step must not be negative, got -1", {"step": -1}),
        ("step must not be negative, got nan", {"step": math.nan}),
        ("min_lr 2.0 and max_lr 1.0", {"min_lr": 2.0}),
        ("min_lr -0.1", {"min_lr": -0.1}),
        ("max_lr nan", {"max_lr": math.nan}),
        ("max_lr inf", {"max_lr": math.inf}),
        ("got 13 and 12: shorten the warm-up or train for longer", {"warmup_steps": 13}),
        ("got -1 and 12", {"warmup_steps": -1}),
        ("got 4 and -12", {"total_steps": -12}),
    ],
)
def test_bad_settings(schedule, message, changed):
    settings = {"step": 3, **RANGE, "warmup_steps": 4, "total_steps": 12} | changed
    with pytest.raises(ValueError, match=message):
        schedule(settings.pop("step"), **settings)


@pytest.mark.parametrize("decay_steps", [-1, 9])
def test_bad_decay(decay_steps):
    with pytest.raises(ValueError, match="decay_steps"):
        wsd_schedule(0, **RANGE, warmup_steps=4, decay_steps=decay_steps, total_steps=12)


@pytest.mark.parametrize("changed", [{"max_lr": -1.0}, {"warmup_steps": -1}, {"step": -1}])
def test_bad_constant(changed):
    settings = {"step": 3, "max_lr": 1.0, "warmup_steps": 4} | changed
    with pytest.raises(ValueError, match="must"):
        constant_schedule(settings.pop("step"), **settings)


def test_a_period_that_warms_up_decays_in_what_is_left():
    rates = [wsd_s_schedule(step, 1.0, 0.0, 8, (10, 20), 1.0, decay="linear") for step in range(21)]
    assert rates[8:11] == [1.0, 0.5, 0.0]
    assert rates[11] == pytest.approx(0.9)
    assert rates[20] == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ends": ()}, "ends must be steps that rise"),
        ({"ends": (5, 5)}, r"ends must be steps that rise from above 0, got \[5, 5\]"),
        ({"decay_part": 1.5}, "decay_part must be in"),
        ({"decay": "steep"}, "decay must be sqrt, linear, cosine, got 'steep'"),
        ({"warmup_steps": 13}, "warmup_steps must be between 0 and total_steps"),
    ],
)
def test_periods_that_cannot_be_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        wsd_s_schedule(3, 1.0, 0.1, **{"warmup_steps": 4, "ends": (12, 20), "decay_part": 0.5} | changed)
