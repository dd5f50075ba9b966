"""What attention's forward and backward share: tiles of rows, scores, masks, dropout, and which tiles to visit.

Scores are kept in powers of 2, s log2(e), so that exp2 takes them as they are. Every kernel serves a batch and a pack:
cu_ptr None, or the starts of the sequences.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cs336.ops.triton.cast import INTERPRET

LOG2E = 1.4426950408889634


@triton.jit
def dot(a, b):
    if INTERPRET:  # which would multiply the bits of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")  # float32 stays float32, not TF32


@triton.jit
def sequence(cu_ptr, b, length, total):
    """First row and length of sequence b; what cu_ptr holds is clamped to the tensor's `total` rows."""
    if cu_ptr is None:
        first, num = 0, length
    else:
        first = tl.minimum(tl.maximum(tl.load(cu_ptr + b), 0), total)
        num = tl.minimum(tl.maximum(tl.load(cu_ptr + b + 1), first), total) - first
    return first, num


@triton.jit
def rows_of(ptr, b, h, first, b_stride, h_stride, stride):
    """Address of row `first` of head h in sequence b. A pack has no b: its stride is 0."""
    return ptr + tl.cast(b, tl.int64) * b_stride + tl.cast(h, tl.int64) * h_stride + tl.cast(first, tl.int64) * stride


@triton.jit
def tile(ptr, stride, start, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = start + tl.arange(0, ROWS)
    return ptr + rows.to(tl.int64)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def load(ptr, stride, start, num, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr):
    """Rows from `start`, zero from row `num` on (none is if WHOLE) and from feature WIDTH on."""
    address = tile(ptr, stride, start, ROWS, COLUMNS)
    if WHOLE and WIDTH == COLUMNS:
        values = tl.load(address)
    else:
        mask = (tl.arange(0, COLUMNS) < WIDTH)[None, :]
        if not WHOLE:
            mask = mask & (start + tl.arange(0, ROWS) < num)[:, None]
        values = tl.load(address, mask=mask, other=0.0)
    return values


@triton.jit
def gather(
    cache_ptr, table_ptr, key, T, P, page, page_stride, token_stride, feature,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows of the keys `key`, zero from T on. Pages outside of the cache are not read."""
    seen = key < T
    entry = tl.load(table_ptr + key // page, mask=seen, other=0)
    seen = seen & (entry >= 0) & (entry < P)
    row = entry.to(tl.int64) * page_stride + (key % page).to(tl.int64) * token_stride
    return tl.load(
        cache_ptr + row[:, None] + feature[None, :], mask=seen[:, None] & (feature < WIDTH)[None, :], other=0.0
    )


@triton.jit
def rows_in_page(
    cache_ptr, table_ptr, n, T, P, page, page_stride, token_stride, feature,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`gather` of the keys from n on, which are in one page."""
    entry = tl.load(table_ptr + n // page)
    here = tl.where((entry >= 0) & (entry < P), T - n, 0)
    key = tl.arange(0, BLOCK_N)
    cache_ptr += tl.cast(entry, tl.int64) * page_stride + tl.cast(n % page, tl.int64) * token_stride
    mask = (key < here)[:, None] & (feature < WIDTH)[None, :]
    return tl.load(cache_ptr + key[:, None] * token_stride + feature[None, :], mask=mask, other=0.0)


@triton.jit
def tanh(x):
    """To an ulp or two near 0, where 1 - 2 / (e^2x + 1) would cancel."""
    square = x * x
    series = x + x * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    e = tl.exp2(-2.0 * 1.4426950408889634 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -far, far))


@triton.jit
def scores(s, position, key, slope, inner, outer, CAPPED: tl.constexpr, ALIBI: tl.constexpr):
    """Products q k -> scores in powers of 2, and the soft-cap's tanh (or s again). position, key: indices, broadcast.

    inner, outer: scale / softcap and softcap log2(e), or unused and scale log2(e).
    """
    t = s
    if CAPPED:
        t = tanh(s * inner)
    s = t * outer
    if ALIBI:
        s -= slope * tl.abs(position - key).to(tl.float32)
    return s, t


@triton.jit
def visible(position, key, T, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    seen = (key < T) & (position == position)
    if HAS_LEFT:
        seen = seen & (key >= position - left)
    if HAS_RIGHT:
        seen = seen & (key <= position + right)
    return seen


@triton.jit
def kept(seed_ptr, query, key, head, threshold):
    """Whether dropout keeps a probability: the draw of ref/attention.py."""
    zero = (query + key) * 0
    i, j = (query + zero).to(tl.uint32), (key + zero).to(tl.uint32)
    z = (zero + head).to(tl.uint32)
    word, _, _, _ = tl.philox(tl.load(seed_ptr), i, j, z, zero.to(tl.uint32), 7)
    return word.to(tl.int64) >= threshold


@triton.jit
def ranges(first, last, left, right, T, BLOCK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """lo <= a <= b <= end: rows at positions first to last see in [lo, end) alone, and in [a, b) everything.

    lo, a and b are multiples of BLOCK.
    """
    lo, a, end, b = 0, 0, T, T
    if HAS_LEFT:
        lo = tl.minimum(tl.maximum(first - left, 0), T) // BLOCK * BLOCK
        a = tl.cdiv(tl.minimum(tl.maximum(last - left, 0), T), BLOCK) * BLOCK
    if HAS_RIGHT:
        end = tl.maximum(tl.minimum(last + right + 1, T), lo)
        b = tl.maximum(tl.minimum(first + right + 1, T), 0)
    a = tl.minimum(a, tl.cdiv(end, BLOCK) * BLOCK)
    return lo, a, tl.maximum(b // BLOCK * BLOCK, a), end


# ---- host ----


def shared_memory(device: torch.device) -> int:
    """Bytes that a block may have."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


def geometry(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q, cu_seqlens_k, max_seqlen_q: int, max_seqlen_k: int) -> dict:
    """B, Hq, Hkv, S, T, D, E, and the rows of all sequences in a pack."""
    B, S, T = q.shape[0], q.shape[2 if q.dim() == 4 else 0], k.shape[-2]
    if cu_seqlens_q is not None:
        B, S, T = cu_seqlens_q.shape[0] - 1, max_seqlen_q, max_seqlen_k
    return {
        "B": B,
        "Hq": q.shape[1],
        "Hkv": k.shape[1],
        "S": S,
        "T": T,
        "D": q.shape[-1],
        "E": v.shape[-1],
        "rows": q.shape[0],
        "keys": k.shape[0],
    }


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of sequences, heads and rows; x is (B, H, S, D), or a pack (T, H, D)."""
    return x.stride()[:3] if x.dim() == 4 else (0, x.stride(1), x.stride(0))  # type: ignore[return-value]


def lse_strides(lse: Tensor) -> tuple[int, int]:
    """Of sequences and heads; lse is (B, H, S), or a pack's (H, T)."""
    return lse.stride()[:2] if lse.dim() == 3 else (0, lse.stride(0))  # type: ignore[return-value]


def modifiers(
    scale: float, causal: bool, left: int, right: int, softcap: float, alibi_slopes=None, dropout_p=0.0, seed=None
) -> tuple[dict, dict]:
    """What every kernel has of the options: run-time arguments, and those compiled in."""
    right = 0 if causal else right
    at_run = {
        "alibi_ptr": alibi_slopes,
        "alibi_stride": alibi_slopes.shape[-1] if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0,
        "seed_ptr": seed if dropout_p > 0 else None,
        "threshold": int(dropout_p * 2**32),
        "inner": scale / softcap if softcap > 0 else 1.0,
        "outer": (softcap if softcap > 0 else scale) * LOG2E,
        "left": left,
        "right": right,
    }
    return at_run, {"CAPPED": softcap > 0, "HAS_LEFT": left >= 0, "HAS_RIGHT": right >= 0}


def width(n: int, *beside: int, dtype: torch.dtype) -> int:
    """Columns of a tile of n features, beside tiles of others. In 16 bits all get as many, or 64 and more: narrower
    tiles have swizzles of their own, and ptxas 12.8 takes their wgmma descriptors for each other's (docs/numerics.md).
    """
    least = 16 if dtype == torch.float32 else min(64, max(map(triton.next_power_of_2, beside)))
    return max(16, least, triton.next_power_of_2(n))


def blocks(table: dict, D: int, E: int, dtype: torch.dtype, device: torch.device) -> dict:
    """The first entry of a table {wide: [(BLOCK_M, BLOCK_N, warps, stages, rows kept, rows streamed a stage)]} that
    fits the device's shared memory, or the last."""
    wide = max(16, triton.next_power_of_2(max(D, E)))
    if INTERPRET.value:
        m, n, warps, stages = 32, 16, 4, 1
    else:
        key = "float32" if dtype == torch.float32 else "16-bit"
        plans, room = table[key][max(64, wide)], shared_memory(device) - 4096
        fits = [p for p in plans if (p[4] + p[3] * p[5]) * wide * dtype.itemsize <= room]
        m, n, warps, stages, *_ = (fits or plans[-1:])[0]
    return {
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_D": width(D, E, dtype=dtype),
        "BLOCK_E": width(E, D, dtype=dtype),
        "num_warps": warps,
        "num_stages": stages,
    }
