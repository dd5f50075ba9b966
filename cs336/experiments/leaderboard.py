"""Leaderboards as rules over local files: a budget, a device, a text, and the lowest number of bits wins.

A rule is RULE.toml in boards/, with our best recipe for it. A submission is a folder:

    submission.json    rule, loss, what it took, what it ran on
    recipe.toml        everything but the data: `cs336 leaderboard run RULE --recipe recipe.toml ...`
    reproduce.sh       that command
    log.jsonl          the run's rows
    samples.txt        what the model writes

Models with other tokenizers have other losses, so submissions are ranked by bits per byte, which for one tokenizer is
the order of the losses.
"""

import json
import math
import os
import pathlib
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from cs336.data import read_meta
from cs336.evaluation import evaluate
from cs336.experiments.train import reached
from cs336.inference.load import load_model
from cs336.inference.samples import sampler
from cs336.training import TrainConfig, Trainer
from cs336.training.budget import Budget
from cs336.training.identity import kept_tokenizer
from cs336.utils import config as configs
from cs336.utils.commit import commit
from cs336.utils.files import write_text
from cs336.utils.stages import Interrupted

BOARDS = pathlib.Path(__file__).with_name("boards")
SLACK = 0.01  # of a time budget: its last step may end after it
EVAL_TOKENS = 10_000_000  # of the final measure, spread evenly
OWN = ("run_dir", "data", "budget")  # keys that the rule and the command say, not the recipe


@dataclass(frozen=True)
class Rule:
    """What a board compares."""

    title: str
    text: str
    """Which data the directory given with --data has to hold."""
    budget: str
    device: Literal["one GPU", "any"]
    recipe: dict[str, Any]
    """Our best so far: keys of `cs336 train`. model.vocab_size follows from the data if it is left out."""

    def __post_init__(self):
        if Budget.parse(self.budget).kind == "steps":
            raise ValueError(f"a board's budget is time, FLOPs or tokens, got {self.budget}")


def rules() -> list[str]:
    """The names of the boards."""
    return sorted(path.stem for path in BOARDS.glob("*.toml"))


def load_rule(name: str) -> Rule:
    """A board by its name. Raises ValueError for one that there is not."""
    if name not in rules():
        raise ValueError(f"there is no rule {name!r}; there are {', '.join(rules())}")
    return configs.load(Rule, BOARDS / f"{name}.toml")


def recipe_config(rule: Rule, recipe: Mapping[str, Any], data: pathlib.Path, directory: pathlib.Path) -> TrainConfig:
    """A recipe under a rule. Raises ValueError for one that says what the rule does, or does not fit the data."""
    if own := [key for key in OWN if key in recipe]:
        raise ValueError(f"a recipe leaves {', '.join(own)} to the rule and the command")
    meta = read_meta(data / "train")
    model = {"vocab_size": -(-meta.vocab_size // 64) * 64} | dict(recipe.get("model", {}))
    sides = {"train": str(data / "train"), "val": str(data / "val")}
    table = dict(recipe) | {"model": model, "data": sides, "budget": rule.budget, "run_dir": str(directory / "run")}
    return TrainConfig.from_table(table)


def compete(
    name: str, data: pathlib.Path, directory: pathlib.Path, recipe: Mapping[str, Any] | None = None, author: str = ""
) -> dict[str, Any]:
    """Train a recipe (ours if None) under a rule, or continue it, and write the submission into `directory`.

    Raises ValueError for what breaks the rule, Interrupted where a signal stopped the run; the same call continues.
    """
    rule = load_rule(name)
    config = recipe_config(rule, rule.recipe if recipe is None else recipe, data, directory)
    tokenizer = kept_tokenizer(config.data.train)
    if tokenizer is None:
        raise ValueError(f"no tokenizer.json lies beside {config.data.train}: bits per byte and samples need it")
    if rule.device == "one GPU" and not torch.cuda.is_available():
        raise ValueError(f"the rule {name} is for one GPU, and torch sees none here; of any machine are: {_any()}")
    sample = sampler(tokenizer, ["", "The"], config.seed)
    done = Trainer(config, tokenizer=tokenizer, sample=sample).train()
    if not done.finished or done.export is None:
        raise Interrupted
    assert config.data.val is not None
    model = load_model(done.export, config.device)
    measured = evaluate(model, tokenizer, config.data.val, most_tokens=EVAL_TOKENS)
    meta = read_meta(config.data.val)
    assert meta is not None  # evaluate has read it
    facts = json.loads((config.run_dir / "run.json").read_text(encoding="utf-8"))
    entry = {
        "rule": name,
        "budget": rule.budget,
        "author": author,
        "loss": measured.loss,
        "bits_per_byte": measured.bits_per_byte,
        "text": f"{meta.documents:,} documents, {meta.text_bytes / 1e6:.2f} MB",
        "tokenizer": f"{tokenizer.vocab_size:,} tokens",
        "parameters": facts["parameters"],
        "steps": done.step,
        "tokens": done.tokens,
        "flops": reached(config.run_dir).flops,
        "seconds": done.seconds,
        "device": facts["device"],
        "torch": facts["torch"],
        "commit": commit(),
        "data": facts["data"],
    }
    if broken := breaks(entry, rule):
        raise ValueError(f"the run breaks the rule {name}: {broken}")
    _write(directory, entry, config, sample(model), name)
    return entry


def _any() -> str:
    return ", ".join(name for name in rules() if load_rule(name).device == "any")


def breaks(entry: Mapping[str, Any], rule: Rule) -> str | None:
    """How a submission breaks a rule, if it does."""
    budget = Budget.parse(rule.budget)
    used = entry.get(budget.kind)
    slack = SLACK if budget.kind == "seconds" else 0.0
    if not isinstance(used, int | float) or not used <= budget.amount * (1 + slack):
        return f"{used:g} {budget.kind} of {budget.amount:g}" if isinstance(used, int | float) else f"no {budget.kind}"
    if entry.get("budget") != rule.budget:
        return f"it was made under a budget of {entry.get('budget')}, the rule's is {rule.budget}"
    if rule.device == "one GPU" and str(entry.get("device", "CPU")).startswith("CPU"):
        return "it was trained on a CPU"
    return None


def _write(
    directory: pathlib.Path, entry: dict[str, Any], config: TrainConfig, samples: Iterable[Mapping[str, Any]], name: str
) -> None:
    table = {key: value for key, value in configs.to_table(config).items() if key not in OWN}
    write_text(directory / "recipe.toml", configs.dumps(table))
    command = ["cs336", "leaderboard", "run", name, "--recipe", "recipe.toml", "--data", "DATA", "--directory", "again"]
    said = "# DATA: a directory with token shards in train/ and val/."
    write_text(directory / "reproduce.sh", f"{said}\n{shlex.join(command)}\n")
    shutil.copyfile(config.run_dir / "metrics.jsonl", directory / "log.jsonl")
    texts = [f"{row['prompt']}{row['text']}" for row in samples]
    write_text(directory / "samples.txt", "\n\n----\n\n".join(texts) + "\n")
    write_text(directory / "submission.json", json.dumps(entry, indent=1) + "\n")  # last: a folder with it is whole


# ---- the table ----


def read_submissions(root: str | os.PathLike) -> list[dict[str, Any]]:
    """Every submission below a directory, with its folder's name.

    Raises NotADirectoryError for another root, ValueError for a file that is no submission."""
    if not pathlib.Path(root).is_dir():
        raise NotADirectoryError(f"{root} is no directory: expected one in which `cs336 leaderboard run` wrote")
    found = []
    for path in sorted(pathlib.Path(root).rglob("submission.json")):
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            entry["name"] = path.parent.name
            found.append({key: entry[key] for key in (*SHOWN, "rule", "budget", "author", "text", "flops", "seconds")})
            _check(found[-1])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is not a submission: {error!r}") from None
    return found


def _check(entry: Mapping[str, Any]) -> None:
    """Raises ValueError for a value of another kind: NaN is no loss, and fewer than no bits beat everybody's."""
    for key in ("bits_per_byte", "loss", "parameters", "tokens", "flops", "seconds"):
        value = entry[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{key} must be a positive, finite number, got {value!r:.80}")
    for key in ("rule", "budget", "author", "text", "tokenizer", "device", "commit"):
        if not isinstance(entry[key], str) and (key != "commit" or entry[key] is not None):
            raise ValueError(f"{key} must be a text, got {entry[key]!r:.80}")


SHOWN = ("name", "bits_per_byte", "loss", "parameters", "tokens", "tokenizer", "device", "commit")


def markdown(submissions: Sequence[Mapping[str, Any]]) -> str:
    """A table a rule and text, the best first; what breaks its rule is left out and named below."""
    parts, broken = ["# Leaderboards", "", "Written by `cs336 leaderboard table`; ranked by bits per byte."], []
    for name in rules():
        rule = load_rule(name)
        of = [entry for entry in submissions if entry["rule"] == name]
        broken += [f"{entry['name']} ({name}): {why}" for entry in of if (why := breaks(entry, rule))]
        of = [entry for entry in of if not breaks(entry, rule)]
        parts += ["", f"## {name}", "", f"{rule.title}. Data: {rule.text}. Device: {rule.device}."]
        if not of:
            parts += ["", "No submission yet."]
        for text in sorted({entry["text"] for entry in of}):
            rows = sorted((e for e in of if e["text"] == text), key=lambda e: e["bits_per_byte"])
            parts += ["", f"On {text} of held-out text:", "", f"| | {' | '.join(HEADS)} |", f"| ---: {ALIGN}|"]
            parts += [f"| {place} | {' | '.join(_cells(entry))} |" for place, entry in enumerate(rows, 1)]
    broken += [f"{e['name']}: there is no rule {e['rule']!r}" for e in submissions if e["rule"] not in rules()]
    if broken:
        parts += ["", "Left out, for they break their rule: " + "; ".join(broken) + "."]
    return "\n".join(parts) + "\n"


HEADS = ("submission", "bits per byte", "loss", "parameters", "tokens", "vocabulary", "device", "commit")
ALIGN = "| --- | ---: | ---: | ---: | ---: | ---: | --- | --- "


def _cells(entry: Mapping[str, Any]) -> list[str]:
    by = f" ({entry['author']})" if entry["author"] else ""
    cells = [f"{entry['name']}{by}", f"{entry['bits_per_byte']:.4f}", f"{entry['loss']:.4f}"]
    cells += [f"{entry['parameters']:,}", f"{entry['tokens']:,}", str(entry["tokenizer"]).removesuffix(" tokens")]
    cells += [str(entry["device"]), str(entry["commit"] or "")]
    return [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]
