import contextlib

import pytest


@pytest.fixture(autouse=True)
def _not_interpreted():
    """Where a CPU has no paged kernel but Triton's interpreter, which takes a hundred times as long, plain torch runs:
    tests/ops holds the kernels to it."""
    torch = pytest.importorskip("torch")
    from cs336.ops import registry

    first, *_ = registry.kernels("paged_attention", torch.device("cpu"))
    with registry.use("ref") if first == "triton" and registry.forced() is None else contextlib.nullcontext():
        yield
