"""What models cost and what they are worth, side by side: the rows of pareto.json. cs336.report draws them."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cs336.evaluation import MOST_TOKENS, evaluate_saved
from cs336.evaluation.tasks import Options, read_task, run_tasks
from cs336.inference import LLM
from cs336.inference.bench import Load, run_engine
from cs336.inference.load import find_model
from cs336.utils.documents import read_texts
from cs336.utils.files import write_json
from cs336.utils.stages import Outcome, Stage, run_stages

ROWS, MEASURED = "pareto.json", "measured"
LENGTH = 128  # tokens of a prompt and of an answer at most: half the context where that is shorter
BATCH = 16  # requests at once, for throughput
REPEATS = 3  # of a latency, of which the median is told
WEIGHTS = (".safetensors", ".gguf", ".pt")


@dataclass(frozen=True)
class Row:
    """One model."""

    name: str
    bits_per_byte: float
    disk_bytes: int
    """Of its files of weights."""
    memory_bytes: int
    """Of its weights as they are kept, the largest step, and the states of BATCH sequences."""
    latency_ms: float
    """Of a token of one sequence alone, the median of gaps and of REPEATS."""
    tokens_per_second: float
    """Of BATCH sequences at once."""
    accuracy: dict[str, float] = field(default_factory=dict)
    """Of tasks, the first metric of each."""


def front(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Those that no other undercuts in one without being above it in the other, the cheapest first; of equal ones all.

    Raises ValueError where there are not as many costs as losses.
    """
    points = list(zip(costs, losses, strict=True))

    def beaten(point: tuple[float, float]) -> bool:
        return any(a <= point[0] and b <= point[1] and (a, b) != point for a, b in points)

    return sorted((i for i, point in enumerate(points) if not beaten(point)), key=points.__getitem__)


def pareto(
    models: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    text: str | os.PathLike,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    device: str = "auto",
    most_tokens: int = MOST_TOKENS,
) -> list[Row]:
    """Measure models one after the other, and write OUT/pareto.json. What was measured already is not measured again.

    Args:
        models: exports, checkpoints or run directories; with names of their own, which the rows have.
        text: text, JSON lines or parquet that none of them has read.
        tasks: KIND:FILE or TOML files, as `cs336 evaluate` takes them.
        limit: questions of a task at most.
        most_tokens: of text.

    Raises FileNotFoundError where there is no model or text, ValueError for fewer than two models, or two of one name.
    """
    paths, text = [pathlib.Path(model) for model in models], pathlib.Path(text)
    names = [path.resolve().name for path in paths]
    if len(paths) < 2 or len(set(names)) < len(names):
        raise ValueError(f"expected two or more models whose directories have names of their own, got {names}")
    for spec in tasks:
        read_task(spec, limit)
    out, stages, found = pathlib.Path(out), [], [find_model(path) for path in paths]
    files = [pathlib.Path(spec.rpartition(":")[2]) for spec in tasks]
    settings = {"tasks": list(tasks), "limit": limit, "device": device, "most_tokens": most_tokens}
    for name, path in zip(names, found, strict=True):

        def run(name: str = name, path: pathlib.Path = path) -> Outcome:
            row = _measured(name, path, text, tasks, limit, device, most_tokens)
            (out / MEASURED).mkdir(exist_ok=True)
            write_json(out / MEASURED / f"{name}.json", dataclasses.asdict(row), indent=2)
            return Outcome(f"{row.bits_per_byte:.4f} bits per byte, {row.latency_ms:.2f} ms a token")

        outputs = (f"{MEASURED}/{name}.json",)
        stages.append(Stage(name, "measure", run, outputs, (path, text, *files), settings))
    run_stages(out, stages)
    rows = [Row(**json.loads((out / MEASURED / f"{name}.json").read_text(encoding="utf-8"))) for name in names]
    write_json(out / ROWS, _told(rows, text), indent=2)
    return rows


def _told(rows: Sequence[Row], text: pathlib.Path) -> dict[str, Any]:
    """Of each row its numbers, and of which pairs it is on the front."""
    bits = [row.bits_per_byte for row in rows]
    fronts = {name: front([getattr(row, name) for row in rows], bits) for name in ("disk_bytes", "latency_ms")}
    told = [
        dataclasses.asdict(row) | {"front": [name for name, best in fronts.items() if i in best]}
        for i, row in enumerate(rows)
    ]
    return {"text": text.name, "batch": BATCH, "rows": told}


def _measured(
    name: str,
    path: pathlib.Path,
    text: pathlib.Path,
    tasks: Sequence[str],
    limit: int | None,
    device: str,
    most_tokens: int,
) -> Row:
    evaluation, _ = evaluate_saved(path, read_texts(text), text=text.name, device=device, most_tokens=most_tokens)
    alone = LLM(path, device=device, quiet=True, max_seqs=1, prefix_cache=False)
    load = Load(1, (LENGTH, LENGTH), (LENGTH, LENGTH)).within(alone.model.config.context_length)
    vocab_size, length = alone.model.config.vocab_size, sum(load.input_len)
    run_engine(alone, load.requests(vocab_size))  # what a first call does is not counted
    gaps = sorted(run_engine(alone, load.requests(vocab_size))["tpot_p50_ms"] for _ in range(REPEATS))
    accuracy = {}
    for result in run_tasks(alone, [read_task(spec, limit) for spec in tasks], Options()):
        accuracy[result.task] = next(iter(result.metrics.values())).mean
    many = LLM(alone.model, device=device, quiet=True, max_seqs=BATCH, max_len=2 * length, prefix_cache=False)
    speed = run_engine(many, dataclasses.replace(load, num_requests=BATCH).requests(vocab_size))["tok_s"]
    memory, weights = many.engine.memory, sum(t.nbytes for t in _tensors(alone.model))
    return Row(
        name,
        evaluation.bits_per_byte,
        _disk_bytes(path),
        weights + memory.activations + memory.pages + memory.slots,
        gaps[len(gaps) // 2],
        speed,
        accuracy,
    )


def _tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """Each once, where two names share one."""
    return list({t.data_ptr(): t for t in model.state_dict().values()}.values())


def _disk_bytes(path: pathlib.Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]  # not what a job keeps below
    return sum(file.stat().st_size for file in files if file.suffix in WEIGHTS)
