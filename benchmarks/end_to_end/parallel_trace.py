"""What torch.profiler saw of steps: how long NCCL's kernels ran, and how much of that beside no other kernel."""

import json
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Span = tuple[float, float]  # microseconds


def traced(step: Callable[[], Any], steps: int = 3) -> dict[str, Any]:
    """Of a step, in the mean: milliseconds of communication, of those that nothing hides, and from first to last."""
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kernels = [e for e in events if e.get("cat") == "kernel"]
    moving = [e for e in kernels if "nccl" in e["name"].lower()]
    found = overlap([_span(e) for e in moving], [_span(e) for e in kernels if e not in moving])
    streams = {e["args"]["stream"] for e in moving}
    shared = streams & {e["args"]["stream"] for e in kernels if "gemm" in e["name"].lower()}
    return {name: round(us / steps / 1e3, 3) for name, us in found.items()} | {"own_stream": not shared}


def _span(event: dict[str, Any]) -> Span:
    return event["ts"], event["ts"] + event["dur"]


def overlap(moving: list[Span], others: list[Span]) -> dict[str, float]:
    """Microseconds in which something moves, in which that is all there is, and from the first to the last."""
    moving, others = _merged(moving), _merged(others)
    hidden = sum(max(0.0, min(b, d) - max(a, c)) for a, b in moving for c, d in others if c < b and a < d)
    total = sum(b - a for a, b in moving)
    ends = [*moving, *others]
    span = max(b for _, b in ends) - min(a for a, _ in ends) if ends else 0.0
    return {"communication_ms": total, "exposed_ms": total - hidden, "span_ms": span}


def _merged(spans: list[Span]) -> list[Span]:
    found: list[Span] = []
    for a, b in sorted(spans):
        if found and a <= found[-1][1]:
            found[-1] = found[-1][0], max(b, found[-1][1])
        else:
            found.append((a, b))
    return found
