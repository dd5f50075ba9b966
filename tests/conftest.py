import os

os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidia0") else "1")  # before triton is imported
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is: see cs336/cli.py

import pytest


@pytest.fixture(autouse=True)
def _seed():
    torch = pytest.importorskip("torch")
    torch.manual_seed(int(os.environ.get("SEED", "0")))


@pytest.fixture(scope="session")
def device():
    """The device that this machine's kernels are for."""
    torch = pytest.importorskip("torch")
    return "cuda" if torch.cuda.is_available() else "cpu"
