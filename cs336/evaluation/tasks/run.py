"""Reads tasks, asks a model, and writes what it said.

    tasks = [read_task("gsm8k:gsm8k-test.jsonl"), read_task("arc.toml")]
    results = run_tasks(LLM("runs/mine"), tasks, Options(), shots=5)
    save_results("results.json", results)

A task is a kind and a file of JSON lines, written KIND:FILE, or a TOML file that says more:

    kind = "choice"
    data = "arc_easy.jsonl"          # beside this file, if it is not absolute
    shots = "arc_easy_train.jsonl"   # examples; without it the task's other items
    prompt = "Q: {question}\\nA:"     # in place of the kind's own, with the fields of a row
"""

import dataclasses
import json
import math
import os
import pathlib
import random
from codecs import BOM_UTF8
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cs336.data.decontaminate import overlaps
from cs336.evaluation.tasks.generation import GSM8K, MATH, Instructions, Pairs, Program, Refusals
from cs336.evaluation.tasks.likelihood import Choice, Continuation, Letters, Text
from cs336.evaluation.tasks.task import Answered, Item, Kind, Metric, Model, Options, metrics
from cs336.utils.config import parse, read_table
from cs336.utils.documents import open_bytes, unpacking
from cs336.utils.files import write_json

_ALL: list[Kind] = [
    Choice(), Letters(), Continuation(), Text(), GSM8K, MATH, Program("mbpp"), Program("humaneval"), Instructions(),
    Refusals(), Pairs(),
]  # fmt: skip
KINDS = {kind.name: kind for kind in _ALL}


@dataclass(frozen=True)
class TaskFile:
    """What a TOML file says of a task."""

    kind: str
    data: pathlib.Path
    shots: pathlib.Path | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class Task:
    name: str
    kind: Kind
    items: tuple[Item, ...]
    examples: tuple[Item, ...] | None = None
    """To choose shots from; the other items if None."""


@dataclass(frozen=True)
class Results:
    """Of one task."""

    task: str
    kind: str
    metrics: dict[str, Metric]
    shots: int
    rows: list[Answered]
    contaminated: dict[int, str] | None = None
    """Items that share words with the training data, by their place, and the words; None if nobody looked."""
    clean: dict[str, Metric] = field(default_factory=dict)
    """The metrics over the other items, where some are contaminated."""


def read_task(spec: str | os.PathLike, limit: int | None = None) -> Task:
    """A task from KIND:FILE or a TOML file. limit: read no more items than this, the first ones.

    Raises ValueError, with the file and the line, for rows of another form, and FileNotFoundError.
    """
    text = os.fspath(spec)
    kind, colon, file = text.partition(":")
    if colon and kind in KINDS:
        described = TaskFile(kind, pathlib.Path(file))
    elif text.endswith(".toml"):
        described = parse(TaskFile, read_table(text))
    else:
        raise ValueError(f"{text} is no task: expected a .toml file, or KIND:FILE with a kind of {', '.join(KINDS)}")
    if described.kind not in KINDS:
        raise ValueError(f"{text}: there is no kind {described.kind!r}: expected one of {', '.join(KINDS)}")
    place = pathlib.Path(text).parent if not colon else pathlib.Path()
    found, prompt = KINDS[described.kind], described.prompt
    items = _items(found, place / described.data, prompt, limit)
    examples = _items(found, place / described.shots, prompt, None) if described.shots else None
    return Task(pathlib.Path(described.data).name.partition(".")[0], found, items, examples)


def _items(kind: Kind, path: pathlib.Path, prompt: str | None, limit: int | None) -> tuple[Item, ...]:
    items: list[Item] = []
    with unpacking(path), open_bytes(path) as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and len(items) >= limit:
                break
            if not line.strip():
                continue
            try:
                row = json.loads(line.removeprefix(BOM_UTF8))
                item = kind.read(row)
                if prompt is not None:
                    item = dataclasses.replace(item, prompt=prompt.format(**row), heading="")
            except KeyError as error:
                raise ValueError(f"{path}:{number}: a row of {kind.name} has no {error}") from None
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: this is no row of {kind.name}: {error}") from None
            items.append(item)
    if not items:
        raise ValueError(f"{path} has no items")
    return tuple(items)


def run_tasks(
    model: Model,
    tasks: Sequence[Task],
    options: Options = Options(),  # noqa: B008 (frozen)
    *,
    shots: int = 0,
    training_text: Iterable[str] | None = None,
) -> list[Results]:
    """Ask a model, and score what it says.

    Args:
        shots: examples before each question, chosen by the seed and the question's place, never the question itself.
        training_text: documents of which no item should have 13 words in a row.

    Raises ValueError for more shots than there are examples, and for a task that lacks what it needs.
    """
    shared = _contamination(tasks, training_text)
    results = []
    for task, found in zip(tasks, shared, strict=True):
        prompts = [_prompt(task, i, shots, options) for i in range(len(task.items))]
        rows = task.kind.answer(model, task.items, prompts, options)
        clean = [row for i, row in enumerate(rows) if i not in found] if found else []
        results.append(Results(task.name, task.kind.name, metrics(rows), shots, rows, found, metrics(clean)))
    return results


def _prompt(task: Task, place: int, shots: int, options: Options) -> Any:
    """The text that a model continues, or with `chat` the messages that it answers."""
    item, chosen = task.items[place], _shots(task, place, shots, options.seed)
    if options.chat:
        turns = [turn for e in chosen for turn in (("user", e.prompt), ("assistant", e.target.strip()))]
        (first, text), *others = [*turns, ("user", item.prompt)]
        return [{"role": role, "content": text} for role, text in [(first, item.heading + text), *others]]
    return item.heading + "".join(f"{e.prompt}{e.target}{task.kind.separator}" for e in chosen) + item.prompt


def _shots(task: Task, place: int, count: int, seed: int) -> list[Item]:
    if not count:
        return []
    item = task.items[place]
    others = task.examples if task.examples is not None else task.items[:place] + task.items[place + 1 :]
    others = tuple(e for e in others if e.target and (e.prompt, e.target) != (item.prompt, item.target))
    if len(others) < count:
        raise ValueError(f"{task.name} has {len(others)} examples with an answer to show, fewer than {count} shots")
    return random.Random(f"{seed}:{place}").sample(others, count)


def _contamination(tasks: Sequence[Task], training_text: Iterable[str] | None) -> list[dict[int, str] | None]:
    if training_text is None:
        return [None] * len(tasks)
    texts = [f"{item.prompt}\n{item.target}" for task in tasks for item in task.items]
    found, start, split = overlaps(texts, training_text), 0, []
    for task in tasks:
        size = len(task.items)
        split.append({i: found[start + i] for i in range(size) if start + i in found})
        start += size
    return list(split)


def save_results(path: str | os.PathLike, results: Sequence[Results], **about: Any) -> pathlib.Path:
    """Write results with every prompt and answer as JSON, and return the path. about: facts to write before them."""
    path = pathlib.Path(path)
    write_json(path, _finite({**about, "tasks": [dataclasses.asdict(r) for r in results]}), indent=1, default=str)
    return path


def _finite(value: Any) -> Any:
    """NaN and infinities are not JSON: null in their place."""
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
