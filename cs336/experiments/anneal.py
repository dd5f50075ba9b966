"""Trunks and the branches that leave them: what runs of several lengths share is trained once.

    trunk    ----------|----------|--------------------|       at the top rate, to the last place where a branch leaves
    branch              \\          \\                    \\      the decay of base.schedule: as a whole run would end

A branch goes on from a checkpoint of the trunk with weights, optimizer and place in the data, so it is the run of its
length under "wsd", bit for bit on a CPU. Hägele et al. 2024, arXiv:2405.18392.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cs336.optim.config import ConstantConfig, WSDConfig
from cs336.training import TrainConfig
from cs336.training.budget import Budget
from cs336.training.checkpoint import step_path

SPARE = 8  # checkpoints that a trunk may keep beside those of its branches: one each time it is stopped


class Segment(NamedTuple):
    """A part of a trunk, and the branch that leaves at its end."""

    trunk: TrainConfig
    branch: TrainConfig


def segments(lengths: Sequence[TrainConfig], folder: Callable[[TrainConfig], pathlib.Path]) -> list[Segment]:
    """What trains runs that differ in nothing but their budgets, the shortest first.

    Args:
        lengths: each run as it would be trained alone.
        folder: where a trunk is trained, given its first part.

    Raises ValueError for another schedule than wsd with warmup_steps, for budgets that are not of steps, and for two
    runs that leave at one step.
    """
    whole = lengths[0]
    schedule = whole.schedule
    if not isinstance(schedule, WSDConfig) or schedule.warmup_steps is None:
        raise ValueError(
            'a trunk is shared under schedule = {kind = "wsd", warmup_steps = N}: its warm-up has one length'
        )
    totals = sorted(_steps(config) for config in lengths)
    leave = [schedule.stable_steps(total) for total in totals]
    if leave[0] <= schedule.warmup_steps or len(set(leave)) < len(leave):
        raise ValueError(
            f"runs of {', '.join(map(str, totals))} steps leave their trunk after {', '.join(map(str, leave))}: these "
            f"must differ, and be more than the {schedule.warmup_steps} of warm-up"
        )
    quiet = dataclasses.replace(
        whole,
        schedule=ConstantConfig(schedule.warmup_steps),
        checkpoint_interval=0,
        keep_checkpoints=len(totals) + SPARE,
    )
    trunks = [dataclasses.replace(quiet, budget=f"{step}steps") for step in leave]
    checkpoints = folder(trunks[0]) / "checkpoints"
    return [
        Segment(trunk, dataclasses.replace(whole, budget=f"{total}steps", branch_from=step_path(checkpoints, step)))
        for trunk, step, total in zip(trunks, leave, totals, strict=True)
    ]


def _steps(config: TrainConfig) -> int:
    budget = Budget.parse(config.budget)
    if budget.kind != "steps":
        raise ValueError(f"runs that share a trunk have budgets of steps, got {config.budget}")
    return int(budget.amount)
