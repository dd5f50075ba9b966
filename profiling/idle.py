"""How long a GPU waits within a trace that torch.profiler wrote."""

import json
import pathlib

WORK = {"kernel", "gpu_memcpy", "gpu_memset"}  # categories of a trace's events


def gpu_idle(trace: pathlib.Path) -> float | None:
    """The part of the time from the first kernel to the end of the last in which none ran, nor a copy; None without."""
    events = json.loads(trace.read_text())["traceEvents"]
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in WORK)
    if not spans:
        return None
    (start, end), idle = spans[0], 0.0
    for first, last in spans:
        idle += max(0.0, first - end)
        end = max(end, last)
    return idle / (end - start)
