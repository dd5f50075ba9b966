"""GGUF's formats of K and of five bits: every number of a block of random bytes, by where its bits lie, and as gguf
reads them."""

import numpy as np
import pytest
import torch
from test_gguf import metadata, write

from cs336.models.gguf.quants import FORMATS, Q2_K, Q3_K, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, dequantize
from cs336.models.gguf.reader import GGUF

HALVES = {Q2_K: (80, 82), Q3_K: (108,), Q4_K: (0, 2), Q5_K: (0, 2), Q6_K: (208,), Q5_0: (0,), Q5_1: (0, 2)}


def blocks(kind, count=5):
    """Random bytes with finite scales."""
    draw = np.random.default_rng(kind)
    found = draw.integers(0, 256, (count, FORMATS[kind].bytes), dtype=np.uint8)
    for at in HALVES[kind]:
        found[:, at : at + 2] = draw.normal(size=(count, 1)).astype("<f2").view(np.uint8)
    return found


def six_bits(b, j):
    """Scale and least value of run j of Q4_K and Q5_K."""
    if j < 4:
        return b[4 + j] & 63, b[8 + j] & 63
    return b[8 + j] & 15 | b[j] >> 6 << 4, b[8 + j] >> 4 | b[4 + j] >> 6 << 4


def element(kind, b, i):
    """Number i of a block b, a list of bytes."""
    d, *m = (float(np.array(b[at : at + 2], np.uint8).view("<f2")[0]) for at in HALVES[kind])
    if kind in (Q5_0, Q5_1):
        high, low = b[-20:-16], b[-16:]
        q = low[i % 16] >> 4 * (i // 16) & 15 | (high[i // 8] >> i % 8 & 1) << 4
        return d * (q - 16) if kind == Q5_0 else d * q + m[0]
    half, in_half, run = i // 128, i % 128, i // 16
    if kind == Q2_K:
        q = b[16 + 32 * half + i % 32] >> 2 * (in_half // 32) & 3
        return d * (b[run] & 15) * q - m[0] * (b[run] >> 4)
    if kind == Q3_K:
        q = b[32 + 32 * half + i % 32] >> 2 * (in_half // 32) & 3 | (b[i % 32] >> i // 32 & 1) << 2
        scale = b[96 + run % 8] >> 4 * (run // 8) & 15 | (b[104 + run % 4] >> 2 * (run // 4) & 3) << 4
        return d * (scale - 32) * (q - 4)
    if kind == Q6_K:
        low = b[64 * half + in_half % 64] >> 4 * (in_half // 64) & 15
        high = b[128 + 32 * half + in_half % 32] >> 2 * (in_half // 32) & 3
        scale = b[192 + run]
        return d * (scale - 256 if scale > 127 else scale) * ((low | high << 4) - 32)
    at = (16 if kind == Q4_K else 48) + 32 * (i // 64) + i % 32
    q = b[at] >> 4 * (i // 32 % 2) & 15
    if kind == Q5_K:
        q |= (b[16 + i % 32] >> i // 32 & 1) << 4
    s, n = six_bits(b, i // 32)
    return d * s * q - m[0] * n


@pytest.mark.parametrize("kind", HALVES, ids=lambda kind: FORMATS[kind].name)
def test_each_number_of_a_block(kind):
    found = blocks(kind)
    elements = FORMATS[kind].elements
    want = [[element(kind, block, i) for i in range(elements)] for block in found.tolist()]
    got = dequantize(memoryview(found.tobytes()), kind).reshape(-1, elements)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", HALVES, ids=lambda kind: FORMATS[kind].name)
def test_the_package_gguf_reads_the_same(kind):
    gguf = pytest.importorskip("gguf")
    found = blocks(kind)
    want = gguf.quants.dequantize(found.reshape(-1), gguf.GGMLQuantizationType[FORMATS[kind].name])
    np.testing.assert_array_equal(dequantize(memoryview(found.tobytes()), kind), want)


def test_in_a_file(tmp_path):
    found = blocks(Q4_K, 6)
    file = GGUF(write(tmp_path / "x.gguf", metadata(), {"t": ((3, 512), Q4_K, found.tobytes())}))
    got = file.tensor("t")
    assert got.shape == (3, 512)
    assert torch.equal(got.flatten(), torch.from_numpy(dequantize(memoryview(found.tobytes()), Q4_K)))
    bad = write(tmp_path / "y.gguf", metadata(), {"t": ((6, 128), Q4_K, found.tobytes())})
    with pytest.raises(ValueError, match="rows of 128, which Q4_K does not divide"):
        GGUF(bad)
