"""The tensors of one quantised layer in a file, each taken by its name."""

from dataclasses import dataclass

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Tensors:
    found: dict[str, Tensor]
    """Of the file; what is taken is taken out."""
    stem: str
    kind: str
    """What they are of: the method."""

    def __contains__(self, last: str) -> bool:
        return f"{self.stem}.{last}" in self.found

    def take(self, last: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
        """Raises ValueError, by the tensor's name, where it is missing or another."""
        name = f"{self.stem}.{last}"
        if name not in self.found:
            raise ValueError(f"{name} is missing, and the other tensors of {self.stem} are there")
        t = self.found.pop(name)
        if t.shape != shape:
            raise ValueError(f"{name} has shape {tuple(t.shape)}, config.json means {shape}")
        if t.dtype not in dtypes:
            raise ValueError(f"{name} is {t.dtype}, {self.kind} means {' or '.join(map(str, dtypes))}")
        return t.contiguous()

    def scales(self, last: str, shape: tuple[int, ...]) -> Tensor:
        """Raises ValueError for what are not positive numbers."""
        name = f"{self.stem}.{last}"
        if name in self.found and not self.found[name].is_floating_point():
            raise ValueError(f"{name} must be positive numbers, got {self.found[name].dtype}")
        t = self.take(last, shape, *FLOATING)
        if not (t.isfinite() & (t > 0)).all():
            raise ValueError(f"{name} must be positive numbers, got others: the file is damaged")
        return t

    def floats(self, last: str, shape: tuple[int, ...]) -> Tensor:
        """Of eight bits. Raises ValueError for NaN."""
        t = self.take(last, shape, torch.float8_e4m3fn)
        if t.float().isnan().any():
            raise ValueError(f"{self.stem}.{last} must be numbers, got NaN: the file is damaged")
        return t
