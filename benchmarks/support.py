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
    moments = _wide(dtype)
    lists = [[torch.empty(4, dtype=d, device=device)] for d in (dtype, dtype, moments, moments, torch.float32)]
    return *lists, torch.empty((), device=device), None, 0.9, 0.95, 1e-8, 0.1


def _activation(*tensors: str) -> Arguments:
    def arguments(dtype: torch.dtype, device: str) -> tuple:
        return *(torch.empty(4, 64, dtype=dtype, device=device) for _ in tensors), 0

    return arguments


def _gated_bwd(dtype: torch.dtype, device: str) -> tuple:
    both, dy = (torch.empty(4, width, dtype=dtype, device=device) for width in (128, 64))
    return both, dy, 0


def _cross_entropy(kind: str) -> Arguments:
    """Arguments of the "fwd", "bwd" or "gradient_" of 4 rows of 64 logits."""

    def arguments(dtype: torch.dtype, device: str) -> tuple:
        logits, targets = torch.empty(4, 64, dtype=dtype, device=device), _ints(4, torch.int64, device)
        stat, scale = (torch.empty(n, dtype=_wide(dtype), device=device) for n in ((4,), ()))
        options = -100, None, 0.0, 0.0
        return {
            "fwd": (logits, targets, *options, False),
            "bwd": (logits, targets, stat, stat, stat, None, None, *options),
            "gradient_": (logits, targets, scale, *options),
        }[kind]

    return arguments


def _dropout(dtype: torch.dtype, device: str) -> tuple:
    return torch.empty(4, 64, dtype=dtype, device=device), None, _ints(1, torch.int64, device), 0.1


def _embedding(dtype: torch.dtype, device: str) -> tuple:
    return torch.empty(4, 64, dtype=dtype, device=device), _ints(4, torch.int64, device), 8


def _scale(dtype: torch.dtype, device: str) -> tuple:
    return torch.empty(64, dtype=dtype, device=device), None, torch.empty((), dtype=_wide(dtype), device=device)


def _linear(dtype: torch.dtype, device: str) -> tuple:
    x, weight = (torch.empty(n, 64, dtype=dtype, device=device) for n in (4, 32))
    return x, weight, None


def _linear_quantized(method: str) -> Arguments:
    kinds = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}

    def arguments(dtype: torch.dtype, device: str) -> tuple:
        x, scales = (torch.empty(*shape, dtype=dtype, device=device) for shape in ((4, 128), (32, 1)))
        weight = torch.empty(32, 64 if method == "int4" else 128, dtype=kinds[method], device=device)
        return x, weight, scales, None, 128

    return arguments


def _linear_attention_fwd(dtype: torch.dtype, device: str) -> tuple:
    q, k, v = (torch.empty(1, 2, 64, 16, dtype=dtype, device=device) for _ in range(3))
    return q, k, v, None, None, None, 0.25


def _linear_attention_bwd(dtype: torch.dtype, device: str) -> tuple:
    q, *rest = _linear_attention_fwd(dtype, device)
    return torch.empty_like(q), None, q, *rest


def _expert_swiglu(dtype: torch.dtype, device: str) -> tuple:
    x, gate, up = (torch.empty(shape, dtype=dtype, device=device) for shape in ((4, 64), (2, 32, 64), (2, 32, 64)))
    return x, _ints(8, torch.int64, device), _ints(2, torch.int64, device), gate, up


def _gated_delta_rule_fwd(dtype: torch.dtype, device: str) -> tuple:
    q, k, v, *rest = _linear_attention_fwd(dtype, device)
    return q, k, v, torch.empty(1, 2, 64, dtype=_wide(dtype), device=device), *rest


def _gated_delta_rule_bwd(dtype: torch.dtype, device: str) -> tuple:
    q, *rest = _gated_delta_rule_fwd(dtype, device)
    return torch.empty_like(q), None, q, *rest


def _paged(q_shape: tuple[int, ...]) -> Arguments:
    """Of decode (q: B, Q, H, D) or prefill (q: T, H, D), for 2 sequences over pages of 16 tokens."""

    def arguments(dtype: torch.dtype, device: str) -> tuple:
        q, *caches = (torch.empty(s, dtype=dtype, device=device) for s in (q_shape, (4, 16, 2, 64), (4, 16, 2, 64)))
        table, lens = _ints((2, 2), torch.int32, device), _ints(2, torch.int32, device)
        more = (_ints(3, torch.int32, device), 1) if len(q_shape) == 3 else ()
        return q, *caches, table, lens, *more, 0.125, -1, 0.0, None

    return arguments


def _sample(dtype: torch.dtype, device: str) -> tuple:
    logits = torch.empty(2, 64, dtype=dtype, device=device)
    temperature, top_p, min_p = (torch.empty(2, device=device) for _ in range(3))
    seeds, offsets = (_ints(2, torch.int64, device) for _ in range(2))
    return logits, temperature, _ints(2, torch.int32, device), top_p, min_p, seeds, offsets, *[None] * 5, 0


def _ints(shape: int | tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# Of ops whose variants look at the dtype; the others are asked about devices alone.
SAMPLES: dict[str, Arguments] = {
    "rms_norm_fwd": _norm("rows", "features", "eps"),
    "rms_norm_residual_fwd": _norm("rows", "rows", "features", "eps"),
    "rms_norm_bwd": _norm("rows", "rows", "rows", "features", "stats"),
    "layer_norm_fwd": _norm("rows", "features", "features", "eps"),
    "layer_norm_residual_fwd": _norm("rows", "rows", "features", "features", "eps"),
    "layer_norm_bwd": _norm("rows", "rows", "rows", "features", "stats", "stats"),
    "adamw_": _adamw,
    "activation_fwd": _activation("x", "up"),
    "activation_bwd": _activation("x", "up", "dy"),
    "gated_bwd": _gated_bwd,
    "cross_entropy_fwd": _cross_entropy("fwd"),
    "cross_entropy_bwd": _cross_entropy("bwd"),
    "cross_entropy_gradient_": _cross_entropy("gradient_"),
    "dropout_fwd": _dropout,
    "embedding_bwd": _embedding,
    "scale_": _scale,
    "fp8_copies": lambda dtype, device: (torch.empty(16, 32, dtype=dtype, device=device), False),
    "gram": lambda dtype, device: (torch.empty(2, 4, 64, dtype=dtype, device=device), None, 1.0, 1.0),
    "linear_invariant": _linear,
    "linear_few_rows": _linear,
    **{f"linear_{method}": _linear_quantized(method) for method in ("int8", "int4", "fp8")},
    "expert_swiglu": _expert_swiglu,
    "gated_delta_rule_fwd": _gated_delta_rule_fwd,
    "gated_delta_rule_bwd": _gated_delta_rule_bwd,
    "linear_attention_fwd": _linear_attention_fwd,
    "linear_attention_bwd": _linear_attention_bwd,
    "paged_attention": _paged((2, 1, 4, 64)),
    "paged_prefill": _paged((2, 4, 64)),
    "sample": _sample,
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
            (registry, "shared_memory", lambda device: 163 * 1024),  # what 8.0 has: 9.0 and 10.0 have more
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
