"""Fixed-length windows over token shards, packed: documents follow one another and a window may hold several.

Window i holds tokens i * T ... i * T + T, T the context length: T + 1 tokens, the last of them shared with the next
window, so that every token but the first is a target exactly once. Windows run across shard files.
"""

import bisect
import functools
import hashlib
import itertools
import json

import numpy as np
import torch
from torch import Tensor

from cs336.utils.files import Paths
from cs336.utils.shards import TokenMeta, open_tokens, shard_files

SAMPLED, BLOCK = 64, 4096  # blocks of so many tokens: half a megabyte to read, however large the data


class TokenDataset(torch.utils.data.Dataset):
    """The windows of a directory of shards, a .bin file, or a list of either.

    Args:
        paths: see cs336.utils.shards.open_tokens.
        context_length: T.
        vocab_size: rows of the embedding that will read the tokens.
        tokenizer: fingerprint of the tokenizer in use.

    Raises ValueError if the data are too short for one window, were made by another tokenizer, or need a larger
    vocabulary. A token beyond it, in a shard that says otherwise, is refused when its window is read.
    """

    def __init__(
        self, paths: Paths, context_length: int, *, vocab_size: int | None = None, tokenizer: str | None = None
    ):
        if context_length < 1:
            raise ValueError(f"context_length must be at least 1, got {context_length}")
        self.paths, self.context_length = paths, context_length
        shards, self.meta = open_tokens(paths)
        self._names = shard_files(paths)
        self._vocab_size = vocab_size
        self._shards = [np.asarray(s) for s in shards]  # slicing a memmap costs ten times as much
        self._ends = list(itertools.accumulate(len(s) for s in self._shards))
        self.num_tokens = self._ends[-1] if self._ends else 0
        if len(self) < 1:
            raise ValueError(
                f"{paths} holds {self.num_tokens} tokens; one window of context_length {context_length} needs "
                f"{context_length + 1}: give more data or a shorter context"
            )
        self._check(self.meta, vocab_size, tokenizer)

    def __len__(self) -> int:
        return max(0, self.num_tokens - 1) // self.context_length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (T,) int64 each, of window `index`."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        window_T1 = self.windows(np.array([index % len(self)]))[0]
        return window_T1[:-1], window_T1[1:]

    def windows(self, index_B: np.ndarray) -> Tensor:
        """The windows index_B (B,), each in 0..len-1, as (B, T + 1) int64."""
        T = self.context_length
        out = np.empty((len(index_B), T + 1), np.int64)
        for row, index in zip(out, index_B, strict=True):
            self._read(int(index) * T, row)
        if self._vocab_size is not None and len(out) and int(out.max()) >= self._vocab_size:
            self._refuse_tokens(index_B, out)
        return torch.from_numpy(out)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Names the content, wherever it lies and in however many files: the tokenizer, the number of tokens, and those
        of SAMPLED blocks spread evenly, ends included."""
        digest = hashlib.sha256(json.dumps([self.meta and self.meta.tokenizer, self.num_tokens]).encode())
        for place in range(SAMPLED):
            start = max(0, self.num_tokens - BLOCK) * place // (SAMPLED - 1)
            tokens = np.empty(min(BLOCK, self.num_tokens), np.int64)
            self._read(start, tokens)
            digest.update(tokens.astype("<i8").data)
        return digest.hexdigest()

    def _read(self, start: int, out: np.ndarray) -> None:
        """Fill out with the tokens from `start` on."""
        shard = bisect.bisect_right(self._ends, start)
        filled = 0
        while filled < len(out):
            begin = start + filled - (self._ends[shard] - len(self._shards[shard]))
            part = self._shards[shard][begin : begin + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1

    def _refuse_tokens(self, index_B: np.ndarray, out: np.ndarray) -> None:
        row, column = np.unravel_index(out.argmax(), out.shape)
        place = int(index_B[row]) * self.context_length + int(column)
        shard = bisect.bisect_right(self._ends, place)
        inside = place - (self._ends[shard] - len(self._shards[shard]))
        raise ValueError(
            f"{self._names[shard]} holds the token {out.max()} (its {inside + 1}th), and the vocabulary has "
            f"{self._vocab_size}: it is damaged, or was made by another tokenizer; tokenize the corpus again"
        )

    def _check(self, meta: TokenMeta | None, vocab_size: int | None, tokenizer: str | None) -> None:
        if meta and tokenizer and meta.tokenizer != tokenizer:
            raise ValueError(
                f"{self.paths} was made by tokenizer {meta.tokenizer[:12]}, the one in use is {tokenizer[:12]}: "
                "load the tokenizer that made the data, or tokenize the corpus again"
            )
        if vocab_size is None:
            return
        needed = meta.vocab_size if meta else 1 + max(int(s.max(initial=0)) for s in self._shards)
        if needed > vocab_size:
            raise ValueError(
                f"{self.paths} needs a vocabulary of {needed}, the model's embedding has {vocab_size} rows: "
                f"set the model's vocab_size to at least {needed}"
            )


def get_batch(
    tokens: np.ndarray | Tensor,
    batch_size: int,
    context_length: int,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Windows of `tokens` (N,) at random places, every place with a target equally likely.

    Args:
        tokens: integers, an array (a memory-map too) or a tensor; only the windows are read.
        generator: a CPU generator; torch's own if None.

    Returns x and y, (batch_size, context_length) int64 on device; y is x one token later.
    Raises ValueError if there are fewer than context_length + 1 tokens, or if they are no integers.
    """
    if not isinstance(tokens, np.ndarray | Tensor):
        raise TypeError(f"tokens must be an array or a tensor, got {type(tokens).__name__}: give np.asarray(tokens)")
    if tokens.ndim != 1 or context_length < 1 or batch_size < 0:
        raise ValueError(
            f"expected tokens (N,), batch_size >= 0 and context_length >= 1, got {tuple(tokens.shape)}, {batch_size} "
            f"and {context_length}"
        )
    if "int" not in str(tokens.dtype):
        raise ValueError(f"tokens must be integers, got {tokens.dtype}")
    if len(tokens) <= context_length:
        raise ValueError(
            f"a window of context_length {context_length} needs {context_length + 1} tokens, got {len(tokens)}"
        )
    start_B1 = torch.randint(len(tokens) - context_length, (batch_size, 1), generator=generator)
    index_BT1 = start_B1 + torch.arange(context_length + 1)
    if isinstance(tokens, Tensor):
        window_BT1 = tokens[index_BT1.to(tokens.device)].long()
    else:
        window_BT1 = torch.from_numpy(tokens[index_BT1.numpy()].astype(np.int64))
    return to_device(window_BT1, device)


def to_device(window_BT1: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Windows (B, T + 1) as inputs and targets (B, T) on the device; a copy to a GPU does not wait for it."""
    if torch.device(device).type == "cuda" and window_BT1.device.type == "cpu":
        window_BT1 = window_BT1.pin_memory()
    window_BT1 = window_BT1.to(device, non_blocking=True)
    return window_BT1[:, :-1].contiguous(), window_BT1[:, 1:].contiguous()
