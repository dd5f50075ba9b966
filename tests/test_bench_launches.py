"""What a profiler's trace says of our kernels."""

from benchmarks import launches

TILE = "cs336::attention::FwdTile<__nv_bfloat16, 128, 128, 3, 80, 2, (cs336::attention::Mask)1, false>"
FORWARD = f"void cs336::attention::attention_fwd_kernel<{TILE} >(cs336::attention::FwdArgs)"


def event(name, cat="kernel", registers=128):
    args = {"registers per thread": registers, "block": [512, 1, 1], "grid": [132, 1, 1], "shared memory": 231424}
    return {"name": name, "cat": cat, "args": args}


def test_a_row_a_kernel_of_that_name():
    events = [event(FORWARD), event(FORWARD), event("ampere_gemm"), event("attention_fwd", cat="cpu_op")]
    (row,) = launches.kernels(events, "attention")
    kernel = "attention_fwd_kernel<FwdTile<bf16, 128, 128, 3, 80, 2, 1, false>>"
    assert row == {"kernel": kernel, "registers": 128, "threads": 512, "shared_bytes": 231424}


def test_kernels_that_are_no_templates():
    assert launches.short("cs336::attention::clear_unheld(cs336::attention::Sequences, int)") == "clear_unheld"
