"""Whole models on N processes: what `cs336 bench parallel` measures beside single steps.

gpt      a GPT of 1.5B under the sharded step, in one pass a step and in four, beside one process by itself
plan     `cs336 train`'s step in every layout, beside what `cs336 plan parallel` says of it, and its losses
large    a step of an 8B model on 32,768 tokens a process under ZeRO-3, beside FSDP2's on the same model
engine   a model's answers, divided by its matrices, beside the whole model on one
"""

import dataclasses
import gc
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import harness
from benchmarks.end_to_end.bench_collectives import block, measure, slowest
from benchmarks.end_to_end.bench_train import MODELS
from cs336.inference import LLM, SamplingParams
from cs336.models import Transformer, TransformerConfig
from cs336.optim import AdamW
from cs336.parallel import FSDP, ParallelConfig, ShardedAdamW, nccl, tensor_parallel
from cs336.parallel.hardware import Gpu, Tier, find
from cs336.parallel.planner import Layout, Work, predict
from cs336.training import DataConfig, TrainConfig
from cs336.training.division import compile_layer
from cs336.training.learner import Learner

Step = Callable[[], Any]
Row = dict[str, Any]
GPT = {"full": ("1.5B", 8), "tiny": ("tiny", 2)}  # model, sequences of a pass
PASSES = (1, 4)
COUNTS = {"full": (2, 3), "tiny": (1, 1)}  # steps of a block, blocks
PLAN = {"full": ("1.5B", 16, 16), "tiny": ("tiny", 4, 2)}  # model, sequences of a process, of a pass
TINY = TransformerConfig(256, 64, 2, 64, 4, 2)
LARGE = {"full": TransformerConfig(151936, 32768, 36, 4096, 32, 8, d_ff=12288, qk_norm=True), "tiny": TINY}
ENGINE = {  # model, requests, tokens of a prompt and of an answer
    "full": (TransformerConfig(128256, 8192, 16, 4096, 32, 8, d_ff=14336), 64, 512, 128),
    "tiny": (TINY, 3, 9, 8),
}
LAYOUTS: dict[str, dict[str, Any]] = {  # N: as many as there are
    "data": {},
    "ZeRO-1": {"zero": 1},
    "native step": {"zero": 1, "native_step": True},
    "ZeRO-2": {"zero": 2},
    "ZeRO-3": {"zero": 3},
    "tensor": {"tensor": "N"},
    "ring": {"context": "N"},
    "pipeline": {"pipeline": "N"},
}


def forget() -> None:
    """Free what a contender held: modules and their hooks hold each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def timed(step: Step, device: torch.device, steps: int, blocks: int) -> tuple[float, int | None]:
    """Seconds of a step, and the most bytes that a process held."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    block(step, steps, device)  # makes what is made once
    samples = [block(step, steps, device) for _ in range(blocks)]
    peak = int(slowest(torch.cuda.max_memory_allocated(), device)) if device.type == "cuda" else None
    return harness.summary(samples, 1, "perf_counter").seconds, peak


def row(section: str, variant: str, shape: tuple, seconds: float, peak: int | None) -> Row:
    found: Row = {"op": f"parallel {section}", "variant": variant, "shape": list(shape), "seconds": seconds}
    return found | {"processes": dist.get_world_size(), "peak_bytes": peak}


def _tokens(config: TransformerConfig, rows: int, device: torch.device) -> list[torch.Tensor]:
    """Inputs and targets, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(config.vocab_size, (2, rows, config.context_length), generator=generator)
    return list(drawn.to(device))


# ---- 1.5B ----


def gpt(size: str, device: torch.device) -> Iterator[Row]:
    """First every process by itself, with an optimizer's whole state, then together; layers are compiled on a GPU."""
    name, sequences = GPT[size]
    config, N = MODELS[name], dist.get_world_size()
    ids, targets = _tokens(config, sequences, device)
    alone: dict[int, float] = {}
    for together in (False, True):
        torch.manual_seed(0)
        model = Transformer(config, device=device)
        optimizer: AdamW | ShardedAdamW = AdamW(model.parameters(), lr=1e-4)
        if together:
            native = nccl.missing(device) is None
            optimizer = ShardedAdamW.of(optimizer, native=native)
            optimizer.overlap(model)
        if device.type == "cuda":
            for layer in model.layers:
                compile_layer(layer)

        def pass_(model=model) -> None:
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(ids, targets=targets)
            (loss / targets.numel()).backward()

        for passes in PASSES:

            def step(optimizer=optimizer, passes=passes, pass_=pass_) -> None:
                if isinstance(optimizer, ShardedAdamW):
                    with optimizer.no_sync():
                        for _ in range(passes - 1):
                            pass_()
                    pass_()
                else:
                    for _ in range(passes):
                        pass_()
                optimizer.step()
                optimizer.zero_grad()

            seconds, peak = timed(step, device, *COUNTS[size])
            count = passes * targets.numel() * (N if together else 1)
            extra: Row = {"tokens_per_second": round(count / seconds, 1), "model": name, "passes": passes}
            if together:
                extra["of_linear"] = round(alone[passes] / seconds, 4)
            alone.setdefault(passes, seconds)
            variant = "cs336 ShardedAdamW" if together else "one process"
            yield row("gpt", f"{variant}, {passes} x {sequences} sequences", (sequences,), seconds, peak) | extra
        del model, optimizer, step, pass_
        forget()


# ---- every layout of a run, and its plan ----


def plan(size: str, device: torch.device) -> Iterator[Row]:
    name, rows, passes = PLAN[size]
    config, N, compiled = MODELS[name], dist.get_world_size(), device.type == "cuda"
    gpu = _measured(name, rows, passes, device, COUNTS[size])
    ids, targets = _tokens(config, rows * N, device)
    first: float | None = None
    for variant, table in LAYOUTS.items():
        parallel = ParallelConfig(**{key: N if value == "N" else value for key, value in table.items()})
        try:
            learner = Learner(_config(name, rows * N, passes, device, parallel))
        except ValueError as error:  # a model's heads may not divide by N
            if dist.get_rank() == 0:
                print(f"{variant} is left out: {error}", flush=True)
            continue
        place, parts = learner.division.row_place
        batch = (ids.chunk(parts)[place], targets.chunk(parts)[place])
        losses = [learner.update(batch, 1e-3)["loss"].item() for _ in range(3)]
        first = losses[-1] if first is None else first
        seconds, peak = timed(lambda learner=learner, batch=batch: learner.update(batch, 1e-3), device, *COUNTS[size])
        sizes = parallel.axes(N)
        layout = Layout(**sizes, zero=parallel.zero, micro_batch=passes)
        compute = learner.dtype.itemsize
        work = Work(config, rows * N, config.context_length, compute_bytes=compute, compiled=compiled)
        predicted = predict(work, layout, gpu)
        yield row("plan", variant, (rows, passes), seconds, peak) | {
            "model": name,
            "predicted_seconds": predicted.step_seconds,
            "predicted_bytes": learner.predicted_memory().total,
            "loss_difference": abs(losses[-1] - first) / first,
        }
        del learner
        forget()


def _config(name: str, rows: int, passes: int, device: torch.device, parallel: ParallelConfig) -> TrainConfig:
    return TrainConfig(
        run_dir=pathlib.Path("runs/none"),
        data=DataConfig(pathlib.Path("none")),
        model=MODELS[name],
        batch_size=rows,
        micro_batch_size=passes,
        parallel=parallel,
        device=device.type,
        compile=False,
        cuda_graph=False,
        gradient_checkpointing=False,
    )


def _measured(name: str, rows: int, passes: int, device: torch.device, counts: tuple[int, int]) -> Gpu:
    """This GPU as a plan sees it: what it reaches by itself, and the links."""
    config = MODELS[name]
    bandwidth = measure("all_reduce", 1 << 28 if device.type == "cuda" else 1 << 16, device)["bus_gbps"] * 1e9
    tiers = (Tier(8, max(bandwidth, 1e6)),)
    gpu = find("H200", tiers=tiers) if device.type == "cuda" else Gpu("cpu", 1 << 40, 1e12, 1e10, tiers)
    seconds, work = _alone(config, rows, passes, device, counts), Work(config, rows, config.context_length)
    forget()
    moved = predict(work, Layout(micro_batch=passes), gpu).seconds["optimizer"]
    reached = work.flops / max(seconds - moved, 0.1 * seconds) / gpu.flops
    return dataclasses.replace(gpu, efficiency=reached)


def _alone(config: TransformerConfig, rows: int, passes: int, device: torch.device, counts: tuple[int, int]) -> float:
    """Seconds of a step of one process by itself."""
    model = Transformer(config, device=device)
    optimizer = AdamW(model.parameters(), lr=1e-4)
    ids, targets = _tokens(config, passes, device)

    def step() -> None:
        for _ in range(rows // passes):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(ids, targets=targets)
            (loss / targets.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, device, *counts)[0]


# ---- 8B ----


def large(size: str, device: torch.device) -> Iterator[Row]:
    """A sequence a process, all blocks recomputed, float32 masters and bfloat16 weights."""
    config = LARGE[size]
    ids, targets = _tokens(config, 1, device)
    for variant, divide in (("cs336 FSDP", _ours), ("FSDP2", _fsdp2)):
        torch.manual_seed(0)
        model = Transformer(config, device=device)
        model.gradient_checkpointing = "full"
        step = divide(model, ids, targets)
        seconds, peak = timed(step, device, 1, 1)
        speed = dist.get_world_size() * targets.numel() / seconds
        yield row("large", variant, tuple(ids.shape), seconds, peak) | {"tokens_per_second": round(speed, 1)}
        del model, step
        forget()


def _ours(model: Transformer, ids, targets) -> Step:
    split = FSDP(model, compute_dtype=torch.bfloat16)
    optimizer = AdamW(split.parameters(), lr=1e-4)

    def step() -> None:
        (split(ids, targets=targets) / targets.numel()).backward()
        split.finish_gradient_synchronization()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _fsdp2(model: Transformer, ids, targets) -> Step:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    fused = {"fused": True} if ids.is_cuda else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **fused)

    def step() -> None:
        (model(ids, targets=targets) / targets.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# ---- the engine ----


def engine(size: str, device: torch.device) -> Iterator[Row]:
    """Tokens of a small float32 model first, whether they are the same; then the speed of a large one."""
    small = TransformerConfig(256, 256, 2, 128, 8, 4, init_std=0.3)
    config, requests, prompt, answer = ENGINE[size]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    said: dict[str, list[list[int]]] = {}
    for variant, divided in (("one process", False), ("tensor parallel", True)):
        said[variant], _ = _answers(small, torch.float32, 8, 33, 64, device, divided)
        forget()
        tokens, seconds = _answers(config, dtype, requests, prompt, answer, device, divided)
        forget()
        pairs = zip(itertools.chain(*said["one process"]), itertools.chain(*said[variant]), strict=True)
        same = [a == b for a, b in pairs]
        count = sum(map(len, tokens))
        yield row("engine", variant, (requests, prompt, answer), seconds, None) | {
            "tokens_per_second": round(count / seconds, 1),
            "equal_tokens": sum(same) / len(same),
        }


def _answers(config, dtype, requests, prompt, answer, device, divided) -> tuple[list[list[int]], float]:
    """The tokens, and the seconds that the second of two equal batches took, of the slowest rank."""
    torch.manual_seed(0)
    model = Transformer(config, device=device, dtype=dtype).eval()
    if divided:
        model = tensor_parallel(model)
    llm = LLM(model, quiet=True, max_seqs=requests, max_len=2 * (prompt + answer), prefix_cache=False)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(config.vocab_size, (requests, prompt), generator=generator).tolist()
    params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
    found: list[list[int]] = []

    def run() -> None:
        found[:] = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]

    run()
    return found, block(run, 1, device)


RUNS = {"gpt": gpt, "plan": plan, "large": large, "engine": engine}
