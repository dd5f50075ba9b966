"""Philox4x32, a random function of a counter (Salmon et al. 2011): the draws of a kernel, whatever its tiles."""

from torch import Tensor

WORD = 0xFFFFFFFF


def philox(seed: Tensor, counter: list[Tensor], rounds: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words in [0, 2^32) for a 64-bit seed and a counter of four words, all int64, broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(rounds):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # mod 2^64: the high words need no sign
        c0, c1, c2, c3 = (p1 >> 32 & WORD) ^ c1 ^ k0, p1 & WORD, (p0 >> 32 & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3
