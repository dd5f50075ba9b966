"""A build: the stages of a recipe in one directory.

1-extract/        documents, removed, unread and counts, a file each a unit of work; index.json
2-documents/ ...  the same after each deduplication
tokenizer.json    where the recipe trains one
tokens/           shards
recipe.toml, build.json, stages.json, report.html
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import time
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from rich.console import Console

from cs336.data.build.counts import text_bytes, total
from cs336.data.build.dedup import run_dedup
from cs336.data.build.engines import run_local, run_ray
from cs336.data.build.progress import Progress
from cs336.data.build.sample import LEAST_HELD_OUT, take_sample, warning
from cs336.data.build.store import Store, Texts, changed, counts_of, is_whole, read_index, write_index
from cs336.data.build.unit import Work
from cs336.data.mix import mixture_epochs, times
from cs336.data.pack import pack_shards
from cs336.data.recipe import Dedup, Mix, Recipe, Tokenize
from cs336.data.sources.unit import Unit
from cs336.data.step import Checked
from cs336.data.tokenize import tokenize_corpus, tokenize_documents
from cs336.tokenizer import Tokenizer
from cs336.utils.config import dumps, to_table
from cs336.utils.contents import Contents
from cs336.utils.documents import Document
from cs336.utils.files import write_json, write_text
from cs336.utils.shards import shards_are_whole
from cs336.utils.special_tokens import END_OF_TEXT
from cs336.utils.stages import Outcome, Stage, run_stages

Engine = Literal["local", "ray"]
VERSION = 1  # of what the outputs of a unit are: another one makes them anew
EXTRACT, TOKENIZER, TOKENS, PACKED = "1-extract", "tokenizer.json", "tokens", "packed"
WORKER_LOCK, SEEN = ".workers.lock", ".sources.json"
PARTS = ("lines", "paragraphs")  # of documents, that deduplication counts
ORPHAN_SECONDS = 60.0  # that a worker of a killed build may take to see that it is alone


class Build:
    """What the stages of one recipe do."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        engine: Engine = "local",
        address: str | None = None,
        workers: int | None = None,
        console: Console | None = None,
    ):
        if engine not in ("local", "ray"):
            raise ValueError(f'the engine is "local" or "ray", got {engine!r}')
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be 1 or more, got {workers}")
        self.recipe, self.output = recipe, recipe.output
        self.engine, self.address, self.workers = engine, address, workers
        self.console = console or Console(highlight=False, soft_wrap=True)

    def run(self) -> None:
        """Make what is not made yet. Raises ValueError or OSError for what the user can mend."""
        self.check()
        begun = (self.output / EXTRACT).exists()
        self.output.mkdir(parents=True, exist_ok=True)
        works = self.works()
        if not begun:
            self._foresee(works)
        run_stages(self.output, self.stages(works), self.console)

    # ---- what can be told before anything is read ----

    def check(self) -> None:
        """Raises ValueError or OSError for a step that could not be built, or a tokenizer that could not be used."""
        for step in (*self.recipe.steps, *self.recipe.dedup):
            if isinstance(step, Checked):
                step.check()
        config = self.recipe.tokenize
        if config is None or config.tokenizer is None:
            return
        if not config.tokenizer.is_file():
            raise FileNotFoundError(f"{config.tokenizer} does not exist: tokenize.tokenizer names a tokenizer.json")
        known = Tokenizer.load(config.tokenizer).special_tokens
        if END_OF_TEXT not in known:
            raise ValueError(
                f"{config.tokenizer} has no special token {END_OF_TEXT!r}, which ends every document (it has: "
                f"{', '.join(known) or 'none'}); train it with one"
            )

    def _foresee(self, works: Sequence[Work]) -> None:
        """Say what a sample shows to go wrong at the end. A build that goes on has been told."""
        config = self.recipe.tokenize
        if not works or config is None or not config.val_fraction:
            return
        if found := warning(self.recipe, take_sample(self.recipe, works, LEAST_HELD_OUT / config.val_fraction)):
            self.console.print(f"warning: {found}", style="yellow", markup=False)

    # ---- the plan ----

    def units(self) -> list[tuple[int, Unit]]:
        """(index of the source, unit), in order. Raises what the sources raise."""
        return [(i, unit) for i, source in enumerate(self.recipe.sources) for unit in source.units(self.output)]

    def works(self) -> list[Work]:
        """The units of every source, in order, each with the key of what it is made from."""
        settings = to_table(self.recipe)
        shared = [VERSION, *(settings.get(name) for name in ("extract", "steps", "limits", "keep_removed"))]
        units = self.units()
        works = []
        with (
            Contents(self.output / SEEN) as contents,
            Progress(self.console, "compare", sum(unit.size for _, unit in units)) as progress,
        ):
            shared.append([contents.digest(path) for step in self.recipe.steps for path in _paths(step)])
            for number, (source, unit) in enumerate(units):
                held = [[file, contents.digest(file)] for file in unit.files]
                progress.advance(unit.size)
                key = _digest([shared, settings["sources"][source], held])
                works.append(Work(number, source, unit, str(self.output / EXTRACT), key))
        return works

    def stages(self, works: Sequence[Work]) -> list[Stage]:
        recipe = self.recipe
        shared = {"keep_removed": recipe.keep_removed}
        stages = [
            Stage(
                "extract",
                "read the sources, keep what every step keeps",
                lambda: self.extract(works),
                outputs=(f"{EXTRACT}/index.json",),
                settings={"units": _digest([work.key for work in works])},
                is_whole=lambda: self._is_whole(EXTRACT) and all(work.done for work in works),
            )
        ]
        source = EXTRACT
        for number, config in enumerate(recipe.dedup, 2):
            target = f"{number}-{config.kind}"
            stages.append(self._dedup_stage(config, source, target, shared))
            source = target
        stages.append(
            Stage(
                "account",
                "say what became of everything",
                self.account,
                outputs=("build.json", "recipe.toml"),
                inputs=tuple(self.output / name for name in (f"{EXTRACT}/index.json", f"{source}/index.json")),
                settings={"recipe": _digest(to_table(recipe))},
            )
        )
        if recipe.tokenize is not None:
            stages += self._token_stages(recipe.tokenize, source)
        return stages

    def _dedup_stage(self, config: Dedup, source: str, target: str, shared: dict[str, Any]) -> Stage:
        purpose = {
            "documents": "drop documents that equal others",
            "lines": "drop lines that others have",
            "paragraphs": "drop paragraphs that others have",
            "substrings": "cut out passages that were there before",
            "minhash": "drop documents that are like others",
            "semantic": "drop documents that mean the same as others",
        }
        return Stage(
            target,
            purpose[config.kind],
            lambda: self.dedup(config, source, target),
            outputs=(f"{target}/index.json",),
            inputs=(self.output / source / "index.json", *_paths(config)),
            settings={**_values(config), **shared, "seed": self.recipe.seed},
            is_whole=lambda: self._is_whole(target),
        )

    def _token_stages(self, config: Tokenize, source: str) -> Iterator[Stage]:
        documents = self.output / source / "index.json"
        if config.tokenizer is None:
            yield Stage(
                "tokenizer",
                "train byte-pair encoding on what is left",
                lambda: self.tokenizer(config, source),
                outputs=(TOKENIZER,),
                inputs=(documents,),
                settings={"vocab_size": config.vocab_size},
            )
        tokenizer = config.tokenizer or self.output / TOKENIZER
        sides = ("train/", "val/") if config.val_fraction else ("",)
        yield Stage(
            "tokenize",
            "turn the documents into shards of token ids",
            lambda: self.tokenize(config, source),
            outputs=tuple(f"{TOKENS}/{side}meta.json" for side in sides),
            inputs=(documents, tokenizer),
            settings={name: getattr(config, name) for name in ("val_fraction", "shuffle", "shard_tokens")}
            | {"seed": self.recipe.seed, "mix": to_table(self.recipe.mix)},
            is_whole=lambda: all(shards_are_whole(self.output / TOKENS / side) for side in sides),
        )
        if config.pack is not None:
            yield Stage(
                "pack",
                "put whole documents into windows",
                lambda: self.pack(config),
                outputs=(f"{PACKED}/meta.json",),
                inputs=(self.output / TOKENS,),
                settings={"pack": config.pack, "shard_tokens": config.shard_tokens, "seed": self.recipe.seed},
                is_whole=lambda: shards_are_whole(self.output / PACKED),
            )

    def _is_whole(self, stage: str) -> bool:
        with Contents(self.output / SEEN) as seen:
            return is_whole(self.output / stage, seen)

    @property
    def cores(self) -> int:
        return len(os.sched_getaffinity(0))

    @property
    def lock(self) -> str:
        """The file that workers hold."""
        return str((self.output / WORKER_LOCK).resolve())

    # ---- what the stages do ----

    def extract(self, works: Sequence[Work]) -> Outcome:
        directory = self.output / EXTRACT
        directory.mkdir(exist_ok=True)
        lock = self.lock
        _wait_for_workers(lock)
        with Contents(self.output / SEEN) as seen:
            damaged = changed(directory, seen)
        for work in works:
            if work.path("documents").name in damaged:
                work.path("counts").unlink(missing_ok=True)
        (directory / "index.json").unlink(missing_ok=True)  # it is not that of what is made from here on
        left = [work for work in works if not work.done]
        with Progress(self.console, "extract", sum(w.unit.size for w in works)) as progress:
            progress.advance(sum(work.unit.size for work in works) - sum(work.unit.size for work in left), done=True)
            if self.engine == "ray":
                run_ray(self.recipe, left, lock, self.address, lambda work: progress.advance(work.unit.size))
            else:
                run_local(self.recipe, left, lock, self.workers, lambda work: progress.advance(work.unit.size))
        counts = total(work.counts() for work in works)
        if not works or not counts.stages:
            raise ValueError("the sources hold nothing to read")
        with Contents(self.output / SEEN) as seen:
            names = [work.path("documents").name for work in works]
            write_index(directory, names, {"counts": counts.to_json()}, seen)
        lost = sum(counts.unread.get(reason, 0) for reason in ("damaged", "too large", "too slow", "killed its worker"))
        listed = f", {lost:,} could not be read" if lost else ""
        return Outcome(f"{counts.documents:,} of {counts.records:,} records are left{listed}")

    def dedup(self, config: Dedup, source: str, target: str) -> Outcome:
        how: dict[str, Any] = {"keep_removed": self.recipe.keep_removed, "seed": self.recipe.seed}
        with Contents(self.output / SEEN) as seen:
            passed = run_dedup(config, self.output / source, self.output / target, **how, seen=seen)
        index = read_index(self.output / target)
        said = f"{index['documents']:,} of {passed.documents:,} documents are left"
        for part in PARTS:
            if part in index:
                said += f", {index[f'{part}_dropped']:,} of {index[part]:,} {part} dropped"
        if "repeats" in index:
            repeats = index["repeats"]
            said += f", {repeats['cut_bytes']:,} of {repeats['text_bytes']:,} bytes cut"
        return Outcome(said)

    def tokenizer(self, config: Tokenize, source: str) -> Outcome:
        store = self._left(source)
        tokenizer = Tokenizer.train((d.text for d in store), config.vocab_size, [END_OF_TEXT])
        tokenizer.save(self.output / TOKENIZER)
        return Outcome(f"{tokenizer.vocab_size:,} tokens")

    def tokenize(self, config: Tokenize, source: str) -> Outcome:
        tokenizer = Tokenizer.load(config.tokenizer or self.output / TOKENIZER)
        texts = iter(self._ordered(self._left(source), config))
        directory = self.output / TOKENS
        if not config.val_fraction:
            meta = tokenize_documents(texts, tokenizer, directory, shard_tokens=config.shard_tokens, progress=True)
            return Outcome(f"{meta.tokens:,} tokens")
        train, val = tokenize_corpus(
            texts,
            tokenizer,
            directory,
            val_fraction=config.val_fraction,
            seed=self.recipe.seed,
            shard_tokens=config.shard_tokens,
            progress=True,
        )
        return Outcome(f"{train.tokens:,} tokens to train on, {val.tokens:,} held out")

    def _left(self, source: str) -> Store:
        store = Store(self.output / source)
        if not len(store):
            raise ValueError(f"no document is left to tokenize: {self.output / 'build.json'} says what removed them")
        return store

    def _ordered(self, store: Store, config: Tokenize) -> Texts:
        order_T = np.arange(len(store)) if self.recipe.mix is None else self._mixed(store, self.recipe.mix)
        if config.shuffle:
            order_T = np.random.default_rng(self.recipe.seed).permutation(order_T)
        return Texts(store, order_T)

    def _mixed(self, store: Store, mix: Mix) -> np.ndarray:
        """(T,) places of documents, each as often as it is taken."""
        sizes = dict.fromkeys(mix.weights, 0.0)

        def repeats(document: Document) -> float:
            return 1.0 if mix.buckets is None else mix.buckets.repeat(document)

        for document in store:
            sizes[document.metadata["collection"]] += text_bytes(document.text) * repeats(document)
        epochs = mixture_epochs(sizes, mix.weights, dict.fromkeys(mix.weights, mix.max_epochs), mix.total_bytes)
        taken = array("q")
        for index, document in enumerate(store):
            count = times(document.text, repeats(document) * epochs[document.metadata["collection"]], self.recipe.seed)
            taken.extend([index] * count)
        return np.frombuffer(taken, np.int64) if taken else np.zeros(0, np.int64)

    def pack(self, config: Tokenize) -> Outcome:
        assert config.pack is not None
        source = self.output / TOKENS / ("train" if config.val_fraction else "")
        found = pack_shards(
            source, self.output / PACKED, config.pack, seed=self.recipe.seed, shard_tokens=config.shard_tokens
        )
        return Outcome(
            f"{found.windows:,} windows of {config.pack:,} tokens, {found.padding / found.tokens:.1%} padding"
        )

    def account(self) -> Outcome:
        counts = counts_of(self.output / EXTRACT)
        stages = [
            {"name": stage.name, "documents": stage.documents, "bytes": stage.bytes, "removed": stage.removed}
            for stage in counts.stages
        ]
        facts: dict[str, Any] = {"folders": [EXTRACT]}
        documents, size = counts.documents, counts.bytes
        for number, config in enumerate(self.recipe.dedup, 2):
            folder = f"{number}-{config.kind}"
            index = read_index(self.output / folder)
            facts["folders"].append(folder)
            stages.append(index["passed"])
            documents, size = index["documents"], index["bytes"]
            counted = [name for part in PARTS for name in (part, f"{part}_dropped") if name in index]
            facts = _added(facts, {name: index[name] for name in counted})
            if "repeats" in index:
                facts["repeats"] = _added(facts.get("repeats", {}), index["repeats"])
        table = counts.to_json() | {"stages": stages, "documents": documents, "bytes": size} | facts
        write_text(self.output / "recipe.toml", dumps(self.recipe))
        write_json(self.output / "build.json", table, indent=1)
        share = documents / counts.records if counts.records else 0.0
        return Outcome(f"{documents:,} documents, {size / 1e6:,.1f} MB: {share:.0%} of the records")


def _paths(step: Any) -> Iterator[pathlib.Path]:
    """The files that a step reads: models, lists."""
    for field in dataclasses.fields(step):
        value = getattr(step, field.name)
        yield from (
            path for path in (value if isinstance(value, tuple) else (value,)) if isinstance(path, pathlib.Path)
        )


def _values(step: Any) -> dict[str, Any]:
    """Its settings but for paths: what is there decides, and not how it is called."""
    values = to_table(step)
    return {name: values[name] for name in values if not isinstance(getattr(step, name), pathlib.Path)}


def _added(facts: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Numbers add up and lists join, over stages of one kind."""
    return facts | {name: facts[name] + value if name in facts else value for name, value in more.items()}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _wait_for_workers(path: str) -> None:
    """Until no worker of an earlier build is left. Raises RuntimeError where one stays."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    with open(path, "a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"a worker of an earlier build still holds {path}: end it, then build again"
                    ) from None
                time.sleep(0.05)
