"""Mixers at one model's shape: tokens a second of training and of decoding, and memory, with short texts and long.

Training is the forward, loss and backward under autocast to bfloat16, each layer compiled or not; decoding is a step of
all rows behind a prompt of T tokens, replayed as a CUDA graph: in pages, as the engine does it, where a mixer has them,
else with the state that generate keeps. The recurrences themselves stand beside fla's kernels (pip install fla-core)
where these are installed. On a GPU each model and each recurrence is a process's: they compile side by side and take
turns to be timed.

    python -m benchmarks.run mixers [NAME ...] [--size 350M] [--tokens 16384] [--compile] [--out FILE]
"""

import contextlib
import importlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from cs336 import ops
from cs336.models import BlockConfig, DecodingState, PagedState, Transformer, TransformerConfig
from cs336.nn import (
    AttentionConfig,
    HyenaConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    Mamba2Config,
    PagedKeyValues,
    PagedTokens,
)
from cs336.ops import registry

SIZES = {"tiny": (64, 2, 64), "350M": (50304, 24, 1024)}  # vocabulary, layers, d_model
LENGTHS = {"tiny": (32, 64), "350M": (2048, 16384)}
STEPS = 3  # of training, timed one by one behind one that is not
PAGE = 64  # tokens
ROOM = 10 << 30  # bytes of a GPU for a process that waits for its turn
TURN: contextlib.AbstractContextManager = contextlib.nullcontext()  # a process's, to be the only one that is timed
FOUND: Any = None  # the queue of a process's rows
PLAIN = ("plain linear_attention", "plain delta_rule")  # that nothing fades of
RECURRENCES = ("linear_attention", "ssd", "gated_delta_rule", *PLAIN)


def mixers(d_model: int, T: int) -> dict[str, Any]:
    """Each with the heads that its paper has at about this width."""
    heads = max(1, d_model // 128)
    return {
        "attention": AttentionConfig(2 * heads),
        "grouped": AttentionConfig(2 * heads, max(1, heads // 2)),
        "window": AttentionConfig(2 * heads, window=min(1024, T // 2)),
        "latent": LatentAttentionConfig(2 * heads, d_model // 4, 64, 32),
        "retention": LinearAttentionConfig(heads, decay="head"),
        "gated linear": LinearAttentionConfig(heads),
        "gated delta": LinearAttentionConfig(heads, delta=True),
        "mamba2": Mamba2Config(min(128, d_model), min(64, d_model)),
        "hyena": HyenaConfig(T),
    }


def config(name: str, size: str, T: int) -> TransformerConfig:
    vocab_size, num_layers, d_model = SIZES[size]
    layers = (BlockConfig(mixers(d_model, T)[name]),)
    return TransformerConfig(vocab_size, T + 256, num_layers, d_model, layers=layers, tie_embeddings=True)


def measure(name: str, size: str, T: int, tokens: int, *, compile: bool = False) -> dict[str, Any]:
    """One row: training on `tokens` tokens a step in texts of T, then decoding as many rows, in this process's turn."""
    device, B, whole = harness.default_device(), max(1, tokens // T), config(name, size, T)
    x_BT = torch.randint(whole.vocab_size, (B, T), device=device)
    row = {"op": "mixer", "variant": name, "model": size, "shape": [B, T], "compiled": compile}
    row["parameters"] = whole.num_parameters()
    dtype, one = torch.bfloat16 if device.type == "cuda" else torch.float32, replace(whole, num_layers=1)
    _train(_model(one, device, compile), x_BT, 0)  # compiles what all layers share
    _decode(Transformer(one, device=device, dtype=dtype), B, T)
    torch.cuda.empty_cache()  # what a process keeps, the one whose turn it is lacks
    with TURN:
        row |= _train(_model(whole, device, compile), x_BT, STEPS)
        row |= _decode(Transformer(whole, device=device, dtype=dtype), B, T)
        torch.cuda.empty_cache()
    return row


def _model(config: TransformerConfig, device: torch.device, compile: bool) -> Transformer:
    model = Transformer(config, device=device)
    for layer in model.layers if compile else ():
        layer.compile()
    return model


def _train(model: Transformer, x_BT: Tensor, steps: int) -> dict[str, Any]:
    """Of `steps` steps behind one that is not timed; nothing of 0."""
    device, seconds = x_BT.device, []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(steps + 1):
        harness.synchronize(device)
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = ops.cross_entropy(model(x_BT), x_BT)
        loss.backward()
        harness.synchronize(device)
        seconds.append(time.perf_counter() - start)
    if not steps:
        return {}
    timing = harness.summary(seconds[1:], 1, "perf_counter")
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    speed = round(x_BT.numel() / timing.seconds, 1)
    return {"train_tokens_per_second": speed, "spread": round(timing.spread, 4), "train_bytes": peak}


@torch.no_grad()
def _decode(model: Transformer, B: int, T: int) -> dict[str, Any]:
    model.join_weights()  # as the engine does
    state, step = (_paged_step if model.new_pages(1, PAGE).is_paged else _step)(model, B, T)
    timing = harness.measure([step], model.device)
    return {"state_bytes": state.nbytes // B, "decode_tokens_per_second": round(B / timing.seconds, 1)}


def _step(model: Transformer, B: int, T: int) -> tuple[DecodingState, Callable[[], tuple]]:
    state = model.new_state(B, T + 256)
    for first in range(0, T, 4096):
        model.features(
            torch.randint(model.config.vocab_size, (B, min(4096, T - first)), device=model.device), state=state
        )
    token_B1 = torch.zeros(B, 1, dtype=torch.int64, device=model.device)

    def step() -> tuple:
        state.lengths.fill_(T)  # each at the same length, whatever their number
        return (model(token_B1, state=state),)

    return state, step


def _paged_step(model: Transformer, B: int, T: int) -> tuple[PagedState, Callable[[], tuple]]:
    """Behind keys and values that are random: what they are does not change how long they take."""
    each = -(-(T + 256) // PAGE)
    state, ints = model.new_pages(B * each, PAGE), {"dtype": torch.int32, "device": model.device}
    for layer in state.layers:
        assert isinstance(layer, PagedKeyValues)
        layer.keys.normal_()
        layer.values.normal_()
    table_BM = torch.randperm(B * each, device=model.device).view(B, each).to(torch.int32)
    row_B, lengths_B = torch.arange(B, **ints), torch.full((B,), T + 1, **ints)  # type: ignore[call-overload]
    state.tokens = PagedTokens(table_BM, lengths_B, row_B, lengths_B - 1, B, row_B)
    token_1B = torch.zeros(1, B, dtype=torch.int64, device=model.device)
    return state, lambda: (model.logits(model.features(token_1B, state=state)),)


def recurrences(op: str, size: str, tokens: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Forward, and forward with backward, of the op alone, replayed as CUDA graphs; the ops are RECURRENCES' names."""
    d_model = SIZES[size][2]
    D = min(128, d_model)
    H = d_model // D
    G, H, K, V = (1, 2 * d_model // min(64, d_model), D, min(64, d_model)) if op == "ssd" else (H, H, D, D)
    for T in LENGTHS[size]:
        B = max(1, tokens // T)
        drawn = _draw(B, G, H, T, K, V, device)
        for variant, call in _contenders(op).items():
            row = {"op": op, "variant": variant, "shape": [B, G, H, T, K, V], "dtype": "bf16"}
            try:
                for pass_, backward in (("fwd", False), ("fwd+bwd", True)):
                    bound = _bind(call, drawn, backward)
                    bound()  # compiles
                    with TURN:
                        timing = harness.measure([bound], device)
                    yield row | {"pass": pass_, "seconds": timing.seconds, "spread": round(timing.spread, 4)}
            except (RuntimeError, ImportError, TypeError) as error:  # of a peer whose version is another
                yield row | {"failed": str(error).partition("\n")[0][:200]}


def _draw(B: int, G: int, H: int, T: int, K: int, V: int, device: torch.device) -> dict[str, Tensor]:
    """Stored by token (B, T, heads, features), as layers make them."""
    normal = {"q": (B, T, G, K), "k": (B, T, G, K), "v": (B, T, H, V)}
    drawn = {name: torch.randn(shape, device=device, dtype=torch.bfloat16) for name, shape in normal.items()}
    drawn["k"] = torch.nn.functional.normalize(drawn["k"], dim=-1)
    drawn["g"] = torch.nn.functional.logsigmoid(torch.randn(B, T, H, device=device) + 4)
    drawn["beta"] = torch.rand(B, T, H, device=device)
    return {name: x.requires_grad_() for name, x in drawn.items()}


def _contenders(op: str) -> dict[str, Callable[..., Tensor]]:
    """(q, k, v, g, beta) stored by token -> o."""

    def ours(q, k, v, g, beta):
        q, k, v, g, beta = (x.transpose(1, 2) for x in (q, k, v, g, beta))
        g = None if op in PLAIN else g
        return ops.gated_delta_rule(q, k, v, beta, g) if "delta" in op else ops.linear_attention(q, k, v, g)

    found: dict[str, Callable[..., Tensor]] = {"cs336": ours}
    try:
        fla = importlib.import_module("fla.ops")
    except ImportError:
        return found
    found["fla"] = {
        "linear_attention": lambda q, k, v, g, beta: fla.chunk_simple_gla(q, k, v, g)[0],
        "plain linear_attention": lambda q, k, v, g, beta: fla.chunk_simple_gla(q, k, v)[0],
        # which has no heads that share keys
        "ssd": lambda q, k, v, g, beta: fla.chunk_simple_gla(*_repeated(q, k, v), v, g)[0],
        "gated_delta_rule": lambda q, k, v, g, beta: fla.chunk_gated_delta_rule(q, k, v, g, beta.to(q.dtype))[0],
        "plain delta_rule": lambda q, k, v, g, beta: fla.chunk_delta_rule(q, k, v, beta.to(q.dtype))[0],
    }[op]
    return found


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    times = v.shape[2] // q.shape[2]
    return q.repeat_interleave(times, 2), k.repeat_interleave(times, 2)


def _bind(call: Callable[..., Tensor], drawn: dict[str, Tensor], backward: bool) -> Callable[[], tuple]:
    def forward() -> tuple:
        with torch.no_grad():
            return (call(**drawn),)

    def both() -> tuple:
        o = call(**drawn)
        return torch.autograd.grad(o, list(drawn.values()), o.detach(), allow_unused=True)

    return both if backward else forward


def rows(names: list[str], size: str, tokens: int, *, compile: bool) -> Iterator[dict[str, Any]]:
    """Everything, each row as soon as it is there. Raises ValueError for names of neither."""
    device = harness.default_device()
    known = (*mixers(SIZES[size][2], LENGTHS[size][0]), *RECURRENCES)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no mixer and no recurrence {', '.join(unknown)}: expected some of {', '.join(known)}")
    cases = [(name, size, tokens, compile) for name in names or known]
    workers = min(len(cases), _workers(device))
    if workers == 1:
        for case in cases:
            yield from _of_case(*case)
        return
    spawn = multiprocessing.get_context("spawn")
    found = spawn.SimpleQueue()  # which holds a row before its process goes on
    with ProcessPoolExecutor(workers, spawn, _start, (spawn.Lock(), found), max_tasks_per_child=1) as pool:
        running = {pool.submit(_send_rows, *case) for case in cases}
        while running:
            done, running = wait(running, timeout=0.1, return_when=FIRST_COMPLETED)
            while not found.empty():
                yield found.get()
            for future in done:
                future.result()


def _workers(device: torch.device) -> int:
    """Models that compile side by side."""
    if device.type != "cuda":
        return 1
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(1, min(os.cpu_count() or 1, memory // ROOM))


def _start(turn: contextlib.AbstractContextManager, found: Any) -> None:
    global TURN, FOUND
    TURN, FOUND = turn, found


def _send_rows(*case: Any) -> None:
    for row in _of_case(*case):
        FOUND.put(row)


def _of_case(name: str, size: str, tokens: int, compile: bool) -> Iterator[dict[str, Any]]:
    """A recurrence's rows, or a mixer's two."""
    if name in RECURRENCES:
        yield from recurrences(name, size, tokens, harness.default_device())
        return
    for T in LENGTHS[size]:
        try:
            yield measure(name, size, T, tokens, compile=compile)
        except RuntimeError as error:  # such as a text too long for the memory: the others go on
            yield {"op": "mixer", "variant": name, "shape": [tokens // T, T], "failed": str(error)[:200]}


def line(row: dict[str, Any]) -> str:
    shape = "x".join(map(str, row["shape"]))
    if "failed" in row:
        return f"{row['op']:22} {row['variant']:14} {shape:24} failed: {row['failed']}"
    if row["op"] != "mixer":
        return f"{row['op']:22} {row['variant']:14} {shape:24} {row['pass']:8} {row['seconds'] * 1e6:10.1f} us"
    memory = "" if row["train_bytes"] is None else f"{row['train_bytes'] / 2**30:7.1f} GiB"
    return (
        f"{row['op']:22} {row['variant']:14} {shape:24} {row['train_tokens_per_second']:12.0f} tokens/s {memory} "
        f"state {row['state_bytes'] / 2**20:8.2f} MiB  decode {row['decode_tokens_per_second']:10.0f} tokens/s"
    )


def bench_mixers(benchmark):
    def all_of_them():
        with registry.use(None):
            return list(rows([], "tiny", 64, compile=False))

    made = benchmark.pedantic(all_of_them)
    assert not [row for row in made if "failed" in row]
