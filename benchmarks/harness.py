"""How long one call takes, beside the roof and beside everyone else who can do the same.

On a GPU the calls are captured in a CUDA graph, so that host time stays out, over inputs that rotate through several
times the L2 cache, so that the cache stays out too. A sample is one replay between two events; samples follow each
other without a gap (the state of a training step: warm, sustained), and their median counts. Where capture fails the
calls run eagerly between the events, and `Timing.method` says so. On a CPU the clock is time.perf_counter, and only
ratios within one run mean anything. Data is random, never zeros: zeros switch fewer transistors and run faster.
"""

import functools
import itertools
import math
import random
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cs336.ops import registry

L2_MULTIPLE = 4  # inputs over L2: even if it evicts at random, a line survives one round with probability e^-4 = 2 %
MAX_CALLS = 2048  # in one graph: capture costs the host 10-50 us a call
SAMPLE = 1e-3  # seconds, at least: the gap between two graphs is a few us
WARM_UP, SAMPLING, MIN_SAMPLES = 5e-3, 15e-3, 7
DISAGREES = 2e-2  # relative error against ref from which a contender computes something else: 5x bf16's rounding

Call = Callable[[], tuple]  # returns the outputs that the pass promises, in one order for all contenders
Bind = Callable[..., Call]  # one set of inputs -> the call to time


@dataclass(frozen=True)
class Case:
    """One op, one pass, one shape, and everyone who can run it.

    `bytes` must be moved and `flops` done; one of them may stay 0. A contender that must move another number, because
    it keeps its state in another dtype, has it in `own_bytes`. `inputs(device)` draws one set of arguments of the raw
    op; all contenders bind the same sets. The contender "ref" says what is right, or `right` does.
    """

    op: str
    pass_: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs: Callable[[torch.device], tuple]
    contenders: dict[str, Bind]
    bytes: int = 0
    flops: int = 0
    own_bytes: dict[str, int] = field(default_factory=dict)
    graph: bool = True
    """Whether calls are captured: not where someone's waits for the device, which spoils torch's generator too."""
    right: Bind | None = None
    """Whose outputs are right, where "ref" would take longer than all timing."""

    def __str__(self) -> str:
        return f"{self.op} {self.pass_} {'x'.join(map(str, self.shape))} {dtype_name(self.dtype)}"


@dataclass(frozen=True)
class Timing:
    seconds: float  # of one call, median
    spread: float  # between the quartiles, over the median: a smaller difference is noise
    method: str  # "cuda graph", "cuda events" or "perf_counter"


@dataclass(frozen=True)
class Batch:
    """`calls` calls behind one function that does not wait for the device."""

    run: Callable[[], None]
    calls: int
    method: str
    held: list[Call] = field(default_factory=list)
    """Whose tensors a graph runs on: it knows their addresses alone, and freed ones may be unmapped before a replay."""


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- contenders ----


def variants(op: str, keep: tuple[int, ...]) -> dict[str, Bind]:
    """Our variants of one raw op; `keep` indexes the outputs that the pass promises."""

    def bind(variant: str, *args: Any) -> Call:
        if reason := registry.why_not(op, variant, *args):
            raise NotImplementedError(reason)
        overload = registry.OPS[op].overloads[variant]

        def call() -> tuple:
            outputs = overload(*args)
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            return tuple(outputs[i] for i in keep)

        return call

    return {variant: functools.partial(bind, variant) for variant in registry.NAMESPACE}


def eager(function: Callable[..., tuple]) -> Bind:
    return lambda *args: lambda: function(*args)


def compiled(function: Callable[..., tuple], mode: str | None = None) -> Bind:
    """torch.compile, once for each shape; it fails loudly instead of running eagerly after too many shapes."""

    def bind(*args: Any) -> Call:
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
        fast = torch.compile(function, dynamic=False, fullgraph=True, mode=mode)
        return lambda: fast(*args)

    return bind


def max_autotuned(function: Callable[..., tuple]) -> Bind:
    """torch.compile that tries every kernel it can think of; without graphs of its own, since the harness has some."""
    return compiled(function, "max-autotune-no-cudagraphs")


def behind_producer(bind: Bind) -> Bind:
    """The call behind the kernel that writes its first argument, as a model runs it: half of it is in the cache."""

    def bind_both(x: Tensor, *args: Any) -> Call:
        source, call = x.clone(), bind(x, *args)

        def produce_and_call() -> tuple:
            torch.mul(source, 1.0, out=x)
            return call()

        return produce_and_call

    return bind_both


def draw(case: Case, device: torch.device) -> list[tuple]:
    """Enough sets of inputs to overflow the L2 cache several times (one set on a CPU)."""
    first = case.inputs(device)
    if device.type != "cuda":
        return [first]
    size = sum(t.nbytes for t in first if isinstance(t, Tensor))
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return [first, *(case.inputs(device) for _ in range(math.ceil(L2_MULTIPLE * cache / size) - 1))]


def disagreement(outputs: tuple, expected: tuple) -> str | None:
    """A sentence if outputs are not what ref computes, by relative Frobenius error; NaN is never right."""
    if len(outputs) != len(expected):
        return f"returns {len(outputs)} outputs, ref {len(expected)}"
    for i, (out, ref) in enumerate(zip(outputs, expected, strict=True)):
        if out.shape != ref.shape:
            return f"output {i} has shape {tuple(out.shape)}, ref's {tuple(ref.shape)}"
        error = (torch.linalg.vector_norm(out - ref, dtype=torch.float32) / ref.float().norm()).item()
        if not error < DISAGREES:
            return f"output {i} disagrees with ref: relative error {error:.2g}"
    return None


# ---- timing ----


def measure(calls: list[Call], device: torch.device, graph: bool = True) -> Timing:
    """Time one call of `calls`, which do the same work on different inputs and are taken in turn."""
    return measure_in_turns({"": prepare(calls, device, graph)}, device)[""]


def measure_in_turns(batches: dict[str, Batch], device: torch.device) -> dict[str, Timing]:
    """Time the batches in MIN_SAMPLES turns, each time a few samples of every one behind one that does not count. In a
    new order each turn: at a GPU's power limit the clock is higher for a while behind what took less power.
    """
    counts = {
        name: max(1, math.ceil(SAMPLING / MIN_SAMPLES / warm_up(batch, device))) for name, batch in batches.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in batches}
    names, orders = list(batches), random.Random(0)
    for _ in range(MIN_SAMPLES):
        orders.shuffle(names)
        for name in names:
            batches[name].run()
            samples[name] += sample(batches[name], device, counts[name])
    return {name: summary(samples[name], batch.calls, batch.method) for name, batch in batches.items()}


def prepare(calls: list[Call], device: torch.device, graph: bool = True) -> Batch:
    """Whole rounds over `calls` that last SAMPLE seconds or longer, as far as MAX_CALLS allows."""
    calls[0]()  # compiles, loads and allocates outside the capture
    build = _loop if device.type != "cuda" else _graph if graph else _events
    batch = build(calls, 1)
    once = max(min(sample(batch, device, 3)), 1e-9)
    rounds = min(math.ceil(SAMPLE / once), max(1, MAX_CALLS // len(calls)))
    return batch if rounds == 1 else build(calls, rounds)


def _graph(calls: list[Call], rounds: int) -> Batch:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):
            _run(calls, rounds)
    except RuntimeError:  # the call synchronises, or uses another stream
        torch.cuda.synchronize()
        return _events(calls, rounds)
    return Batch(graph.replay, rounds * len(calls), "cuda graph", held=calls)


def _events(calls: list[Call], rounds: int) -> Batch:
    return Batch(functools.partial(_run, calls, rounds), rounds * len(calls), "cuda events")


def _loop(calls: list[Call], rounds: int) -> Batch:
    return Batch(functools.partial(_run, calls, rounds), rounds * len(calls), "perf_counter")


def _run(calls: list[Call], rounds: int) -> None:
    outputs: deque[tuple] = deque(maxlen=len(calls))  # so that outputs rotate through memory like inputs
    for _ in range(rounds):
        for call in calls:
            outputs.append(call())


def warm_up(batch: Batch, device: torch.device) -> float:
    """Run for WARM_UP seconds, at least once; seconds a run."""
    start, runs, elapsed = time.perf_counter(), 0, 0.0
    while elapsed < WARM_UP:
        batch.run()
        synchronize(device)
        runs, elapsed = runs + 1, time.perf_counter() - start
    return elapsed / runs


def sample(batch: Batch, device: torch.device, count: int) -> list[float]:
    """Seconds of each of `count` consecutive runs."""
    if device.type != "cuda":
        stamps = [time.perf_counter()]
        for _ in range(count):
            batch.run()
            stamps.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(stamps)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        batch.run()
        event.record()
    events[-1].synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_seconds(calls: dict[str, Callable[[], Any]], device: torch.device, blocks: int = 30) -> dict[str, Timing]:
    """Host time of one call of each, in alternating blocks: the device's work must be shorter than the call."""
    for call in calls.values():
        call()
    repeats = math.ceil(10 * SAMPLE / max(_host_time(call, 10) for call in calls.values()))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for block in range(-2, blocks):
        for name, call in calls.items():
            synchronize(device)
            seconds = _host_time(call, repeats)
            if block >= 0:
                times[name].append(seconds)
    return {name: summary(samples, repeats, "perf_counter") for name, samples in times.items()}


def _host_time(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - start


def summary(samples: list[float], calls: int, method: str) -> Timing:
    """Of samples of `calls` calls each."""
    times, quarter, median = sorted(samples), len(samples) // 4, statistics.median(samples)
    return Timing(median / calls, (times[-1 - quarter] - times[quarter]) / median, method)


# ---- roofs ----


@functools.cache
def copy_roof(device: torch.device) -> float:
    """Bytes a second, read plus written, of the device's own copy: 1 GiB on a GPU, 64 MiB on a CPU."""
    source = torch.randn((1 << 28) if device.type == "cuda" else (1 << 24), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: (target.copy_(source),), device)


@functools.cache
def matmul_roof(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP a second of torch's matrix product: 8192^3 on a GPU, 512^3 on a CPU."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _best(lambda: (a @ b,), device)


def _best(call: Call, device: torch.device) -> float:
    """Of three medians: the first may still see the clocks rise. In a graph a copy is slower: 2.7 TB/s to 4.3, H200."""
    return min(measure([call], device, graph=False).seconds for _ in range(3))


# ---- rows ----


def rows(case: Case, device: torch.device, only: set[str] | None = None, timed: bool = True) -> list[dict[str, Any]]:
    """One row a contender: its time, or why it has none ("skipped": not here; "failed": broken, or wrong)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # every graph has its own pool
    if timed and case.flops:
        matmul_roof(device, case.dtype)  # before anything is captured: it draws random numbers
    sets = draw(case, device) if timed else [case.inputs(device)]
    expected = (case.right or case.contenders["ref"])(*sets[0])()
    outcomes: dict[str, dict] = {}
    batches: dict[str, Batch] = {}
    for name, bind in case.contenders.items():
        if only is None or name in only:
            outcome = _prepared(bind, sets, expected, device, timed, case.graph)
            outcomes[name] = {}
            if isinstance(outcome, Batch):
                batches[name] = outcome
            else:
                outcomes[name] = outcome
    for name, timing in measure_in_turns(batches, device).items():
        outcomes[name] = result(case, timing, device, name)
    return [
        {"op": case.op, "pass": case.pass_, "variant": name, "shape": list(case.shape), "dtype": dtype_name(case.dtype)}
        | outcome
        for name, outcome in outcomes.items()
    ]


def _prepared(
    bind: Bind, sets: list[tuple], expected: tuple, device: torch.device, timed: bool, graph: bool
) -> Batch | dict:
    """What to time, or a row's end that says why there is nothing."""
    try:
        calls = [bind(*inputs) for inputs in sets]
        if reason := disagreement(calls[0](), expected):
            return {"failed": reason}
        return prepare(calls, device, graph) if timed else {}
    except (ImportError, NotImplementedError) as refusal:
        return {"skipped": _one_line(refusal)}
    except Exception as error:  # a peer breaks in any way it likes; the row says how, and the sweep goes on
        return {"failed": f"{type(error).__name__}: {_one_line(error)}"}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def result(case: Case, timing: Timing, device: torch.device, contender: str = "native") -> dict[str, Any]:
    """The roof that counts is the one that the case is nearer to."""
    moved = case.own_bytes.get(contender, case.bytes)
    row = {"seconds": timing.seconds, "spread": round(timing.spread, 4), "method": timing.method}
    shares = []
    if moved:
        rate = moved / timing.seconds
        shares.append(rate / copy_roof(device))
        row |= {"bytes": moved, "gbps": round(rate / 1e9, 1)}
    if case.flops:
        rate = case.flops / timing.seconds
        shares.append(rate / matmul_roof(device, case.dtype))
        row |= {"flops": case.flops, "tflops": round(rate / 1e12, 2)}
    return row | {"percent_of_roof": round(100 * max(shares), 1)}


# ---- pytest-benchmark ----


def bench(benchmark: Any, case: Case) -> None:
    """Body of every bench_*: check everyone against ref, time the best of ours, set the others beside it.

    With --benchmark-disable each contender runs once and nothing is timed.
    """
    device = default_device()
    benchmark.group = str(case)
    table = {row["variant"]: row for row in rows(case, device, timed=not benchmark.disabled)}
    broken = {v: table[v]["failed"] for v in registry.NAMESPACE if "failed" in table[v]}
    assert not broken, f"{case}: {broken}"
    best = next(v for v in registry.NAMESPACE if "skipped" not in table[v])
    sets = [case.inputs(device)] if benchmark.disabled else draw(case, device)
    calls = [case.contenders[best](*inputs) for inputs in sets]
    if benchmark.disabled:
        benchmark.pedantic(calls[0])
        return
    batch = prepare(calls, device, case.graph)

    def replay() -> None:
        batch.run()
        synchronize(device)

    benchmark.pedantic(replay, rounds=20, warmup_rounds=3)
    ours = table[best]
    benchmark.extra_info |= {k: ours[k] for k in ("variant", "gbps", "tflops", "percent_of_roof") if k in ours}
    benchmark.extra_info |= {"calls": batch.calls, "method": batch.method}
    for name, row in table.items():
        if name != best and "seconds" in row:
            benchmark.extra_info[f"{name}/ours"] = round(row["seconds"] / ours["seconds"], 2)


def bench_host(benchmark: Any, host: Callable[..., list[dict[str, Any]]]) -> None:
    """Body of bench_*_host: microseconds of a public call and of torch's; `host(device, blocks)` returns rows."""
    rows = benchmark.pedantic(host, args=(default_device(), 1 if benchmark.disabled else 30))
    if not benchmark.disabled:
        benchmark.extra_info |= {f"{r['pass']} {r['variant']} us": round(r["seconds"] * 1e6, 2) for r in rows}
