"""Answers through the engine, as fast as they go: models of real shapes with random weights, prompts of random tokens.

    python -m benchmarks.end_to_end.bench_engine --out benchmarks/results/h200.json [WORK ...]

What a step must read is the weights once, and keys and values of all tokens; its share of the read roof is that over
the median time between two tokens. "scoring" is of few-shot prompts, whose common beginning is computed once or each
time.
"""

import argparse
import gc
import json
import pathlib
import random
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import harness, results
from cs336.inference import LLM
from cs336.inference.bench import Load, run_engine
from cs336.models import Transformer, TransformerConfig

READ_ROOF = {"NVIDIA H200": 4.37e12}  # bytes a second of a stream that only reads

QWEN: dict[str, Any] = {"qk_norm": True, "rope_theta": 1e6, "norm_eps": 1e-6, "head_dim": 128, "num_kv_heads": 8}
MODELS = {
    "Qwen3-0.6B": TransformerConfig(
        151936, 4096, num_layers=28, d_model=1024, num_heads=16, d_ff=3072, tie_embeddings=True, **QWEN
    ),
    "Qwen3-8B": TransformerConfig(
        151936, 4096, num_layers=36, d_model=4096, num_heads=32, d_ff=12288, tie_embeddings=False, **QWEN
    ),
    "Llama-3.2-1B": TransformerConfig(
        128256, 4096, num_layers=16, d_model=2048, num_heads=32, num_kv_heads=8, d_ff=8192, tie_embeddings=True,
        rope_theta=5e5, norm_eps=1e-5,
    ),
    "tiny": TransformerConfig(512, 256, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2),
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    title: str
    model: str
    load: Load
    options: dict[str, Any] = field(default_factory=dict)
    """Of LLM."""
    repeats: int = 1
    peers: dict[str, int] = field(default_factory=dict)
    """Tokens a second in another run on the same kind of card."""


def _same(n: int, inputs: int, outputs: int) -> Load:
    return Load(n, (inputs, inputs), (outputs, outputs))


MANY = {"max_seqs": 256, "max_step_tokens": 16384, "num_pages": 3400}
SHORT = Load(256, (100, 400), (100, 400))
WORKS = {
    "many": Work(
        "Qwen3-0.6B, 256 requests, prompts and answers of 100 to 1024 tokens", "Qwen3-0.6B", Load(), MANY, 2,
        {"mini-sglang": 21799, "nano-vllm": 17485},
    ),
    "short": Work("Qwen3-0.6B, 256 requests of 100 to 400 tokens", "Qwen3-0.6B", SHORT, MANY, 2),
    "slots": Work(
        "Qwen3-0.6B, 160 requests on 64 slots, prompts of 100 tokens, answers of 100 to 300", "Qwen3-0.6B",
        Load(160, (100, 100), (100, 300)), MANY | {"max_seqs": 64},
    ),
    "crowd": Work(
        "Qwen3-0.6B, 1,024 requests of 100 to 400 tokens on 256 slots", "Qwen3-0.6B",
        Load(1024, (100, 400), (100, 400)), MANY,
    ),
    "invariant": Work(
        "the same, inside cs336.invariant()", "Qwen3-0.6B", SHORT, MANY | {"invariant": True}, 2
    ),
    "llama": Work(
        "Llama-3.2-1B, one request of 100 tokens, answer of 400", "Llama-3.2-1B", _same(1, 100, 400),
        {"max_seqs": 1}, 1, {"mini-sglang": 783, "nano-vllm": 623},
    ),
    "batch": Work(
        "Qwen3-8B, 64 requests of 512 tokens, answers of 256", "Qwen3-8B", _same(64, 512, 256),
        {"max_seqs": 64, "num_pages": 1000},
    ),
    "alone": Work(
        "Qwen3-8B, one request of 512 tokens, answer of 128", "Qwen3-8B", _same(1, 512, 128),
        {"max_seqs": 64, "num_pages": 1000},
    ),
    "tiny": Work("a tiny model, 3 requests", "tiny", _same(3, 20, 10), {"max_seqs": 4}),
}  # fmt: skip
SCORING = {"scoring": ("Qwen3-0.6B", 2048, 40, 8, 128), "tiny-scoring": ("tiny", 100, 10, 4, 5)}


def make(model: str, **options: Any) -> LLM:
    torch.manual_seed(0)
    device = harness.default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return LLM(Transformer(MODELS[model], device=device, dtype=dtype).eval(), quiet=True, **options)


def share_of_roof(work: Work, step: float) -> float | None:
    device = harness.default_device()
    roof = READ_ROOF.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if roof is None or any(least != most for least, most in (work.load.input_len, work.load.output_len)):
        return None
    config, tokens = MODELS[work.model], work.load.input_len[0] + work.load.output_len[0] / 2
    weights = 2 * (config.num_parameters(embeddings=False) + config.vocab_size * config.d_model)
    return round((weights + work.load.num_requests * tokens * config.state_bytes(1, 2)) / roof / step, 3)


def measure(work: Work, llm: LLM) -> list[dict[str, Any]]:
    """A row a repeat, after a first run that warms up."""
    vocab_size, made = MODELS[work.model].vocab_size, []
    run_engine(llm, Load(8, (20, 20), (10, 10)).requests(vocab_size))
    for _ in range(work.repeats):
        found = run_engine(llm, work.load.requests(vocab_size))
        row: dict[str, Any] = {"op": "engine", "variant": "cs336", "work": work.title}
        row["dtype"] = harness.dtype_name(llm.model.embedding.weight.dtype)
        row |= {"output_tokens": found["output_tokens"], "seconds": found["seconds"]}
        row |= {"tokens_per_second": found["tok_s"], "steps": found["steps"]}
        row |= {name: found[name] for name in ("ttft_p50_ms", "itl_p50_ms")}
        if share := share_of_roof(work, found["itl_p50_ms"] / 1e3):
            row["share_of_read_roof"] = share
        made.append(row | ({"peers_in_another_run": work.peers} if work.peers else {}))
    return made


def scorer(name: str, cached: bool) -> LLM:
    model, shared, own, scored, count = SCORING[name]
    together, each = count if cached else min(count, 32), 2 + (shared + own + scored) // 64
    num_pages = each + 3 * count if cached else each * together
    return make(model, prefix_cache=cached, max_seqs=together, num_pages=num_pages, cuda_graphs=False)


def score(name: str) -> list[dict[str, Any]]:
    """Without and with the cache of prefixes: the best of three, of nothing that was computed before."""
    model, shared, own, scored, count = SCORING[name]
    draw, vocab_size = random.Random(2), MODELS[model].vocab_size
    prefix = [draw.randrange(vocab_size) for _ in range(shared)]
    prompts = [prefix + [draw.randrange(vocab_size) for _ in range(own)] for _ in range(count)]
    answers = [[draw.randrange(vocab_size) for _ in range(scored)] for _ in range(count)]
    made = []
    for cached in (False, True):
        llm = scorer(name, cached)
        llm.score(prompts[:2], answers[:2])
        seconds = []
        for _ in range(3):
            llm.engine.cache.forget()
            begin = time.perf_counter()
            llm.score(prompts, answers)
            seconds.append(time.perf_counter() - begin)
        title = f"{model}, {count} prompts of {shared:,} common tokens and {own} more, {scored} scored each"
        row: dict[str, Any] = {
            "op": "engine",
            "variant": "cs336",
            "work": title + (", common ones once" if cached else ""),
        }
        row |= {"output_tokens": count * scored, "seconds": round(min(seconds), 4)}
        made.append(row | {"tokens_per_second": round(count * scored / min(seconds), 1)})
        del llm
        gc.collect()
    return made


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [name for name in (*WORKS, *SCORING) if "tiny" not in name]
    parser.add_argument("works", nargs="*", default=known, metavar="WORK", help=f"of {', '.join(known)}; all if none")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="results file to put the rows into")
    parser.add_argument("--commit", help="to record where there is no git checkout")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.works if name not in WORKS | SCORING]:
        parser.error(f"no work {', '.join(unknown)}: expected some of {', '.join(known)}")
    return options


def main(argv: list[str] | None = None) -> int:
    options, rows = parse(argv), []
    command = " ".join(["python -m benchmarks.end_to_end.bench_engine", *options.works])
    header = results.header(harness.default_device(), command, options.commit, roofs=False)
    kept: dict[tuple, LLM] = {}
    for name in options.works:
        if name in SCORING:
            kept.clear()
            found = score(name)
        else:
            work = WORKS[name]
            key = (work.model, *work.options.items())
            if key not in kept:
                kept.clear()  # so that its memory is free before the next one's is planned
                gc.collect()
                kept[key] = make(work.model, prefix_cache=False, **work.options)
            found = measure(work, kept[key])
        for row in found:
            print(json.dumps(row), flush=True)
        rows += found
        if options.out:
            results.write(options.out, "engine", header, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
