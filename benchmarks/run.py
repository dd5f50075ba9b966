"""Run benchmarks outside pytest, print a compact table, and write results for benchmarks/report.py.

python -m benchmarks.run ops                                # every op, whole sweep
python -m benchmarks.run ops rms_norm --quick --only native,eager
python -m benchmarks.run ops --out benchmarks/results/h200.json && python -m benchmarks.report
python -m benchmarks.run collectives --processes 4          # several processes, one for each GPU
python -m benchmarks.run ops --quick --check   # exit status 1 if we fell behind a peer
"""

import argparse
import functools
import importlib
import itertools
import multiprocessing
import os
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from types import ModuleType
from typing import Any

import torch

from benchmarks import check, harness, results
from benchmarks.ops.norms import TUNED
from cs336.ops import registry

DISTRIBUTED = ("collectives", "parallel")  # in several processes
OPS = sorted(p.stem.removeprefix("bench_") for p in (pathlib.Path(__file__).parent / "ops").glob("bench_*.py"))


def parse(argv: list[str]) -> argparse.Namespace:
    others = (
        "collectives, parallel: of several processes; offline MODEL, latency MODEL, serve URL: answers of an engine. "
        "Each has its own --help."
    )
    usage = "cs336 bench [-h] {ops,train,ladder,mixers,collectives,parallel,offline,latency,serve} ..."
    parser = argparse.ArgumentParser("cs336 bench", usage, description=__doc__.splitlines()[0], epilog=others)
    kinds = parser.add_subparsers(dest="kind", required=True, prog="cs336 bench")
    ops = kinds.add_parser("ops", help="kernels beside their peers and the roof")
    ops.add_argument("names", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; all if none is named")
    ops.add_argument("--quick", action="store_true", help="a few shapes of one size")
    ops.add_argument(
        "--only",
        metavar="A,B",
        help="these contenders: native, triton, ref, eager, compile, liger, quack; the ones "
        "that tune themselves, for minutes, run only if they are named: max-autotune, quack tuned",
    )
    ops.add_argument(
        "--check",
        type=pathlib.Path,
        nargs="?",
        const=pathlib.Path(),
        metavar="FILE",
        help="exit 1 if we fell behind a peer since this results file; the committed one of this device by default",
    )
    ops.add_argument("--workers", type=int, metavar="N", help="processes that compile first, before a whole sweep")
    ops.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="start nothing after (%(default)s)")
    train = kinds.add_parser("train", help="tokens a second of training against plain PyTorch")
    sizes = "124M, 350M, 774M, 1.5B, llama-1B, quickstart or tiny"
    train.add_argument("models", nargs="*", default=["124M"], metavar="MODEL", help=sizes)
    train.add_argument("--batch", type=int, help="sequences a step; 32 of 1,024 tokens, of larger models fewer")
    train.add_argument("--blocks", type=int, default=8, help="alternating blocks of each, one of them untimed")
    train.add_argument("--steps", type=int, help="in a block; so many that it takes most of a second on an H200")
    train.add_argument("--data", type=pathlib.Path, help="token shards; Zipf-distributed noise if none are given")
    train.add_argument("--no-compile", action="store_true")
    kinds_of_ours = ("default", "deterministic", "bf16_weights", "fp8")
    train.add_argument("--ours", nargs="+", default=["default"], choices=kinds_of_ours, help="with which options")
    train.add_argument("--whole", action="store_true", help="plain PyTorch compiled whole, too: for minutes, if deep")
    ladder = kinds.add_parser("ladder", help="plain PyTorch, and our pieces put in one after the other")
    ladder.add_argument("model", nargs="?", default="124M", metavar="MODEL", help="124M, 350M, 774M, 1.5B or tiny")
    ladder.add_argument("--batch", type=int, default=24, help="sequences a step; of 24 all rungs fit an H200")
    ladder.add_argument("--blocks", type=int, default=4, help="a rung, one of them untimed")
    ladder.add_argument("--steps", type=int, default=20, help="in a block")
    ladder.add_argument("--data", type=pathlib.Path, help="token shards; Zipf-distributed noise if none are given")
    ladder.add_argument("--no-compile", action="store_true")
    mixers = kinds.add_parser("mixers", help="training and decoding of each mixer, and the recurrences beside fla's")
    mixers.add_argument("names", nargs="*", metavar="MIXER", help="or a recurrence; all, if none is named")
    mixers.add_argument("--size", default="350M", choices=("tiny", "350M"), help="of the model (%(default)s)")
    mixers.add_argument("--tokens", type=int, default=16384, help="a step (%(default)s)")
    mixers.add_argument("--compile", action="store_true", help="each layer")
    for kind in (ops, train, ladder, mixers):
        kind.add_argument("--out", type=pathlib.Path, metavar="FILE", help="results file to put the rows into")
        kind.add_argument("--commit", help="to record where there is no git checkout")
    options = parser.parse_args(argv)
    if options.kind == "ops" and (unknown := [name for name in options.names if name not in OPS]):
        parser.error(f"no benchmark of {', '.join(unknown)}: expected some of {', '.join(OPS)}")
    try:
        if options.out:
            results.read(options.out)  # before the work, not after it
        if options.kind == "ops" and options.check is not None:
            if options.check == pathlib.Path():
                options.check = results.of_device(harness.default_device())
            check.comparable(results.read(options.check), options.names or OPS, options.check)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(argv: list[str]) -> int:
    """The exit status: 1 if one of our own variants failed or disagreed with what it is compared with."""
    if argv and argv[0] in DISTRIBUTED:
        return distributed(*argv)
    if argv and argv[0].startswith("--") and argv[0] != "--help":
        argv = ["ops", *argv]  # `cs336 bench --check`
    options = parse(argv)
    device = harness.default_device()
    header = results.header(device, command(argv), options.commit)
    print(
        f"{header['gpu'] or 'CPU'}, torch {header['torch']}, copy roof {header['roofs']['copy_gbps']} GB/s", flush=True
    )
    return {"ops": ops, "train": train, "ladder": ladder, "mixers": mixers}[options.kind](options, device, header)


def distributed(name: str, *argv: str) -> int:
    """benchmarks/end_to_end/bench_NAME.py under torchrun, in --processes: one for each GPU, two on a CPU."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count() or 2)
    options, rest = parser.parse_known_args(argv)
    if options.processes < 1:
        raise SystemExit(f"--processes must be 1 or more, got {options.processes}")
    importlib.import_module(f"benchmarks.end_to_end.bench_{name}").parse(rest)  # --help and mistakes, once
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.processes}"]
    found = os.pathsep.join(filter(None, [str(results.ROOT), os.environ.get("PYTHONPATH")]))
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": found}  # from any working directory
    return subprocess.run([*torchrun, "-m", f"benchmarks.end_to_end.bench_{name}", *rest], env=environment).returncode


def command(argv: list[str]) -> str:
    """What a reader would type: without this machine's paths."""
    words, rest = [], iter(argv)
    for word in rest:
        name, joined, _ = word.partition("=")
        if name in ("--out", "--commit", "--data"):
            words += ["--data", "TOKENS"] if name == "--data" else []
            joined or next(rest)
        else:
            words.append(word)
    return shlex.join(["python", "-m", "benchmarks.run", *words])


def default_workers(device: torch.device) -> int:
    """Each takes a core or two, and up to 4 GiB of the GPU."""
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return min(8, (os.cpu_count() or 1) // 2, memory // (4 << 30))


def compile_cases(names: list[str], size: str, workers: int) -> None:
    """Fill the compilers' caches on disk from several processes: one after another, compiling is most of a sweep."""
    jobs = [
        (name, size, i)
        for name in names
        for i, case in enumerate(importlib.import_module(f"benchmarks.ops.bench_{name}").cases(size))
        if "compile" in case.contenders
    ]
    if not jobs:
        return
    start = time.monotonic()
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(_compile_case, *zip(*jobs, strict=True)))
    except RuntimeError as error:  # it only saves time: go on without
        print(f"compiling ahead stopped: {error}")
    print(f"compiled ahead in {workers} processes: {time.monotonic() - start:.0f} s", flush=True)


def _compile_case(name: str, size: str, index: int) -> None:
    cases = importlib.import_module(f"benchmarks.ops.bench_{name}").cases(size)
    harness.rows(next(itertools.islice(cases, index, None)), harness.default_device(), timed=False)


def ops(options: argparse.Namespace, device: torch.device, header: dict[str, Any]) -> int:
    size = "tiny" if device.type == "cpu" else "quick" if options.quick else "full"
    only = set(options.only.split(",")) if options.only else None
    start, names, failed = time.monotonic(), options.names or OPS, []
    behind: list[str] = []
    workers = default_workers(device) if options.workers is None else options.workers
    if size == "full" and workers and (only is None or only & {"compile", "quack"}):
        compile_cases(names, size, workers)
    left = start + options.limit - time.monotonic()  # compiling ahead took the rest
    start = time.monotonic()
    for i, name in enumerate(names, 1):
        deadline = start + left * i / len(names)
        keep = functools.partial(results.write, options.out, name, header) if options.out else None
        rows = sweep(importlib.import_module(f"benchmarks.ops.bench_{name}"), size, device, only, deadline, keep)
        failed += [row for row in rows if "failed" in row and row["variant"] in registry.NAMESPACE]
        print("\n".join(summary(rows)), flush=True)
        if options.check:
            try:
                behind += check.regressions(rows, results.read(options.check)[name]["rows"])
            except ValueError as nothing:
                behind.append(f"{name}: {nothing}")
    for row in failed:
        print(f"FAILED {label(row)} {row['variant']}: {row['failed']}")
    for sentence in behind:
        print(sentence)
    return 1 if failed or behind else 0


def train(options: argparse.Namespace, device: torch.device, header: dict[str, Any]) -> int:
    from benchmarks.end_to_end import bench_train

    if unknown := [name for name in options.models if name not in bench_train.MODELS]:
        raise SystemExit(f"no model {', '.join(unknown)}: expected some of {', '.join(bench_train.MODELS)}")
    if options.blocks < 2:
        raise SystemExit(f"--blocks must be 2 or more, since the first is not timed; got {options.blocks}")
    batches = {name: options.batch or bench_train.BATCH[name] for name in dict.fromkeys(options.models)}
    ours, plain = dict.fromkeys(options.ours), ["plain whole"] * options.whole + ["plain"]
    names = [f"cs336 {option}".removesuffix(" default") for option in ours] + plain
    table = "_".join(["train", *(option for option in ours if option != "default")])
    settings = {"blocks": options.blocks, "steps": options.steps, "data": options.data}
    settings |= {"compile": not options.no_compile}
    if device.type == "cuda":
        makers = bench_train.compare_apart(batches, names, **settings)
    else:
        one = functools.partial(bench_train.compare, **settings)
        makers = (functools.partial(one, name, names, batch_size=size) for name, size in batches.items())
    rows: list[dict[str, Any]] = []
    for name, make in zip(batches, makers, strict=True):
        try:
            found = make()
        except ValueError as error:
            print(f"FAILED {name}: {error}", flush=True)
            continue
        rows += found
        _print_training(found)
        if options.out:
            results.write(options.out, table, header, rows)
    return 0 if len(rows) == len(names) * len(batches) else 1


def _print_training(rows: list[dict[str, Any]]) -> None:
    """The last is the plain model's."""
    for row in rows:
        mfu = f"{row['mfu']:.1f} % MFU" if row["mfu"] else "MFU unknown"
        memory = f"  {row['bytes'] / 2**30:.2f} GiB" if row["bytes"] else ""
        memory += f", predicted {row['predicted_bytes'] / 2**30:.2f}" if memory and row["predicted_bytes"] else ""
        print(
            f"{row['model']} {row['variant']:20} {row['tokens_per_second']:11.1f} tokens/s "
            f"{row['tokens_per_second'] / rows[-1]['tokens_per_second']:.3f}x  {1e3 * row['seconds']:9.2f} ms a step "
            f"(spread {row['spread']:.1%})  {mfu}  loss {row['loss']:.4f}{memory}",
            flush=True,
        )


def ladder(options: argparse.Namespace, device: torch.device, header: dict[str, Any]) -> int:
    from benchmarks.end_to_end import bench_ladder, bench_train

    if options.model not in bench_train.MODELS:
        raise SystemExit(f"no model {options.model}: expected one of {', '.join(bench_train.MODELS)}")
    settings = {"batch_size": options.batch, "blocks": options.blocks, "steps": options.steps, "data": options.data}
    try:
        made = bench_ladder.climb(options.model, **settings, compile=not options.no_compile)
    except ValueError as error:
        raise SystemExit(f"{options.model}: {error}") from None
    for row in made:
        memory = f"{row['bytes'] / 2**30:6.1f} GiB  " if row["bytes"] else ""
        print(
            f"{row['variant']:24} {row['tokens_per_second']:11.1f} tokens/s  {1e3 * row['seconds']:9.2f} ms a step "
            f"(spread {row['spread']:.1%})  {made[0]['seconds'] / row['seconds']:.3f}x  {memory}loss {row['loss']:.4f}",
            flush=True,
        )
    if options.out:
        results.write(options.out, "ladder", header, made)
    return 0


def mixers(options: argparse.Namespace, device: torch.device, header: dict[str, Any]) -> int:
    from benchmarks.end_to_end import bench_mixers

    made = []
    for row in bench_mixers.rows(options.names, options.size, options.tokens, compile=options.compile):
        print(bench_mixers.line(row), flush=True)
        made.append(row)
        if options.out:
            results.write(options.out, "mixers", header, made)
    return 1 if any("failed" in row and row["variant"] != "fla" for row in made) else 0


def sweep(
    module: ModuleType,
    size: str,
    device: torch.device,
    only: set[str] | None,
    deadline: float,
    keep: Callable[[list[dict[str, Any]]], None] | None = None,
) -> list[dict[str, Any]]:
    """Rows of the cases that start before the deadline, then of the public call's host time.

    keep: gets all rows so far after each case, so that a run that is cut short leaves what it has.
    """
    rows: list[dict[str, Any]] = []
    cases = list(module.cases(size))
    for i, case in enumerate(cases):
        if time.monotonic() > deadline:
            print(f"time limit: {len(cases) - i} of {len(cases)} cases not run, from {case} on")
            break
        rows += (found := harness.rows(case, device, only or case.contenders.keys() - set(TUNED)))
        print(line(found) if found else f"{case}: none of {only}", flush=True)
        if keep:
            keep(rows)
    host = module.host(device) if hasattr(module, "host") else []
    for _, group in itertools.groupby(host, label):
        print(line(list(group)))
    if keep:
        keep(rows + host)
    return rows + host


def label(row: dict[str, Any]) -> str:
    return f"{row['op']} {row['pass']} {'x'.join(map(str, row['shape']))} {row['dtype']}"


def line(rows: list[dict[str, Any]]) -> str:
    """One case: the first contender's time, rate and percent of roof, then how many times slower the others are."""
    timed = [row for row in rows if "seconds" in row]
    if not timed:
        return f"{label(rows[0]):44} nothing ran: {rows[0].get('skipped') or rows[0].get('failed')}"
    first = timed[0]
    rate = f" {first['percent_of_roof']:5.1f} %" if "percent_of_roof" in first else ""
    ratios = "".join(f"  {row['variant']} {row['seconds'] / first['seconds']:.2f}x" for row in timed[1:])
    return f"{label(first):44} {first['variant']} {first['seconds'] * 1e6:9.2f} us{rate}{ratios}"


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Who is not here, what broke, and where native is behind by more than the noise of both."""
    lines = []
    for kind in ("skipped", "failed"):
        reasons: dict[tuple[str, str], int] = {}
        for row in rows:
            if kind in row:
                key = row["variant"], row[kind]
                reasons[key] = reasons.get(key, 0) + 1
        lines += [f"{kind} {variant} in {count} cases: {reason}" for (variant, reason), count in reasons.items()]
    for _, group in itertools.groupby(rows, label):
        timed = {row["variant"]: row for row in group if "seconds" in row}
        native = timed.pop("native", None)
        for variant, row in timed.items() if native else ():
            if row["seconds"] * (1 + row["spread"] + native["spread"]) < native["seconds"]:
                lines.append(
                    f"native behind {variant}: {label(row)}, {native['seconds'] / row['seconds']:.2f}x its time"
                )
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
