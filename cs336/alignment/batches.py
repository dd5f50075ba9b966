"""Which examples make the batch of a step: a pure function of the seed and the step, so that nothing is to be saved."""

import functools
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from cs336.alignment.sft import Example, fill_rows
from cs336.data.loader import permute

BUCKET = 64  # batches whose examples are sorted by length together: rows of a batch are alike, batches are not


class Batches:
    """Batches of indices into `lengths`, each index once an epoch, in an order that the seed and the epoch decide.

    With `bucketed`, examples of a batch are of similar length, so that padding is little. The last batch of an epoch
    may be smaller. Raises ValueError without examples.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, *, seed: int = 0, bucketed: bool = False):
        if not lengths:
            raise ValueError("there are no examples")
        self.lengths, self.batch_size, self.seed, self.bucketed = np.asarray(lengths), batch_size, seed, bucketed
        self._of_epoch = functools.lru_cache(2)(self._make)

    @property
    def per_epoch(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def batch(self, step: int) -> list[int]:
        """Of step 0, 1, ..."""
        epoch, place = divmod(step, self.per_epoch)
        return self._of_epoch(epoch)[place]

    def _make(self, epoch: int) -> list[list[int]]:
        size = self.batch_size
        order = permute(np.arange(len(self.lengths)), len(self.lengths), self.seed, epoch)
        if not self.bucketed:
            return [order[i : i + size].tolist() for i in range(0, len(order), size)]
        batches = []
        for start in range(0, len(order), BUCKET * size):
            part = order[start : start + BUCKET * size]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            batches += [part[i : i + size].tolist() for i in range(0, len(part), size)]
        return [batches[i] for i in permute(np.arange(len(batches)), len(batches), self.seed, epoch)]


def pad_examples(examples: Sequence[Example], *, pad_id: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Each example in a row of its own, as long as the longest: what pack_examples returns, unpacked."""
    longest = max(len(example.token_ids) for example in examples)
    return fill_rows([[example] for example in examples], longest, pad_id=pad_id)
