"""Memory of the host that a checkpoint lies in while it is written: the same for all checkpoints of a run, and pinned.

Fresh pages and a copy through the driver's own buffers made each checkpoint of 1.5 GB cost 1.3 s of an H200's time.
"""

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes


class Staging:
    """Copies of tensors, one set at a time."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._pinned = False

    def copies(self, kinds: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """The tensors of each kind, as they are now, in memory of the host: valid until the next call or `free`."""
        tensors = [tensor for found in kinds.values() for tensor in found.values()]
        devices = {tensor.device for tensor in tensors if tensor.is_cuda}
        self._have(sum(_room(tensor) for tensor in tensors), next(iter(devices), None))
        end = 0
        copies: dict[str, dict[str, Tensor]] = {}
        for kind, found in kinds.items():
            copies[kind] = {}
            for name, tensor in found.items():
                place = self._memory[end : end + tensor.numel() * tensor.element_size()]
                copies[kind][name] = place.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)
                end += _room(tensor)
        for device in devices:
            torch.cuda.synchronize(device)
        return copies

    def _have(self, size: int, device: torch.device | None) -> None:
        if self._memory.numel() >= size:
            return
        self.free()
        self._memory = torch.empty(size, dtype=torch.uint8)
        self._pinned = device is not None and _pin(self._memory, device)

    def free(self) -> None:
        """Give the memory back; copies in it are void."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
        self._memory, self._pinned = torch.empty(0, dtype=torch.uint8), False


def _pin(memory: Tensor, device: torch.device) -> bool:
    """Not by torch's allocator, which rounds up to a power of two. Whether it could be: other memory serves too."""
    if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)) == 0:
        return True
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)  # takes the error, which CUDA keeps for the next kernel
    return False


def _room(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
