"""Training: tokens a second of `cs336 train` against the same model, optimizer and data in plain PyTorch.

All start from the same weights and read the same batches; blocks of steps alternate, so that all see the same clocks;
the median block counts, and the loss curves must agree. Both are compiled a layer at a time, plain PyTorch's head and
loss too; --whole adds plain PyTorch compiled as one, for which the first, untimed block waits. On a GPU each has a
process of its own; all others compile side by side, and are timed when none does any more.

    python -m benchmarks.run train [124M 350M ...] [--batch 32] [--data TOKENS] [--ours default bf16_weights]
"""

import contextlib
import dataclasses
import functools
import gc
import multiprocessing
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.end_to_end.plain import PlainTransformer
from cs336.data import TokenDataset, TokenLoader, write_shard
from cs336.models import TransformerConfig
from cs336.optim import AdamW, clip_scale, cosine_schedule, grad_norm
from cs336.training import DataConfig, TrainConfig
from cs336.training.learner import Learner

DISAGREES = 0.01  # relative difference of two losses, averaged over the last block
LEAST = 40  # steps of a schedule: one that rises to its height in 6 leads losses of 1B apart
SHALLOW = 2  # layers that have all the graphs of a model: its first, and one that adds to what came before

GPT2 = {"124M": (12, 768, 12), "350M": (24, 1024, 16), "774M": (36, 1280, 20), "1.5B": (48, 1600, 25)}
MODELS = {
    "tiny": TransformerConfig(256, 32, 2, 64, 2, tie_embeddings=True),
    **{name: TransformerConfig(50304, 1024, *shape, tie_embeddings=True) for name, shape in GPT2.items()},
    "llama-1B": TransformerConfig(32000, 4096, 18, 2048, 16),
    "quickstart": TransformerConfig(4096, 512, 8, 512, 8, tie_embeddings=True),
}
BATCH = {"tiny": 4, "quickstart": 32, "124M": 32, "350M": 32, "774M": 16, "1.5B": 12, "llama-1B": 4}
"""Sequences a step: two contenders fit a GPU."""
STEPS = {"tiny": 4, "quickstart": 60, "124M": 12, "350M": 4, "774M": 4, "1.5B": 3, "llama-1B": 3}
"""In a block, which takes most of a second on an H200."""

Update = Callable[[Tensor, Tensor, float], Tensor]  # x, y, learning rate -> loss, still on the device
Way = Callable[[Callable[..., Learner]], tuple[Learner, Update]]  # what makes a learner -> it, and what makes a step
Block = tuple[float, list[float]]  # seconds, the loss of each step


def zipf_tokens(path: pathlib.Path, vocab_size: int, count: int) -> pathlib.Path:
    """A shard of independent tokens, the i-th as frequent as 1 / (i + 1)."""
    weights = np.cumsum(1 / np.arange(1, vocab_size + 1))
    drawn = np.random.default_rng(0).random(count) * weights[-1]
    write_shard(path, np.searchsorted(weights, drawn).clip(max=vocab_size - 1).astype(np.uint16))
    return path


def plain_update(
    ours: Learner, compile: Callable = torch.compile, *, our_optimizer: bool = False, whole: bool = False
) -> Update:
    """What a Learner does, in plain PyTorch, from the same weights; `compile` is called where the learner compiles, on
    the whole model or a layer at a time.

    The learner's own weights are freed: the plain twin trains in its place.
    """
    settings, device = ours.config.optimizer, ours.device
    with device:  # on a CPU its first weights, which are not used, take a second for each 100M
        model = PlainTransformer(ours.config.model)
    model.copy_weights(ours.model)
    ours.model.to("meta")
    ours.optimizer.param_groups.clear()
    if ours.compiled and whole:
        model.loss = compile(model.loss)  # type: ignore[method-assign]
    elif ours.compiled:
        model.compile_parts(compile)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    kind = AdamW if our_optimizer else functools.partial(torch.optim.AdamW, fused=True)
    optimizer = kind(groups, betas=settings.betas, eps=settings.eps)

    def update(x_BT: Tensor, y_BT: Tensor, lr: float) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(device.type, torch.bfloat16, enabled=ours.dtype == torch.bfloat16):
            loss = model.loss(x_BT, y_BT)
        loss.backward()
        if our_optimizer:
            optimizer.step(grad_scale=clip_scale(grad_norm(parameters), settings.max_grad_norm))
        else:
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm, foreach=True)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return update


@torch.no_grad()
def begin(config: TrainConfig) -> Learner:
    """From weights that bfloat16 holds. Float32 ones lie between two, where the first small steps change what some are
    cast to; bfloat16 ones begin with remainders of 0, and would be two steps behind."""
    learner = Learner(config)
    for p in learner.model.parameters():
        p.copy_(p.to(torch.bfloat16))
    return learner


def trained(make: Callable[..., Learner], **settings: Any) -> tuple[Learner, Update]:
    """As `cs336 train` does it."""
    learner = make(**settings)
    return learner, lambda x, y, lr: learner.update((x, y), lr)["loss"]


def plain(make: Callable[..., Learner], *, whole: bool = False) -> tuple[Learner, Update]:
    learner = make(cuda_graph=False)
    return learner, plain_update(learner, whole=whole)


def ways() -> dict[str, Way]:
    """Of training, by the names of their rows."""
    options = {"deterministic": {"deterministic": True}, "bf16_weights": {"precision": "bf16_weights"}}
    options["fp8"] = {"fp8": True}
    ours = {f"cs336 {name}": functools.partial(trained, **settings) for name, settings in options.items()}
    return {"cs336": trained, **ours, "plain whole": functools.partial(plain, whole=True), "plain": plain}


class Contender:
    """Makes blocks of steps of one model in one way. All ways begin with the weights of one seed.

    The compilers' work is done when it is made: by a step of a model that has the same layers, but few of them.
    """

    def __init__(
        self,
        name: str,
        way: str,
        data: pathlib.Path,
        *,
        batch_size: int,
        compile: bool = True,
        ways: Callable[[], Mapping[str, Way]] = ways,
    ):
        model = MODELS[name]
        self.name, self.way = name, way
        dataset = TokenDataset(data, model.context_length, vocab_size=model.vocab_size)
        self.loader = TokenLoader(dataset, batch_size, device=harness.default_device())
        config = TrainConfig(data.parent, DataConfig(data), model, batch_size=batch_size, compile=compile)
        if compile:
            shallow = dataclasses.replace(model, num_layers=min(SHALLOW, model.num_layers))
            self._begin(ways()[way], dataclasses.replace(config, model=shallow))
            self.block(0, 1, 1)
            del self.learner, self.update
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        self._begin(ways()[way], config)

    def _begin(self, way: Way, config: TrainConfig) -> None:
        self.learner, self.update = way(lambda **settings: begin(dataclasses.replace(config, **settings)))

    def block(self, first: int, steps: int, total: int) -> Block:
        """Seconds of steps first, first + 1, ... of `total`, and the loss of each."""
        harness.synchronize(self.learner.device)
        start = time.perf_counter()
        losses = [self.update(*self.loader.batch(step), rate(step, total)) for step in range(first, first + steps)]
        harness.synchronize(self.learner.device)
        return time.perf_counter() - start, torch.stack(losses).tolist()

    def row(self, blocks: Sequence[Block]) -> dict[str, Any]:
        """Of blocks, the first of them untimed."""
        curve = torch.tensor([losses for _, losses in blocks], dtype=torch.float64)
        timing = harness.summary([seconds for seconds, _ in blocks[1:]], curve.shape[1], "perf_counter")
        return row(self.name, self.way, self.learner, timing, curve)


class Apart:
    """A Contender in a process of its own, where it is made at once."""

    def __init__(self, *args: Any, **settings: Any):
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=_serve, args=(end, args, settings), daemon=True)
        self.process.start()
        end.close()
        self._made = False

    def wait(self) -> None:
        """Until it is made. Raises ValueError if it cannot be."""
        if not self._made:
            self._made = self._answer()

    def block(self, first: int, steps: int, total: int) -> Block:
        return self._ask("block", first, steps, total)

    def row(self, blocks: Sequence[Block]) -> dict[str, Any]:
        return self._ask("row", blocks)

    def end(self) -> None:
        self.process.kill()
        self.process.join()

    def _ask(self, *message: Any) -> Any:
        self.wait()
        with contextlib.suppress(ConnectionError):  # there is no answer then
            self.pipe.send(message)
        return self._answer()

    def _answer(self) -> Any:
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise ValueError(f"a contender's process ended with status {self.process.exitcode}") from None


def _serve(pipe: Connection, args: tuple, settings: dict[str, Any]) -> None:
    contender = Contender(*args, **settings)
    pipe.send(True)
    while True:
        name, *arguments = pipe.recv()
        pipe.send(getattr(contender, name)(*arguments))


def compare(
    name: str,
    names: Sequence[str] = ("cs336", "plain"),
    *,
    batch_size: int,
    blocks: int,
    steps: int | None = None,
    data: pathlib.Path | None = None,
    compile: bool = True,
) -> list[dict[str, Any]]:
    """Alternate `blocks` blocks of `steps` steps, STEPS if None, the first of them untimed, of each way: a row each.

    Raises ValueError if the loss curves disagree.
    """
    steps = steps or STEPS[name]
    with shard(name, data, blocks * steps * batch_size) as tokens:
        return take_turns(
            [Contender(name, n, tokens, batch_size=batch_size, compile=compile) for n in names], blocks, steps
        )


def compare_apart(
    batch_sizes: Mapping[str, int],
    names: Sequence[str] = ("cs336", "plain"),
    *,
    blocks: int,
    steps: int | None = None,
    data: pathlib.Path | None = None,
    compile: bool = True,
) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """What makes `compare(...)` of one model after the other, each contender in a process of its own. The contenders of
    all models are made side by side, before the first of them is timed."""
    with contextlib.ExitStack() as stack:
        groups, counts = [], [steps or STEPS[name] for name in batch_sizes]
        for (name, batch_size), count in zip(batch_sizes.items(), counts, strict=True):
            tokens = stack.enter_context(shard(name, data, blocks * count * batch_size))
            groups.append([Apart(name, n, tokens, batch_size=batch_size, compile=compile) for n in names])
        for group, count in zip(in_turn(groups), counts, strict=True):
            yield functools.partial(take_turns, group, blocks, count)


def in_turn(groups: Sequence[Sequence[Apart]]) -> Iterator[Sequence[Apart]]:
    """One group after the other, from when all are made; its processes end before the next group's turn.

    A contender that cannot be made says so when it is asked for something.
    """
    contenders = [contender for group in groups for contender in group]
    try:
        for contender in contenders:
            with contextlib.suppress(ValueError):
                contender.wait()
        for group in groups:
            yield group
            for contender in group:
                contender.end()
    finally:
        for contender in contenders:
            contender.end()


def take_turns(contenders: Sequence[Contender | Apart], blocks: int, steps: int) -> list[dict[str, Any]]:
    """The curve of each is held against the last one's."""
    made: list[list[Block]] = [[] for _ in contenders]
    for first in range(0, blocks * steps, steps):
        for contender, own in zip(contenders, made, strict=True):
            own.append(contender.block(first, steps, blocks * steps))
    rows = [contender.row(own) for contender, own in zip(contenders, made, strict=True)]
    curves = [torch.tensor([losses for _, losses in own], dtype=torch.float64) for own in made]
    for row, curve in zip(rows, curves, strict=True):
        check_curves(curve, curves[-1], row["variant"])
    return rows


@contextlib.contextmanager
def shard(name: str, data: pathlib.Path | None, sequences: int) -> Iterator[pathlib.Path]:
    """data, or noise for so many sequences."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = sequences * MODELS[name].context_length + 1
        yield data or zipf_tokens(pathlib.Path(folder) / "zipf.bin", MODELS[name].vocab_size, tokens)


def rate(step: int, total: int) -> float:
    """Small and slowly rising: at 6e-4 from step 10 on the loss of 124M jumps, and weights moved by a thousandth of
    themselves end 0.8 % apart in plain PyTorch alone. Of a few steps it does not come to its highest."""
    total = max(total, LEAST)
    return cosine_schedule(step + 1, max_lr=2e-4, min_lr=2e-5, warmup_steps=total // 2, total_steps=total)


def check_curves(ours: Tensor, plain: Tensor, name: str = "cs336") -> None:
    """Loss curves, (blocks, steps) each."""
    difference = ((ours[-1] - plain[-1]).abs().mean() / plain[-1].mean()).item()
    if not difference < DISAGREES:
        raise ValueError(
            f"the loss curves disagree: {difference:.2%} over the last block, {ours[-1].mean():.4f} ({name}) and "
            f"{plain[-1].mean():.4f} (plain); from the same weights and batches they must stay within {DISAGREES:.0%}"
        )


def row(name: str, way: str, learner: Learner, timing: harness.Timing, curve: Tensor) -> dict[str, Any]:
    model, batch_size = learner.config.model, learner.config.batch_size
    speed = batch_size * model.context_length / timing.seconds
    on_gpu = learner.device.type == "cuda"
    return {
        "op": "train",
        "model": name,
        "variant": way,
        "shape": [batch_size, model.context_length],
        "dtype": harness.dtype_name(learner.dtype),
        "seconds": timing.seconds,
        "spread": round(timing.spread, 4),
        "tokens_per_second": round(speed, 1),
        "mfu": round(100 * speed * model.flops_per_token() / learner.peak_flops, 2) if learner.peak_flops else None,
        "loss": round(curve[-1].mean().item(), 4),
        "curve": [round(loss, 4) for loss in curve.mean(1).tolist()],
        "bytes": torch.cuda.max_memory_allocated(learner.device) if on_gpu else None,
        "predicted_bytes": None if way.startswith("plain") else learner.predicted_memory().total,
    }


def bench_train(benchmark):
    benchmark.pedantic(compare, ("tiny",), {"batch_size": 4, "blocks": 2, "steps": 3, "compile": False})
