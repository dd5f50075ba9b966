"""Linear attention in chunks, for any GPU that Triton knows and, interpreted, for the CPU: ops/chunked.py's formulas.

One kernel sums up each chunk's decays; one walks the chunks of a head in order and leaves the state before each; one
takes all rows side by side, some of a chunk at a time, and makes their outputs. A long walk goes in parts, side by
side: each first adds up its own chunks, then starts from what the parts before it have left. A head's sums depend on
nothing but its own sequence.
"""

import torch
import triton
import triton.language as tl

from cs336.ops.triton.attention_tile import dot, rows_of, shared_memory, tile, width
from cs336.ops.triton.cast import INTERPRET, cast

FORGETS = tl.constexpr(-104.0)  # the least log-decay that ops/recurrence.py leaves: its exponential is 0
MOST_TOKENS = 4096  # that are walked at once
PART = 1024  # tokens of a part of a longer walk


@triton.jit
def decays(g_ptr, g_stride, segments_ptr, start, T, CHUNK: tl.constexpr, FINE: tl.constexpr):
    """Of the chunk at `start`, (CHUNK,) each: the log-decay up to a token, what it sees of the state before the chunk,
    its share of the state after it, its run, and whether that begins with it; and what is left of the state before, and
    the last token's run. A run begins with a segment, and if FINE where a token forgets all that was before it: of sums
    that go through such a decay the others' last digits are lost. 0 is the run that sees the state before."""
    i = tl.arange(0, CHUNK)
    index = start + i
    fresh = tl.zeros((CHUNK,), tl.int1)
    run = tl.zeros((CHUNK,), tl.int32)
    g = tl.zeros((CHUNK,), tl.float32)
    last = 0
    if g_ptr is not None:
        g = tl.load(g_ptr + index.to(tl.int64) * g_stride, mask=index < T, other=0.0)
        if FINE:
            fresh = g <= FORGETS
            g = tl.where(fresh, 0.0, g)
    if segments_ptr is not None:
        own = tl.load(segments_ptr + tl.minimum(index, T - 1)).to(tl.int32)
        fresh = fresh | (own != tl.load(segments_ptr + tl.minimum(tl.maximum(index - 1, 0), T - 1)).to(tl.int32))
    if FINE:
        run = tl.cumsum(fresh.to(tl.int32), 0)
        last = tl.sum(tl.where(i == CHUNK - 1, run, 0), 0)
    elif segments_ptr is not None:
        before = tl.load(segments_ptr + tl.maximum(start - 1, 0)).to(tl.int32)
        run = own - before
        last = tl.load(segments_ptr + tl.minimum(start + CHUNK, T) - 1).to(tl.int32) - before
    c = g
    total = 0.0
    if g_ptr is not None:
        if segments_ptr is None:
            c = tl.cumsum(g, 0)
        else:  # from the run's start: what was before it does not even change how this is rounded
            c = tl.sum(tl.where((i[:, None] >= i[None, :]) & (run[:, None] == run[None, :]), g[None, :], 0.0), 1)
        total = tl.sum(tl.where(i == CHUNK - 1, c, 0.0), 0)  # the same bits: nothing of the last token fades
    into, out, through = tl.exp(c), tl.exp(total - c), tl.exp(total)
    if FINE or segments_ptr is not None:
        into = tl.where(run == 0, into, 0.0)
        out = tl.where(run == last, out, 0.0)
        through = tl.where(last == 0, through, 0.0)
    return c, into, out, through, run, last, fresh


@triton.jit
def inner_decay(c, run, CHUNK: tl.constexpr):
    """exp(c_i - c_j) where token i sees token j of its chunk, else 0."""
    i = tl.arange(0, CHUNK)
    seen = (i[:, None] >= i[None, :]) & (run[:, None] == run[None, :])
    return tl.exp(tl.where(seen, c[:, None] - c[None, :], float("-inf")))


@triton.jit
def load_state(ptr, k, v, K, V, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """(BLOCK_K, BLOCK_V) from row k and column v of a state (K, V)."""
    rows, columns = k + tl.arange(0, BLOCK_K), v + tl.arange(0, BLOCK_V)
    mask = (rows < K)[:, None] & (columns < V)[None, :]
    return tl.load(ptr + rows[:, None] * V + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_state(ptr, state, k, v, K, V, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    rows, columns = k + tl.arange(0, BLOCK_K), v + tl.arange(0, BLOCK_V)
    mask = (rows < K)[:, None] & (columns < V)[None, :]
    tl.store(ptr + rows[:, None] * V + columns[None, :], cast(state, ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_columns(ptr, stride, start, T, column, WIDTH, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) from row `start` and `column`; zero from row T and column WIDTH on."""
    mask = (start + tl.arange(0, ROWS) < T)[:, None] & (column + tl.arange(0, COLUMNS) < WIDTH)[None, :]
    return tl.load(tile(ptr + column, stride, start, ROWS, COLUMNS), mask=mask, other=0.0)


@triton.jit
def store_columns(ptr, stride, values, start, T, column, WIDTH, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    mask = (start + tl.arange(0, ROWS) < T)[:, None] & (column + tl.arange(0, COLUMNS) < WIDTH)[None, :]
    tl.store(tile(ptr + column, stride, start, ROWS, COLUMNS), cast(values, ptr.dtype.element_ty), mask=mask)


@triton.jit
def scaled(x, weights):
    """Rows of x times their weights, in x's dtype."""
    return cast(x.to(tl.float32) * weights[:, None], x.dtype)


@triton.jit
def _decays_kernel(
    g_ptr,  # (B, H, T) float32, or None
    segments_ptr,  # (B, T), or None
    weights_ptr,  # (B, H, T) float32, contiguous, as all that is written: see chunk_decays
    through_ptr,  # (B, H, N) float32
    g_b, g_h, g_stride, segments_b,
    H, T, scale,
    CHUNK: tl.constexpr, BACK: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    n, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    if g_ptr is not None:
        g_ptr = rows_of(g_ptr, b, h, 0, g_b, g_h, g_stride)
    if segments_ptr is not None:
        segments_ptr += tl.cast(b, tl.int64) * segments_b
    _, into, out, through, _, _, _ = decays(g_ptr, g_stride, segments_ptr, n * CHUNK, T, CHUNK, FINE)
    index = n * CHUNK + tl.arange(0, CHUNK)
    tl.store(weights_ptr + head * T + index, (into if BACK else out) * scale, mask=index < T)
    tl.store(through_ptr + head * tl.cdiv(T, CHUNK) + n, through)


@triton.jit
def _walk_kernel(
    x_ptr,  # (B, G, T, K)
    y_ptr,  # (B, H, T, V)
    weights_ptr,  # (B, H, T) float32, contiguous, as all that follows
    through_ptr,  # (B, H, N) float32
    first_ptr,  # (B, H, K, V) float32, or None
    sums_ptr,  # (B, H, parts, K, V) float32: what each part's chunks add up to
    kept_ptr,  # (B, H, parts) float32: what a part leaves of the state before it
    states_ptr,  # (B, H, N, K, V): before each chunk on the way
    last_ptr,  # (B, H, K, V) float32
    x_b, x_h, x_stride, y_b, y_h, y_stride,
    H, group, T, K, V, parts,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, ADD_UP: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    tiles_v, part = tl.cdiv(V, BLOCK_V), tl.program_id(2)
    k0, v0 = (tl.program_id(0) // tiles_v) * BLOCK_K, (tl.program_id(0) % tiles_v) * BLOCK_V
    x_ptr = rows_of(x_ptr, b, h // group, 0, x_b, x_h, x_stride)
    y_ptr = rows_of(y_ptr, b, h, 0, y_b, y_h, y_stride)
    head = tl.program_id(1).to(tl.int64)
    num_chunks = tl.cdiv(T, CHUNK)
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    kept = 1.0
    if not ADD_UP:
        if first_ptr is not None:
            state = load_state(first_ptr + head * K * V, k0, v0, K, V, BLOCK_K, BLOCK_V)
        for before in range(0, part):
            sums = load_state(sums_ptr + (head * parts + before) * K * V, k0, v0, K, V, BLOCK_K, BLOCK_V)
            state = state * tl.load(kept_ptr + head * parts + before) + sums
    each = tl.cdiv(num_chunks, parts)
    for i in range(part * each, tl.minimum((part + 1) * each, num_chunks)):
        n = num_chunks - 1 - i if BACK else i
        if not ADD_UP:
            store_state(states_ptr + (head * num_chunks + n) * K * V, state, k0, v0, K, V, BLOCK_K, BLOCK_V)
        index = n * CHUNK + tl.arange(0, CHUNK)
        through = tl.load(through_ptr + head * num_chunks + n)
        weights = tl.load(weights_ptr + head * T + index, mask=index < T, other=0.0)
        x = load_columns(x_ptr, x_stride, n * CHUNK, T, k0, K, CHUNK, BLOCK_K)
        y = load_columns(y_ptr, y_stride, n * CHUNK, T, v0, V, CHUNK, BLOCK_V)
        state = state * through + dot(tl.trans(x), scaled(y, weights))
        kept *= through
    if ADD_UP:
        store_state(sums_ptr + (head * parts + part) * K * V, state, k0, v0, K, V, BLOCK_K, BLOCK_V)
        tl.store(kept_ptr + head * parts + part, kept)
    elif part == parts - 1:
        store_state(last_ptr + head * K * V, state, k0, v0, K, V, BLOCK_K, BLOCK_V)


@triton.jit
def _out_kernel(
    q_ptr,  # (B, G, T, K)
    k_ptr,
    v_ptr,  # (B, H, T, V)
    g_ptr,
    segments_ptr,
    states_ptr,  # (B, H, N, K, V)
    o_ptr,  # (B, H, T, V)
    q_b, q_h, q_stride, k_b, k_h, k_stride, v_b, v_h, v_stride, o_b, o_h, o_stride, g_b, g_h, g_stride, segments_b,
    H, group, T, K, V, scale,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    tiles_v = tl.cdiv(V, BLOCK_V)
    start, v0 = tl.program_id(0) // tiles_v * ROWS, (tl.program_id(0) % tiles_v) * BLOCK_V
    n = start // CHUNK
    q_ptr = rows_of(q_ptr, b, h // group, 0, q_b, q_h, q_stride)
    k_ptr = rows_of(k_ptr, b, h // group, 0, k_b, k_h, k_stride)
    v_ptr = rows_of(v_ptr, b, h, 0, v_b, v_h, v_stride)
    o_ptr = rows_of(o_ptr, b, h, 0, o_b, o_h, o_stride)
    if g_ptr is not None:
        g_ptr = rows_of(g_ptr, b, h, 0, g_b, g_h, g_stride)
    if segments_ptr is not None:
        segments_ptr += tl.cast(b, tl.int64) * segments_b
    FINE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    states_ptr += (tl.program_id(1).to(tl.int64) * tl.cdiv(T, CHUNK) + n) * K * V
    scores = tl.zeros((ROWS, ROWS), tl.float32)
    o = tl.zeros((ROWS, BLOCK_V), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        q = load_columns(q_ptr, q_stride, start, T, k0, K, ROWS, BLOCK_K)
        k = load_columns(k_ptr, k_stride, start, T, k0, K, ROWS, BLOCK_K)
        scores += dot(q, tl.trans(k))
        o += dot(q, load_state(states_ptr, k0, v0, K, V, BLOCK_K, BLOCK_V))
    if CHUNK > ROWS:  # o becomes what the state before these rows, which is not formed, gives
        for first in range(n * CHUNK, start, ROWS):
            others = tl.zeros((ROWS, ROWS), tl.float32)
            for k0 in range(0, K, BLOCK_K):
                q = load_columns(q_ptr, q_stride, start, T, k0, K, ROWS, BLOCK_K)
                k = load_columns(k_ptr, k_stride, first, T, k0, K, ROWS, BLOCK_K)
                others += dot(q, tl.trans(k))
            _, _, out, through, _, _, _ = decays(g_ptr, g_stride, segments_ptr, first, T, ROWS, FINE)
            v = load_columns(v_ptr, v_stride, first, T, v0, V, ROWS, BLOCK_V)
            o = o * through + dot(cast(others * out[None, :], v.dtype), v)
    c, into, _, _, run, _, _ = decays(g_ptr, g_stride, segments_ptr, start, T, ROWS, FINE)
    v = load_columns(v_ptr, v_stride, start, T, v0, V, ROWS, BLOCK_V)
    o = o * into[:, None] + dot(cast(scores * inner_decay(c, run, ROWS), v.dtype), v)
    store_columns(o_ptr, o_stride, o * scale, start, T, v0, V, ROWS, BLOCK_V)


def roomy(device: torch.device) -> bool:
    """Whether a block has the shared memory of an H100's."""
    return INTERPRET.value or shared_memory(device) > 200_000


def tiles(K: int, V: int, chunk: int, dtype: torch.dtype) -> dict[str, int]:
    return {
        "CHUNK": chunk,
        "BLOCK_K": min(width(K, chunk, dtype=dtype), 64),
        "BLOCK_V": min(width(V, chunk, dtype=dtype), 64),
    }


def plan(K: int, V: int, dtype: torch.dtype, device: torch.device) -> dict[str, dict]:
    """How each kernel cuts its work."""
    chunk = 64 if dtype.itemsize == 2 or roomy(device) else 32
    cut, whole = tiles(K, V, chunk, dtype), width(K, chunk, dtype=dtype)
    most = (64 if whole <= 128 else 32) if roomy(device) else (32 if whole <= 128 else 16)
    grads = {"BLOCK_K": whole, "BLOCK_V": min(cut["BLOCK_V"], most), "num_warps": 8 if whole > 64 else 4}
    out = outputs_plan(V, cut, dtype, device)
    states = cut | {"CHUNK": out["CHUNK"]}
    return {"states": states, "walk": cut, "out": out, "grads": cut | grads | {"num_stages": 1}}


def outputs_plan(V: int, cut: dict[str, int], dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """A program makes the outputs of 64 rows. Where they fit scores are made once for 128 features of values, and a
    state is kept for 128 rows, so that half as many are written and read."""
    cut = cut | {"ROWS": cut["CHUNK"]}
    if V <= 64 or dtype.itemsize != 2 or not roomy(device):
        return cut
    wide = {} if INTERPRET.value else {"BLOCK_V": 128, "num_warps": 4, "num_stages": 3}
    return cut | {"CHUNK": 2 * cut["CHUNK"]} | wide


def strides(x) -> tuple[int, ...]:
    """Of the batch, the head and the token; zeros of what is not there."""
    return (0, 0, 0) if x is None else x.stride()[:3]


def chunk_decays(v, g, segments, chunk, scale, back):
    """Of each chunk's tokens, (B, H, T): their shares of the state after it, or `back` what they see of that before it,
    times scale; and what it leaves of the state before it, (B, H, N); in float32."""
    (B, H, T, _), N = v.shape, triton.cdiv(v.shape[2], chunk)
    weights, through = (v.new_empty(B, H, n, dtype=torch.float32) for n in (T, N))
    with torch.cuda.device_of(v):
        _decays_kernel[(N, B * H)](
            g, segments, weights, through, *strides(g), 0 if segments is None else segments.stride(0), H, T, scale,
            CHUNK=chunk, BACK=back, FINE=v.dtype == torch.float32, num_warps=1,
        )  # fmt: skip
    return weights, through


def walk(x, y, g, state, segments, cut, scale=1.0, back=False):
    """The states S' = through S + x^T (weights y) before each chunk (B, H, N, K, V), in 16 bits where x is, and after
    the last (B, H, K, V), from the first chunk on or `back` from the last."""
    (B, H, T, V), K = y.shape, x.shape[-1]
    weights, through = chunk_decays(y, g, segments, cut["CHUNK"], scale, back)
    N = through.shape[2]
    parts = 1 if T <= MOST_TOKENS else min(N, triton.cdiv(T, PART))
    before, last = y.new_empty(B, H, N, K, V), y.new_empty(B, H, K, V, dtype=torch.float32)
    sums, kept = (y.new_empty(B, H, parts, n, dtype=torch.float32) for n in (K * V, 1))
    state = None if state is None else state.contiguous()
    blocks = triton.cdiv(K, cut["BLOCK_K"]) * triton.cdiv(V, cut["BLOCK_V"])
    with torch.cuda.device_of(x):
        for add_up in (True, False) if parts > 1 else (False,):
            _walk_kernel[(blocks, B * H, parts - add_up)](
                x, y, weights, through, state, sums, kept, before, last, *strides(x), *strides(y),
                H, H // x.shape[1], T, K, V, parts, ADD_UP=add_up, BACK=back, **cut,
            )  # fmt: skip
    return before, last


def fwd(q, k, v, g, state, segments, scale):
    segments, cuts = _rows(segments), plan(k.shape[-1], v.shape[-1], v.dtype, v.device)
    before, last = walk(k, v, g, state, segments, cuts["states"])
    return outputs(q, k, v, g, segments, before, scale, cuts["out"]), last


def outputs(q, k, v, g, segments, before, scale, cut):
    """o (B, H, T, V), stored by token, of the states before each chunk."""
    (B, H, T, V), K = v.shape, q.shape[-1]
    o = v.new_empty(B, T, H, V).transpose(1, 2)
    with torch.cuda.device_of(q):
        _out_kernel[(triton.cdiv(T, cut["ROWS"]) * triton.cdiv(V, cut["BLOCK_V"]), B * H)](
            q, k, v, g, segments, before, o,
            *strides(q), *strides(k), *strides(v), *strides(o), *strides(g),
            0 if segments is None else segments.stride(0),
            H, H // q.shape[1], T, K, V, scale, **cut,
        )  # fmt: skip
    return o


def _rows(segments):
    return segments if segments is None or segments.stride(-1) == 1 else segments.contiguous()
