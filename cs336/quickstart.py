"""The main job, end to end: text, tokenizer, tokens, a trained model, its measure, what it writes, a report.

Every stage leaves its output in the run directory and its fingerprint in stages.json: a hash of its settings and of the
stage before. A stage whose fingerprint and output are there is skipped; changed settings run it and all later ones.
"""

import hashlib
import itertools
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cs336 import __version__
from cs336.data import TokenDataset, in_validation, read_documents, read_meta, tokenize_documents
from cs336.data.stdlib import stdlib_documents, stdlib_name
from cs336.evaluation import baselines, bits_per_byte, mean_loss
from cs336.inference import SamplingParams, generate
from cs336.inference.load import load_model
from cs336.models import Transformer, TransformerConfig
from cs336.report import write_report
from cs336.tokenizer import Tokenizer
from cs336.tokenizer.statistics import statistics
from cs336.training import DataConfig, OptimizerConfig, TrainConfig, Trainer
from cs336.utils.device import peak_flops, pick
from cs336.utils.duration import duration
from cs336.utils.files import replacing
from cs336.utils.locks import locked
from cs336.utils.special_tokens import END_OF_TEXT
from cs336.utils.terminal import visible

HELD_OUT = 0.02  # of the documents
FEW = 200  # documents; fewer are cut into pieces, or the held-out part might be empty
HELD_OUT_OF_FEW = 0.1
LEAST_BYTES, LEAST_HELD_OUT = 100_000, 2_000
EPOCHS = 5  # passes over the text before more of it teaches little (arXiv:2305.16264)
MFU, LEAST_MFU = 0.4, 0.15  # of the device's peak: what is expected, and what can be counted on
MOST_EVALUATED = 150_000  # tokens: 5 s on two idle CPU cores, and more hardly changes the mean
UNKNOWN_PEAK = 1e13  # FLOP/s of a device that is not in the table: a small GPU
PROMPTS = ("def ", "class ", "import ")


@dataclass(frozen=True)
class Quickstart:
    """Settings of the main job."""

    corpus: pathlib.Path | None = None
    """Text, JSON lines, parquet, or a directory of them. None: the standard library of this Python."""
    run_dir: pathlib.Path = pathlib.Path("runs/quickstart")
    """Where everything is written; the same command continues a run that is already there."""
    minutes: float = 4.0
    """Time for pretraining. The other stages take about one more on two CPU cores."""
    vocab_size: int = 4096
    """Tokens of the tokenizer."""
    max_megabytes: float = 400.0
    """Read no more text than this."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda."""
    seed: int = 0
    """Of the weights, the order of the data and the samples."""

    def __post_init__(self):
        if not 0 < self.minutes < float("inf"):
            raise ValueError(f"minutes must be more than zero and finite, got {self.minutes}")
        if not self.max_megabytes > 0:
            raise ValueError(f"max_megabytes must be more than zero, got {self.max_megabytes}")


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


@dataclass(frozen=True)
class Stage:
    name: str
    purpose: str
    settings: tuple[str, ...]
    """Fields of Quickstart that decide its output."""
    outputs: tuple[str, ...]
    """Files that it leaves in the run directory."""


STAGES = (
    Stage(
        "collect",
        "read the text, hold some documents out",
        ("max_megabytes",),
        ("corpus/train.jsonl", "corpus/val.jsonl"),
    ),
    Stage("tokenizer", "train byte-pair encoding on it", ("vocab_size",), ("tokenizer.json", "tokenizer_stats.json")),
    Stage("tokenize", "turn the text into token ids", (), ("tokens/train/meta.json", "tokens/val/meta.json")),
    Stage("pretrain", "learn to predict the next token", ("minutes", "device", "seed"), ("export/model.safetensors",)),
    Stage("evaluate", "measure it on text it has never seen", (), ("evaluation.json",)),
    Stage("generate", "let it write", (), ("generated.jsonl",)),
    Stage("report", "put everything on one page", (), ("report.html",)),
)


@dataclass(frozen=True)
class Outcome:
    summary: str
    seconds: float | None = None
    """Of a stage that continued what an earlier process began."""


class Interrupted(Exception):
    """A signal stopped the run; the same command continues it."""


class Job:
    """One run directory being filled."""

    def __init__(self, settings: Quickstart, console: Console | None = None):
        self.settings, self.run_dir = settings, settings.run_dir
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.device = pick(settings.device)
        self.record_path = self.run_dir / "stages.json"
        if settings.corpus is not None and not settings.corpus.exists():
            raise FileNotFoundError(
                f"{settings.corpus} does not exist: expected text, JSON lines, parquet, or a directory"
            )
        theirs = [] if self.record_path.exists() else [n for s in STAGES for n in self._names(s)]
        if found := [name for name in theirs if (self.run_dir / name).exists()]:
            raise ValueError(
                f"{self.run_dir} holds {', '.join(found)}, which quickstart did not make and would replace: "
                "choose another run_dir"
            )

    def run(self) -> None:
        """Run the stages that are not current. Raises Interrupted where a signal stopped training."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with locked(self.run_dir, ".quickstart.lock"):
            self._run_stages()

    def _run_stages(self) -> None:
        fingerprint, ran = _hash(__version__, self._source_identity()), False
        for number, stage in enumerate(STAGES, 1):
            fingerprint = _hash(fingerprint, {name: getattr(self.settings, name) for name in stage.settings})
            head = Text.assemble((f"{number}/{len(STAGES)} {stage.name:<9}", "bold"), f"  {stage.purpose}")
            if not ran and self._is_current(stage, fingerprint):
                self.console.print(head.append(" (done before)", "dim"))
                self._say(self._record()[stage.name]["summary"])
                continue
            ran = True
            self.console.print(head)
            self._run(stage, fingerprint)

    def _run(self, stage: Stage, fingerprint: str) -> None:
        record = self._record()
        if record.get(stage.name, {}).get("fingerprint") != fingerprint:
            self._forget(stage)
        later = [s.name for s in STAGES[STAGES.index(stage) :]]
        record = {name: entry for name, entry in record.items() if name not in later}
        self._write_record(record | {stage.name: {"fingerprint": fingerprint}})
        start = time.perf_counter()
        outcome: Outcome = getattr(self, stage.name)()
        seconds = time.perf_counter() - start if outcome.seconds is None else outcome.seconds
        entry = {"fingerprint": fingerprint, "seconds": round(seconds, 2), "summary": outcome.summary}
        self._write_record(record | {stage.name: entry})
        where = self.run_dir / pathlib.Path(stage.outputs[0]).parts[0]
        self._say(f"{outcome.summary}", f"{seconds:.1f} s" if seconds < 10 else duration(seconds), str(where))

    def _is_current(self, stage: Stage, fingerprint: str) -> bool:
        entry = self._record().get(stage.name, {})
        finished = entry.get("fingerprint") == fingerprint and "seconds" in entry
        return finished and all((self.run_dir / name).exists() for name in stage.outputs)

    @staticmethod
    def _names(stage: Stage) -> list[str]:
        """What the stage makes in the run directory, of a run all that a trainer would continue."""
        names = {pathlib.Path(name).parts[0] for name in stage.outputs}
        if stage.name == "pretrain":
            names |= {"config.toml", "run.json", "metrics.jsonl", "samples.jsonl", "checkpoints"}
        return sorted(names)

    def _forget(self, stage: Stage) -> None:
        """Remove what the stage made from other settings; a model, which took longest, is put aside instead."""
        aside = self.run_dir / "previous"
        keep = stage.name == "pretrain" and (self.run_dir / "checkpoints").exists()
        if keep:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            self._say("the settings changed: training again", f"the earlier model is kept in {aside}")
        for path in (self.run_dir / name for name in self._names(stage)):
            if keep and path.exists():
                path.rename(aside / path.name)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _record(self) -> dict[str, Any]:
        try:
            record = json.loads(self.record_path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return {name: entry for name, entry in record.items() if isinstance(entry, dict)}

    def _write_record(self, record: dict[str, Any]) -> None:
        with replacing(self.record_path) as file:
            json.dump(record, file, indent=2)

    def _say(self, *facts: str) -> None:
        self.console.print(Text("    " + "  ·  ".join(facts), style="dim"))

    # ---- collect ----

    def _source_identity(self) -> Any:
        """What tells that the corpus is still the same: names, sizes and times of its files."""
        corpus = self.settings.corpus
        if corpus is None:
            return stdlib_name()
        run_dir = self.run_dir.resolve()
        files = [corpus] if corpus.is_file() else sorted(p for p in corpus.rglob("*") if p.is_file())
        files = [p for p in files if run_dir not in p.resolve().parents]
        return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]

    def collect(self) -> Outcome:
        counts = {"train": [0, 0], "val": [0, 0]}  # documents, bytes
        limit = self.settings.max_megabytes * 1e6
        documents = self._documents()
        head = list(itertools.islice(documents, FEW))
        few = len(head) < FEW
        fraction, documents = (HELD_OUT_OF_FEW, _pieces(head)) if few else (HELD_OUT, itertools.chain(head, documents))
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
        source = stdlib_documents() if corpus is None else read_documents(corpus, without=self.run_dir)
        return (part for document in source for part in document.split(END_OF_TEXT) if part.strip())

    def _source(self) -> str:
        return stdlib_name() if self.settings.corpus is None else str(self.settings.corpus)

    def _text(self, side: str) -> pathlib.Path:
        return self.run_dir / "corpus" / f"{side}.jsonl"

    def _tokens(self, side: str) -> pathlib.Path:
        return self.run_dir / "tokens" / side

    # ---- tokenizer, tokenize ----

    def tokenizer(self) -> Outcome:
        tokenizer = Tokenizer.train(
            read_documents(self._text("train")),
            self.settings.vocab_size,
            [END_OF_TEXT],
            progress=self.console.is_terminal,
        )
        held_out = list(read_documents(self._text("val")))
        num_tokens = len(tokenizer.encode_batch_numpy(held_out)[0])
        per_token = round(sum(len(d.encode()) for d in held_out) / num_tokens, 3)
        keep_tokenizer(tokenizer, self.run_dir, bytes_per_token=per_token)
        return Outcome(f"{tokenizer.vocab_size:,} tokens, {per_token} bytes each on held-out text")

    def tokenize(self) -> Outcome:
        tokenizer = Tokenizer.load(self.run_dir / "tokenizer.json")
        train, val = (
            tokenize_documents(read_documents(self._text(side)), tokenizer, self._tokens(side), progress=True)
            for side in ("train", "val")
        )
        return Outcome(f"{train.tokens:,} tokens to train on, {val.tokens:,} held out")

    # ---- pretrain ----

    def pretrain(self) -> Outcome:
        tokenizer = Tokenizer.load(self.run_dir / "tokenizer.json")
        saved = self.run_dir / "config.toml"
        resumed = saved.exists() and (self.run_dir / "checkpoints").exists()
        config = replace(TrainConfig.from_toml(saved), run_dir=self.run_dir) if resumed else self._train_config()
        sample = sampler(tokenizer, self._prompts(), self.settings.seed)
        if not resumed:
            torch.manual_seed(config.seed)  # the weights that the trainer begins with
            untrained = Transformer(config.model, device=self.device).eval()
            _write_lines(self.run_dir / "samples.jsonl", [{"step": 0} | row for row in sample(untrained)])
        result = Trainer(config, tokenizer=tokenizer, sample=sample).train()
        if not result.finished:
            raise Interrupted
        return Outcome(
            f"{config.model.num_parameters():,} parameters, {result.step:,} steps, {result.tokens:,} tokens, "
            f"validation loss {result.val['val/loss']:.3f}",
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
            optimizer=OptimizerConfig(lr=shape.lr),
            budget=f"{most_tokens}tok" if enough else f"{seconds:g}s",
            batch_size=shape.batch_size,
            device=settings.device,
            seed=settings.seed,
            deterministic=True,
            eval_tokens=64 * shape.context_length,
        )

    def _prompts(self) -> list[str]:
        if self.settings.corpus is None:
            return list(PROMPTS)
        held_out = itertools.islice(read_documents(self._text("val")), 3)
        return [" ".join(document[:80].split()[:4])[:24] for document in held_out]  # 96 tokens at most

    # ---- evaluate, generate, report ----

    def _trained(self) -> tuple[Transformer, Tokenizer]:
        export = self.run_dir / "export"
        return load_model(export, self.settings.device), Tokenizer.load(export / "tokenizer.json")

    def evaluate(self) -> Outcome:
        model, tokenizer = self._trained()
        context = model.config.context_length
        data = TokenDataset(
            self._tokens("val"), context, vocab_size=model.config.vocab_size, tokenizer=tokenizer.fingerprint
        )
        assert data.meta is not None  # TokenDataset reads it from the directory
        windows = min(len(data), max(1, MOST_EVALUATED // context))
        loss = mean_loss(model, data, most_windows=windows)
        bits = bits_per_byte(loss, data.meta.tokens, data.meta.text_bytes)
        train_text, held_out_text = (read_documents(self._text(side)) for side in ("train", "val"))
        others = baselines(train_text, held_out_text, self._tokens("train"), self._tokens("val"))
        how = f"{data.meta.documents:,} documents, {data.meta.text_bytes / 1e6:.2f} MB, read {context} tokens at a time"
        if windows < len(data):
            how += f", {windows / len(data):.0%} of them"
        evaluation = {
            "loss": loss,
            "bits_per_byte": bits,
            "how": how,
            "baselines": [asdict(other) for other in others],
        }
        with replacing(self.run_dir / "evaluation.json") as file:
            json.dump(evaluation, file, indent=2)
        self.console.print(_table([("this model", bits, how), *((o.name, o.bits_per_byte, o.how) for o in others)]))
        return Outcome(f"{bits:.3f} bits per byte on held-out text, loss {loss:.3f} nats per token")

    def generate(self) -> Outcome:
        model, tokenizer = self._trained()
        length = min(200, model.config.context_length // 2)
        rows = sampler(tokenizer, self._prompts(), self.settings.seed, length)(model)
        _write_lines(self.run_dir / "generated.jsonl", rows)
        for row in rows:
            self.console.print(Text.assemble((visible(row["prompt"]), "bold"), visible(row["text"])))
        return Outcome(f"{len(rows)} texts of up to {length} tokens")

    def report(self) -> Outcome:
        return Outcome(f"open {write_report(self.run_dir)} in a browser")


def quickstart(settings: Quickstart, console: Console | None = None) -> None:
    """Run the main job, or what is left of it. Raises Interrupted where a signal stopped training."""
    Job(settings, console).run()


def keep_tokenizer(tokenizer: Tokenizer, run_dir: pathlib.Path, **facts: float) -> None:
    """Write tokenizer.json, and tokenizer_stats.json for the report, into a run directory."""
    run_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(run_dir / "tokenizer.json")
    with replacing(run_dir / "tokenizer_stats.json") as file:
        json.dump(facts | statistics(tokenizer), file, indent=2)


def sampler(
    tokenizer: Tokenizer, prompts: Sequence[str], seed: int, max_tokens: int = 64
) -> Callable[[Transformer], list[dict[str, Any]]]:
    """What the trainer calls to see what the model writes."""
    params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=max_tokens, seed=seed)

    def sample(model: Transformer) -> list[dict[str, Any]]:
        return [{"prompt": c.prompt, "text": c.text} for c in generate(model, tokenizer, prompts, params)]

    return sample


def _pieces(documents: Sequence[str]) -> Iterator[str]:
    """Few documents as at least FEW pieces, cut at line ends where lines are not too long for that."""
    size = max(1, sum(map(len, documents)) // (2 * FEW))
    for document in documents:
        start = 0
        while start < len(document):
            end = document.find("\n", start + size, start + 2 * size) + 1 or start + 2 * size
            if document[start:end].strip():
                yield document[start:end]
            start = end


def _hash(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, default=str, sort_keys=True).encode()).hexdigest()[:16]


def _write_lines(path: os.PathLike, rows: list[dict[str, Any]]) -> None:
    with replacing(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _table(rows: list[tuple[str, float, str]]) -> Table:
    """Fewest bits first."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("bits per byte of held-out text", style="bold")
    table.add_column("", justify="right")
    table.add_column("", style="dim")
    for name, bits, how in sorted(rows, key=lambda row: row[1]):
        table.add_row(name, f"{bits:.3f}", how, style="green" if name == "this model" else "")
    return table
