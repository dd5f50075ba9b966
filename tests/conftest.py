import os
import signal

os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidia0") else "1")  # before triton is imported
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is: see cs336/cli/program.py
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # processes side by side share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's "&" does it, and children would ignore Ctrl-C too
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import numpy
import pytest

# The same examples each time, however slowly they are drawn; --hypothesis-profile=default looks for others.
slow = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=slow)
hypothesis.settings.load_profile("repeatable")


def seed():
    torch = pytest.importorskip("torch")
    torch.manual_seed(int(os.environ.get("SEED", "0")))


@pytest.fixture(autouse=True, scope="module")
def _seed_fixtures():
    """Else what a module's fixtures draw depends on which modules the process has run before."""
    seed()


@pytest.fixture(autouse=True)
def _seed():
    seed()


@pytest.fixture(scope="session")
def device():
    """The device that this machine's kernels are for."""
    torch = pytest.importorskip("torch")
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def fixed_order(monkeypatch):
    """Interpreted products add up each element in one order. By BLAS, on some processors, it depends on where in a tile
    a row lies, which on a GPU it does not."""
    if os.environ["TRITON_INTERPRET"] == "1":
        interpreter = pytest.importorskip("triton.runtime.interpreter")
        monkeypatch.setattr(interpreter, "np", _Numpy())


class _Numpy:
    def __getattr__(self, name):
        return getattr(numpy, name)

    def matmul(self, a, b, dtype):
        return numpy.multiply(a[..., None], b[..., None, :, :], dtype=dtype).sum(-2)
