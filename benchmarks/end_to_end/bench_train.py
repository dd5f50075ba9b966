"""Training: tokens a second of `cs336 train` against the same model, optimizer and data in plain PyTorch.

Both start from the same weights and read the same batches; blocks of steps alternate, so that both see the same
clocks; the median block counts, and the loss curves must agree. On a GPU each has a process of its own.

    python -m benchmarks.run train [124M 350M ...] [--batch 32] [--data TOKENS] [--nondeterministic] [--out FILE]
"""

import contextlib
import functools
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
from torch._dynamo.callback import callback_handler

from benchmarks import harness
from benchmarks.end_to_end.plain import PlainTransformer
from cs336.data import TokenDataset, TokenLoader, write_shard
from cs336.models import TransformerConfig
from cs336.optim import AdamW, clip_scale, cosine_schedule, grad_norm
from cs336.training import DataConfig, TrainConfig
from cs336.training.learner import Learner

DISAGREES = 0.01  # relative difference of the two losses, averaged over the last block

GPT2 = {"124M": (12, 768, 12), "350M": (24, 1024, 16), "774M": (36, 1280, 20), "1.5B": (48, 1600, 25)}
MODELS = {
    "tiny": TransformerConfig(256, 32, 2, 64, 2, tie_embeddings=True),
    **{name: TransformerConfig(50304, 1024, *shape, tie_embeddings=True) for name, shape in GPT2.items()},
    "llama-1B": TransformerConfig(32000, 4096, 18, 2048, 16),
}
BATCH = {"tiny": 4, "124M": 32, "350M": 32, "774M": 16, "1.5B": 16, "llama-1B": 4}  # sequences a step
VARIANTS = ("cs336", "plain")

Update = Callable[[Tensor, Tensor, float], Tensor]  # x, y, learning rate -> loss, still on the device
Block = tuple[float, list[float]]  # seconds, the loss of each step


def zipf_tokens(path: pathlib.Path, vocab_size: int, count: int) -> pathlib.Path:
    """A shard of independent tokens, the i-th as frequent as 1 / (i + 1)."""
    weights = np.cumsum(1 / np.arange(1, vocab_size + 1))
    drawn = np.random.default_rng(0).random(count) * weights[-1]
    write_shard(path, np.searchsorted(weights, drawn).clip(max=vocab_size - 1).astype(np.uint16))
    return path


def plain_update(ours: Learner, compile: Callable = torch.compile, *, our_optimizer: bool = False) -> Update:
    """What a Learner does, in plain PyTorch, from the same weights; `compile` is called where the learner compiles."""
    settings, device = ours.config.optimizer, ours.device
    model = PlainTransformer(ours.config.model).to(device)
    model.copy_weights(ours.model)
    loss_of = compile(model.loss) if ours.compiled else model.loss
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
            loss = loss_of(x_BT, y_BT)
        loss.backward()
        if our_optimizer:
            optimizer.step(grad_scale=clip_scale(grad_norm(parameters), settings.max_grad_norm))
        else:
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm, foreach=True)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return update


class Contender:
    """Makes blocks of steps of one model, as "cs336" or as "plain". Both begin with the weights of one seed."""

    def __init__(
        self,
        name: str,
        variant: str,
        data: pathlib.Path,
        *,
        batch_size: int,
        compile: bool = True,
        deterministic: bool = True,
    ):
        model = MODELS[name]
        switches = {"compile": compile, "deterministic": deterministic}
        self.name, self.variant = name, variant
        self.learner = Learner(TrainConfig(data.parent, DataConfig(data), model, batch_size=batch_size, **switches))
        self.update: Update = lambda x, y, lr: self.learner.update((x, y), lr)["loss"]
        if variant == "plain":
            self.update = plain_update(self.learner)
            release(self.learner)
        dataset = TokenDataset(data, model.context_length, vocab_size=model.vocab_size)
        self.loader = TokenLoader(dataset, batch_size, device=self.learner.device)

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
        return row(self.name, self.variant, self.learner, timing, curve)


class Apart:
    """A Contender in a process of its own. It compiles at once, and waits before its first step until that is asked."""

    def __init__(self, *args: Any, steps: int, total: int, **settings: Any):
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=_serve, args=(end, args, settings, steps, total), daemon=True)
        self.process.start()
        end.close()

    def block(self, first: int, steps: int, total: int) -> Block:
        return self._ask("block", first, steps, total)

    def row(self, blocks: Sequence[Block]) -> dict[str, Any]:
        return self._ask("row", blocks)

    def _ask(self, *message: Any) -> Any:
        try:
            self.pipe.send(message)
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise ValueError(f"a contender's process ended with status {self.process.exitcode}") from None


def _serve(pipe: Connection, args: tuple, settings: dict[str, Any], steps: int, total: int) -> None:
    contender, asked = Contender(*args, **settings), []

    def wait(_: Any = None) -> None:
        if not asked:
            asked.append(pipe.recv())

    if contender.learner.compiled:
        torch._functorch.config.force_non_lazy_backward_lowering = True  # the backward before the first step, too
        callback_handler.register_end_callback(wait)
    else:
        wait()
    pipe.send(contender.block(0, steps, total))
    while True:
        name, *arguments = pipe.recv()
        pipe.send(getattr(contender, name)(*arguments))


def release(learner: Learner) -> None:
    """Free the weights of a learner whose plain twin trains in its place."""
    learner.model.to("meta")
    learner.optimizer.param_groups.clear()


def compare(
    name: str, *, batch_size: int, blocks: int, steps: int, data: pathlib.Path | None = None, **switches: bool
) -> list[dict[str, Any]]:
    """Alternate `blocks` blocks of `steps` steps, the first of them untimed. Two rows: "cs336" and "plain".

    switches: compile, deterministic. Raises ValueError if the loss curves disagree.
    """
    with _shard(name, data, blocks * steps * batch_size) as shard:
        contenders = [Contender(name, v, shard, batch_size=batch_size, **switches) for v in VARIANTS]
        return take_turns(contenders, blocks, steps)


def compare_apart(
    batch_sizes: Mapping[str, int], *, blocks: int, steps: int, data: pathlib.Path | None = None, **switches: bool
) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """What makes `compare(...)` of one model after the other, each contender in a process of its own: the two compile
    side by side, and no other is there while they are timed. To be called before the next is asked for."""
    for name, batch_size in batch_sizes.items():
        settings: dict[str, Any] = {"batch_size": batch_size, "steps": steps, "total": blocks * steps, **switches}
        with _shard(name, data, blocks * steps * batch_size) as shard:
            pair = [Apart(name, variant, shard, **settings) for variant in VARIANTS]
            try:
                yield functools.partial(take_turns, pair, blocks, steps)
            finally:
                for contender in pair:
                    contender.process.kill()
                    contender.process.join()


def take_turns(contenders: Sequence[Contender | Apart], blocks: int, steps: int) -> list[dict[str, Any]]:
    made: list[list[Block]] = [[] for _ in contenders]
    for first in range(0, blocks * steps, steps):
        for contender, own in zip(contenders, made, strict=True):
            own.append(contender.block(first, steps, blocks * steps))
    check_curves(*(torch.tensor([losses for _, losses in own], dtype=torch.float64) for own in made))
    return [contender.row(own) for contender, own in zip(contenders, made, strict=True)]


@contextlib.contextmanager
def _shard(name: str, data: pathlib.Path | None, sequences: int) -> Iterator[pathlib.Path]:
    """data, or noise for so many sequences."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = sequences * MODELS[name].context_length + 1
        yield data or zipf_tokens(pathlib.Path(folder) / "zipf.bin", MODELS[name].vocab_size, tokens)


def rate(step: int, total: int) -> float:
    """Small and slowly rising: at 6e-4 from step 10 on the loss of 124M jumps, and weights moved by a thousandth of
    themselves end 0.8 % apart in plain PyTorch alone."""
    return cosine_schedule(step + 1, max_lr=2e-4, min_lr=2e-5, warmup_steps=total // 2, total_steps=total)


def check_curves(ours: Tensor, plain: Tensor) -> None:
    """Loss curves, (blocks, steps) each."""
    difference = ((ours[-1] - plain[-1]).abs().mean() / plain[-1].mean()).item()
    if not difference < DISAGREES:
        raise ValueError(
            f"the loss curves disagree: {difference:.2%} over the last block, {ours[-1].mean():.4f} (cs336) and "
            f"{plain[-1].mean():.4f} (plain); from the same weights and batches they must stay within {DISAGREES:.0%}"
        )


def row(name: str, variant: str, ours: Learner, timing: harness.Timing, curve: Tensor) -> dict[str, Any]:
    model, batch_size = ours.config.model, ours.config.batch_size
    speed = batch_size * model.context_length / timing.seconds
    on_gpu = ours.device.type == "cuda"
    return {
        "op": "train",
        "model": name,
        "variant": variant,
        "shape": [batch_size, model.context_length],
        "dtype": harness.dtype_name(ours.dtype),
        "deterministic": ours.deterministic and variant == "cs336",
        "seconds": timing.seconds,
        "spread": round(timing.spread, 4),
        "tokens_per_second": round(speed, 1),
        "mfu": round(100 * speed * model.flops_per_token() / ours.peak_flops, 2) if ours.peak_flops else None,
        "loss": round(curve[-1].mean().item(), 4),
        "curve": [round(loss, 4) for loss in curve.mean(1).tolist()],
        "bytes": torch.cuda.max_memory_allocated(ours.device) if on_gpu else None,
        "predicted_bytes": ours.predicted_memory().total if variant == "cs336" else None,
    }


def bench_train(benchmark):
    benchmark.pedantic(compare, ("tiny",), {"batch_size": 4, "blocks": 2, "steps": 3, "compile": False})
