"""The alignment demo: a tiny model learns to add two numbers of two digits, through every stage, on two CPU cores.

pretrain on generated text, SFT on generated answers of which nine in a hundred are right, DPO on preferences between
its own, GRPO with a verifier. Sums that are tested are in none of them. Stages on cs336.utils.stages: what is current
is skipped.
"""

import json
import pathlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from cs336.align_ladder import GRPO, TESTED, nearly, sums
from cs336.alignment.examples import Prompt, Turn
from cs336.alignment.make_pairs import VerifierLabels, make_pairs
from cs336.alignment.rewards import CharactersReward, ExactReward, MathReward
from cs336.alignment.run import StageRun
from cs336.alignment.stages.answering import PromptData
from cs336.alignment.stages.dpo import DPOConfig, PairData, dpo_stage
from cs336.alignment.stages.grpo import GRPOStage, GRPOStageConfig
from cs336.alignment.stages.sft import SFTConfig, SFTData, SFTStage
from cs336.data import tokenize_documents
from cs336.inference import LLM, SamplingParams
from cs336.inference.load import find_model, read_config
from cs336.models import TransformerConfig
from cs336.optim import LinearConfig
from cs336.report import write_report
from cs336.tokenizer import Tokenizer
from cs336.training import AdamWConfig, DataConfig, TrainConfig, Trainer
from cs336.utils.files import write_json, write_json_lines
from cs336.utils.special_tokens import END_OF_TEXT
from cs336.utils.stages import Interrupted, Outcome, Stage, run_stages

CHARACTERS = "0123456789+=\n"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}={{ m.content }}<|endoftext|>{% else %}{{ m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)
"""A question is written as 12+34, its answer as =046, so that every answer is of three characters and an end."""
CONTEXT, ANSWER = 16, 4
COPIES = 3  # of each sum that SFT learns from, with another answer each
SFT_SHARE = 0.25  # of the minutes, where there are any; GRPO has the rest
WIDTH = 64  # of the model that is pretrained here; a wider one learns more slowly by so much


@dataclass(frozen=True)
class AlignDemo:
    """Settings of the alignment demo."""

    run_dir: pathlib.Path = pathlib.Path("runs/align-demo")
    """Where everything is written; the same command goes on with what is there."""
    model: pathlib.Path | None = None
    """A base model to begin with, a run of quickstart for one. None: a tiny one of characters is pretrained."""
    pretrain_steps: int = 100
    sft_steps: int = 600
    """On answers of which nine in a hundred are right: the model knows how an answer looks, and is seldom right."""
    dpo_steps: int = 20
    grpo_steps: int = 200
    prompts_per_step: int = 32
    """Of GRPO, each answered 16 times."""
    device: str = "cpu"
    """cpu, auto (a GPU if there is one), cuda."""
    seed: int = 0
    minutes: float | None = None
    """For SFT and GRPO together. None: sft_steps and grpo_steps say how long they are."""

    def __post_init__(self):
        for name in ("pretrain_steps", "sft_steps", "dpo_steps", "grpo_steps", "prompts_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise ValueError(f"minutes must be more than zero and finite, got {self.minutes}")


def align_demo(settings: AlignDemo, console: Console | None = None) -> pathlib.Path:
    """Run the demo, or what is left of it, and return the report of its last stage.

    Raises Interrupted where a signal stopped a stage, and, before anything is written, FileNotFoundError where there is
    no base model.
    """
    if settings.model is not None:
        find_model(settings.model)
    job = _Job(settings, console or Console(highlight=False, soft_wrap=True))
    run_stages(settings.run_dir, job.stages(), job.console)
    return settings.run_dir / "grpo" / "report.html"


def split_sums(seed: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pairs of numbers of two digits to learn from, and those that are tested."""
    pairs = sums(random.Random(seed))
    return pairs[:-TESTED], pairs[-TESTED:]


def sums_right(model: pathlib.Path, tested: Sequence[tuple[int, int]], device: str) -> float:
    """The share of sums whose likeliest answer is right."""
    llm = LLM(model, device=device, quiet=True, max_seqs=256)
    outputs = llm.generate([f"{a}+{b}=" for a, b in tested], SamplingParams(0, max_tokens=ANSWER))
    return sum(o.text == f"{a + b:03}" for o, (a, b) in zip(outputs, tested, strict=True)) / len(tested)


class _Job:
    def __init__(self, settings: AlignDemo, console: Console):
        self.settings, self.console, self.run_dir = settings, console, settings.run_dir
        self.learned, self.tested = split_sums(settings.seed)

    def stages(self) -> list[Stage]:
        s, data = self.settings, self.run_dir / "data"
        files = ("data/text.jsonl", "data/sft.jsonl", "data/prompts.jsonl", "data/test.jsonl")
        exports = {name: self._export(name) for name in ("sft", "dpo", "grpo")}
        first = [
            Stage("data", "write questions and answers", self.data, outputs=files, settings={"seed": s.seed}),
        ]
        if s.model is None:
            first.append(
                Stage(
                    "pretrain", "a tiny model of characters", self.pretrain, outputs=("base/export/model.safetensors",),
                    inputs=(data / "text.jsonl",), settings={"steps": s.pretrain_steps, "seed": s.seed}, kept=("base",),
                )
            )  # fmt: skip
        return [
            *first,
            self._stage("sft", "learn how an answer looks", self.sft, self._base, data / "sft.jsonl", s.sft_steps),
            Stage(
                "pairs", "draw answers in pairs, and label the better", self.pairs, outputs=("data/pairs.jsonl",),
                inputs=(self.run_dir / "sft" / "export", data / "prompts.jsonl"), settings={"seed": s.seed},
            ),
            self._stage("dpo", "prefer the better ones", self.dpo, exports["sft"], data / "pairs.jsonl", s.dpo_steps),
            self._stage("grpo", "learn to add", self.grpo, exports["dpo"], data / "prompts.jsonl", s.grpo_steps),
            Stage(
                "compare", "ask each the tested sums", self.compare, outputs=("results.json",),
                inputs=(*exports.values(), data / "test.jsonl"),
            ),
        ]  # fmt: skip

    def _stage(self, name: str, purpose: str, run: Any, model: pathlib.Path, data: pathlib.Path, steps: int) -> Stage:
        timed = name != "dpo" and self.settings.minutes is not None
        settings = {"seed": self.settings.seed, **({"minutes": self.settings.minutes} if timed else {"steps": steps})}
        if name == "grpo":
            settings["prompts_per_step"] = self.settings.prompts_per_step
        outputs = (f"{name}/export/model.safetensors",)
        return Stage(name, purpose, run, outputs=outputs, inputs=(model, data), settings=settings, kept=(name,))

    @property
    def _base(self) -> pathlib.Path:
        return self.settings.model or self._export("base")

    def _export(self, name: str) -> pathlib.Path:
        return self.run_dir / name / "export"

    # ---- what the stages do ----

    def data(self) -> Outcome:
        folder = self.run_dir / "data"
        folder.mkdir(exist_ok=True)
        rng = random.Random(self.settings.seed + 1)
        text = ["\n".join(f"{a}+{b}={a + b}" for a, b in _small(rng, 200)) for _ in range(50)]
        write_json_lines(folder / "text.jsonl", [{"text": document} for document in text])
        conversations = [
            {"messages": [_turn("user", f"{a}+{b}"), _turn("assistant", nearly(rng, a, b))]}
            for a, b in self.learned * COPIES
        ]
        write_json_lines(folder / "sft.jsonl", conversations)
        for name, pairs in (("prompts", self.learned), ("test", self.tested)):
            rows = [{"prompt": [_turn("user", f"{a}+{b}")], "answer": f"{a + b:03}"} for a, b in pairs]
            write_json_lines(folder / f"{name}.jsonl", rows)
        (folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
        return Outcome(f"{len(self.learned):,} sums to learn from, {len(self.tested):,} that are tested")

    def pretrain(self) -> Outcome:
        tokenizer = Tokenizer({i: bytes([c]) for i, c in enumerate(CHARACTERS.encode())}, [], [END_OF_TEXT])
        rows = (json.loads(line) for line in (self.run_dir / "data" / "text.jsonl").read_text().splitlines())
        tokens = self.run_dir / "data" / "tokens"
        tokenize_documents((row["text"] for row in rows), tokenizer, tokens)
        config = TrainConfig(
            run_dir=self.run_dir / "base",
            data=DataConfig(tokens),
            model=TransformerConfig(len(CHARACTERS) + 1, CONTEXT, num_layers=2, d_model=WIDTH, num_heads=4),
            optimizer=AdamWConfig(lr=3e-3, weight_decay=0.0),
            budget=f"{self.settings.pretrain_steps}steps",
            device=self.settings.device,
            seed=self.settings.seed,
        )
        result = Trainer(config, tokenizer=tokenizer).train()
        if not result.finished:
            raise Interrupted
        return Outcome(f"{config.model.num_parameters():,} parameters, {result.tokens:,} characters", result.seconds)

    def sft(self) -> Outcome:
        config = SFTConfig(
            **self._shared("sft", self._base, self.settings.sft_steps, 4e-3, SFT_SHARE),
            chat_template=self.run_dir / "data" / "template.jinja",
            data=SFTData(self.run_dir / "data" / "sft.jsonl"),
            batch_size=128,
            batching="bucketed",
        )
        return self._run(config, SFTStage(config))

    def pairs(self) -> Outcome:
        prompts = [Prompt((Turn("user", f"{a}+{b}"),), f"{a + b:03}") for a, b in self.learned[:1000]]
        llm = LLM(self._export("sft"), device=self.settings.device, quiet=True)
        labels = VerifierLabels([CharactersReward()])
        seed = self.settings.seed
        found = make_pairs(llm, prompts, self.run_dir / "data" / "pairs.jsonl", labels, max_tokens=ANSWER, seed=seed)
        if found.ties == found.pairs:
            raise ValueError("after SFT all answers are worth the same, and none can be preferred: give more minutes")
        return Outcome(f"{found.pairs:,} pairs of answers, {found.ties:,} of them equally good")

    def dpo(self) -> Outcome:
        config = DPOConfig(
            **self._shared("dpo", self._export("sft"), self.settings.dpo_steps, 1e-4),
            data=PairData(self.run_dir / "data" / "pairs.jsonl"),
            batch_size=32,
        )
        return self._run(config, dpo_stage(config))

    def grpo(self) -> Outcome:
        config = GRPOStageConfig(
            **self._shared("grpo", self._export("dpo"), self.settings.grpo_steps, 1e-3, 1 - SFT_SHARE),
            data=PromptData(self.run_dir / "data" / "prompts.jsonl", self.run_dir / "data" / "test.jsonl"),
            rewards=(ExactReward(), MathReward(weight=0.0)),
            grpo=replace(GRPO, prompts_per_step=self.settings.prompts_per_step, max_tokens=ANSWER),
            eval_prompts=TESTED,
            max_seqs=1024,
        )  # fmt: skip
        return self._run(config, GRPOStage(config))

    def compare(self) -> Outcome:
        names = ["sft", "dpo", "grpo"]
        accuracies = {name: sums_right(self._export(name), self.tested, self.settings.device) for name in names}
        rows = [{"model": name, "accuracy": accuracy} for name, accuracy in accuracies.items()]
        found = {"settings": asdict(self.settings), "tested": len(self.tested), "rows": rows}
        write_json(self.run_dir / "results.json", found, default=str)
        table = Table("after", "tested sums that are right", box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for name, accuracy in accuracies.items():
            table.add_row(name, f"{accuracy:.1%}")
        self.console.print(table)
        write_report(self.run_dir / "grpo")
        first, last = accuracies["sft"], accuracies["grpo"]
        return Outcome(f"from {first:.1%} to {last:.1%} of {len(self.tested)} sums that it never saw")

    def _shared(self, name: str, model: pathlib.Path, steps: int, lr: float, share: float = 0.0) -> dict[str, Any]:
        """share: of the minutes, where there are any."""
        timed = bool(share) and self.settings.minutes is not None
        seconds = 60 * share * (self.settings.minutes or 0)
        return {
            "run_dir": self.run_dir / name,
            "init_from": model,
            "optimizer": AdamWConfig(lr=lr * min(1, WIDTH / self._width()), weight_decay=0.0),
            "schedule": LinearConfig(warmup_steps=None if timed else min(20, steps // 4)),
            "budget": f"{seconds:g}s" if timed else f"{steps}steps",
            "device": self.settings.device,
            "seed": self.settings.seed,
            "log_interval": 10 if steps >= 100 else 1,
        }

    def _width(self) -> int:
        return read_config(self._base).d_model

    def _run(self, config: Any, stage: Any) -> Outcome:
        result = StageRun(config, stage).train()
        write_report(config.run_dir)
        if not result.finished:
            raise Interrupted
        said = ", ".join(f"{name} {value:.3g}" for name, value in list(result.metrics.items())[:2])
        return Outcome(f"{result.step:,} steps" + (f", {said}" if said else ""), result.seconds)


def _small(rng: random.Random, count: int) -> Iterator[tuple[int, int]]:
    return ((rng.randrange(10), rng.randrange(10)) for _ in range(count))


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
