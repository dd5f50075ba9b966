"""Registers, threads and shared memory of the kernels that native calls launch, as the profiler saw them.

python -m benchmarks.launches attention attention_varlen --out FILE
"""

import argparse
import importlib
import json
import pathlib
import re
import shlex
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

import torch

from benchmarks import harness, results

Event = dict[str, Any]


def calls(name: str, device: torch.device) -> Iterable[harness.Call]:
    """One native call of each case of benchmarks/ops/bench_NAME.py that has one."""
    for case in importlib.import_module(f"benchmarks.ops.bench_{name}").cases("full"):
        try:
            yield case.contenders["native"](*case.inputs(device))
        except NotImplementedError:
            continue


def kernels(events: Iterable[Event], word: str) -> list[dict[str, Any]]:
    """A row for each kernel among a trace's events whose name has the word: what every launch of it takes."""
    rows: dict[str, dict[str, Any]] = {}
    for event in events:
        if event.get("cat") != "kernel" or word not in event["name"]:
            continue
        taken = event["args"]
        row = {"kernel": short(event["name"]), "registers": taken["registers per thread"]}
        row |= {"threads": taken["block"][0], "shared_bytes": taken["shared memory"]}
        rows.setdefault(row["kernel"], row)
    return sorted(rows.values(), key=lambda row: row["kernel"])


def short(name: str) -> str:
    """A kernel and its template arguments, without namespaces, return type and parameters."""
    name = re.sub(r"\([\w:]+\)(?=\d)", "", name).split("(")[0].removeprefix("void ")
    return re.sub(r"\b(?:\w+::)+", "", name).replace("__nv_bfloat16", "bf16").replace(" >", ">")


def profile(names: list[str], device: torch.device) -> list[Event]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for name in names:
            for call in calls(name, device):
                call()
        harness.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        trace = pathlib.Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        return json.loads(trace.read_text())["traceEvents"]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.launches", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="OP", help="as `python -m benchmarks.run ops` calls them")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="results file to put OP_launches into")
    parser.add_argument("--commit", help="to record where there is no git checkout")
    options = parser.parse_args(argv)
    device = harness.default_device()
    if device.type != "cuda":
        print("no kernel is launched on a CPU: run this where torch.cuda.is_available()")
        return 1
    word = options.names[0]
    rows = kernels(profile(options.names, device), word)
    for row in rows:
        print(f"{row['registers']:4} registers {row['threads']:5} threads {row['shared_bytes']:7} B  {row['kernel']}")
    if options.out:
        command = shlex.join(["python", "-m", "benchmarks.launches", *options.names])
        header = results.header(device, command, options.commit, roofs=False)
        results.write(options.out, f"{word}_launches", header, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
