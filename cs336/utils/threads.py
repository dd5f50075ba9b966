"""How many threads to work with."""

import operator
import os


def thread_count(wanted: int | None) -> int:
    """`wanted`, or as many as this process may run on for None. Raises ValueError for fewer than 1."""
    if wanted is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        wanted = operator.index(wanted)
    except TypeError:
        raise TypeError(f"num_threads must be a whole number or None, got {wanted!r}") from None
    if wanted < 1:
        raise ValueError(
            f"num_threads must be at least 1, or None for as many as this process may run on, got {wanted}"
        )
    return wanted
