"""Every variant of a block at one small budget: parameters, loss, speed, state, and whether decoding is exact.

    python -m benchmarks.end_to_end.bench_variants [--steps 150] [--seeds 3] [--device cpu] [--only NAME ...] [--out F]

Each trains on the same text, tiny and made here: random words of a random dictionary, where every letter but a word's
first can be learned. The loss is the mean of the seeds with a 95 % interval of Student's t.
"""

import argparse
import datetime
import json
import pathlib
import platform
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.end_to_end.variants import MIXERS, VARIANTS
from cs336.models import Transformer, TransformerConfig
from cs336.nn.moe import balance_experts
from cs336.optim import AdamW
from cs336.training.objectives import NextToken

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % points, by the number of seeds
BATCH = 16
ALL = VARIANTS | MIXERS


def batches(config: TransformerConfig, steps: int, seed: int, device: torch.device) -> Tensor:
    """(steps, BATCH, T + 1) int64."""
    source = torch.Generator().manual_seed(seed)
    words = torch.randint(1, config.vocab_size, (40, 5), generator=torch.Generator().manual_seed(0))
    count = steps * BATCH * (config.context_length // 6 + 2)
    text = torch.nn.functional.pad(words[torch.randint(40, (count,), generator=source)], (0, 1)).flatten()
    size = config.context_length + 1
    return text[: steps * BATCH * size].view(steps, BATCH, size).to(device)


def train(config: TransformerConfig, steps: int, seed: int, device: torch.device) -> tuple[Transformer, float, float]:
    """The model, its mean loss over the last tenth of the steps, and tokens a second."""
    torch.manual_seed(seed)
    model, objective = Transformer(config, device=device), NextToken()
    optimizer = AdamW(model.parameters(), lr=3e-3)
    losses, data = [], batches(config, steps, seed, device)
    harness.synchronize(device)
    start = time.perf_counter()
    for x in data:
        total, count, metrics = objective(model, (x[:, :-1].contiguous(), x[:, 1:].contiguous()))
        (total / count).backward()
        optimizer.step()
        balance_experts(model)
        optimizer.zero_grad()
        losses.append((metrics.get("cross_entropy", total) / count).detach())
    harness.synchronize(device)
    speed = data[:, :, 1:].numel() / (time.perf_counter() - start)
    return model, torch.stack(losses[-max(1, steps // 10) :]).mean().item(), speed


@torch.inference_mode()
def decoding_error(model: Transformer) -> float:
    """The largest difference of a logit between the parallel form and prefill with token by token."""
    model.eval()
    x = torch.randint(model.config.vocab_size, (2, model.config.context_length), device=model.device)
    state, half = model.new_state(2), model.config.context_length // 2
    parts = [model(x[:, :half], state=state)]
    parts += [model(x[:, i : i + 1], state=state) for i in range(half, x.shape[1])]
    return (torch.cat(parts, 1) - model(x)).abs().max().item()


def row(name: str, config: TransformerConfig, steps: int, seeds: int, device: torch.device) -> dict[str, Any]:
    runs = [train(config, steps, seed, device) for seed in range(seeds)]
    losses = [loss for _, loss, _ in runs]
    spread = statistics.stdev(losses) / seeds**0.5 * STUDENT[seeds] if seeds > 1 else None
    error = max(decoding_error(model) for model, _, _ in runs)
    return {
        "variant": name,
        "parameters": config.num_parameters(),
        "loss": round(statistics.mean(losses), 4),
        "interval": None if spread is None else round(spread, 4),
        "tokens_per_second": round(max(speed for _, _, speed in runs)),
        "state_bytes": config.state_bytes(width=4),
        "decoding_error": float(f"{error:.2g}"),
        "decodes": error < 1e-3,
    }


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3, choices=(1, *STUDENT))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", default=list(ALL), choices=list(ALL))
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args(arguments)
    rows = []
    print(f"{'variant':<30}{'parameters':>11}{'loss':>9}{'±':>8}{'tok/s':>10}{'state B':>9}{'decoding':>10}")
    for name in options.only:
        found = row(name, ALL[name], options.steps, options.seeds, torch.device(options.device))
        rows.append(found)
        interval = "" if found["interval"] is None else f"{found['interval']:.4f}"
        print(
            f"{name:<30}{found['parameters']:>11,}{found['loss']:>9.4f}{interval:>8}"
            f"{found['tokens_per_second']:>10,}{found['state_bytes']:>9,}{found['decoding_error']:>10.1e}",
            flush=True,
        )
    if options.out is not None:
        about = {"steps": options.steps, "seeds": options.seeds, "batch": BATCH, "device": options.device}
        about |= {"torch": torch.__version__, "machine": platform.machine(), "date": f"{datetime.date.today()}"}
        options.out.write_text(json.dumps({"header": about, "rows": rows}, indent=1) + "\n")
    return rows


def bench_variants(benchmark):
    benchmark.pedantic(main, (["--steps", "2", "--seeds", "2", "--device", "cpu", "--only", "SwiGLU", "MoE"],))


if __name__ == "__main__":
    main()
