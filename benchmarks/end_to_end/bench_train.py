"""Training: tokens a second of `cs336 train` against the same model, optimizer and data in plain PyTorch.

Both start from the same weights and read the same batches; blocks of steps alternate, so that both see the same
clocks; the median block counts, and the loss curves must agree.

    python -m benchmarks.run train [124M] [--batch 32] [--data TOKENS] [--nondeterministic] [--out FILE]
"""

import functools
import pathlib
import tempfile
import time
from collections.abc import Callable
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

DISAGREES = 0.01  # relative difference of the two losses, averaged over the last block

GPT2 = {"124M": (12, 768, 12), "350M": (24, 1024, 16), "774M": (36, 1280, 20), "1.5B": (48, 1600, 25)}
MODELS = {
    "tiny": TransformerConfig(256, 32, 2, 64, 2, tie_embeddings=True),
    **{name: TransformerConfig(50304, 1024, *shape, tie_embeddings=True) for name, shape in GPT2.items()},
}

Update = Callable[[Tensor, Tensor, float], Tensor]  # x, y, learning rate -> loss, still on the device


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


def compare(
    name: str,
    *,
    batch_size: int,
    blocks: int,
    steps: int,
    data: pathlib.Path | None = None,
    compile: bool = True,
    deterministic: bool = True,
) -> list[dict[str, Any]]:
    """Alternate `blocks` blocks of `steps` steps, the first of them untimed. Two rows: "cs336" and "plain".

    Raises ValueError if the loss curves disagree.
    """
    model, total = MODELS[name], blocks * steps
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            tokens = total * batch_size * model.context_length + 1
            data = zipf_tokens(pathlib.Path(folder) / "zipf.bin", model.vocab_size, tokens)
        switches = {"compile": compile, "deterministic": deterministic}
        config = TrainConfig(pathlib.Path(folder), DataConfig(data), model, batch_size=batch_size, **switches)
        ours = Learner(config)
        dataset = TokenDataset(data, model.context_length, vocab_size=model.vocab_size)
        loader = TokenLoader(dataset, batch_size, device=ours.device)
        updates = {"cs336": lambda x, y, lr: ours.update((x, y), lr)["loss"], "plain": plain_update(ours)}
        seconds: dict[str, list[float]] = {variant: [] for variant in updates}
        losses: dict[str, list[Tensor]] = {variant: [] for variant in updates}
        for first in range(0, total, steps):
            for variant, update in updates.items():
                harness.synchronize(ours.device)
                start = time.perf_counter()
                for step in range(first, first + steps):
                    losses[variant].append(update(*loader.batch(step), rate(step, total)))
                harness.synchronize(ours.device)
                seconds[variant].append(time.perf_counter() - start)
    curves = {variant: torch.stack(values).view(blocks, steps).double().cpu() for variant, values in losses.items()}
    check_curves(curves["cs336"], curves["plain"])
    return [
        row(name, variant, ours, harness.summary(seconds[variant][1:], steps, "perf_counter"), curves[variant])
        for variant in updates
    ]


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
    }


def bench_train(benchmark):
    benchmark.pedantic(compare, ("tiny",), {"batch_size": 4, "blocks": 2, "steps": 3, "compile": False})
