"""The table of ops. Tests, benchmarks and the generated tables iterate over it.

One op has one schema and up to three variants, each a torch.ops namespace:
    native  torch.ops.cs336.NAME         hand-written: CUDA for GPU tensors, C++ for CPU tensors
    triton  torch.ops.cs336_triton.NAME  also on CPU tensors when TRITON_INTERPRET=1
    ref     torch.ops.cs336_ref.NAME     plain torch, fp32 inside, any device: the definition of the op
The device of an op's first argument (a tensor, or a list of tensors) picks the kernel.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from cs336 import _load

NAMESPACE = {"native": "cs336", "triton": "cs336_triton", "ref": "cs336_ref"}  # in order of preference
KEY = {"cpu": "CPU", "cuda": "CUDA", "meta": "Meta", "mps": "MPS", "xpu": "XPU"}  # device -> torch's dispatch key
TRITON_MISSING = None if importlib.util.find_spec("triton") else "triton is not installed: pip install 'cs336[cuda]'"
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

Supports = Callable[..., str | None]  # the op's arguments -> why they are refused, or None
Capability = tuple[int, int]
Range = tuple[Capability, Capability]  # the least and the most, both included

ANY: Range = ((0, 0), (99, 9))
CAPABILITIES = {"triton": ((8, 0), ANY[1])}  # of a variant's kernels where an op does not say otherwise


@dataclass(frozen=True)
class Op:
    schema: str
    overloads: dict[str, Any]  # variant -> torch op
    supports: dict[str, Supports]  # variant -> its checker; absent: takes all that the op takes
    capabilities: dict[str, Range]  # variant -> the compute capabilities of CUDA devices that its kernel runs on
    prefer: Callable[..., str] | None  # the op's arguments -> the variant to try first on a CUDA device
    has_triton: bool
    mutates: tuple[tuple[int, str], ...]  # position and name of the arguments marked (a!) in the schema
    order: dict[torch.device, tuple[str, ...]] = field(default_factory=dict)  # what `kernels` found


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
    capabilities: dict[str, Range] | None = None,
    prefer: Callable[..., str] | None = None,
) -> None:
    """Register one op under every namespace.

    Args:
        schema: torch schema, e.g. "softcap_fwd(Tensor x, float cap=30.0, *, bool exact=False) -> Tensor". `(a!)` marks
            what the op writes to: `call` raises the version of those tensors, so that autograd notices.
        fake: shapes and dtypes of the outputs, for torch.compile.
        ref: the definition, in plain torch.
        triton: "STEM.FUNCTION" under cs336/ops/triton, imported at the first call (triton is slow to import).
        check: raises for arguments that no variant takes; runs before all of the above.
        supports: per variant, a checker that returns why it refuses arguments that others take, or None. Native kernels
            check for themselves: theirs only saves the attempt.
        capabilities: per variant, the CUDA compute capabilities that its kernel runs on, ((9, 0), (9, 0)) for one that
            uses wgmma. What the library was compiled for limits the native ones anyway, 8.0 and up the Triton ones.
        prefer: which variant to try first on a CUDA device, from the arguments: where one measures faster. It must
            not look at the number of rows, or a row's bits would depend on its neighbours.

    All of these functions get every argument, with the schema's defaults filled in: positional ones by position,
    keyword-only ones by name. Native kernels register themselves when their library loads, and check for themselves.
    """
    name, signature = schema[: schema.index("(")], schema[schema.index("(") :]
    overloads: dict[str, Any] = {}
    for variant, namespace in NAMESPACE.items():
        torch.library.define(f"{namespace}::{name}", signature, tags=torch.Tag.pt2_compliant_tag)
        overloads[variant] = getattr(getattr(torch.ops, namespace), name).default
    arguments = overloads["ref"]._schema.arguments
    complete = _completer(arguments)
    for variant, namespace in NAMESPACE.items():
        qualname = f"{namespace}::{name}"
        torch.library.register_fake(qualname, complete(check, _shortening_logs(fake)))
        if variant == "ref":
            torch.library.impl(qualname, "CompositeExplicitAutograd")(complete(check, ref))
        elif variant == "triton" and triton is not None and TRITON_MISSING is None:
            for key in ("CUDA", "CPU") if INTERPRET else ("CUDA",):
                kernel = _at_first_call(triton, (supports or {}).get("triton"))
                torch.library.impl(qualname, key)(complete(check, kernel))
    written = [(i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    OPS[name] = Op(
        schema,
        overloads,
        {v: complete(None, function) for v, function in (supports or {}).items()},
        CAPABILITIES | (capabilities or {}),
        None if prefer is None else complete(None, prefer),
        triton is not None,
        tuple(written),
    )


def _shortening_logs(fake: Callable) -> Callable:
    """Before torch 2.13 inductor words a log line for each op that it meets first, whoever listens, with all that was
    computed before it, each value as often as it is read: at the end of 12 layers that takes minutes. Its fake runs
    before that, and leaves the line the op's name."""
    if torch.torch_version.TorchVersion(torch.__version__) >= "2.13":
        return fake

    def run(*args, **kwargs):
        if inductor := sys.modules.get("torch._inductor.exc"):
            inductor.OperatorIssue.operator_str = staticmethod(lambda target, args, kwargs: str(target))
        return fake(*args, **kwargs)

    return run


def _completer(arguments: list) -> Callable[[Callable[..., None] | None, Callable], Callable]:
    """A decorator that fills in the schema's defaults, which torch drops, and runs a check first."""
    positional = [a for a in arguments if not a.kwarg_only]
    keywords = [a for a in arguments if a.kwarg_only]

    def complete(check: Callable[..., None] | None, function: Callable) -> Callable:
        def run(*args, **kwargs):
            if kwargs or len(args) < len(positional):
                args += tuple(kwargs.pop(a.name, a.default_value) for a in positional[len(args) :])
            if keywords:
                kwargs = {a.name: kwargs.get(a.name, a.default_value) for a in keywords}
            if check is not None:
                check(*args, **kwargs)
            return function(*args, **kwargs)

        bare = check is None and not keywords and not any(a.has_default_value() for a in positional)
        return function if bare else run

    return complete


def _at_first_call(path: str, supports: Supports | None) -> Callable:
    stem, function = path.split(".")

    def run(*args, **kwargs):
        if supports is not None and (reason := supports(*args, **kwargs)):
            raise NotImplementedError(reason)
        return getattr(importlib.import_module(f"cs336.ops.triton.{stem}"), function)(*args, **kwargs)

    return run


def _device(args: tuple) -> torch.device:
    first = args[0]
    return (first if isinstance(first, torch.Tensor) else first[0]).device


@functools.cache
def capability(device: torch.device) -> Capability | None:
    """The compute capability of a CUDA device, asked of the driver once; None for a fake tensor's, without a GPU."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a block of a CUDA device may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


def has_kernel(name: str, variant: str, kind: str) -> bool:
    """Whether a kernel for that type of device is registered."""
    registered = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    return kind in KEY and registered(f"{NAMESPACE[variant]}::{name}", KEY[kind])


def missing(name: str, variant: str, device: torch.device) -> str | None:
    """Why `variant` has no kernel for that device, whatever the arguments, as a sentence; None if it has one."""
    op, kind = OPS[name], device.type
    absent = _load.missing(kind) if variant == "native" and kind in _load.LIBRARIES else None
    if not has_kernel(name, variant, kind):
        reason = f"{name} has no {variant} kernel for {kind} tensors"
        if variant == "triton":
            absent = TRITON_MISSING
            if kind == "cpu" and absent is None:
                absent = "set TRITON_INTERPRET=1 to interpret it"
        return f"{reason} ({absent})" if absent else reason
    if kind != "cuda" or variant == "ref":
        return None
    here = capability(device)
    if here is None:
        return "torch sees no CUDA device"
    least, most = op.capabilities.get(variant, ANY)
    if not least <= here <= most:
        needed = _range(least, most)
        return f"{name}'s {variant} kernel needs compute capability {needed}, and {device} has {_dotted(here)}"
    if variant == "native" and not _load.has_code_for(here):
        return (
            f"_C_cuda.so holds code for {', '.join(_load.architectures())}, and {device} has compute capability "
            f"{_dotted(here)}: build it anew with CMAKE_CUDA_ARCHITECTURES={here[0]}{here[1]}"
        )
    return None


def _range(least: Capability, most: Capability) -> str:
    if least == most:
        return _dotted(least)
    return f"{_dotted(least)} or newer" if most == ANY[1] else f"{_dotted(least)} to {_dotted(most)}"


def _dotted(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"


def kernels(name: str, device: torch.device) -> tuple[str, ...]:
    """The variants that have a kernel for that device, best first."""
    order = OPS[name].order
    if device not in order:
        order[device] = tuple(v for v in NAMESPACE if missing(name, v, device) is None)
    return order[device]


kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler's decorator would import triton


def why_not(name: str, variant: str, *args: Any, **kwargs: Any) -> str | None:
    """Why `variant` cannot run these arguments, as a sentence, or None if it can."""
    device = _device(args)
    if variant not in kernels(name, device):
        return missing(name, variant, device)
    supports = OPS[name].supports.get(variant)
    return None if supports is None else supports(*args, **kwargs)


def call(name: str, *args: Any, **kwargs: Any) -> Any:
    """Run the forced variant, or the first that accepts the arguments. A forced variant never falls back.

    Raises NotImplementedError that says, variant by variant, why none can run.
    """
    op = OPS[name]
    if _forced is None:
        variant = _choose(name, op, args, kwargs)
    elif reason := why_not(name, _forced, *args, **kwargs):
        raise NotImplementedError(reason)
    else:
        variant = _forced
    result = op.overloads[variant](*args, **kwargs)
    if op.mutates and not torch.compiler.is_compiling():  # a compiler knows from the schema
        written = [args[i] if i < len(args) else kwargs.get(argument) for i, argument in op.mutates]
        for tensors in written:
            if tensors is not None:
                torch.autograd.graph.increment_version(tensors)
    return result


def _choose(name: str, op: Op, args: tuple, kwargs: dict[str, Any]) -> str:
    device = _device(args)
    variants = kernels(name, device)
    if op.prefer is not None and device.type == "cuda" and (first := op.prefer(*args, **kwargs)) in variants:
        variants = (first, *variants)
    for variant in variants:
        supports = op.supports.get(variant)
        if supports is None or supports(*args, **kwargs) is None:
            return variant
    raise NotImplementedError("; ".join(f"{v}: {why_not(name, v, *args, **kwargs)}" for v in NAMESPACE))


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
    """Ask for deterministic algorithms in the whole process, ours and torch's.

    Our norms and optimizers have no other: they add in a fixed order. On a GPU torch's gradients of embeddings and
    attention do so only when asked.
    """
    # Without this, cuBLAS refuses: the value is torch's own default on Hopper.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(on)


def is_deterministic() -> bool:
    """Whether determinism is asked for: what an op with a faster kernel that adds in any order must look at."""
    return torch.are_deterministic_algorithms_enabled()


@contextlib.contextmanager
def determinism(on: bool) -> Iterator[None]:
    """`deterministic(on)` inside the block."""
    before = torch.are_deterministic_algorithms_enabled()
    deterministic(on)
    try:
        yield
    finally:
        deterministic(before)


_invariant = False


def is_invariant() -> bool:
    """Whether each sequence shall have the bits that it has alone: what a layer with a faster, batch-dependent kernel
    must look at."""
    return _invariant


@contextlib.contextmanager
def invariant(on: bool = True) -> Iterator[None]:
    """In the block a model gives each sequence the same bits, whatever is computed beside it and however it is cut:
    linear layers, attention and log-probabilities add in an order that the batch does not change. See
    docs/inference.md. A backward that recomputes a forward belongs into the block too. For the whole process, as
    determinism is: threads that want different things disturb each other."""
    global _invariant
    before, _invariant = _invariant, on
    try:
        yield
    finally:
        _invariant = before
