"""Every variant of a block at one small budget: parameters, loss, speed, state, and whether decoding is exact.

    python -m benchmarks.end_to_end.bench_variants [--steps 150] [--seeds 3] [--device cpu] [--only NAME ...] [--out F]
    ... --steps 20 --out benchmarks/results/cpu.json && python -m benchmarks.report    # docs/architectures.md's table

Each trains on the same text, tiny and made here: random words of a random dictionary, where every letter but a word's
first can be learned. The loss is the mean of the seeds, over the last tenth of their steps, with a 95 % interval of
Student's t.
"""

import argparse
import pathlib
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, results
from benchmarks.end_to_end.variants import MIXERS, VARIANTS
from cs336.models import Transformer, TransformerConfig
from cs336.nn.moe import balance_experts
from cs336.optim import AdamW
from cs336.training.objectives import NextToken

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % points, by the number of seeds
BATCH = 16
ALL = VARIANTS | MIXERS

Row = dict[str, Any]


def batches(config: TransformerConfig, steps: int, seed: int, device: torch.device) -> Tensor:
    """(steps, BATCH, T + 1) int64."""
    source = torch.Generator().manual_seed(seed)
    words = torch.randint(1, config.vocab_size, (40, 5), generator=torch.Generator().manual_seed(0))
    count = steps * BATCH * (config.context_length // 6 + 2)
    text = torch.nn.functional.pad(words[torch.randint(40, (count,), generator=source)], (0, 1)).flatten()
    size = config.context_length + 1
    return text[: steps * BATCH * size].view(steps, BATCH, size).to(device)


def train(config: TransformerConfig, steps: int, seed: int, device: torch.device) -> tuple[Transformer, float, float]:
    """The model, its mean loss over the last tenth of the steps, and tokens a second (on a CPU, of processor time)."""
    torch.manual_seed(seed)
    model, objective = Transformer(config, device=device), NextToken()
    optimizer = AdamW(model.parameters(), lr=3e-3)
    losses, data = [], batches(config, steps, seed, device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    harness.synchronize(device)
    start = clock()
    for x in data:
        total, count, metrics = objective(model, (x[:, :-1].contiguous(), x[:, 1:].contiguous()))
        (total / count).backward()
        optimizer.step()
        balance_experts(model)
        optimizer.zero_grad()
        losses.append((metrics.get("cross_entropy", total) / count).detach())
    harness.synchronize(device)
    speed = data[:, :, 1:].numel() / (clock() - start)
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


def row(name: str, config: TransformerConfig, steps: int, seeds: int, device: torch.device) -> Row:
    runs = [train(config, steps, seed, device) for seed in range(seeds)]
    losses = [loss for _, loss, _ in runs]
    spread = statistics.stdev(losses) / seeds**0.5 * STUDENT[seeds] if seeds > 1 else None
    error = max(decoding_error(model) for model, _, _ in runs)
    return {
        "op": "variants",
        "variant": name,
        "parameters": config.num_parameters(),
        "tokens": steps * BATCH * config.context_length,
        "loss": round(statistics.mean(losses), 4),
        "interval": None if spread is None else round(spread, 4),
        "tokens_per_second": round(max(speed for _, _, speed in runs)),
        "state_bytes": config.state_bytes(width=4),
        "decoding_error": float(f"{error:.2g}"),
        "decodes": error < 1e-3,
    }


def header(options: argparse.Namespace) -> Row:
    command = f"python -m benchmarks.end_to_end.bench_variants --steps {options.steps} --seeds {options.seeds}"
    if options.device != "cpu":
        return results.header(torch.device(options.device), command)
    return results.cpu_header(command, cores=torch.get_num_threads())


def found_before(path: pathlib.Path | None, about: Row) -> dict[str, Row]:
    """The rows of a run that was stopped: of the same command at the same commit."""
    last = results.read(path).get("variants") if path else None
    same = last is not None and all(last["header"].get(key) == about.get(key) for key in ("command", "commit", "cpu"))
    return {row["variant"]: row for row in last["rows"]} if last and same else {}


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3, choices=(1, *STUDENT))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", default=list(ALL), choices=list(ALL))
    parser.add_argument("--out", type=pathlib.Path, help="results file; a run that was stopped goes on from its rows")
    options = parser.parse_args(arguments)
    about = header(options)
    rows = found_before(options.out, about)
    print(f"{'variant':<30}{'parameters':>11}{'loss':>9}{'±':>8}{'tok/s':>10}{'state B':>9}{'decoding':>10}")
    for name in options.only:
        if name not in rows:
            rows[name] = row(name, ALL[name], options.steps, options.seeds, torch.device(options.device))
        found = rows[name]
        interval = "" if found["interval"] is None else f"{found['interval']:.4f}"
        print(
            f"{name:<30}{found['parameters']:>11,}{found['loss']:>9.4f}{interval:>8}"
            f"{found['tokens_per_second']:>10,}{found['state_bytes']:>9,}{found['decoding_error']:>10.1e}",
            flush=True,
        )
        if options.out is not None:
            results.write(options.out, "variants", about, [rows[name] for name in ALL if name in rows])
    return [rows[name] for name in options.only]


def bench_variants(benchmark):
    benchmark.pedantic(main, (["--steps", "2", "--seeds", "2", "--device", "cpu", "--only", "SwiGLU", "MoE"],))


if __name__ == "__main__":
    main()
