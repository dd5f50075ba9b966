"""Load the compiled libraries. Each registers its implementations of torch.ops.cs336.* as it loads."""

import pathlib

import torch

_HERE = pathlib.Path(__file__).parent


def _load(name: str) -> str | None:
    """None if cs336/NAME.so is loaded, else a sentence that says why not."""
    path = _HERE / f"{name}.so"
    if not path.exists():
        hint = " where nvcc is on PATH" if name == "_C_cuda" else ""
        return f"{path.name} is not built: run `pip install -e .`{hint}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load with torch {torch.__version__}: {error}"
    return None


CPU_MISSING = _load("_C")
CUDA_MISSING = _load("_C_cuda") if torch.cuda.is_available() else "torch sees no CUDA device"
