import torch
from torch import nn


class Derived(nn.Module):
    """A module whose buffers follow from its arguments: `reset_buffers` makes them, on the device they are on.

    They are no part of its state and stay in their dtype whatever the model's: no cast rounds them, and `to_empty`
    leaves no garbage in them.
    """

    def reset_buffers(self) -> None:
        raise NotImplementedError

    def place(self, device: torch.device) -> None:
        """Make the buffers anew on another device; those that are there stay."""
        moved = {name: t for name, t in self._buffers.items() if t is not None and t.device != device}
        for name, t in moved.items():
            self._buffers[name] = torch.empty_like(t, device=device)
        if moved:
            self.reset_buffers()

    def _apply(self, fn, recurse=True):
        buffers, self._buffers = self._buffers, {}
        super()._apply(fn, recurse)
        self._buffers = buffers
        for t in buffers.values():
            if t is not None:
                self.place(fn(torch.empty(0, device=t.device)).device)
        return self
