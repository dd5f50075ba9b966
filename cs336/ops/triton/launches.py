"""Programmatic dependent launches of Triton's kernels, as common/async.cuh has them."""

import torch
import triton
import triton.language as tl

from cs336.ops.triton.cast import INTERPRET


def launches_early(device: torch.device) -> bool:
    """Whether the device knows them."""
    return not INTERPRET.value and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def wait_for_predecessor(EARLY: tl.constexpr):
    """First of all in a kernel launched with `launch_pdl`: it began before the one before it has ended, and so may the
    next one."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
