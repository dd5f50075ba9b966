"""Tokens a second of one sequence through the engine: of weights of 16, 8 and 4 bits, and with prompt lookup.

    python -m benchmarks.end_to_end.bench_decoding llama-1b qwen3-8b --out FILE
    python -m benchmarks.end_to_end.bench_decoding --real MODEL --out FILE

Weights are random, of real shapes. With prompt lookup the layers add nothing to what they read, so that the next token
follows from the last alone; that takes as long as ever. A text then repeats itself (greedy: all drafts are right),
wanders (drawn from three tokens: most drafts are wrong) or is new (drawn from all: there are no drafts). MODEL, which
is what cs336 serve takes, goes on greedily with prompts of code and of other texts, in rows of their own.
"""

import argparse
import bisect
import copy
import dataclasses
import functools
import gc
import inspect
import itertools
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks import results
from cs336.inference import LLM, SamplingParams
from cs336.inference.load import load_model, load_tokenizer
from cs336.inference.quantization import quantize_
from cs336.models import Transformer, TransformerConfig

MODELS = {
    "llama-1b": TransformerConfig(128256, 4096, 16, 2048, 32, num_kv_heads=8, d_ff=8192, tie_embeddings=True),
    "qwen3-8b": TransformerConfig(151936, 4096, 36, 4096, 32, num_kv_heads=8, d_ff=12288, qk_norm=True),
    "tiny": TransformerConfig(256, 512, 2, 64, 2, tie_embeddings=True),
}
WEIGHTS = ("unquantised", "int8", "fp8", "int4")
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
TEXTS = {
    "repeats itself": SamplingParams(temperature=0),
    "wanders": SamplingParams(temperature=1000, top_k=3, seed=1),
    "is new": SamplingParams(temperature=1000, seed=1),
}
REPEATS = 3
PROMPT = 100
CODE = inspect.getsource(bisect)
PROMPTS = {
    "code with one name changed": f"```python\n{CODE[:1600]}```\nThe same with `lo` named `low`:\n```python\n",
    "code that goes on": CODE[:2000],
    "a table that goes on": "| n | n squared |\n| --- | --- |\n" + "".join(f"| {n} | {n * n} |\n" for n in range(40)),
    "a list said again": "Names: Ada, Grace, Edsger, Barbara, Donald, Alan, John, Niklaus. Again: Ada, Grace, Edsger,",
    "prose": "The history of the village by the river began long before anyone wrote it down. In the spring of",
    "a question": "Why is the sky blue? Explain it to a child in a few sentences.\n\n",
}


def engine(model: Transformer | pathlib.Path, **options: Any) -> LLM:
    return LLM(model, max_seqs=1, max_len=1024, max_step_tokens=128, prefix_cache=False, quiet=True, **options)


def noise(llm: LLM, tokens: int) -> list[int]:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, llm.model.config.vocab_size, (min(PROMPT, tokens),), generator=draw).tolist()


def rate(llm: LLM, prompt: list[int], params: SamplingParams) -> float:
    """Tokens a second behind the first, of the best of some runs."""
    best = 0.0
    for _ in range(REPEATS):
        request = llm.engine.add(prompt, params)
        (sample,) = request.samples
        while len(sample.token_ids) == len(prompt):
            llm.engine.step()
        seen, begin = len(sample.token_ids), time.perf_counter()
        while not request.finished:
            llm.engine.step()
        best = max(best, (len(sample.token_ids) - seen) / (time.perf_counter() - begin))
    return best


def make(name: str, device: torch.device) -> Transformer:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Transformer(MODELS[name], device=device, dtype=dtype).eval()


def measure(name: str, device: torch.device, tokens: int, kinds: Sequence[str]) -> Iterator[dict[str, Any]]:
    unquantised = make(name, device)
    for weights in kinds:
        model = copy.deepcopy(unquantised)
        if weights != "unquantised":
            quantize_(model, weights, group=128)
        read = sum(t.nbytes for t in (*model.layers.parameters(), *model.layers.buffers()))
        read += (model.embedding if model.head is None else model.head).weight.nbytes
        kept = DTYPES[model.embedding.weight.dtype] if weights == "unquantised" else weights
        speed = _alone(model, tokens)
        yield {"model": name, "weights": kept, "tokens_per_second": round(speed, 1), "gb": round(read / 1e9, 6)}


def _alone(model: Transformer, tokens: int) -> float:
    llm = engine(model)
    speed = rate(llm, noise(llm, tokens), dataclasses.replace(TEXTS["is new"], max_tokens=tokens))
    del llm, model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return speed


@torch.no_grad()
def speculate(name: str, device: torch.device, tokens: int) -> Iterator[dict[str, Any]]:
    model = make(name, device)
    for path, weight in model.layers.named_parameters():
        if path.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    plain, drafting = engine(model), engine(model, speculation="ngram")
    for text, params in TEXTS.items():
        yield lookup(name, text, noise(plain, tokens), plain, drafting, dataclasses.replace(params, max_tokens=tokens))


def speculate_for_real(path: pathlib.Path, device: torch.device, tokens: int) -> Iterator[dict[str, Any]]:
    model = load_model(path, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    tokenizer = load_tokenizer(path)
    plain, drafting = engine(model), engine(model, speculation="ngram")
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for text, prompt in PROMPTS.items():
        yield lookup(path.stem, text, tokenizer.encode(prompt), plain, drafting, params)


def lookup(
    name: str, text: str, prompt: list[int], plain: LLM, drafting: LLM, params: SamplingParams
) -> dict[str, Any]:
    before = sum(drafting.engine.stats.drafted), sum(drafting.engine.stats.accepted)
    speeds = [rate(llm, prompt, params) for llm in (plain, drafting)]
    drafted, accepted = (sum(n) for n in (drafting.engine.stats.drafted, drafting.engine.stats.accepted))
    return {
        "model": name,
        "text": text,
        "tokens_per_second": round(speeds[0], 1),
        "with_lookup": round(speeds[1], 1),
        "drafted": drafted - before[0],
        "accepted": accepted - before[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--real", type=pathlib.Path, metavar="MODEL", help="prompt lookup with its weights")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=WEIGHTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--out", type=pathlib.Path, help="results file that gets the run `decoding` or `decoding_real`")
    args = parser.parse_args()
    if unknown := [name for name in args.models if name not in MODELS]:
        parser.error(f"no model {', '.join(unknown)}: expected some of {', '.join(MODELS)}")
    device = torch.device(args.device)
    command = f"python -m benchmarks.end_to_end.bench_decoding {' '.join(args.models)}".rstrip()
    command += f" --real {args.real.name}" if args.real else ""
    command += f" --tokens {args.tokens}"
    header = results.header(device, command, roofs=False)
    makers = [functools.partial(measure, name, device, args.tokens, args.weights) for name in args.models]
    tied = [name for name in args.models if MODELS[name].tie_embeddings]
    makers += [functools.partial(speculate, name, device, args.tokens) for name in tied]
    if args.real:
        makers.append(functools.partial(speculate_for_real, args.real, device, args.tokens))
    rows = []
    for row in itertools.chain.from_iterable(make_rows() for make_rows in makers):
        rows.append(row)
        print(row, flush=True)
        if args.out:
            results.write(args.out, "decoding_real" if args.real else "decoding", header, rows)


if __name__ == "__main__":
    main()
