"""Shuffled batches that are a pure function of (seed, step, rank, world): nothing to save but the step.

Step s of the run takes windows s * B ... s * B + B - 1 of an endless sequence, B the batch of all ranks together. The
sequence is one pseudo-random permutation of all windows after another, an epoch each, computed a window at a time.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cs336.data.dataset import TokenDataset, to_device

ROUNDS = 6


def permute(index_N: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Send index_N (N,) int64 in 0..size-1 through the permutation of range(size) that (seed, epoch) names.

    A Feistel network permutes the smallest power of four that is at least `size`; an image outside is sent through
    again until it falls inside, which keeps it a permutation (Black & Rogaway 2002, "Ciphers with arbitrary finite
    domains"). Four passes at most are expected.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(ROUNDS, np.uint64)
    out_N = np.array(index_N, np.uint64)
    outside = np.arange(len(out_N))
    while len(outside):
        left, right = out_N[outside] >> half, out_N[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        out_N[outside] = image = (left << half) | right
        outside = outside[image >= np.uint64(size)]
    return out_N.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): every bit of x reaches every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class TokenLoader:
    """Endless batches (x_BT, y_BT), int64 on `device`, of a TokenDataset's windows; each window once an epoch.

    batch_size is this rank's; every rank of `world` must use the same. The sequence depends on batch_size * world
    alone, so a run may continue on another number of ranks.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        batch_size: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
    ):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
        if not 0 <= rank < world:
            raise ValueError(f"rank must be in 0..{world - 1}, got {rank}")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.device, self.rank, self.world = torch.device(device), rank, world
        self.step = 0

    def indices(self, step: int) -> np.ndarray:
        """The windows of one step, (B,) int64."""
        sequence_B = (step * self.world + self.rank) * self.batch_size + np.arange(self.batch_size)
        epoch_B, position_B = np.divmod(sequence_B, len(self.dataset))
        index_B = np.empty_like(position_B)
        for epoch in np.unique(epoch_B):
            now = epoch_B == epoch
            index_B[now] = permute(position_B[now], len(self.dataset), self.seed, int(epoch))
        return index_B

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of one step."""
        return to_device(self.dataset.windows(self.indices(step)), self.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        batch = self.batch(self.step)
        self.step += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, and what must be the same for that to mean anything."""
        return {"step": self.step, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position. Raises ValueError if seed, batch or data are not those of the saved run, and
        for what no state_dict() is."""
        if lacks := self.state_dict().keys() - state.keys():
            raise ValueError(f"the saved data position lacks {', '.join(sorted(lacks))}: give a loader's state_dict()")
        for name, mine in self._identity().items():
            if state[name] != mine:
                raise ValueError(f"the saved data position has {name} = {state[name]}, this run has {mine}")
        self.step = state["step"]

    def _identity(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "global_batch": self.batch_size * self.world,
            "windows": len(self.dataset),
            "context_length": self.dataset.context_length,
        }
