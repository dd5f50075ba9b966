"""Laws of loss in parameters N and tokens D, and what they say about spending a budget of C FLOPs.

L(N, D) = E + A / N^alpha + B / D^beta          Hoffmann et al. 2022, arXiv:2203.15556

Losses are in nats a token; FLOPs are 6 N D unless said otherwise.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

FLOPS_A_TOKEN = 6.0  # of training, a parameter: 2 forward, 4 backward (arXiv:2001.08361)
SPAN = (1e3, 1e16)  # parameters among which an optimum is looked for


class Allocation(NamedTuple):
    """How a budget is spent."""

    parameters: float
    tokens: float
    loss: float
    flops: float


@dataclass(frozen=True)
class ChinchillaLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta. Raises ValueError for values that are not positive."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")

    def loss(self, parameters, tokens):
        """Of numbers or arrays that broadcast."""
        N, D = np.asarray(parameters, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
        return self.E + self.A * N**-self.alpha + self.B * D**-self.beta

    @property
    def parameter_exponent(self) -> float:
        """a of N = G (C / 6)^a at the optimum; tokens have 1 - a."""
        return self.beta / (self.alpha + self.beta)

    def optimum(self, flops: float) -> Allocation:
        """The least loss for 6 N D = flops, in closed form (arXiv:2203.15556, equation 4)."""
        check_positive(flops=flops)
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        a, budget = self.parameter_exponent, flops / FLOPS_A_TOKEN
        N, D = G * budget**a, budget ** (1 - a) / G
        return Allocation(N, D, float(self.loss(N, D)), flops)

    def matched_parameters(self, tokens: float) -> float:
        """The parameters that are optimal for so many tokens: those where both terms fall equally fast."""
        return (self.alpha * self.A * tokens**self.beta / (self.beta * self.B)) ** (1 / self.alpha)

    def tokens_to(self, loss: float, parameters: float) -> float:
        """Tokens until a model of so many parameters reaches a loss; inf where it never does."""
        left = loss - self.E - self.A * parameters**-self.alpha
        return (self.B / left) ** (1 / self.beta) if left > 0 else math.inf

    def cheapest(self, loss: float, inference_tokens: float = 0.0) -> Allocation:
        """The fewest FLOPs over a model's life that reach a loss: 6 N D of training and 2 N of each token it serves.

        Sardana et al. 2023, arXiv:2401.00448. The allocation's flops are those of both. Raises ValueError for a loss
        below E, which no budget reaches, and for tokens that are no number or negative.
        """
        if not 0 <= inference_tokens < math.inf:
            raise ValueError(f"inference_tokens must be finite and not negative, got {inference_tokens}")
        if not loss > self.E:
            raise ValueError(f"no budget reaches a loss of {loss}: the law ends at E = {self.E}")

        def cost(N: float) -> float:
            return FLOPS_A_TOKEN * N * self.tokens_to(loss, N) + 2 * N * inference_tokens

        least = (self.A / (loss - self.E)) ** (1 / self.alpha)  # fewer parameters never reach the loss
        N = _minimum(cost, least * (1 + 1e-9), least * 1e9)
        return Allocation(N, self.tokens_to(loss, N), loss, cost(N))


EPOCH = ChinchillaLaw(E=1.817, A=478.0, B=2143.0, alpha=0.347, beta=0.367)
"""Hoffmann et al.'s runs, fitted again by Besiroglu et al. 2024, arXiv:2404.10102."""


@dataclass(frozen=True)
class DataConstrainedLaw:
    """The law where unique tokens run out and are repeated: each further epoch, and each parameter beyond those that
    the unique tokens deserve, is worth less than the one before.

    D' = U + U R (1 - exp(-(D / U - 1) / R)), likewise N'.     Muennighoff et al. 2023, arXiv:2305.16264, equation 5
    """

    base: ChinchillaLaw
    unique_tokens: float
    repeat_decay: float = 15.387756
    """R of tokens: repetitions after which another is worth 1/e of a fresh token."""
    excess_decay: float = 5.309743
    """R of parameters."""

    def __post_init__(self):
        check_positive(unique_tokens=self.unique_tokens, repeat_decay=self.repeat_decay, excess_decay=self.excess_decay)

    def loss(self, parameters, tokens):
        deserved = self.base.matched_parameters(self.unique_tokens)
        N = worth(np.asarray(parameters, dtype=np.float64), deserved, self.excess_decay)
        D = worth(np.asarray(tokens, dtype=np.float64), self.unique_tokens, self.repeat_decay)
        return self.base.loss(N, D)

    def optimum(self, flops: float) -> Allocation:
        """The least loss for 6 N D = flops."""
        check_positive(flops=flops)

        def loss(N: float) -> float:
            return float(self.loss(N, flops / (FLOPS_A_TOKEN * N)))

        N = _minimum(loss, *SPAN)
        return Allocation(N, flops / (FLOPS_A_TOKEN * N), loss(N), flops)


def step_law(parameters: float, tokens: float) -> tuple[float, float]:
    """Peak learning rate of AdamW, and tokens a batch, for a model without embeddings of so many parameters.

    lr = 1.79 N^-0.713 D^0.307, batch = 0.58 D^0.571          Li et al. 2025, arXiv:2503.04715
    """
    check_positive(parameters=parameters, tokens=tokens)
    return 1.79 * parameters**-0.713 * tokens**0.307, 0.58 * tokens**0.571


def worth(x, full, decay):
    """What x is worth of which all up to `full` counts whole, and the rest less and less: numbers or arrays."""
    excess = np.maximum(x / full - 1, 0)
    return np.minimum(x, full) - full * decay * np.expm1(-excess / decay)


def _minimum(f: Callable[[float], float], low: float, high: float) -> float:
    """Where a function with one valley is least, by golden sections of the logarithm."""
    ratio = (math.sqrt(5) - 1) / 2
    a, b = math.log(low), math.log(high)
    c, d = b - ratio * (b - a), a + ratio * (b - a)
    fc, fd = f(math.exp(c)), f(math.exp(d))
    while b - a > 1e-9:
        if fc < fd:
            b, d, fd = d, c, fc
            c = b - ratio * (b - a)
            fc = f(math.exp(c))
        else:
            a, c, fc = c, d, fd
            d = a + ratio * (b - a)
            fd = f(math.exp(d))
    return math.exp((a + b) / 2)


def check_positive(**values: float | None) -> None:
    """Raises ValueError for a number that is not positive and finite; None may be any."""
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
