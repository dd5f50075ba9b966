"""Frequencies of rotary positions, how to stretch them to longer contexts, and the tables cos and sin.

    inverse_frequencies -> linear | ntk | yarn | llama3 | longrope -> tables

Pair i of P turns by position * theta^(-i / P). All in float64 on the CPU, whatever the default device: in float32 an
angle is off by 1e-7 of the position.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MOST_ANGLES = 1 << 30  # in float64 they are 8 GiB: 16 million positions of heads of 128 features


def inverse_frequencies(rotary_dim: int, theta: float = 10000.0) -> Tensor:
    """Radians a token of each pair, (rotary_dim / 2,) float64 on the CPU, the fastest first."""
    if rotary_dim < 2 or rotary_dim % 2 != 0:
        raise ValueError(f"rotary_dim must be even and at least 2, got {rotary_dim}")
    if not theta > 0:
        raise ValueError(f"theta must be positive, got {theta}")
    return float(theta) ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64, device="cpu") / rotary_dim)


def linear(frequencies: Tensor, factor: float) -> Tensor:
    """Position interpolation: positions are divided by factor. Chen et al. 2023, arXiv:2306.15595"""
    return frequencies / _at_least_one(factor)


def ntk(rotary_dim: int, theta: float, factor: float) -> Tensor:
    """NTK-aware: theta grows so that the slowest pair is stretched by factor and the fastest not at all."""
    if rotary_dim < 4:
        raise ValueError(f"rotary_dim must be at least 4 for NTK scaling, got {rotary_dim}")
    return inverse_frequencies(rotary_dim, theta * _at_least_one(factor) ** (rotary_dim / (rotary_dim - 2)))


def yarn(
    rotary_dim: int,
    theta: float,
    factor: float,
    original_max_len: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> tuple[Tensor, float]:
    """YaRN, Peng et al. 2023, arXiv:2309.00071: frequencies, and what cos and sin are multiplied by.

    Pairs that turn more than beta_fast times in original_max_len tokens keep their frequency, those that turn less than
    beta_slow times are divided by factor, and a ramp joins them, from whole pairs if truncate.
    """
    frequencies = inverse_frequencies(rotary_dim, theta)

    def pair(turns: float) -> float:
        """The pair, as a real number, that turns so often in original_max_len tokens."""
        return rotary_dim * math.log(original_max_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(beta_fast), pair(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    ramp = (torch.arange(rotary_dim // 2, dtype=torch.float64, device="cpu") - low) / max(high - low, 1e-3)
    stretched = ramp.clamp(0, 1)
    attention_factor = 0.1 * math.log(_at_least_one(factor)) + 1.0
    return torch.lerp(frequencies, frequencies / factor, stretched), attention_factor


def llama3(
    frequencies: Tensor, factor: float, low_freq_factor: float, high_freq_factor: float, original_max_len: int
) -> Tensor:
    """Llama 3.1's: wavelengths beyond original_max_len / low_freq_factor are stretched by factor, those short of
    original_max_len / high_freq_factor are kept, and between them the frequency goes from one to the other."""
    if not high_freq_factor > low_freq_factor:
        raise ValueError(f"high_freq_factor must exceed low_freq_factor {low_freq_factor}, got {high_freq_factor}")
    turns = original_max_len * frequencies / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return torch.lerp(frequencies / _at_least_one(factor), frequencies, kept)


def longrope(frequencies: Tensor, factors: Sequence[float]) -> Tensor:
    """LongRoPE, Ding et al. 2024, arXiv:2402.13753: each pair is stretched by its own factor, which a search found."""
    if len(factors) != len(frequencies):
        raise ValueError(f"longrope has a factor for each of {len(frequencies)} pairs, got {len(factors)}")
    return frequencies / torch.tensor(factors, dtype=torch.float64, device="cpu")


def tables(
    frequencies: Tensor, max_len: int, scale: float = 1.0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin (max_len, P) float32, times scale (the attention factor of YaRN and LongRoPE)."""
    if max_len * len(frequencies) > MOST_ANGLES:
        raise ValueError(
            f"tables of {max_len:,} positions would have {max_len * len(frequencies):,} angles, {MOST_ANGLES:,} is the "
            "most: lower context_length"
        )
    angles = torch.outer(torch.arange(max_len, dtype=torch.float64, device="cpu"), frequencies.double().cpu())
    return tuple((scale * t).to(device, torch.float32) for t in (angles.cos(), angles.sin()))  # type: ignore[return-value]


def _at_least_one(factor: float) -> float:
    if not factor >= 1:
        raise ValueError(f"factor must be at least 1, got {factor}")
    return factor
