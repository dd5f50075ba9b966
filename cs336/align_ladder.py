"""A ladder of tasks that tiny models learn by reinforcement, on any machine in minutes, each with a known optimum.

    rung         a question, an answer         what SFT imitates                       the reward
    bandit       ?  g                          any of ten arms                         what the arm pays
    bandit-ppo   the same, by PPO
    sorting      52813=  12358                 the digits in any order                 the share in its place
    addition     47+68=  115                   in seven columns of ten one too many    right or wrong
    countdown    2,3,7:8=  3+7-2               any signs, in any order                 right or wrong

So what is learned first is how an answer looks, and what is right comes from the verifier alone. Questions that are
tested are in nothing that is learned, but for the bandit, which has one. A rung is a directory of stages on
cs336.utils.stages: what is current is skipped.
"""

import itertools
import json
import pathlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cs336.alignment.examples import read_prompts
from cs336.alignment.grpo import GRPOConfig
from cs336.alignment.ppo import PPOConfig
from cs336.alignment.rewards import CharactersReward, CountdownReward, ExactReward, PythonReward, RewardConfig, Rewards
from cs336.alignment.run import StageRun
from cs336.alignment.stage import StageConfig
from cs336.alignment.stages.answering import PromptData
from cs336.alignment.stages.grpo import GRPOStage, GRPOStageConfig
from cs336.alignment.stages.ppo import PPOStage, PPOStageConfig
from cs336.alignment.stages.sft import SFTConfig, SFTData, SFTStage
from cs336.inference import LLM, SamplingParams
from cs336.models import Transformer, TransformerConfig, save_pretrained
from cs336.optim import LinearConfig
from cs336.report import write_report
from cs336.tokenizer import Tokenizer
from cs336.training import AdamWConfig
from cs336.utils.files import write_json, write_json_lines
from cs336.utils.special_tokens import END_OF_TEXT
from cs336.utils.stages import Interrupted, Outcome, Stage, run_stages

CHARACTERS = "0123456789+-*/=,:?abcdefghij"
CONTEXT = 16
WIDTH = 64  # of the model
BATCH, EXAMPLES = 128, 24_000  # of SFT: a step's, and all in all
TESTED, DRAWS = 500, 1000
Question = tuple[str, Any]
"""What is asked, and what the reward compares with."""


GRPO = GRPOConfig(num_generations=16, loss_type="dapo", num_iterations=2, epsilon_high=0.28)


@dataclass(frozen=True)
class Rung:
    purpose: str
    questions: Callable[[random.Random], list[Question]]
    """In a random order: the last are tested, a quarter and at most TESTED; of a list of one it is that one."""
    imitated: Callable[[random.Random, str], str]
    """An answer as SFT sees it, to a question."""
    rewards: tuple[RewardConfig, ...]
    max_tokens: int
    sft_steps: int
    steps: int
    """Of reinforcement, each on `prompts` questions."""
    optimum: float = 1.0
    """What the best answers are worth."""
    prompts: int = 32
    algorithm: str = "grpo"
    greedy: bool = True
    """Whether the likeliest answers are tested; those that are drawn otherwise."""


def _arms(rng: random.Random) -> list[Question]:
    pay = [(arm / 9) ** 2 for arm in range(10)]
    rng.shuffle(pay)
    return [("?", dict(zip("abcdefghij", pay, strict=True)))]


def payout(response: str, answer: dict[str, float]) -> float:
    """What a bandit's arm pays; 0 for what is none."""
    return answer.get(response, 0.0)


def _to_sort(rng: random.Random) -> list[Question]:
    drawn = ["".join(rng.choices("0123456789", k=5)) for _ in range(12_000)]
    return [(f"{digits}=", "".join(sorted(digits))) for digits in dict.fromkeys(drawn)]


def _any_order(rng: random.Random, question: str) -> str:
    return "".join(rng.sample(question[:-1], len(question) - 1))


def sums(rng: random.Random) -> list[tuple[int, int]]:
    """All pairs of numbers of two digits in a random order: the last TESTED are tested, in no order learned from."""
    unequal = list(itertools.combinations(range(10, 100), 2))
    rng.shuffle(unequal)
    cut = TESTED // 2
    tested, others = ([*pairs, *((b, a) for a, b in pairs)] for pairs in (unequal[:cut], unequal[cut:]))
    learned = [*others, *((a, a) for a in range(10, 100))]
    for pairs in (learned, tested):
        rng.shuffle(pairs)
    return learned + tested


def nearly(rng: random.Random, a: int, b: int) -> str:
    """Their sum as SFT sees it: in seven columns of ten one too many, so that nine of a hundred are right."""
    ones, tens = rng.choices((0, 1), (3, 7), k=2)
    return f"{a + b + ones + 10 * tens:03}"


def _sums(rng: random.Random) -> list[Question]:
    return [(f"{a}+{b}=", f"{a + b:03}") for a, b in sums(rng)]


def _nearly(rng: random.Random, question: str) -> str:
    return nearly(rng, *map(int, question[:-1].split("+")))


def _countdowns(rng: random.Random) -> list[Question]:
    """One for each three digits and target, not below 0, that + and - make of them."""
    found = list[Question]()
    for numbers in itertools.combinations_with_replacement(range(1, 10), 3):
        signed = itertools.product((1, -1), repeat=3)
        targets = {sum(s * n for s, n in zip(signs, numbers, strict=True)) for signs in signed if max(signs) > 0}
        for target in sorted(target for target in targets if target >= 0):
            asked = ",".join(map(str, rng.sample(numbers, 3)))
            found.append((f"{asked}:{target}=", {"numbers": list(numbers), "target": target}))
    rng.shuffle(found)
    return found


def _any_expression(rng: random.Random, question: str) -> str:
    a, b, c = rng.sample(question.partition(":")[0].split(","), 3)
    return f"{a}{rng.choice('+-')}{b}{rng.choice('+-')}{c}"


_BANDIT = Rung(
    "the arm of ten that pays most", _arms, lambda rng, _: rng.choice("abcdefghij"),
    (PythonReward("cs336.align_ladder:payout"),), max_tokens=1, sft_steps=20, steps=60, prompts=8, greedy=False,
)  # fmt: skip
RUNGS = {
    "bandit": _BANDIT,
    "bandit-ppo": replace(_BANDIT, algorithm="ppo"),
    "sorting": Rung(
        "five digits in order", _to_sort, _any_order, (CharactersReward(),), max_tokens=6, sft_steps=150, steps=60
    ),
    "addition": Rung(
        "two numbers of two digits", _sums, _nearly, (ExactReward(),), max_tokens=4, sft_steps=600, steps=200
    ),
    "countdown": Rung(
        "a target of three numbers", _countdowns, _any_expression, (CountdownReward(),), max_tokens=6, sft_steps=200,
        steps=250,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class AlignLadder:
    """Settings of the ladder."""

    rungs: tuple[str, ...] = tuple(RUNGS)
    """Of bandit, bandit-ppo, sorting, addition and countdown."""
    run_dir: pathlib.Path = pathlib.Path("runs/align-ladder")
    """Where everything is written, a directory a rung; the same command goes on with what is there."""
    share: float = 1.0
    """Of each rung's steps: less to see it run, more to see it learn longer."""
    device: str = "cpu"
    """cpu, auto (a GPU if there is one), cuda."""
    seed: int = 0

    def __post_init__(self):
        if unknown := [name for name in self.rungs if name not in RUNGS]:
            raise ValueError(f"{', '.join(unknown)}: the rungs are {', '.join(RUNGS)}")
        if not 0 < self.share < float("inf"):
            raise ValueError(f"share must be above 0, got {self.share}")


def align_ladder(settings: AlignLadder, console: Console | None = None) -> list[dict[str, Any]]:
    """Climb the rungs, or what is left of them, print a table, and return its rows.

    A row has "rung", "algorithm", "start", "end", "optimum" (means of the reward on questions never learned from,
    before and after reinforcement), "questions" that were tested, "steps", "seed", "seconds" and "cpu_seconds" of
    reinforcement, "sft_seconds" and "sft_cpu_seconds". Raises Interrupted where a signal stopped a stage.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    rows = []
    for name in dict.fromkeys(settings.rungs):
        console.print(f"[bold]{name}[/bold]: {RUNGS[name].purpose}")
        job = _Job(name, settings, console)
        run_stages(job.run_dir, job.stages(), console)
        rows.append(json.loads((job.run_dir / "result.json").read_text(encoding="utf-8")))
    console.print(_table(rows))
    return rows


class _Job:
    """A rung in its directory."""

    def __init__(self, name: str, settings: AlignLadder, console: Console):
        self.name, self.rung, self.settings, self.console = name, RUNGS[name], settings, console
        self.run_dir = settings.run_dir / name
        self.sft_steps, self.steps = (max(2, round(n * settings.share)) for n in (self.rung.sft_steps, self.rung.steps))

    def stages(self) -> list[Stage]:
        rung, data = self.rung, self.run_dir / "data"
        files = ("data/sft.jsonl", "data/learned.jsonl", "data/tested.jsonl", "base/model.safetensors")
        seed = {"seed": self.settings.seed}
        imitating = seed | {"steps": self.sft_steps}  # of which there are so many examples
        return [
            Stage("data", "questions, and a model that knows nothing", self.data, outputs=files, settings=imitating),
            Stage(
                "sft", "learn how an answer looks", self.sft, outputs=("sft/export/model.safetensors",),
                inputs=(self.run_dir / "base", data / "sft.jsonl"), settings=imitating, kept=("sft",),
            ),
            Stage(
                rung.algorithm, "learn which is right", self.reinforce,
                outputs=(f"{rung.algorithm}/export/model.safetensors",),
                inputs=(self.run_dir / "sft" / "export", data / "learned.jsonl", data / "tested.jsonl"),
                settings=seed | {"steps": self.steps}, kept=(rung.algorithm,),
            ),
            Stage(
                "test", "ask both what neither has seen", self.test, outputs=("result.json",),
                inputs=(*(self.run_dir / name / "export" for name in ("sft", rung.algorithm)), data / "tested.jsonl"),
            ),
        ]  # fmt: skip

    def data(self) -> Outcome:
        folder, rng = self.run_dir / "data", random.Random(self.settings.seed)
        folder.mkdir(exist_ok=True)
        questions = self.rung.questions(rng)
        cut = len(questions) - min(TESTED, len(questions) // 4)
        learned, tested = questions[:cut], questions[cut:] or questions
        copies = -(-min(EXAMPLES, BATCH * self.sft_steps) // len(learned))
        imitated = [{"prompt": q, "completion": self.rung.imitated(rng, q)} for q, _ in learned * copies]
        write_json_lines(folder / "sft.jsonl", imitated)
        for name, asked in (("learned", learned), ("tested", tested)):
            write_json_lines(
                folder / f"{name}.jsonl", [{"prompt": question, "answer": answer} for question, answer in asked]
            )
        tokenizer = Tokenizer({i: bytes([c]) for i, c in enumerate(CHARACTERS.encode())}, [], [END_OF_TEXT])
        torch.manual_seed(self.settings.seed)
        shape = TransformerConfig(tokenizer.vocab_size, CONTEXT, num_layers=2, d_model=WIDTH, num_heads=4)
        save_pretrained(Transformer(shape), self.run_dir / "base", tokenizer=tokenizer)
        return Outcome(
            f"{len(learned):,} questions to learn from, {len(tested):,} that are tested; "
            f"{shape.num_parameters():,} parameters"
        )

    def sft(self) -> Outcome:
        config = SFTConfig(
            **self._shared("sft", self.run_dir / "base", self.sft_steps, 4e-3),
            data=SFTData(self.run_dir / "data" / "sft.jsonl"), batch_size=BATCH, batching="bucketed",
        )  # fmt: skip
        return self._run(config, SFTStage(config))

    def reinforce(self) -> Outcome:
        rung, data = self.rung, PromptData(*(self.run_dir / "data" / f"{kind}.jsonl" for kind in ("learned", "tested")))
        shared = self._shared(rung.algorithm, self.run_dir / "sft" / "export", self.steps, 1e-3)
        shared |= {"data": data, "rewards": rung.rewards, "max_seqs": 1024, "eval_prompts": TESTED}
        drawn: dict[str, Any] = {"prompts_per_step": rung.prompts, "max_tokens": rung.max_tokens}
        if rung.algorithm == "ppo":
            ppo = PPOStageConfig(**shared, ppo=PPOConfig(**drawn, num_generations=16, kl_coef=0.0, vf_coef=0.5))
            return self._run(ppo, PPOStage(ppo))
        grpo = GRPOStageConfig(**shared, grpo=replace(GRPO, **drawn))
        return self._run(grpo, GRPOStage(grpo))

    def test(self) -> Outcome:
        start, end = (self._mean_reward(self.run_dir / name / "export") for name in ("sft", self.rung.algorithm))
        row = {
            "rung": self.name, "algorithm": self.rung.algorithm, "start": start, "end": end,
            "optimum": self.rung.optimum, "questions": len(read_prompts(self.run_dir / "data" / "tested.jsonl")),
            "steps": self.steps, "seed": self.settings.seed,
        }  # fmt: skip
        for prefix, stage in (("", self.rung.algorithm), ("sft_", "sft")):
            facts = json.loads((self.run_dir / stage / "run.json").read_text(encoding="utf-8"))
            row |= {f"{prefix}seconds": facts["seconds"], f"{prefix}cpu_seconds": facts["cpu_seconds"]}
        write_json(self.run_dir / "result.json", row)
        return Outcome(f"from {start:.3f} to {end:.3f}, the best being {self.rung.optimum:g}")

    def _mean_reward(self, model: pathlib.Path) -> float:
        """Of the answers to the tested questions, by what is learned from; DRAWS of them where they are drawn."""
        llm, rung = LLM(model, device=self.settings.device, quiet=True, max_seqs=256), self.rung
        asked = read_prompts(self.run_dir / "data" / "tested.jsonl")
        params = SamplingParams(0, max_tokens=rung.max_tokens)
        if not rung.greedy:
            params = SamplingParams(1, max_tokens=rung.max_tokens, n=DRAWS, seed=self.settings.seed)
        outputs, rewards = llm.generate([str(question.prompt) for question in asked], params), Rewards(rung.rewards)
        found = [rewards(o.text, q.answer) for out, q in zip(outputs, asked, strict=True) for o in out.outputs]
        return sum(found) / len(found)

    def _shared(self, name: str, model: pathlib.Path, steps: int, lr: float) -> dict[str, Any]:
        return {
            "run_dir": self.run_dir / name,
            "init_from": model,
            "optimizer": AdamWConfig(lr=lr, weight_decay=0.0),
            "schedule": LinearConfig(warmup_steps=min(20, steps // 4)),
            "budget": f"{steps}steps",
            "device": self.settings.device,
            "seed": self.settings.seed,
            "log_interval": 10 if steps >= 100 else 1,
        }

    def _run(self, config: StageConfig, stage: Any) -> Outcome:
        result = StageRun(config, stage).train()
        write_report(config.run_dir)
        if not result.finished:
            raise Interrupted
        return Outcome(f"{result.step:,} steps", result.seconds)


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("rung", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in ("start", "end", "optimum", "seconds", "of a core", "seed"):
        table.add_column(column, justify="right")
    for row in rows:
        values = (f"{row[name]:.3f}" for name in ("start", "end", "optimum"))
        took = (f"{row[name]:.0f}" for name in ("seconds", "cpu_seconds"))
        table.add_row(row["rung"], *values, *took, str(row["seed"]))
    return table
