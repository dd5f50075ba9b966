"""`cs336 train`: options of its own, and every key of the configuration as a dotted one."""

import argparse
from typing import Any

from cs336.cli.common import Path, Stopped

OWN = "options"
HELP = "CONFIGURATION, as keys of the TOML file and as options, which win"


def train(arguments: list[str]) -> None:
    """Train a model on token shards, or continue the run that is in --run-dir.

    Settings come from --config FILE and from options, which win. `cs336 tokenizer encode --shards` makes the data.
    """
    from cs336.utils import config as configs

    own, options = _parser().parse_known_args(arguments)
    if own.help:
        print(_help())
        return
    from cs336.training import TrainConfig

    table = {} if own.config is None else configs.read_table(own.config)
    settings = TrainConfig.from_table(configs.override(TrainConfig, table, options))
    if own.print_config:
        print(settings.to_toml(), end="")
        return
    _train(settings, own.tokenizer, own.prompt)


def _train(settings: Any, tokenizer: Path | None, prompts: list[str]) -> None:
    from cs336.evaluation import evaluate_run
    from cs336.inference.samples import sampler
    from cs336.report import write_report
    from cs336.tokenizer import convert
    from cs336.tokenizer.statistics import keep
    from cs336.training import Trainer
    from cs336.training.identity import kept_tokenizer

    kept = settings.run_dir / "tokenizer.json"
    if tokenizer is not None or kept.exists():
        loaded = convert.load(tokenizer or kept)
    else:
        loaded = kept_tokenizer(settings.data.train)
    sample = None if loaded is None else sampler(loaded, prompts, settings.seed)
    trainer = Trainer(settings, tokenizer=loaded, sample=sample)
    if loaded is not None:
        keep(loaded, settings.run_dir)
    result = trainer.train()
    if result.finished and loaded is not None and settings.data.val is not None:
        evaluate_run(settings.run_dir, device=settings.device)
    print(f"report: {write_report(settings.run_dir)}")
    if not result.finished:
        raise Stopped
