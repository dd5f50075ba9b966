"""The main job, end to end: text, tokenizer, tokens, a trained model, its measure, what it writes, a report.

Seven stages on cs336.utils.stages, eight where the data demo comes first, three more with `full`: what is current is
skipped, and a trained model is never replaced by another.
"""

import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cs336.data import for_split, in_validation, read_meta, read_texts, tokenize_documents
from cs336.data.stdlib import stdlib_documents, stdlib_name
from cs336.data_demo import DataDemo, curated_documents, data_demo
from cs336.evaluation import Evaluation, evaluate, last_validation
from cs336.inference.load import load_model
from cs336.inference.samples import sampler
from cs336.models import Transformer, TransformerConfig
from cs336.quickstart_full import MEASURED, Full
from cs336.report import write_report
from cs336.tokenizer import Tokenizer
from cs336.tokenizer.statistics import keep
from cs336.training import AdamWConfig, DataConfig, TrainConfig, Trainer
from cs336.utils.device import peak_flops, pick
from cs336.utils.documents import TEXT_FIELD
from cs336.utils.files import replacing, write_json_lines
from cs336.utils.shards import shards_are_whole
from cs336.utils.special_tokens import END_OF_TEXT
from cs336.utils.stages import Interrupted, Outcome, Stage, run_stages
from cs336.utils.terminal import visible

DEMO = "data"  # below the run's directory: where the data demo works
LEAST_BYTES, LEAST_HELD_OUT = 100_000, 2_000
EPOCHS = 5  # passes over the text before more of it teaches little (arXiv:2305.16264)
MFU, LEAST_MFU = 0.4, 0.15  # of the device's peak: what is expected, and what can be counted on
UNKNOWN_PEAK = 1e13  # FLOP/s of a device that is not in the table: a small GPU
PROMPTS = ("def ", "class ", "import ")
REPORTED = ("config.toml", "run.json", "metrics.jsonl", "samples.jsonl", "evaluation.json", "generated.jsonl")


@dataclass(frozen=True)
class Quickstart:
    """Settings of the main job."""

    corpus: pathlib.Path | None = None
    """Text, JSON lines, parquet, or a directory of them. None: the standard library of this Python."""
    run_dir: pathlib.Path = pathlib.Path("runs/quickstart")
    """Where everything is written; the same command continues a run that is already there."""
    minutes: float = 4.0
    """Time for pretraining, and with --full as much again for SFT and GRPO together. The other stages take about one
    more on two CPU cores, those of --full about four more."""
    vocab_size: int = 4096
    """Tokens of the tokenizer."""
    text_field: str = TEXT_FIELD
    """Of JSON lines and parquet: the field that holds the text."""
    max_megabytes: float = 400.0
    """Read no more text than this."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda."""
    seed: int = 0
    """Of the weights, the order of the data and the samples."""
    data_demo: bool = False
    """Instead of a corpus: make a crawl of this Python's documentation, clean it as `cs336 data demo` does, and learn
    from what is left."""
    full: bool = False
    """From a crawl to a model that answers, in int8: the data demo first, unless there is a corpus, then SFT, DPO and
    GRPO with a verifier, and a measure of each model."""

    def __post_init__(self):
        if not 0 < self.minutes < float("inf"):
            raise ValueError(f"minutes must be more than zero and finite, got {self.minutes}")
        if not self.max_megabytes > 0:
            raise ValueError(f"max_megabytes must be more than zero, got {self.max_megabytes}")
        if self.data_demo and self.corpus is not None:
            raise ValueError(f"the data demo makes its own text: leave out either data_demo or corpus ({self.corpus})")

    @property
    def makes_a_crawl(self) -> bool:
        return self.data_demo or (self.full and self.corpus is None)


@dataclass(frozen=True)
class Shape:
    """A model, and how to train it where time and text allow at least `flops`."""

    flops: float
    num_layers: int
    d_model: int
    num_heads: int
    context_length: int
    batch_size: int
    lr: float

    def model(self, vocab_size: int) -> TransformerConfig:
        return TransformerConfig(
            vocab_size=-(-vocab_size // 64) * 64,
            context_length=self.context_length,
            num_layers=self.num_layers,
            d_model=self.d_model,
            num_heads=self.num_heads,
            tie_embeddings=True,
            init_std=round(0.6 / self.d_model**0.5, 3),
        )


SHAPES = (  # the smallest first
    Shape(0, num_layers=3, d_model=96, num_heads=3, context_length=256, batch_size=2, lr=6e-3),
    Shape(1e14, num_layers=4, d_model=192, num_heads=6, context_length=256, batch_size=8, lr=5e-3),
    Shape(6e14, num_layers=6, d_model=320, num_heads=5, context_length=256, batch_size=16, lr=3e-3),
    Shape(2e15, num_layers=8, d_model=512, num_heads=8, context_length=512, batch_size=32, lr=2e-3),
    Shape(2e16, num_layers=12, d_model=768, num_heads=12, context_length=1024, batch_size=32, lr=1e-3),
)


class Job:
    """What the stages of one run directory do."""

    def __init__(self, settings: Quickstart, console: Console | None = None):
        self.settings, self.run_dir = settings, settings.run_dir
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.device = pick(settings.device)
        self._demo = DataDemo(self.run_dir / DEMO, vocab_size=settings.vocab_size, seeds=0)
        cleaning = f"{DEMO}/curated/report.html" if settings.makes_a_crawl else None
        self.after = Full(self.run_dir, settings.device, settings.seed, settings.minutes, cleaning, self.console)
        if settings.corpus is not None and not settings.corpus.exists():
            raise FileNotFoundError(
                f"{settings.corpus} does not exist: expected text, JSON lines, parquet, or a directory"
            )
        own = (self.run_dir / "corpus").resolve()
        if settings.corpus is not None and own in (settings.corpus.resolve(), *settings.corpus.resolve().parents):
            raise ValueError(f"{settings.corpus} is where this run writes the text it has read: choose another run_dir")

    def stages(self) -> list[Stage]:
        settings, corpus, tokens = self.settings, self.settings.corpus, self.run_dir / "tokens"
        demo = self._demo.run_dir
        sources = (
            (curated_documents(demo).parent / "index.json",) if settings.makes_a_crawl else (corpus,) if corpus else ()
        )
        first = Stage(
            "curate",
            "make a crawl of this Python's documentation, and clean it",
            self.curate,
            outputs=(f"{DEMO}/curated/build.json", f"{DEMO}/curated/report.html"),
            settings={"pages": self._demo.pages, "python": stdlib_name()},
        )
        texts = tuple(self._text(side) for side in ("train", "val"))
        tokenizer = self.run_dir / "tokenizer.json"
        return [
            *([first] if settings.makes_a_crawl else []),
            Stage(
                "collect",
                "read the text, hold some documents out",
                self.collect,
                outputs=("corpus/train.jsonl", "corpus/val.jsonl"),
                inputs=sources,
                settings={"max_megabytes": settings.max_megabytes, "text_field": settings.text_field}
                | ({} if sources else {"standard library": _stdlib_digest()}),
            ),
            Stage(
                "tokenizer",
                "train byte-pair encoding on it",
                self.tokenizer,
                outputs=("tokenizer.json", "tokenizer_stats.json"),
                inputs=texts,
                settings={"vocab_size": settings.vocab_size},
            ),
            Stage(
                "tokenize",
                "turn the text into token ids",
                self.tokenize,
                outputs=("tokens/train/meta.json", "tokens/val/meta.json"),
                inputs=(*texts, tokenizer),
                is_whole=lambda: all(shards_are_whole(self.run_dir / "tokens" / side) for side in ("train", "val")),
            ),
            Stage(
                "pretrain",
                "learn to predict the next token",
                self.pretrain,
                outputs=("export/model.safetensors",),
                inputs=(tokens, tokenizer),
                settings={name: getattr(settings, name) for name in ("minutes", "device", "seed")},
                kept=("export", "checkpoints", "config.toml", "run.json", "metrics.jsonl", "samples.jsonl"),
            ),
            Stage(
                "evaluate",
                "measure it on text it has never seen",
                self.evaluate,
                outputs=("evaluation.json",),
                inputs=(self.run_dir / "export", tokens),
            ),
            Stage(
                "generate",
                "let it write",
                self.generate,
                outputs=("generated.jsonl",),
                inputs=(self.run_dir / "export", texts[1]),
            ),
            *(self.after.stages() if settings.full else []),
            Stage(
                "report",
                "put everything on one page",
                self.report,
                outputs=("report.html",),
                inputs=tuple(self.run_dir / name for name in (*REPORTED, *((MEASURED,) if settings.full else ()))),
            ),
        ]

    # ---- curate, collect ----

    def curate(self) -> Outcome:
        report = data_demo(self._demo, self.console)
        found = json.loads((report.parent / "build.json").read_text(encoding="utf-8"))
        return Outcome(f"{found['documents']:,} of {found['records']:,} records are left: {report} says why")

    def collect(self) -> Outcome:
        counts = {"train": [0, 0], "val": [0, 0]}  # documents, bytes
        limit = self.settings.max_megabytes * 1e6
        fraction, documents = for_split(self._documents())
        (self.run_dir / "corpus").mkdir(exist_ok=True)
        with replacing(self._text("train")) as train, replacing(self._text("val")) as val:
            files = {"train": train, "val": val}
            for document in documents:
                side = "val" if in_validation(document, fraction) else "train"
                files[side].write(json.dumps({"text": document}) + "\n")
                counts[side][0] += 1
                counts[side][1] += len(document.encode())
                if counts["train"][1] + counts["val"][1] >= limit:
                    break
            if counts["train"][1] + counts["val"][1] < LEAST_BYTES:
                raise ValueError(
                    f"{self._source()} holds {counts['train'][1] + counts['val'][1]:,} bytes of text, and this needs "
                    f"at least {LEAST_BYTES:,}: give more with --corpus PATH"
                )
            if counts["val"][1] < LEAST_HELD_OUT or not counts["train"][0]:
                raise ValueError(
                    f"{self._source()} cannot be split: {counts['val'][1]:,} bytes of it would be held out. Equal "
                    "documents stay on one side, and too few of these differ: give others with --corpus PATH"
                )
        (trained_on, size), (held_out, held_out_size) = counts["train"], counts["val"]
        return Outcome(
            f"{trained_on:,} documents, {size / 1e6:.1f} MB of {self._source()}; "
            f"{held_out:,} documents, {held_out_size / 1e6:.1f} MB held out"
        )

    def _documents(self) -> Iterator[str]:
        corpus = self.settings.corpus
        if self.settings.makes_a_crawl:
            source = read_texts(curated_documents(self._demo.run_dir))
        elif corpus is None:
            source = stdlib_documents()
        else:
            source = read_texts(corpus, text_field=self.settings.text_field, without=self.run_dir)
        return (part for document in source for part in document.split(END_OF_TEXT) if part.strip())

    def _source(self) -> str:
        if self.settings.corpus is not None:
            return str(self.settings.corpus)
        return f"documentation of {stdlib_name()}" if self.settings.makes_a_crawl else stdlib_name()

    def _text(self, side: str) -> pathlib.Path:
        return self.run_dir / "corpus" / f"{side}.jsonl"

    def _tokens(self, side: str) -> pathlib.Path:
        return self.run_dir / "tokens" / side

    # ---- tokenizer, tokenize ----

    def tokenizer(self) -> Outcome:
        tokenizer = Tokenizer.train(
            read_texts(self._text("train")),
            self.settings.vocab_size,
            [END_OF_TEXT],
            progress=self.console.is_terminal,
        )
        held_out = list(read_texts(self._text("val")))
        num_tokens = len(tokenizer.encode_batch_numpy(held_out)[0])
        per_token = round(sum(len(d.encode()) for d in held_out) / num_tokens, 3)
        keep(tokenizer, self.run_dir, bytes_per_token=per_token)
        return Outcome(f"{tokenizer.vocab_size:,} tokens, {per_token} bytes each on held-out text")

    def tokenize(self) -> Outcome:
        tokenizer = Tokenizer.load(self.run_dir / "tokenizer.json")
        train, val = (
            tokenize_documents(read_texts(self._text(side)), tokenizer, self._tokens(side), progress=True)
            for side in ("train", "val")
        )
        return Outcome(f"{train.tokens:,} tokens to train on, {val.tokens:,} held out")

    # ---- pretrain ----

    def pretrain(self) -> Outcome:
        tokenizer = Tokenizer.load(self.run_dir / "tokenizer.json")
        saved = self.run_dir / "config.toml"
        resumed = saved.exists() and (self.run_dir / "checkpoints").exists()
        config = TrainConfig.from_toml(saved) if resumed else self._train_config()
        config = replace(config, run_dir=self.run_dir, data=DataConfig(self._tokens("train"), self._tokens("val")))
        sample = sampler(tokenizer, self._prompts(), self.settings.seed)
        if not resumed:
            torch.manual_seed(config.seed)  # the weights that the trainer begins with
            untrained = Transformer(config.model, device=self.device).eval()
            write_json_lines(self.run_dir / "samples.jsonl", [{"step": 0} | row for row in sample(untrained)])
        result = Trainer(config, tokenizer=tokenizer, sample=sample).train()
        if not result.finished:
            raise Interrupted
        return Outcome(
            f"{config.model.num_parameters():,} parameters, {result.step:,} steps, {result.tokens:,} tokens",
            result.seconds,
        )

    def _train_config(self) -> TrainConfig:
        """The largest shape that time and text allow, and a stop before the text is repeated too often."""
        settings, seconds = self.settings, 60 * self.settings.minutes
        on_gpu = self.device.type == "cuda"
        peak = peak_flops(self.device, torch.bfloat16 if on_gpu else torch.float32) or UNKNOWN_PEAK
        meta = read_meta(self._tokens("train"))
        most_tokens = EPOCHS * meta.tokens
        models = [(shape, shape.model(meta.vocab_size)) for shape in SHAPES]
        shape, model = [
            (s, m) for s, m in models if s.flops <= min(MFU * peak * seconds, most_tokens * m.flops_per_token())
        ][-1]
        enough = LEAST_MFU * peak * seconds > most_tokens * model.flops_per_token()
        return TrainConfig(
            run_dir=self.run_dir,
            data=DataConfig(self._tokens("train"), self._tokens("val")),
            model=model,
            optimizer=AdamWConfig(lr=shape.lr),
            budget=f"{most_tokens}tok" if enough else f"{seconds:g}s",
            batch_size=shape.batch_size,
            device=settings.device,
            seed=settings.seed,
            deterministic=True,
            eval_tokens=64 * shape.context_length,
        )

    def _prompts(self) -> list[str]:
        if self.settings.corpus is None and not self.settings.makes_a_crawl:
            return list(PROMPTS)
        held_out = itertools.islice(read_texts(self._text("val")), 3)
        return [" ".join(document[:80].split()[:4])[:24] for document in held_out]  # 96 tokens at most

    # ---- evaluate, generate, report ----

    def _trained(self) -> tuple[Transformer, Tokenizer]:
        export = self.run_dir / "export"
        return load_model(export, self.settings.device), Tokenizer.load(export / "tokenizer.json")

    def evaluate(self) -> Outcome:
        model, tokenizer = self._trained()
        step, loss = last_validation(self.run_dir)  # which the terminal has said: one number, not two
        found = evaluate(model, tokenizer, self._tokens("val"), self._tokens("train"), step=step, loss=loss)
        found.save(self.run_dir)
        self.console.print(_table(found))
        return Outcome(
            f"{found.bits_per_byte:.3f} bits per byte on held-out text, loss {found.loss:.3f} nats per token"
        )

    def generate(self) -> Outcome:
        model, tokenizer = self._trained()
        length = min(200, model.config.context_length // 2)
        rows = sampler(tokenizer, self._prompts(), self.settings.seed, length)(model)
        write_json_lines(self.run_dir / "generated.jsonl", rows)
        for row in rows:
            self.console.print(Text.assemble((visible(row["prompt"]), "bold"), visible(row["text"])))
        return Outcome(f"{len(rows)} texts of up to {length} tokens")

    def report(self) -> Outcome:
        return Outcome(f"open {write_report(self.run_dir)} in a browser")


def quickstart(settings: Quickstart, console: Console | None = None) -> None:
    """Run the main job, or what is left of it. Raises Interrupted where a signal stopped training."""
    job = Job(settings, console)
    run_stages(job.run_dir, job.stages(), job.console)
    if settings.full:
        job.after.say_what_is_next()


def _stdlib_digest() -> str:
    digest = hashlib.sha256()
    for text in stdlib_documents():
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def _table(evaluation: Evaluation) -> Table:
    """Fewest bits first."""
    rows = [("this model", evaluation.bits_per_byte, evaluation.how)]
    rows += [(other.name, other.bits_per_byte, other.how) for other in evaluation.baselines]
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("bits per byte of held-out text", style="bold")
    table.add_column("", justify="right")
    table.add_column("", style="dim")
    for name, bits, how in sorted(rows, key=lambda row: row[1]):
        table.add_row(name, f"{bits:.3f}", how, style="green" if name == "this model" else "")
    return table
