"""Byte-level BPE tokenizers: train, encode, decode, and read and write the formats of others. Needs no torch."""

from cs336.tokenizer.patterns import PATTERNS
from cs336.tokenizer.tokenizer import Tokenizer

__all__ = ["PATTERNS", "Tokenizer"]
