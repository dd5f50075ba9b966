"""What GRPO adds to SFT on grade-school mathematics: a model is tuned on GSM8K's answers, then learns of a verifier.

    python -m benchmarks.end_to_end.bench_gsm8k MODEL GSM8K.jsonl [--seed 0] [--sft 120steps] [--grpo 120s] [--out FILE]

MODEL: any that the verbs take, SmolLM2-135M-Instruct as a GGUF file for one. GSM8K: its training set, of which one
split, the same for every seed, holds out TESTED questions. SFT imitates the solutions of all others, without their
calculator's marks; GRPO learns from those of at most EASY steps of reckoning to which some of TRIED answers of that
model are right and some wrong: to most of the others all sixteen would be wrong, and teach nothing. Both models answer
all that is held out: greedily, and DRAWS times at GRPO's temperature. What is called SFT is the model that GRPO begins
with. A call adds its seed's row to FILE; calls beside each other take a FILE each. With --within GRPO has the time that
the rest leaves.
"""

import argparse
import dataclasses
import json
import pathlib
import random
import re
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import results
from cs336.alignment.rollouts import Order
from cs336.alignment.run import StageRun
from cs336.alignment.stages.grpo import GRPOStage, GRPOStageConfig
from cs336.alignment.stages.sft import SFTConfig, SFTStage
from cs336.experiments.significance import mean
from cs336.inference import SamplingParams
from cs336.utils import config as configs
from cs336.utils.device import pick
from cs336.utils.documents import open_bytes

TESTED, MAX_TOKENS, DRAWS = 2000, 200, 2
EASY, TRIED = 2, 4  # marks for a calculator, one a step
LEARNED_TOKENS = 160  # of an answer that GRPO draws: easy questions seldom take more
TEMPERATURE = 0.7  # after so little SFT a draw at 1 is right half as often as the likeliest answer
WARMUP = 6  # steps of GRPO: Adam's first are of the gradient's sign alone
MARGIN = 1.5  # of the time that the second evaluation and an export take, over the first's
_CALCULATOR = re.compile(r"<<.*?>>")  # the answers' marks for a calculator
Row = dict[str, Any]


def write_data(source: pathlib.Path, folder: pathlib.Path) -> None:
    """sft.jsonl, train.jsonl and val.jsonl of the question's own text."""
    with open_bytes(source) as file:
        rows = [json.loads(line) for line in file]
    random.Random(0).shuffle(rows)

    def asked(row: Row) -> list[Row]:
        return [{"role": "user", "content": row["question"]}]

    def prompts(some: list[Row]) -> list[Row]:
        return [{"prompt": asked(row), "answer": row["answer"].split("####")[1].strip()} for row in some]

    def conversation(row: Row) -> Row:
        return {"messages": [*asked(row), {"role": "assistant", "content": _CALCULATOR.sub("", row["answer"])}]}

    learned, tested = rows[:-TESTED], rows[-TESTED:]
    easy = [row for row in learned if len(_CALCULATOR.findall(row["answer"])) <= EASY]
    for name, lines in (
        ("sft", list(map(conversation, learned))), ("train", prompts(easy)), ("val", prompts(tested)),
    ):  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


class Stage(GRPOStage):
    """GRPO on the engine that has answered before it began."""

    def begin(self) -> None:
        if not hasattr(self, "llm"):
            super().begin()


def right(stage: GRPOStage, asked: Sequence[tuple[str, Any]], temperature: float, n: int) -> list[float]:
    """The share of n answers to each question that is right.

    As many are asked at once as the engine runs at once: a step in which a prompt begins is no CUDA graph, and where
    each that ends makes room for another nearly all steps are such.
    """
    params, shares = SamplingParams(temperature, max_tokens=MAX_TOKENS, seed=7, n=n), list[float]()
    size = stage.llm.engine.config.max_seqs // n
    for some in (asked[start : start + size] for start in range(0, len(asked), size)):
        with stage.policy.autocast():
            requests = stage.llm.generate([prompt for prompt, _ in some], params)
        for request, (_, answer) in zip(requests, some, strict=True):
            shares.append(sum(stage.rewards(output.text, answer) for output in request.outputs) / n)
    return shares


def answered(stage: GRPOStage, tested: Sequence[tuple[str, Any]]) -> tuple[list[float], float]:
    """Which tested questions the likeliest answer is right about, and the share of right answers that are drawn."""
    return right(stage, tested, 0.0, 1), mean(right(stage, tested, TEMPERATURE, DRAWS)).value


def measure(options: argparse.Namespace) -> Row:
    """A seed: SFT, what it answers, GRPO from there, what that answers."""
    began = time.monotonic()
    folder: pathlib.Path = options.run_dir / f"seed-{options.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    write_data(options.data, folder)
    shared = {
        "device": options.device,
        "seed": options.seed,
        "checkpoint_interval": 0,
        "eval_interval": 0,
        "micro_batch_size": 128,
    }
    tuning = configs.parse(SFTConfig, shared | {
        "run_dir": str(folder / "sft"), "init_from": str(options.model), "data": {"train": str(folder / "sft.jsonl")},
        "budget": options.sft, "batch_size": 16, "context_length": 1024, "too_long": "drop",
        "optimizer": {"lr": options.sft_lr, "weight_decay": 0.0},
        "schedule": {"kind": "linear", "warmup_steps": 10, "min_lr_ratio": 0.0},
    })  # fmt: skip
    tuned = StageRun(tuning, SFTStage(tuning)).train()
    config = configs.parse(GRPOStageConfig, shared | {
        "run_dir": str(folder / "grpo"), "init_from": str(tuned.export), "budget": options.grpo,
        "data": {side: str(folder / f"{side}.jsonl") for side in ("train", "val")}, "eval_prompts": TESTED,
        "optimizer": {"lr": options.lr, "weight_decay": 0.0}, "max_seqs": 512,
        "schedule": {"kind": "linear", "warmup_steps": WARMUP, "min_lr_ratio": 0.1},
        "grpo": {
            "num_generations": 16, "prompts_per_step": 32, "max_tokens": LEARNED_TOKENS, "temperature": TEMPERATURE,
            "loss_type": "dapo", "epsilon_high": 0.28,
        },
    })  # fmt: skip
    stage = Stage(config)
    stage.begin()
    tested, stage.val = stage.val, []  # the run's own evaluations would take of its time
    mark = time.monotonic()
    before, before_drawn = answered(stage, tested)
    took = time.monotonic() - mark
    print(f"after SFT: {mean(before).value:.4f} greedy, {before_drawn:.4f} drawn", flush=True)
    shares = right(stage, stage.order.items, TEMPERATURE, TRIED)
    kept = [item for item, share in zip(stage.order.items, shares, strict=True) if 0 < share < 1]
    print(f"{len(kept):,} of {len(shares):,} questions are learned from", flush=True)
    stage.order = Order(kept or stage.order.items, options.seed)
    if options.within:
        rest = options.within - (time.monotonic() - began) - MARGIN * took
        config = dataclasses.replace(config, budget=f"{max(1, int(rest))}s")
    result = StageRun(config, stage).train()
    after, after_drawn = answered(stage, tested)
    return {
        "seed": options.seed, "sft_greedy": mean(before).value, "sft_drawn": before_drawn,
        "grpo_greedy": mean(after).value, "grpo_drawn": after_drawn, "tested": TESTED, "learned": len(kept),
        "gained": sum(b > a for a, b in zip(before, after, strict=True)),
        "lost": sum(b < a for a, b in zip(before, after, strict=True)),
        "sft_steps": tuned.step, "grpo_steps": result.step, "sft_seconds": round(tuned.seconds),
        "grpo_seconds": round(result.seconds), "lr": options.lr, "temperature": TEMPERATURE,
    }  # fmt: skip


def with_gains(rows: list[Row]) -> list[Row]:
    """And the mean gain over the seeds, with half of its 95 % interval, of either way to answer."""
    found = list(rows)
    for how in ("greedy", "drawn"):
        gain = mean([row[f"grpo_{how}"] - row[f"sft_{how}"] for row in rows])
        found.append({"gain": how, "mean": gain.value, "half_width": gain.half_width})
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.end_to_end.bench_gsm8k", description=__doc__)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("data", type=pathlib.Path, help='JSON lines of "question" and "answer", .xz or not')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sft", default="120steps", help="budget of SFT (%(default)s)")
    parser.add_argument("--grpo", default="120s", help="budget of GRPO (%(default)s)")
    parser.add_argument("--within", type=float, metavar="SECONDS", help="of the whole call, in place of --grpo")
    parser.add_argument("--sft-lr", type=float, default=3e-4)
    parser.add_argument("--lr", type=float, default=2.5e-5, help="of GRPO, at its start (%(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--run-dir", type=pathlib.Path, default=pathlib.Path("runs/bench-gsm8k"))
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="results file to put the row into")
    options = parser.parse_args(argv)
    row = measure(options)
    print(json.dumps(row))
    if options.out:
        kept = results.read(options.out).get("gsm8k", {"rows": []})["rows"]
        rows = with_gains([*(other for other in kept if other.get("seed") not in (None, options.seed)), row])
        command = shlex.join(["python", "-m", "benchmarks.end_to_end.bench_gsm8k", *argv])
        results.write(options.out, "gsm8k", results.header(pick(options.device), command, roofs=False), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
