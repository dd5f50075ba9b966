"""Communicators by number: what an op is handed in place of a group of processes, for a schema takes no objects."""

import itertools
from typing import Protocol

from torch import Tensor


class Communicator(Protocol):
    """What an op asks of one; cs336.parallel.nccl makes them."""

    rank: int
    size: int
    native: bool
    """Whether the compiled library has an NCCL communicator of this number."""

    def all_reduce(self, x: Tensor) -> None: ...
    def reduce_scatter(self, out: Tensor, x: Tensor) -> None: ...
    def all_gather(self, out: Tensor, x: Tensor) -> None: ...


_open: dict[int, Communicator] = {}
_numbers = itertools.count(1)


def add(communicator: Communicator) -> int:
    """Give it a number, from 1, that no other one of this process has had."""
    number = next(_numbers)
    _open[number] = communicator
    return number


def get(number: int) -> Communicator:
    """Raises ValueError for a number that is not open."""
    if number not in _open:
        raise ValueError(f"comm must be the number of an open communicator, one of {sorted(_open)}, got {number}")
    return _open[number]


def remove(number: int) -> None:
    _open.pop(number, None)
