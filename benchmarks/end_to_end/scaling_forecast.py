"""What recipes/scaling/ladder.sh wrote, as results: the ladder's runs, its law, the forecast, and its grade if given.

python -m benchmarks.end_to_end.scaling_forecast DIRECTORY --text "..." --out benchmarks/results/cpu.json
"""

import argparse
import json
import pathlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import results
from cs336.experiments import Ledger
from cs336.scaling import ComputeFit, Fit, read_points
from cs336.scaling.forecast import read
from cs336.scaling.saved import load_compute_fit, load_fit

Row = dict[str, Any]
NAMES = ("E", "A", "B", "alpha", "beta", "parameter_exponent")
COMPUTE_NAMES = ("E", "A", "gamma")


def rows(directory: pathlib.Path) -> Iterator[Row]:
    yield from _runs(directory / "ladder", "rung")
    compute = load_compute_fit(directory / "law.json")
    yield _law(load_fit(directory / "law.json"), NAMES) if compute is None else _law(compute, COMPUTE_NAMES)
    for made in read(directory / "forecasts.jsonl"):
        yield {"job": "forecast"} | asdict(made) | {"error": made.error, "covered": made.covered}
    for target in sorted(directory.glob("target*/ledger.sqlite")):
        yield from _runs(target.parent, "target")


def _runs(study: pathlib.Path, job: str) -> Iterator[Row]:
    points, entries = read_points(study), [e for e in Ledger(study).entries() if e.state == "done"]
    for i, entry in enumerate(entries):
        seconds = round(entry.spent.seconds or 0.0, 1)  # by the clock
        counts = {name: int(getattr(points, name)[i]) for name in ("parameters", "tokens", "flops")}
        yield {"job": job} | counts | {"loss": round(float(points.loss[i]), 4), "seconds": seconds}


def _law(fit: Fit | ComputeFit, names: tuple[str, ...]) -> Row:
    numbers = {name: [getattr(fit.law, name), *fit.interval(name)] for name in names}
    return {"job": "law"} | numbers | {"residual_rms": float((fit.residuals**2).mean() ** 0.5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--text", required=True, help="what the tokens are of")
    parser.add_argument("--load", default="", help="what else the machine did")
    parser.add_argument("--settings", default="", help="variables that ladder.sh was given, as the shell takes them")
    parser.add_argument("--run", default="scaling_forecast", metavar="NAME", help="of the results")
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="FILE")
    options = parser.parse_args()
    command = f"{options.settings} recipes/scaling/ladder.sh TOKENS DIRECTORY forecast".strip() + ", then grade"
    header: Row = {"text": options.text, "load": options.load}
    if torch.cuda.is_available():
        header |= results.header(torch.device("cuda"), command, roofs=False)
    else:
        header |= results.cpu_header(command)
    found = list(rows(options.directory))
    results.write(options.out, options.run, header, found)
    print("\n".join(json.dumps(row) for row in found))


if __name__ == "__main__":
    main()
