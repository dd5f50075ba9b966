"""Load the compiled libraries. Each registers its implementations of torch.ops.cs336.* as it loads.

A library is loaded when a tensor first needs it: merely asking torch whether there is a GPU would poison every process
that is forked later.
"""

import ctypes
import functools
import pathlib
import warnings

import torch

HERE = pathlib.Path(__file__).parent
LIBRARIES = {"cpu": "_C", "cuda": "_C_cuda"}  # type of device -> the library of its kernels


@functools.cache
def missing(device_type: str) -> str | None:
    """None if the native kernels for that type of device are loaded, else a sentence that says why not."""
    if device_type not in LIBRARIES:
        return f"there are no native kernels for {device_type} tensors"
    path = HERE / f"{LIBRARIES[device_type]}.so"
    if not path.exists():
        hint = " where nvcc is on PATH and CUDACXX is not none" if device_type == "cuda" else ""
        return f"{path.name} is not built: run `pip install --no-build-isolation -e .`{hint}"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        sentence = f"{path.name} does not load with torch {torch.__version__}: {error}"
        warnings.warn(f"{sentence}. Slower kernels run in its place", RuntimeWarning, stacklevel=2)
        return sentence
    return None


@functools.cache
def architectures() -> tuple[str, ...]:
    """What the CUDA library holds code for, as CMake names it: "80-real" is machine code, "90" has PTX beside it."""
    name = ctypes.CDLL(str(HERE / "_C_cuda.so")).cs336_cuda_architectures
    name.restype = ctypes.c_char_p
    return tuple(name().decode().split(","))


def has_code_for(capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability can run what the CUDA library holds."""
    return any(runs_on(architecture, capability) for architecture in architectures())


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Machine code runs on its capability and on later ones of that generation, PTX on every later one.

    Code for "90a" runs on 9.0 alone, code for "100f" on its generation.
    """
    number, _, kind = architecture.partition("-")
    built = divmod(int(number.rstrip("af")), 10)
    if number.endswith("a"):
        return capability == built
    same_generation = capability[0] == built[0] and capability >= built
    return same_generation or (kind != "real" and not number.endswith("f") and capability >= built)
