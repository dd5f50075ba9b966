"""`cs336 sft`, `dpo`, `grpo` and their kin: the keys of a stage's configuration as options."""

from collections.abc import Callable
from typing import Any

from cs336.cli.common import Run, Stopped
from cs336.cli.settings import help_text, own_options


def sft(arguments: list[str]) -> Run:
    """Fine-tune a model on conversations, or continue the run that is in --run-dir.

    Learned are the assistant's turns alone. Settings come from --config FILE and from options, which win.
    """
    from cs336.alignment.stages.sft import SFTConfig, SFTStage

    return _verb("sft", arguments, SFTConfig, SFTStage, sft.__doc__)


def dpo(arguments: list[str]) -> Run:
    """Teach a model which of two answers is preferred, without a reward model, or continue the run in --run-dir.

    DPO and its relatives. Settings come from --config FILE and from options, which win.
    """
    from cs336.alignment.stages.dpo import DPOConfig, DPOStage

    return _verb("dpo", arguments, DPOConfig, DPOStage, dpo.__doc__)


def grpo(arguments: list[str]) -> Run:
    """Teach a model by the scores of its own answers, or continue the run in --run-dir.

    GRPO and its relatives, on the engine that serves. Settings come from --config FILE and from options, which win.
    """
    from cs336.alignment.stages.grpo import GRPOStage, GRPOStageConfig

    return _verb("grpo", arguments, GRPOStageConfig, GRPOStage, grpo.__doc__, plans=True)


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
        table = {} if own.config is None else configs.read_table(own.config)
        settings = configs.parse(kind, configs.override(kind, table, options))
        if own.print_config:
            print(configs.dumps(settings), end="")
            return
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
