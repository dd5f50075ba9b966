"""Programmatic dependent launch: a kernel that asks for it may start while the one before it still runs."""

import pathlib

import pytest
import torch

from cs336 import ops
from cs336.ops import registry

HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0}
KERNELS = pathlib.Path(__file__).parents[2] / "csrc" / "kernels"


def test_kernels_that_start_early_wait_before_they_touch_memory():
    asking = [path for path in KERNELS.rglob("*.cu*") if ".dependent = true" in path.read_text()]
    assert asking
    for path in asking:
        if path.parent == KERNELS:
            parts = path.read_text().split("__global__")[1:]
        else:  # a family of files, one of which has the kernel
            parts = ["".join(source.read_text() for source in path.parent.glob("*.cu*"))]
        assert parts, f"{path.name} launches a kernel of another file"
        for part in parts:
            assert "wait_for_predecessor();" in part, f"{path.name}: {part[:80]}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("N", [64, 1000, 1024, 16384])
def test_a_chain_equals_itself_synchronised(N):
    """Each kernel reads what the one before it has just written; small ones overlap the most."""

    def chain(wait):
        torch.manual_seed(0)
        x, w, b = torch.randn(96, N, device="cuda").bfloat16(), *torch.randn(2, N, device="cuda").bfloat16()
        moments = [torch.zeros(N, device="cuda") for _ in range(2)]
        for step in range(1, 31):
            leaves = [t.detach().requires_grad_() for t in (x, w, b)]
            y, total = ops.rms_norm(leaves[0], leaves[1], residual=x)
            wait()
            z = ops.layer_norm(y, leaves[1], leaves[2])
            wait()
            dx, dw, _ = torch.autograd.grad([z, total], leaves, [x, y.detach()])
            wait()
            ops.adamw_([w], [dw], *([m] for m in moments), **HYPER, step=step)
            wait()
            x = ops.rms_norm(dx, w)
            wait()
        return x, w

    with registry.use("native"):
        want = chain(torch.cuda.synchronize)
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(chain(lambda: None), want, strict=True))
