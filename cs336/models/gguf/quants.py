"""Formats of GGUF's tensors, block by block, as float32: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    F32, F16, BF16     a number
    Q8_0    d, 32 q of int8                              x = d q
    Q4_0    d, 32 q of 4 bits                            x = d (q - 8)
    Q4_1    d, m, 32 q of 4 bits                         x = d q + m

d and m are float16. Of two 4-bit numbers in byte i the low one is element i, the high one element i + 16.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Format:
    name: str
    elements: int
    """Of a block."""
    bytes: int
    """Of a block."""


F32, F16, Q4_0, Q4_1, Q8_0, BF16 = 0, 1, 2, 3, 8, 30
FORMATS = {
    F32: Format("F32", 1, 4),
    F16: Format("F16", 1, 2),
    BF16: Format("BF16", 1, 2),
    Q4_0: Format("Q4_0", 32, 18),
    Q4_1: Format("Q4_1", 32, 20),
    Q8_0: Format("Q8_0", 32, 34),
}


def dequantize(data: memoryview, kind: int) -> np.ndarray:
    """All elements of whole blocks, one after the other: float32."""
    if kind == F32:
        return np.frombuffer(data, "<f4").astype(np.float32)
    if kind == F16:
        return np.frombuffer(data, "<f2").astype(np.float32)
    if kind == BF16:
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    blocks = np.frombuffer(data, np.uint8).reshape(-1, FORMATS[kind].bytes)
    d = _half(blocks, 0)
    if kind == Q8_0:
        return (d * blocks[:, 2:].view(np.int8)).reshape(-1)
    packed = blocks[:, 2:] if kind == Q4_0 else blocks[:, 4:]
    q = np.concatenate((packed & 15, packed >> 4), axis=1).astype(np.float32)
    return (d * (q - 8) if kind == Q4_0 else d * q + _half(blocks, 2)).reshape(-1)


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of each block: (blocks, 1) float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)
