"""The gradient of an embedding's table in Triton: sums over runs of equal ids, in the order of the stable sort.

A program takes LENGTH neighbours of the sorted ids. A run that lies between its ends it writes itself; what it has of a
run that goes on beyond an end is a partial sum, and a second kernel adds those up, in order.
"""

import torch
import triton
import triton.language as tl

from cs336.ops.triton.cast import cast

LENGTH = 64
MAX_BLOCK = 1024


@triton.jit
def _store_row(out_ptr, row, V, total, D, columns, live):
    """Nowhere, if there is no such row."""
    if (row >= 0) & (row < V):
        tl.store(out_ptr + row * D + columns, cast(total, out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _runs_kernel(
    dy_ptr,  # (N, D)
    ids_ptr,  # (N,) sorted
    order_ptr,  # (N,): where the sorted ids stood
    out_ptr,  # (V, D) zeros
    first_ptr,  # (programs, D) float32: of the run at a program's start, if it began before
    last_ptr,  # (programs, D) float32: of the run at its end, if it goes on and began here
    N,
    V,
    D,
    dy_stride,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = columns < D
    start = program * LENGTH
    stop = tl.minimum(start + LENGTH, N)
    before = tl.load(ids_ptr + start - 1, mask=start > 0, other=-1)
    after = tl.load(ids_ptr + stop, mask=stop < N, other=-1)
    total = tl.zeros((BLOCK,), tl.float32)
    begins = start  # of the present run
    for i in range(start, stop):
        row = tl.load(order_ptr + i)
        total += tl.load(dy_ptr + row * dy_stride + columns, mask=live, other=0.0).to(tl.float32)
        here = tl.load(ids_ptr + i)
        following = tl.load(ids_ptr + i + 1, mask=i + 1 < stop, other=-1)
        if here != following:  # or the program's end, where nothing follows
            from_before = (begins == start) & (here == before)
            goes_on = (i + 1 == stop) & (here == after)
            offset = program.to(tl.int64) * D + columns
            if from_before:
                tl.store(first_ptr + offset, total, mask=live)
            elif goes_on:
                tl.store(last_ptr + offset, total, mask=live)
            else:
                _store_row(out_ptr, here, V, total, D, columns, live)
            total = tl.zeros((BLOCK,), tl.float32)
            begins = i + 1


@triton.jit
def _joins_kernel(ids_ptr, out_ptr, first_ptr, last_ptr, N, V, D, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """Of a run that begins in this program's part and goes on: its partial sums."""
    program = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = columns < D
    start = program * LENGTH
    stop = tl.minimum(start + LENGTH, N)
    here = tl.load(ids_ptr + stop - 1)
    goes_on = (stop < N) & (tl.load(ids_ptr + stop, mask=stop < N, other=-1) == here)
    before = tl.load(ids_ptr + start - 1, mask=start > 0, other=-1)
    begins_here = (before != here) | (tl.load(ids_ptr + start) != here)
    if goes_on & begins_here:
        total = tl.load(last_ptr + program.to(tl.int64) * D + columns, mask=live, other=0.0)
        part = program + 1
        more = 1
        while more == 1:
            total += tl.load(first_ptr + part.to(tl.int64) * D + columns, mask=live, other=0.0)
            end = (part + 1) * LENGTH
            whole = tl.load(ids_ptr + tl.minimum(end, N) - 1) == here
            beyond = tl.load(ids_ptr + end, mask=end < N, other=-1) == here
            more = (whole & beyond).to(tl.int32)
            part += 1
        _store_row(out_ptr, here, V, total, D, columns, live)


def bwd(dy, ids, num_rows):
    (N, D) = dy.shape
    out = dy.new_zeros(num_rows, D)
    if N == 0 or D == 0:
        return out
    ids, order = torch.sort(ids, stable=True)
    programs, block = triton.cdiv(N, LENGTH), min(triton.next_power_of_2(D), MAX_BLOCK)
    grid = programs, triton.cdiv(D, block)
    first, last = (dy.new_empty(programs, D, dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(dy):
        _runs_kernel[grid](dy, ids, order, out, first, last, N, num_rows, D, dy.stride(0), LENGTH, block)
        _joins_kernel[grid](ids, out, first, last, N, num_rows, D, LENGTH, block)
    return out
