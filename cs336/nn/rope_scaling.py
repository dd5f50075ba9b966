"""How rotary positions are stretched to contexts longer than a model was first trained on: see ops/rope_tables.py.

Each config's `frequencies(rotary_dim, theta, context_length)` gives radians a token of each pair, (rotary_dim / 2,)
float64, and what cos and sin are multiplied by. factor is how many times longer the context becomes, at least 1;
context_length is the model's, by which LongRoPE alone takes the one or the other of its factors.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from cs336.nn.checks import check_counts, check_flags, check_kind, check_positive
from cs336.ops import rope_tables


def _check_factor(factor: float) -> None:
    check_positive(factor=factor)
    if factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}")


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation, arXiv:2306.15595: positions are divided by factor."""

    factor: float
    """How many times longer the context becomes, at least 1."""
    kind: Literal["linear"] = "linear"

    def __post_init__(self):
        _check_factor(self.factor)

    def frequencies(self, rotary_dim: int, theta: float, context_length: int) -> tuple[Tensor, float]:
        return rope_tables.linear(rope_tables.inverse_frequencies(rotary_dim, theta), self.factor), 1.0


@dataclass(frozen=True)
class NtkScaling:
    """NTK-aware: theta grows so that the slowest pair is stretched by factor, the fastest not at all."""

    factor: float
    """How many times longer the context becomes, at least 1."""
    kind: Literal["ntk"] = "ntk"

    def __post_init__(self):
        _check_factor(self.factor)

    def frequencies(self, rotary_dim: int, theta: float, context_length: int) -> tuple[Tensor, float]:
        return rope_tables.ntk(rotary_dim, theta, self.factor), 1.0


@dataclass(frozen=True)
class YarnScaling:
    """YaRN, arXiv:2309.00071: fast pairs are kept, slow ones divided by factor, a ramp joins them."""

    factor: float
    """How many times longer the context becomes, at least 1."""
    original_context_length: int
    """Tokens that the model was first trained on."""
    beta_fast: float = 32.0
    """Pairs that turn more often in the original context are kept."""
    beta_slow: float = 1.0
    """Pairs that turn less often are divided by factor."""
    truncate: bool = True
    """The ramp begins and ends at whole pairs."""
    attention_factor: float | None = None
    """Of cos and sin. None: 0.1 ln(factor) + 1."""
    kind: Literal["yarn"] = "yarn"

    def __post_init__(self):
        _check_factor(self.factor)
        check_counts(original_context_length=self.original_context_length)
        check_positive(beta_fast=self.beta_fast, beta_slow=self.beta_slow)
        check_positive(optional=True, attention_factor=self.attention_factor)
        check_flags(truncate=self.truncate)

    def frequencies(self, rotary_dim: int, theta: float, context_length: int) -> tuple[Tensor, float]:
        original, betas = self.original_context_length, (self.beta_fast, self.beta_slow)
        scaled, factor = rope_tables.yarn(rotary_dim, theta, self.factor, original, *betas, self.truncate)
        return scaled, factor if self.attention_factor is None else self.attention_factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's: long wavelengths are stretched by factor, short ones kept, and between them it is gradual."""

    factor: float
    """How many times longer the context becomes, at least 1."""
    original_context_length: int
    """Tokens that the model was first trained on."""
    low_freq_factor: float = 1.0
    """Wavelengths beyond original_context_length / low_freq_factor are stretched whole."""
    high_freq_factor: float = 4.0
    """Those short of original_context_length / high_freq_factor are kept."""
    kind: Literal["llama3"] = "llama3"

    def __post_init__(self):
        _check_factor(self.factor)
        check_counts(original_context_length=self.original_context_length)
        check_positive(low_freq_factor=self.low_freq_factor, high_freq_factor=self.high_freq_factor)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor must exceed low_freq_factor {self.low_freq_factor}, got {self.high_freq_factor}"
            )

    def frequencies(self, rotary_dim: int, theta: float, context_length: int) -> tuple[Tensor, float]:
        frequencies = rope_tables.inverse_frequencies(rotary_dim, theta)
        factors = self.factor, self.low_freq_factor, self.high_freq_factor, self.original_context_length
        return rope_tables.llama3(frequencies, *factors), 1.0


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE, arXiv:2402.13753: each pair is divided by a factor of its own: a short one in a model whose
    context_length is at most the original one, a long one in any other, whatever the length of a text."""

    short_factors: tuple[float, ...]
    """Of each pair, the fastest first, where the model's context_length is at most the original one."""
    long_factors: tuple[float, ...]
    """Of each pair, where the model's context_length is longer."""
    original_context_length: int
    """Tokens that the model was first trained on."""
    factor: float
    """How many times longer the context becomes, at least 1. The attention factor alone depends on it."""
    attention_factor: float | None = None
    """Of cos and sin, with either factors. None: sqrt(1 + ln(factor) / ln(original_context_length))."""
    kind: Literal["longrope"] = "longrope"

    def __post_init__(self):
        _check_factor(self.factor)
        check_counts(original_context_length=self.original_context_length)
        check_positive(optional=True, attention_factor=self.attention_factor)
        if self.original_context_length == 1 and self.attention_factor is None:
            raise ValueError("original_context_length must be at least 2 where there is no attention_factor, got 1")
        for name in ("short_factors", "long_factors"):
            factors = getattr(self, name)
            check_kind(name, factors, list, tuple)
            for i, value in enumerate(factors):
                check_positive(**{f"{name}[{i}]": value})
            object.__setattr__(self, name, tuple(factors))

    def check(self, rotary_dim: int) -> None:
        """Raises ValueError where there is not one short and one long factor a pair."""
        for name in ("short_factors", "long_factors"):
            if (found := len(getattr(self, name))) != rotary_dim // 2:
                raise ValueError(f"{name} must have {rotary_dim // 2} numbers, one a rotated pair, got {found}")

    def frequencies(self, rotary_dim: int, theta: float, context_length: int) -> tuple[Tensor, float]:
        original = self.original_context_length
        factors = self.short_factors if context_length <= original else self.long_factors
        scale = self.attention_factor
        if scale is None:
            scale = math.sqrt(1 + math.log(self.factor) / math.log(original))
        return rope_tables.longrope(rope_tables.inverse_frequencies(rotary_dim, theta), factors), scale


RopeScaling = Annotated[
    LinearScaling | NtkScaling | YarnScaling | Llama3Scaling | LongRopeScaling, Field(discriminator="kind")
]
