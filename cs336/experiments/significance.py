"""Whether means differ: Student's t, Welch's test, Holm's correction, without a library.

t = (mean a - mean b) / sqrt(va/na + vb/nb)                                  Welch 1947
degrees of freedom = (va/na + vb/nb)^2 / ((va/na)^2/(na-1) + (vb/nb)^2/(nb-1))
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

STEPS = 300  # of the continued fraction, which converges in a few dozen


def t_two_sided(t: float, freedom: float) -> float:
    """The probability of a larger |Student's t|: I_x(freedom / 2, 1 / 2) at x = freedom / (freedom + t^2)."""
    if math.isinf(t):
        return 0.0
    return incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


def t_quantile(confidence: float, freedom: float) -> float:
    """The t that |Student's t| stays below with this probability."""
    low, high = 0.0, 1.0
    while 1 - t_two_sided(high, freedom) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - t_two_sided(middle, freedom) < confidence else (low, middle)
    return high


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)) / a
    value = 1.0  # of the fraction from its end: 1 / (1 + d1 / (1 + d2 / ...))
    for step in range(STEPS, 0, -1):
        m = step // 2
        if step % 2:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        value = 1 + d / value
    return front / value


@dataclass(frozen=True)
class Mean:
    value: float
    half_width: float | None
    """Of the interval that holds the true mean at 95 %. None of a single number."""


def mean(values: Sequence[float], confidence: float = 0.95) -> Mean:
    """With its confidence interval, of Student's t."""
    if len(values) < 2:
        return Mean(statistics.fmean(values), None)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Mean(statistics.fmean(values), t_quantile(confidence, len(values) - 1) * error)


def welch(a: Sequence[float], b: Sequence[float]) -> float | None:
    """The probability of means at least as far apart, were the true ones equal. None with fewer than two numbers."""
    if len(a) < 2 or len(b) < 2:
        return None
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    apart = abs(statistics.fmean(a) - statistics.fmean(b))
    if va + vb == 0:
        return 1.0 if apart == 0 else 0.0
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return t_two_sided(apart / math.sqrt(va + vb), freedom)


def holm(probabilities: Sequence[float]) -> list[float]:
    """Of several tests at once (Holm 1979): each below alpha keeps the chance of any false one below alpha."""
    order = sorted(range(len(probabilities)), key=lambda i: probabilities[i])
    adjusted, highest = [0.0] * len(probabilities), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(probabilities) - rank) * probabilities[i]))
        adjusted[i] = highest
    return adjusted
