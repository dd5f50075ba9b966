"""Formats of GGUF's tensors, block by block, as float32: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    F32, F16, BF16     a number
    Q8_0    d, 32 q of int8                              x = d q
    Q4_0    d, 32 q of 4 bits                            x = d (q - 8)
    Q4_1    d, m, 32 q of 4 bits                         x = d q + m
    Q5_0    d, 32 high bits, 32 q of 4 bits              x = d (q - 16)
    Q5_1    d, m, 32 high bits, 32 q of 4 bits           x = d q + m

d and m are float16. Of two 4-bit numbers in byte i the low one is element i, the high one element i + 16. Files of K
formats have Q5_0 and Q5_1 where a row is no multiple of 256.

A block of a K format is 256 numbers in groups, each with a scale s of its own, and in some a least value n:

    Q2_K    16 of 4-bit s, n; q of 2 bits; d, m          x = d s q - m n
    Q3_K    high bits; 2 bits; 16 of 6-bit s; d          x = d (s - 32) (q - 4)
    Q4_K    d, m; 8 of 6-bit s, n; q of 4 bits           x = d s q - m n
    Q5_K    d, m; 8 of 6-bit s, n; high bits; 4 bits     x = d s q - m n
    Q6_K    4 bits; 2 high bits; 16 of int8 s; d         x = d s (q - 32)

Of their numbers a run of bytes holds planes: first the lowest bits of each byte, which are one run of elements, then
the next, which are the run behind it.
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


F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, BF16 = 0, 1, 2, 3, 6, 7, 8, 30
Q2_K, Q3_K, Q4_K, Q5_K, Q6_K = 10, 11, 12, 13, 14
FORMATS = {
    F32: Format("F32", 1, 4),
    F16: Format("F16", 1, 2),
    BF16: Format("BF16", 1, 2),
    Q4_0: Format("Q4_0", 32, 18),
    Q4_1: Format("Q4_1", 32, 20),
    Q5_0: Format("Q5_0", 32, 22),
    Q5_1: Format("Q5_1", 32, 24),
    Q8_0: Format("Q8_0", 32, 34),
    Q2_K: Format("Q2_K", 256, 84),
    Q3_K: Format("Q3_K", 256, 110),
    Q4_K: Format("Q4_K", 256, 144),
    Q5_K: Format("Q5_K", 256, 176),
    Q6_K: Format("Q6_K", 256, 210),
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
    if kind in OF_256:
        return OF_256[kind](blocks).reshape(-1)
    d = _half(blocks, 0)
    if kind == Q8_0:
        return (d * blocks[:, 2:].view(np.int8)).reshape(-1)
    packed = blocks[:, -16:]
    q = np.concatenate((packed & 15, packed >> 4), axis=1)
    if kind in (Q5_0, Q5_1):
        q |= np.unpackbits(blocks[:, -20:-16], axis=1, bitorder="little") << 4
    if kind in (Q4_0, Q5_0):
        return (d * (q.astype(np.float32) - (8 if kind == Q4_0 else 16))).reshape(-1)
    return (d * q + _half(blocks, 2)).reshape(-1)


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of each block: (blocks, 1) float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


# ---- blocks of 256: (blocks, bytes) uint8 -> (blocks, groups, elements of one) float32 ----


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    d, m, scales = _half(blocks, 80), _half(blocks, 82), blocks[:, :16]
    return _grouped(d * (scales & 15), _planes(blocks[:, 16:80], 2, 32)) - (m * (scales >> 4))[..., None]


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    scales = np.concatenate((low & 15, low >> 4), 1) | (_planes(high, 2, 4) << 4)
    q = _planes(blocks[:, 32:96], 2, 32) | _planes(blocks[:, :32], 1, 32) << 2
    return _grouped(_half(blocks, 108) * (scales.astype(np.float32) - 32), q, 4)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    return _of_eight(blocks, _planes(blocks[:, 16:], 4, 32))


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    return _of_eight(blocks, _planes(blocks[:, 48:], 4, 32) | _planes(blocks[:, 16:48], 1, 32) << 4)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    q = _planes(blocks[:, :128], 4, 64) | _planes(blocks[:, 128:192], 2, 32) << 4
    return _grouped(_half(blocks, 208) * blocks[:, 192:208].view(np.int8), q, 32)


OF_256 = {Q2_K: _q2_k, Q3_K: _q3_k, Q4_K: _q4_k, Q5_K: _q5_k, Q6_K: _q6_k}


def _of_eight(blocks: np.ndarray, q: np.ndarray) -> np.ndarray:
    """d s q - m n. 12 bytes hold eight 6-bit s and n: the first four of each in bytes 0-3 and 4-7; the low bits of the
    others in bytes 8-11, their two high ones on top of the first four."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate((first & 63, (third & 15) | (first >> 6 << 4)), 1)
    least = np.concatenate((second & 63, (third >> 4) | (second >> 6 << 4)), 1)
    return _grouped(_half(blocks, 0) * scales, q) - (_half(blocks, 2) * least)[..., None]


def _grouped(scales: np.ndarray, q: np.ndarray, zero: int = 0) -> np.ndarray:
    """Each scale times its run of q - zero."""
    return scales[..., None] * (q.reshape(*scales.shape, -1).astype(np.float32) - zero)


def _planes(packed: np.ndarray, bits: int, run: int) -> np.ndarray:
    """(blocks, bytes) -> (blocks, numbers): of each run of bytes the lowest bits, then the next ones, ..."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    runs = packed.reshape(len(packed), -1, 1, run)
    return ((runs >> shifts[:, None]) & ((1 << bits) - 1)).reshape(len(packed), -1)
