"""A step's numbers on their way to the device: written one after the other, sent in one copy."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


class Staging:
    """Room for `size` int32. Two buffers take turns on the host, for the copy of the one before may still be under way;
    on the device there is one, whose addresses a captured graph may hold."""

    def __init__(self, size: int, device: torch.device):
        self._hosts = [torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda") for _ in range(2)]
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self._used = 0

    def begin(self) -> None:
        """The buffer of the step before the last is free again."""
        self._hosts.reverse()
        self._used = 0

    def put(self, values: Sequence[int] | np.ndarray, size: int | None = None, fill: int = 0) -> Tensor:
        """Numbers, filled up to `size` of them: where they will be on the device, once they are sent."""
        begin, end = self._used, self._used + (len(values) if size is None else size)
        host = self._hosts[0].numpy()
        host[begin : begin + len(values)] = values
        host[begin + len(values) : end] = fill
        self._used = end
        return self._device[begin:end]

    def put_floats(self, values: Iterable[float]) -> Tensor:
        """Float32 numbers, of which int32 has the bits."""
        return self.put(np.fromiter(values, dtype=np.float32).view(np.int32))

    def first(self, count: int) -> Tensor:
        """Where the first `count` numbers are on the device."""
        return self._device[:count]

    def send(self) -> None:
        self._device[: self._used].copy_(self._hosts[0][: self._used], non_blocking=True)
