"""The table of ops. Tests, benchmarks and the README tables iterate over it.

One op has one schema and up to three variants, each a torch.ops namespace:
    native  torch.ops.cs336.NAME         hand-written: CUDA for GPU tensors, C++ for CPU tensors
    triton  torch.ops.cs336_triton.NAME  also on CPU tensors when TRITON_INTERPRET=1
    ref     torch.ops.cs336_ref.NAME     plain torch, fp32 inside, any device: the definition of the op
The device of an op's first argument (a tensor, or a list of tensors) picks the kernel.
"""

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cs336 import _load

NAMESPACE = {"native": "cs336", "triton": "cs336_triton", "ref": "cs336_ref"}  # in order of preference
KEY = {"cpu": "CPU", "cuda": "CUDA", "meta": "Meta", "mps": "MPS", "xpu": "XPU"}  # device -> torch's dispatch key
TRITON_MISSING = None if importlib.util.find_spec("triton") else "triton is not installed: pip install 'cs336[cuda]'"
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

Supports = Callable[..., str | None]  # the op's arguments -> why they are refused, or None


@dataclass(frozen=True)
class Op:
    schema: str
    overloads: dict[str, Callable]  # variant -> torch op
    devices: dict[str, frozenset[str]]  # variant -> devices it has a kernel for
    supports: dict[str, Supports]  # variant -> its checker; absent: takes all that the op takes
    ranked: dict[str, list[tuple[Callable, Supports | None]]]  # device -> overloads that have a kernel, best first


OPS: dict[str, Op] = {}
_forced: str | None = None


def define(
    schema: str,
    *,
    fake: Callable,
    ref: Callable,
    triton: str | None = None,
    check: Callable[..., None] | None = None,
    supports: dict[str, Supports] | None = None,
) -> None:
    """Register one op under every namespace.

    Args:
        schema: torch schema, e.g. "rms_norm_fwd(Tensor x, Tensor w, float eps) -> (Tensor, Tensor)".
        fake: shapes and dtypes of the outputs, for torch.compile.
        ref: the definition, in plain torch.
        triton: "STEM.FUNCTION" under cs336/ops/triton, imported at the first call (triton is slow to import).
        check: raises for arguments that no variant takes; runs before all of the above.
        supports: per variant, a checker that returns why it refuses arguments that others take, or None.

    Native kernels register themselves when their library loads, and check for themselves.
    """
    name, signature = schema[: schema.index("(")], schema[schema.index("(") :]
    supports = supports or {}
    overloads: dict[str, Callable] = {}
    devices: dict[str, frozenset[str]] = {}
    for variant, namespace in NAMESPACE.items():
        qualname = f"{namespace}::{name}"
        torch.library.define(qualname, signature, tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(qualname, _checked(check, fake))
        if variant == "ref":
            torch.library.impl(qualname, "CompositeExplicitAutograd")(_checked(check, ref))
        elif variant == "triton" and triton is not None and TRITON_MISSING is None:
            for key in ("CUDA", "CPU") if INTERPRET else ("CUDA",):
                torch.library.impl(qualname, key)(_checked(check, _at_first_call(triton)))
        has_kernel = torch._C._dispatch_has_computed_kernel_for_dispatch_key
        devices[variant] = frozenset(d for d, key in KEY.items() if has_kernel(qualname, key))
        overloads[variant] = getattr(getattr(torch.ops, namespace), name).default
    ranked = {d: [(overloads[v], supports.get(v)) for v in NAMESPACE if d in devices[v]] for d in KEY}
    OPS[name] = Op(schema, overloads, devices, supports, ranked)


def _checked(check: Callable[..., None] | None, implementation: Callable) -> Callable:
    if check is None:
        return implementation

    def run(*args):
        check(*args)
        return implementation(*args)

    return run


def _at_first_call(path: str) -> Callable:
    stem, function = path.split(".")

    def run(*args):
        return getattr(importlib.import_module(f"cs336.ops.triton.{stem}"), function)(*args)

    return run


def _device(args: tuple) -> str:
    first = args[0]
    return (first if isinstance(first, torch.Tensor) else first[0]).device.type


def why_not(name: str, variant: str, *args: Any) -> str | None:
    """Why `variant` cannot run these arguments, as a sentence, or None if it can."""
    op, device = OPS[name], _device(args)
    if device not in op.devices[variant]:
        reason = f"{name} has no {variant} kernel for {device} tensors"
        if variant == "native":
            missing = {"cpu": _load.CPU_MISSING, "cuda": _load.CUDA_MISSING}.get(device)
        elif variant == "triton" and device == "cpu" and TRITON_MISSING is None:
            missing = "set TRITON_INTERPRET=1 to interpret it"
        else:
            missing = TRITON_MISSING
        return f"{reason} ({missing})" if missing else reason
    return op.supports[variant](*args) if variant in op.supports else None


def call(name: str, *args: Any) -> Any:
    """Run the forced variant, or the first that accepts the arguments. A forced variant never falls back.

    Raises NotImplementedError that says, variant by variant, why none can run.
    """
    if _forced is not None:
        if reason := why_not(name, _forced, *args):
            raise NotImplementedError(reason)
        return OPS[name].overloads[_forced](*args)
    for overload, supports in OPS[name].ranked.get(_device(args), ()):
        if supports is None or supports(*args) is None:
            return overload(*args)
    raise NotImplementedError("; ".join(f"{v}: {why_not(name, v, *args)}" for v in NAMESPACE))


@contextlib.contextmanager
def use(variant: str | None) -> Iterator[None]:
    """Force one variant ("native", "triton" or "ref") inside the block; None lifts a force."""
    global _forced
    before, _forced = _forced, _valid(variant)
    try:
        yield
    finally:
        _forced = before


def forced() -> str | None:
    """The variant in force, for ops that have no kernels of their own yet and only know "ref" from torch's."""
    return _forced


def _valid(variant: str | None) -> str | None:
    if variant is not None and variant not in NAMESPACE:
        raise ValueError(f"unknown variant {variant!r}: expected one of {', '.join(NAMESPACE)} (see CS336_VARIANT)")
    return variant


_forced = _valid(os.environ.get("CS336_VARIANT") or None)


def deterministic(on: bool = True) -> None:
    """Ask torch for its deterministic algorithms in the whole process; ours have no other.

    Our kernels add in a fixed order. On a GPU torch's gradients of embeddings and attention do so only when asked.
    """
    # Without this, cuBLAS refuses: the value is torch's own default on Hopper.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(on)


@contextlib.contextmanager
def determinism(on: bool) -> Iterator[None]:
    """`deterministic(on)` inside the block."""
    before = torch.are_deterministic_algorithms_enabled()
    deterministic(on)
    try:
        yield
    finally:
        deterministic(before)
