"""Where a training step's time goes, op by op, and what share of the roof each reaches.

    python -m profiling.table 124M --batch 32 [--rows 20] [--optimizer muon]

One step, not compiled, each op timed on its own. The least that an op can take follows from what it must do: the bytes
of its inputs and outputs at the device's bandwidth, or its FLOPs at its peak, whichever is longer. The share of the
roof is that over its time; "to gain" is the difference, in milliseconds a step: read the table from there. On a CPU
inputs come from its caches, so that an op may be above the roof.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from cs336.utils.device import peak_bandwidth, peak_flops
from profiling.steps import Steps, add_options

WARM_UP = 2  # steps
FREE = {"detach", "alias", "lift_fresh", "_unsafe_view", "promote_types"}  # ops that move nothing


@dataclass
class Row:
    op: str
    calls: int = 0
    seconds: float = 0.0
    bytes: int = 0
    flops: int = 0
    least: float = 0.0
    """Seconds at the roof."""

    @property
    def share(self) -> float:
        """Of the roof, 0 to 1."""
        return self.least / self.seconds if self.seconds else 0.0


class OpTimer(TorchDispatchMode):
    """Within the block, every op that moves memory is timed alone and added to its row."""

    def __init__(self, device: torch.device, bandwidth: float, flops: Callable[[torch.dtype], float | None]):
        super().__init__()
        self.device, self.bandwidth, self.peak = device, bandwidth, flops
        self.rows: dict[str, Row] = defaultdict(lambda: Row(""))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(function).removesuffix(".default").removeprefix("aten.")
        if function.is_view or name.partition(".")[0] in FREE:
            return function(*args, **kwargs)
        out, seconds = self._timed(function, args, kwargs)
        row = self.rows[name]
        row.op, row.calls, row.seconds = name, row.calls + 1, row.seconds + seconds
        tensors = list(_tensors((args, kwargs)))
        moved = sum(t.nbytes for t in [*tensors, *_tensors(out)])
        work = _flops(function, args, kwargs, out)
        peak = self.peak(tensors[0].dtype) if tensors and work else None
        row.bytes, row.flops = row.bytes + moved, row.flops + work
        row.least += max(moved / self.bandwidth, work / peak if peak else 0.0)
        return out

    def _timed(self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> tuple[Any, float]:
        if self.device.type != "cuda":
            start = time.perf_counter()
            out = function(*args, **kwargs)
            return out, time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        out = function(*args, **kwargs)
        last.record()
        last.synchronize()
        return out, first.elapsed_time(last) / 1e3


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Those of a nest of lists and dicts, each storage once."""
    seen = set()
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.data_ptr() not in seen:
            seen.add(leaf.data_ptr())
            yield leaf


def _flops(function: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> int:
    """Of products and attention; of others what counts is their bytes."""
    name = function._schema.name
    if "::attention" in name:  # ours: forward 2 products of S x T x D, backward 5; half of them under a causal mask
        backward = name.endswith("_bwd")
        q, k = args[2:4] if backward else args[:2]
        causal = any(a.name == "causal" and v for a, v in zip(function._schema.arguments, args, strict=False))
        keys = k.shape[-2] if q.dim() == 4 else k.shape[0]
        return (10 if backward else 4) * q.numel() * keys // (2 if causal else 1)
    count = flop_registry.get(function.overloadpacket)
    return count(*args, **kwargs, out_val=out) if count else 0


def lines(rows: list[Row], most: int) -> Iterator[str]:
    total = sum(row.seconds for row in rows)
    yield f"{'op':44} {'calls':>5} {'ms':>9} {'of step':>8} {'of roof':>8} {'to gain':>9}"
    ordered = sorted(rows, key=lambda row: row.least - row.seconds)
    rest = ordered[most:]
    for row in ordered[:most]:
        yield _line(row, total)
    if rest:
        others = Row(f"{len(rest)} others", *(sum(getattr(r, n) for r in rest) for n in ("calls", "seconds")))
        others.least = sum(row.least for row in rest)
        yield _line(others, total)
    whole = Row("all", sum(row.calls for row in rows), total)
    whole.least = sum(row.least for row in rows)
    yield _line(whole, total)


def _line(row: Row, total: float) -> str:
    ms, gain = 1e3 * row.seconds, 1e3 * (row.seconds - row.least)
    return f"{row.op:44} {row.calls:5} {ms:9.3f} {row.seconds / total:8.1%} {row.share:8.1%} {gain:9.3f}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m profiling.table", description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--rows", type=int, default=20, help="of the table (%(default)s)")
    options = parser.parse_args(argv)
    steps = Steps.of(options, compile=False)
    device = steps.learner.device
    steps.make(WARM_UP)
    timer = OpTimer(device, peak_bandwidth(device) or 1e12, lambda dtype: peak_flops(device, dtype))
    with timer:
        steps.make(1)
    print("\n".join(lines(list(timer.rows.values()), options.rows)))


if __name__ == "__main__":
    main()
