"""Calibration text: to tokens, and in windows of them."""

import math
import pathlib

import numpy as np
import torch
from torch import Tensor

from cs336.data import TokenDataset, tokenize_documents
from cs336.inference.load import load_model, load_tokenizer
from cs336.models import Transformer, TransformerConfig
from cs336.training.evaluators import bits_per_byte
from cs336.utils.documents import read_texts
from cs336.utils.shards import read_meta
from cs336.utils.special_tokens import END_OF_TEXT

MOST_CONTEXT = 2048  # tokens of a window
BATCH_TOKENS = 4096  # through a block at once
HELD_OUT = 10  # one window of so many is measured and not read


def tokenize(model: pathlib.Path, text: pathlib.Path, shards: pathlib.Path) -> int:
    """Write a text as shards of the tokens of the model at `model`, and return how many there are."""
    tokenizer, ends = load_tokenizer(model), load_model(model, "cpu").end_ids
    end = next((text for text, i in tokenizer.special_tokens.items() if i in ends), END_OF_TEXT)
    return tokenize_documents(read_texts(text), tokenizer, shards, eot_token=end).tokens


class Windows:
    """Calibration text in windows, one of HELD_OUT of them set aside; a text of one window is read and measured."""

    def __init__(self, shards: pathlib.Path, config: TransformerConfig):
        meta = read_meta(shards)
        assert meta is not None
        self.tokens, self.bytes = meta.tokens, meta.text_bytes
        self.context = max(1, min(config.context_length, MOST_CONTEXT, (meta.tokens - 1) // 2))
        self.data = TokenDataset(shards, self.context, vocab_size=config.vocab_size)
        self.held_out = np.arange(len(self.data))[HELD_OUT - 1 :: HELD_OUT]
        if not len(self.held_out):
            self.held_out = np.arange(len(self.data))[-1:]

    def read(self, samples: int) -> np.ndarray:
        """The windows to calibrate with, at most so many, spread evenly."""
        rest = np.setdiff1d(np.arange(len(self.data)), self.held_out)
        rest = rest if len(rest) else self.held_out
        return rest[np.unique(np.arange(samples) * len(rest) // samples)]

    def batches(self, index_N: np.ndarray) -> list[Tensor]:
        """Token ids (B, S) of windows, BATCH_TOKENS or one window at a time."""
        size = max(1, BATCH_TOKENS // self.context)
        parts = np.split(index_N, range(size, len(index_N), size))
        return [self.data.windows(part)[:, :-1] for part in parts]

    @torch.inference_mode()
    def bits_per_byte(self, model: Transformer) -> float:
        losses, size = [], max(1, BATCH_TOKENS // self.context)
        for part in np.split(self.held_out, range(size, len(self.held_out), size)):
            ids_BT = self.data.windows(part).to(model.device)
            losses.append(float(model(ids_BT[:, :-1], targets=ids_BT[:, 1:])))
        loss = math.fsum(losses) / (len(self.held_out) * self.context)
        return bits_per_byte(loss, self.tokens, self.bytes)
