"""What the configurations of modules ask of their numbers."""

from typing import Any


def check_counts(*, optional: bool = False, **values: Any) -> None:
    """Raises ValueError for a value that is not a positive integer; optional ones may be None."""
    for name, value in values.items():
        valid = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not (valid or (optional and value is None)):
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def check_positive(*, optional: bool = False, **values: Any) -> None:
    """Raises ValueError for a value that is not a positive, finite number; optional ones may be None."""
    for name, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not ((number and 0 < value < float("inf")) or (optional and value is None)):
            raise ValueError(f"{name} must be a positive, finite number, got {value!r}")
