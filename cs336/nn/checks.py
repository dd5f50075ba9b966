"""What modules and their configurations ask of their numbers."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def check_counts(*, optional: bool = False, **values: Any) -> None:
    """Raises ValueError for a value that is not a positive integer of 64 bits; optional ones may be None."""
    for name, value in values.items():
        valid = isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**63
        if not (valid or (optional and value is None)):
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def check_positive(*, optional: bool = False, **values: Any) -> None:
    """Raises ValueError for a value that is not a positive, finite number; optional ones may be None."""
    for name, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not ((number and 0 < value < float("inf")) or (optional and value is None)):
            raise ValueError(f"{name} must be a positive, finite number, got {value!r}")


def check_probabilities(**values: Any) -> None:
    """Raises ValueError for a value that is not a number in [0, 1)."""
    for name, value in values.items():
        if not (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1):
            raise ValueError(f"{name} must be a number from 0 to below 1, got {value!r}")


def check_flags(**values: Any) -> None:
    """Raises ValueError for a value that is neither True nor False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises ValueError for a value that is none of the choices."""
    if value not in (known := tuple(choices)):
        raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, got {value!r}")


def check_kind(name: str, value: Any, *classes: type, optional: bool = False) -> None:
    """Raises ValueError for a value of none of the classes; an optional one may be None."""
    if not (isinstance(value, classes) or (optional and value is None)):
        raise ValueError(f"{name} must be a {' or '.join(c.__name__ for c in classes)}, got {value!r}")


def check_tokens(x: Tensor, d_model: int) -> None:
    """Raises ValueError for what is not (batch, tokens, d_model)."""
    if x.dim() != 3 or x.shape[-1] != d_model:
        raise ValueError(f"x must be (batch, tokens, {d_model}), got shape {tuple(x.shape)}")


def head_size(d_model: int, num_heads: int, head_dim: int | None) -> int:
    """Features of a head. Raises ValueError where there is no head_dim and d_model is not a multiple of num_heads."""
    if head_dim is None and d_model % num_heads != 0:
        raise ValueError(f"d_model {d_model} is not a multiple of num_heads {num_heads}: change one or set head_dim")
    return d_model // num_heads if head_dim is None else head_dim
