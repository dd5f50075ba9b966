"""A step of GRPO by the clock, on one device: responses from the engine, then what is learned from them.

    python -m benchmarks.end_to_end.bench_grpo [--steps 2] [--out FILE]

A model of random weights in the shape of Qwen2.5-1.5B, in bfloat16 with AdamW's remainder, so that its steps are those
of float32 weights. Prompts are random; no token ends a response, so all have TOKENS; rewards are random, so that there
is something to learn from each. A short step goes before, which compiles. Then a step in the engine's invariant mode,
whose log-probabilities must be those of the training forward.
"""

import argparse
import dataclasses
import json
import pathlib
import random
import shlex
import sys
import time
from typing import Any

import torch

from benchmarks import results
from cs336.alignment import GRPOConfig
from cs336.alignment.grpo import collect, learn
from cs336.inference import LLM
from cs336.models import Transformer, TransformerConfig
from cs336.optim import AdamW
from cs336.utils.device import pick

PROMPTS, GENERATIONS, PROMPT, TOKENS, MICRO = 32, 8, 128, 1024, 8
FIRST = 16  # tokens of the step that compiles
INVARIANT = GRPOConfig(num_generations=4, prompts_per_step=4, max_tokens=64)
SHAPE = {
    "vocab_size": 151936, "num_layers": 28, "d_model": 1536, "num_heads": 12, "num_kv_heads": 2, "d_ff": 8960,
    "tie_embeddings": True, "qkv_bias": True,
}  # fmt: skip
Row = dict[str, Any]


def step(llm: LLM, optimizer: AdamW, config: GRPOConfig, number: int) -> Row:
    """Its seconds, of drawing and of learning, and how far the engine's log-probabilities are from training's."""
    rng, device = random.Random(number), llm.model.device
    vocab = llm.model.config.vocab_size
    prompts = [[rng.randrange(vocab) for _ in range(PROMPT)] for _ in range(config.prompts_per_step)]
    began = _now(device)
    collected = collect(llm, lambda _: [(p, None) for p in prompts], lambda *_: rng.random(), config, seed=number << 20)
    drawn = _now(device)
    values = learn(llm, optimizer, collected, config)
    learned = _now(device)
    tokens = int(collected.rollouts.mask_BT.sum())
    return {
        "responses": len(collected.rewards_B), "prompt": PROMPT, "tokens": tokens, "seconds": learned - began,
        "rollout_seconds": drawn - began, "rollout_tokens_per_second": tokens / (drawn - began),
        "learn_seconds": learned - drawn, "difference_mean": values["sampling/sampling_logp_difference/mean"],
        "difference_max": values["sampling/sampling_logp_difference/max"],
    }  # fmt: skip


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(device: torch.device, steps: int) -> list[Row]:
    rows = list[Row]()

    def found(row: Row) -> None:
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
        rows.append(row | {"peak_gib": peak})
        print(json.dumps(rows[-1]), flush=True)

    torch.manual_seed(0)
    shape = TransformerConfig(context_length=PROMPT + TOKENS, **SHAPE)
    model = Transformer(shape, device=device, dtype=torch.bfloat16).eval()
    optimizer = AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, rounding="remainder")
    config = GRPOConfig(
        num_generations=GENERATIONS, prompts_per_step=PROMPTS, max_tokens=TOKENS, micro_batch_size=MICRO
    )
    llm = LLM(model, max_seqs=PROMPTS * GENERATIONS, quiet=True)
    step(llm, optimizer, dataclasses.replace(config, max_tokens=min(FIRST, TOKENS)), steps + 1)
    for number in range(steps):
        found({"mode": "fast", "step": number} | step(llm, optimizer, config, number))
    del llm
    llm = LLM(model, max_seqs=INVARIANT.prompts_per_step * INVARIANT.num_generations, invariant=True, quiet=True)
    found({"mode": "invariant", "step": 0} | step(llm, optimizer, INVARIANT, steps))
    return rows


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.end_to_end.bench_grpo", description=__doc__)
    parser.add_argument("--steps", type=int, default=2, help="that are timed (%(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="results file to put the rows into")
    options = parser.parse_args(argv)
    device = pick(options.device)
    rows = measure(device, options.steps)
    if options.out:
        command = shlex.join(["python", "-m", "benchmarks.end_to_end.bench_grpo", *argv])
        results.write(options.out, "grpo_step", results.header(device, command, roofs=False), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
