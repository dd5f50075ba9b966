"""What a model loses on held-out text by each way of quantising it, beside torchao's and llm-compressor's ways where
those are installed.

    python -m benchmarks.end_to_end.bench_quantization MODEL TEXT --out benchmarks/results/cpu.json

MODEL is what cs336 compress takes. The text is cut into windows; every tenth is measured, and GPTQ and AWQ read some of
the others. Weights alone are quantised, embedding and head left as they are.
"""

import argparse
import functools
import itertools
import os
import pathlib
import platform
import tempfile
from collections.abc import Iterator

import torch

from benchmarks import results
from benchmarks.end_to_end import quantization_peers
from benchmarks.end_to_end.quantization_peers import Batches, Method
from cs336.inference.load import load_model, load_tokenizer
from cs336.inference.quantization.awq import awq_block
from cs336.inference.quantization.gptq import gptq, gptq_block
from cs336.inference.quantization.layerwise import Scheme, fill_block, quantize_blocks_
from cs336.inference.quantization.rounding import nearest
from cs336.models import Transformer
from cs336.nn.quantized import BITS


def by_block(method, scheme: Scheme) -> Method:
    def run(model: Transformer, batches: Batches) -> None:
        with tempfile.TemporaryDirectory() as folder:
            quantize = functools.partial(method, scheme=scheme)
            place = {"device": model.device, "say": lambda line: None}
            quantize_blocks_(model, batches, scheme, quantize, pathlib.Path(folder), **place)

    return run


def rounded(scheme: Scheme, bits: int | None = None) -> Method:
    def run(model: Transformer, batches: Batches) -> None:
        for old, new in scheme.replace(model.layers).values():
            grid = nearest(old.weight, bits or BITS[scheme.method], new.group, asymmetric=scheme.zeros)
            new.fill(grid, old.bias)

    return run


def gptq_of_bits(block, inputs, scheme: Scheme, bits: int) -> str:
    def quantize(weight, group, read):
        return gptq(weight, read.hessian, bits=bits, group=group, act_order=scheme.order)

    return fill_block(block, inputs, scheme, quantize)


def methods(group: int) -> Iterator[tuple[str, Method]]:
    yield "unquantised", lambda model, batches: None
    yield "int8", rounded(Scheme("int8", group))
    yield "int4", rounded(Scheme("int4", group))
    yield "int4 asymmetric", rounded(Scheme("int4", group, zeros=True))
    yield "gptq int4", by_block(gptq_block, Scheme("int4", group))
    yield "gptq int4 act-order", by_block(gptq_block, Scheme("int4", group, order=True))
    yield "awq int4 asymmetric", by_block(awq_block, Scheme("int4", group, zeros=True))
    yield "3 bits", rounded(Scheme("int4", group), bits=3)
    yield "gptq 3 bits act-order", by_block(functools.partial(gptq_of_bits, bits=3), Scheme("int4", group, order=True))
    yield from quantization_peers.methods(group)


@torch.inference_mode()
def bits_per_byte(model: Transformer, windows: torch.Tensor, num_bytes: int) -> float:
    loss = sum(float(model(row[None, :-1], targets=row[None, 1:])) for row in windows.to(model.device))
    return loss / torch.log(torch.tensor(2.0)).item() / num_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--measured", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="these, by the names of the table")
    parser.add_argument("--out", type=pathlib.Path, help="results file that gets the run `quantization`")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    ids = torch.tensor(tokenizer.encode(args.text.read_text(encoding="utf-8")))
    whole = ids[: len(ids) // args.context * args.context].view(-1, args.context)
    held_out = whole[9::10][: args.measured]
    read = whole[[i for i in range(len(whole)) if i % 10 != 9]]
    batches = list(read[:: max(1, len(read) // args.samples)][: args.samples].split(8))
    num_bytes = sum(len(tokenizer.decode(row[1:].tolist()).encode()) for row in held_out)
    print(f"| method | bits per byte of {num_bytes:,} bytes | MiB of layers |\n| --- | ---: | ---: |")
    peers = {name: results.version(name) for name in ("torch", "torchao", "transformers", "llmcompressor")}
    command = f"python -m benchmarks.end_to_end.bench_quantization {args.model.name} {args.text.name}"
    command += f" --context {args.context} --samples {args.samples} --measured {args.measured} --group {args.group}"
    header = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "peers": peers}
    header |= {"python": platform.python_version(), "command": command, "bytes": num_bytes}
    header |= {"commit": results.describe_commit(), "date": results.today()}
    rows = []
    for name, method in methods(args.group):
        if args.only and name not in args.only:
            continue
        model = load_model(args.model, args.device, torch.float32)
        model = method(model, batches) or model
        bits = bits_per_byte(model, held_out, num_bytes)
        size = sum(t.nbytes for t in itertools.chain(model.layers.buffers(), model.layers.parameters())) / 2**20
        rows.append({"model": args.model.stem, "method": name, "bits_per_byte": round(bits, 4), "mib": round(size, 1)})
        print(f"| {name} | {bits:.4f} | {size:.1f} |", flush=True)
        if args.out:
            results.write(args.out, "quantization", header, rows)


if __name__ == "__main__":
    main()
