"""`cs336 sft`, `dpo`, `grpo` and their kin: the keys of a stage's configuration as options."""

import functools
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from cs336.cli.common import MaybePath, OwnOptions, Path, Run, Stopped, check_output
from cs336.cli.settings import given, help_text, own_options


@OwnOptions
def sft(arguments: list[str]) -> Run:
    """Fine-tune a model on conversations, or continue the run that is in --run-dir.

    Learned are the assistant's turns alone. Settings come from --config FILE and from options, which win.
    """
    from cs336.alignment.stages.sft import SFTConfig, SFTStage

    return _verb("sft", arguments, SFTConfig, SFTStage, sft.__doc__)


@OwnOptions
def dpo(arguments: list[str]) -> Run:
    """Teach a model which of two answers is preferred, without a reward model, or continue the run in --run-dir.

    DPO and its relatives; with --loss-type kto, from answers that were good or not, each by itself, or from pairs as
    two such. Settings come from --config FILE and from options, which win.
    """
    from cs336.alignment.stages.dpo import DPOConfig, dpo_stage

    return _verb("dpo", arguments, DPOConfig, dpo_stage, dpo.__doc__)


@OwnOptions
def reward(arguments: list[str]) -> Run:
    """Train a model that says what an answer is worth, from preferences, or continue the run in --run-dir.

    With --loss-type outcome, from answers that were right or wrong. Settings come from --config FILE and from options,
    which win.
    """
    from cs336.alignment.stages.reward import RewardConfig, reward_stage

    return _verb("reward", arguments, RewardConfig, reward_stage, reward.__doc__)


@OwnOptions
def ppo(arguments: list[str]) -> Run:
    """Teach a model by the scores of its own answers, with a critic, or continue the run in --run-dir.

    Proximal policy optimization. Settings come from --config FILE and from options, which win.
    """
    from cs336.alignment.stages.ppo import PPOStage, PPOStageConfig

    return _verb("ppo", arguments, PPOStageConfig, PPOStage, ppo.__doc__)


@OwnOptions
def grpo(arguments: list[str]) -> Run:
    """Teach a model by the scores of its own answers, or continue the run in --run-dir.

    GRPO and its relatives, on the engine that serves. Settings come from --config FILE and from options, which win.
    """
    from cs336.alignment.stages.grpo import GRPOStage, GRPOStageConfig

    return _verb("grpo", arguments, GRPOStageConfig, GRPOStage, grpo.__doc__, plans=True)


def pairs(
    model: Annotated[Positional[Path], arg(metavar="MODEL")],
    prompts: Annotated[Positional[Path], arg(metavar="PROMPTS")],
    out: Annotated[Positional[Path], arg(metavar="OUT")],
    label: Literal["math", "exact", "characters", "format", "judge"] = "math",
    judge: str | None = None,
    judge_model: str = "default",
    rubric: MaybePath = None,
    num_generations: int = 2,
    temperature: float = 1.0,
    max_tokens: int = 256,
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Draw pairs of answers from a model, label which is better, and write preferences for `cs336 dpo`.

    Args:
        model: an export, a checkpoint or a run directory.
        prompts: JSON lines of {"prompt": a text or messages, "answer": ...}.
        out: JSON lines of {"history", "response_a", "response_b", "chosen", "margin"}.
        label: the verifier that scores both answers, or judge.
        judge: a model's directory, or the address of an OpenAI-compatible server (its key is OPENAI_API_KEY), which is
            asked about each pair in both orders. Without it the model itself judges.
        judge_model: the server's name for the model.
        rubric: a text file that tells the judge what is good.
        num_generations: answers to a prompt, an even number.
    """
    import dataclasses
    import json

    from cs336.alignment.examples import read_prompts
    from cs336.alignment.make_pairs import JudgeLabels, VerifierLabels, make_pairs
    from cs336.alignment.rewards import CharactersReward, ExactReward, FormatReward, MathReward
    from cs336.inference import LLM
    from cs336.utils.files import read_text
    from cs336.verifiers.judge import RUBRIC, Judge, engine_chat, judge_from

    if label != "judge" and (judge is not None or rubric is not None):
        raise ValueError(f"--judge and --rubric go with --label judge: {label} asks no judge")
    check_output(out, prompts)
    asked = read_prompts(prompts)
    llm = LLM(model, device=device, quiet=True)
    verifiers = {"math": MathReward, "exact": ExactReward, "characters": CharactersReward, "format": FormatReward}
    if label == "judge":
        text = RUBRIC if rubric is None else read_text(rubric)
        own = Judge(engine_chat(llm), text)
        labels: Any = JudgeLabels(own if judge is None else judge_from(judge, judge_model, rubric=text, device=device))
    else:
        labels = VerifierLabels([verifiers[label]()])
    report = make_pairs(
        llm, asked, out, labels,
        num_generations=num_generations, temperature=temperature, max_tokens=max_tokens, seed=seed,
    )  # fmt: skip
    print(json.dumps({name: value for name, value in dataclasses.asdict(report).items() if value is not None}))


def demo(
    run_dir: Path = Path("runs/align-demo"),  # noqa: B008 (immutable)
    model: MaybePath = None,
    pretrain_steps: int = 100,
    sft_steps: int = 600,
    dpo_steps: int = 20,
    grpo_steps: int = 200,
    prompts_per_step: int = 32,
    device: str = "cpu",
    seed: int = 0,
    minutes: float | None = None,
) -> None:
    """All stages on a task that two cores learn in minutes: sums that the model never saw.

    Pretraining, SFT, preferences between its own answers, DPO, GRPO with a verifier, and a report. Stages whose output
    is current are skipped; after Ctrl-C the same command continues.

    Args:
        run_dir: where everything is written; the same command goes on with what is there.
        model: a base model to begin with, a run of quickstart for one; without it a tiny one is pretrained.
        sft_steps: on answers of which nine in a hundred are right.
        prompts_per_step: of GRPO, each answered 16 times.
        device: cpu, auto (a GPU if there is one), cuda.
        minutes: for SFT and GRPO together, in place of their steps.
    """
    import webbrowser

    from cs336.align_demo import AlignDemo, align_demo
    from cs336.utils.stages import Interrupted

    settings = AlignDemo(
        run_dir, model, pretrain_steps, sft_steps, dpo_steps, grpo_steps, prompts_per_step, device, seed, minutes
    )  # fmt: skip
    try:
        report = align_demo(settings)
    except Interrupted:
        raise Stopped from None
    if sys.stdout.isatty():
        webbrowser.open(report.resolve().as_uri())


def ladder(
    rungs: Annotated[Positional[tuple[str, ...]], arg(metavar="[RUNG ...]", help_behavior_hint="")] = (),
    run_dir: Path = Path("runs/align-ladder"),  # noqa: B008 (immutable)
    share: float = 1.0,
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """Tasks that tiny models learn by reinforcement, each with a known optimum: a row for each, from where to where.

    SFT teaches how an answer looks, GRPO (or PPO) which is right. Stages whose output is current are skipped; after
    Ctrl-C the same command continues.

    Args:
        rungs: of bandit, bandit-ppo, sorting, addition and countdown; all of them without any.
        run_dir: where everything is written, a directory a rung; the same command goes on with what is there.
        share: of each rung's steps; less to see it run.
        device: cpu, auto (a GPU if there is one), cuda.
    """
    from cs336.align_ladder import RUNGS, AlignLadder, align_ladder
    from cs336.utils.stages import Interrupted

    try:
        align_ladder(AlignLadder(rungs or tuple(RUNGS), run_dir, share, device, seed))
    except Interrupted:
        raise Stopped from None


def _verb(
    verb: str,
    arguments: list[str],
    kind: Any,
    stage: Callable[[Any], Any],
    description: str | None,
    *,
    plans: bool = False,
) -> Run:
    from cs336.utils import config as configs

    parser = own_options(verb)
    if plans:
        help = "say what memory and time the run would take, from two steps that are thrown away"
        parser.add_argument("--plan", action="store_true", help=help)
    own, options = parser.parse_known_args(arguments)

    def run() -> None:
        if own.help:
            print(help_text(parser, kind, description))
            return
        settings = given(own, options, kind, functools.partial(configs.parse, kind))
        if own.print_config:
            print(configs.dumps(settings), end="")
            return
        if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
            raise ValueError(f"{verb} is one process, and torchrun started {processes}: start it without torchrun")
        if plans and own.plan:
            print(stage(settings).plan())
            return
        _run(settings, stage)

    return run


def _run(settings: Any, stage: Callable[[Any], Any]) -> None:
    from cs336.alignment.run import StageRun
    from cs336.report import write_report
    from cs336.training import StepError

    try:
        result = StageRun(settings, stage(settings)).train()
    except StepError:
        print(f"report: {write_report(settings.run_dir)}")  # it says why
        raise
    print(f"report: {write_report(settings.run_dir)}")
    if not result.finished:
        raise Stopped
