"""Which variants serve which dtype on which device: docs/support.md, from what the registry says of itself.

python -m benchmarks.support    # rewrites it

It describes a whole build, wherever it is made: all libraries, for the architectures of CMakeLists.txt, and Triton.
"""

import contextlib
import itertools
import pathlib
import re
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode

import cs336.ops  # noqa: F401  (registers them)
from cs336 import _load
from cs336.ops import registry

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "support.md"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DEVICES = {"CPU": None, "7.5 (T4)": (7, 5), "8.0 (A100)": (8, 0), "9.0 (H100, H200)": (9, 0), "10.0 (B200)": (10, 0)}
HEADER = """# Support

Which variants of an op serve which dtype, by the compute capability of a GPU, the first that is tried first. Made by
`python -m benchmarks.support` from what `registry.why_not` says; `tests/test_support.py` keeps it current. On a CPU
Triton is interpreted where `TRITON_INTERPRET=1` asks for it. Ops without kernels of their own run torch's everywhere.
"""

Arguments = Callable[[torch.dtype, str], tuple]


def _norm(*kinds: str) -> Arguments:
    """Arguments of a norm's raw op: "rows" (4, 64), "features" (64,), "stats" (4,), or a number."""
    shapes = {"rows": (4, 64), "features": (64,), "stats": (4,)}

    def arguments(dtype: torch.dtype, device: str) -> tuple:
        return tuple(torch.empty(shapes[k], dtype=dtype, device=device) if k in shapes else 1e-5 for k in kinds)

    return arguments


def _adamw(dtype: torch.dtype, device: str) -> tuple:
    moments = torch.promote_types(dtype, torch.float32)
    lists = [[torch.empty(4, dtype=d, device=device)] for d in (dtype, dtype, moments, moments, torch.float32)]
    return *lists, torch.empty((), device=device), None, 0.9, 0.95, 1e-8, 0.1


# Of ops whose variants look at the dtype; the others are asked about devices alone.
SAMPLES: dict[str, Arguments] = {
    "rms_norm_fwd": _norm("rows", "features", "eps"),
    "rms_norm_residual_fwd": _norm("rows", "rows", "features", "eps"),
    "rms_norm_bwd": _norm("rows", "rows", "rows", "features", "stats"),
    "layer_norm_fwd": _norm("rows", "features", "features", "eps"),
    "layer_norm_residual_fwd": _norm("rows", "rows", "features", "features", "eps"),
    "layer_norm_bwd": _norm("rows", "rows", "rows", "features", "stats", "stats"),
    "adamw_": _adamw,
}


def page() -> str:
    lines = [HEADER, f"| op | dtypes | {' | '.join(DEVICES)} |", f"| --- | --- {'| --- ' * len(DEVICES)}|"]
    for name in defined():
        served = {dtype: tuple(_variants(name, dtype, device) for device in DEVICES) for dtype in DTYPES}
        for variants, group in itertools.groupby(DTYPES if name in SAMPLES else DTYPES[:1], served.__getitem__):
            dtypes = ", ".join(str(d).removeprefix("torch.") for d in group) if name in SAMPLES else "all it takes"
            lines.append(f"| `{name}` | {dtypes} | {' | '.join(variants)} |")
    return "\n".join(lines) + "\n"


def defined() -> list[str]:
    """The ops of this package: tests define some of their own."""
    sources = "".join(path.read_text() for path in (ROOT / "cs336" / "ops").glob("*.py"))
    return sorted(name for name in registry.OPS if f'"{name}(' in sources)


def _variants(name: str, dtype: torch.dtype, device: str) -> str:
    with whole_build(DEVICES[device]), FakeTensorMode():
        kind = "cpu" if DEVICES[device] is None else "cuda"
        if name not in SAMPLES:
            return ", ".join(registry.kernels(name, torch.device(kind, 0)))
        arguments = SAMPLES[name](dtype, kind)
        return ", ".join(v for v in registry.NAMESPACE if registry.why_not(name, v, *arguments) is None)


@contextlib.contextmanager
def whole_build(capability: registry.Capability | None) -> Iterator[None]:
    """The registry as on a machine with such a GPU, where everything is built and installed."""
    with contextlib.ExitStack() as stack:
        for op in registry.OPS.values():
            stack.enter_context(mock.patch.dict(op.order, clear=True))
        for where, name, value in (
            (registry, "capability", lambda device: capability),
            (registry, "has_kernel", _is_written),
            (registry, "_forced", None),
            (_load, "missing", lambda kind: None),
            (_load, "architectures", _default_architectures),
        ):
            stack.enter_context(mock.patch.object(where, name, value))
        yield


def _default_architectures() -> tuple[str, ...]:
    found = re.search(r"set\(CMAKE_CUDA_ARCHITECTURES ([^)]+)\)", (ROOT / "CMakeLists.txt").read_text())
    assert found is not None
    return tuple(found[1].split())


def _is_written(name: str, variant: str, kind: str) -> bool:
    """Whether the sources have a kernel, compiled here or not."""
    if variant == "native":
        return name in _registered(kind)
    return variant == "ref" or (kind == "cuda" and registry.OPS[name].has_triton)


def _registered(kind: str) -> set[str]:
    """The ops that the bindings of that type of device implement, themselves or in a header that they share."""
    found: set[str] = set()
    for path in (ROOT / "csrc" / "ops").rglob(f"*_{kind}.cpp"):
        text = path.read_text()
        for header in re.findall(r'#include "(ops/[^"]+)"', text):
            text += (ROOT / "csrc" / header).read_text()
        found |= set(re.findall(r'm\.impl\("(\w+)"', text))
    return found


if __name__ == "__main__":
    PAGE.write_text(page())
