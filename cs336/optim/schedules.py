"""Learning rates as pure functions of the step: without state of their own, they resume exactly.

All rise as max_lr * step / warmup_steps while step < warmup_steps. All but the constant one are at min_lr from
total_steps on. Steps count from 0 and may be fractions. Settings that cannot land raise ValueError.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

Decay = Literal["sqrt", "linear", "cosine"]
SHAPES: dict[str, Callable[[float], float]] = {  # from 1 at 0 to 0 at 1
    "sqrt": lambda x: 1 - math.sqrt(x),
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
}


def cosine_schedule(step: float, max_lr: float, min_lr: float, warmup_steps: float, total_steps: float) -> float:
    """Half a cosine from max_lr down to min_lr.                       Loshchilov & Hutter 2016, arXiv:1608.03983"""
    _check(step, max_lr, min_lr, warmup_steps, total_steps)
    return _warm_up_then_decay(step, max_lr, min_lr, warmup_steps, warmup_steps, total_steps, SHAPES["cosine"])


def linear_schedule(step: float, max_lr: float, min_lr: float, warmup_steps: float, total_steps: float) -> float:
    """A straight line from max_lr down to min_lr."""
    _check(step, max_lr, min_lr, warmup_steps, total_steps)
    return _warm_up_then_decay(step, max_lr, min_lr, warmup_steps, warmup_steps, total_steps, SHAPES["linear"])


def wsd_schedule(
    step: float,
    max_lr: float,
    min_lr: float,
    warmup_steps: float,
    decay_steps: float,
    total_steps: float,
    *,
    decay: Decay = "sqrt",
) -> float:
    """Warm-up, stable, decay: max_lr until the last decay_steps, then down to min_lr.

    decay: "sqrt", as 1 - sqrt(progress), the best of Hägele et al. 2024, arXiv:2405.18392; "linear"; "cosine".
    Hu et al. 2024, arXiv:2404.06395.
    """
    _check(step, max_lr, min_lr, warmup_steps, total_steps)
    if not 0 <= decay_steps <= total_steps - warmup_steps:
        raise ValueError(
            f"warmup_steps {warmup_steps} and decay_steps {decay_steps} must not be negative, nor together more than "
            f"total_steps {total_steps}"
        )
    return _warm_up_then_decay(
        step, max_lr, min_lr, warmup_steps, total_steps - decay_steps, total_steps, _shape(decay)
    )


def wsd_s_schedule(
    step: float,
    max_lr: float,
    min_lr: float,
    warmup_steps: float,
    ends: Sequence[float],
    decay_part: float,
    *,
    decay: Decay = "sqrt",
) -> float:
    """WSD-S: at each of `ends` the learning rate has fallen to min_lr, and right after it is max_lr again.

    So each end leaves a finished model, and the next period goes on from it (Wen et al. 2024, arXiv:2410.05192).

    Args:
        ends: steps, rising; the last is the total.
        decay_part: of each period, at its end, in which the rate falls; less in the first if it has to warm up.
        decay: as in wsd_schedule.
    """
    if not ends or any(a >= b for a, b in itertools.pairwise((0.0, *ends))):
        raise ValueError(f"ends must be steps that rise from above 0, got {list(ends)}")
    if not 0 <= decay_part <= 1:
        raise ValueError(f"decay_part must be in 0..1, got {decay_part}")
    _check(step, max_lr, min_lr, warmup_steps, ends[0])
    shape = _shape(decay)
    begin, end = next(((a, b) for a, b in itertools.pairwise((0.0, *ends)) if step <= b), (0.0, ends[-1]))
    warmup = warmup_steps if begin == 0 else 0
    fall = min(decay_part * (end - begin), end - begin - warmup)
    if begin == 0 and step < warmup:
        return max_lr * step / warmup
    return _warm_up_then_decay(step, max_lr, min_lr, 0, end - fall, end, shape)


def constant_schedule(step: float, max_lr: float, warmup_steps: float = 0) -> float:
    """max_lr for ever."""
    _check(step, max_lr, 0.0, warmup_steps, math.inf)
    return max_lr * step / warmup_steps if step < warmup_steps else max_lr


def _shape(decay: str) -> Callable[[float], float]:
    if decay not in SHAPES:
        raise ValueError(f"decay must be {', '.join(SHAPES)}, got {decay!r}")
    return SHAPES[decay]


def _warm_up_then_decay(
    step: float,
    max_lr: float,
    min_lr: float,
    warmup_steps: float,
    decay_start: float,
    total_steps: float,
    shape: Callable[[float], float],  # from 1 at 0 to 0 at 1
) -> float:
    if step < warmup_steps:
        return max_lr * step / warmup_steps
    if step >= total_steps:
        return min_lr
    if step < decay_start:
        return max_lr
    return min_lr + shape((step - decay_start) / (total_steps - decay_start)) * (max_lr - min_lr)


def _check(step: float, max_lr: float, min_lr: float, warmup_steps: float, total_steps: float) -> None:
    if not step >= 0:
        raise ValueError(f"step must not be negative, got {step}")
    if not 0 <= min_lr <= max_lr < math.inf:
        raise ValueError(f"learning rates must be 0 <= min_lr <= max_lr, got min_lr {min_lr} and max_lr {max_lr}")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"warmup_steps must be between 0 and total_steps, got {warmup_steps} and {total_steps}: "
            "shorten the warm-up or train for longer"
        )
