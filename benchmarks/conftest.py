"""Each bench_* that takes a `case` runs once for every case of its module: 64 MB on a GPU, tiny on a CPU."""

import os

os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidia0") else "1")  # before triton is imported

import torch


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        size = "quick" if torch.cuda.is_available() else "tiny"
        metafunc.parametrize("case", list(metafunc.module.cases(size)), ids=str)
