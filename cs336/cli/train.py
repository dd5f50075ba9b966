"""`cs336 train`: a few options of its own, and every key of the configuration as a dotted one."""

import argparse
import os
from typing import TYPE_CHECKING

from cs336.cli.common import OwnOptions, Path, Run, Stopped
from cs336.cli.settings import given, help_text, own_options

if TYPE_CHECKING:
    from cs336.tokenizer import Tokenizer
    from cs336.training import TrainConfig, TrainResult


@OwnOptions
def train(arguments: list[str]) -> Run:
    """Train a model on token shards, or continue the run that is in --run-dir.

    Settings come from --config FILE and from options, which win. `cs336 tokenizer encode --shards` makes the data.
    On several GPUs: torchrun --standalone --nproc_per_node=8 -m cs336 train ..., with the same steps as on one.
    """
    from cs336.training import TrainConfig

    own, options = _own_options().parse_known_args(arguments)

    def run() -> None:
        if own.help:
            print(help_text(_own_options(), TrainConfig, train.__doc__))
            return
        settings = given(own, options, TrainConfig, TrainConfig.from_table)
        if own.print_config:
            print(settings.to_toml(), end="")
            return
        _train(settings, own.tokenizer, own.prompt)

    return run


def _train(settings: "TrainConfig", tokenizer: Path | None, prompts: list[str]) -> None:
    from cs336.inference.samples import sampler
    from cs336.parallel.launch import connect, on_first, rank
    from cs336.report import write_report
    from cs336.tokenizer import convert
    from cs336.tokenizer.statistics import keep
    from cs336.training import StepError, Trainer, checkpoint
    from cs336.training.identity import kept_tokenizer
    from cs336.utils.stages import RECORD

    if (settings.run_dir / RECORD).exists() and not checkpoint.list_checkpoints(settings.run_dir / "checkpoints"):
        raise ValueError(
            f"{settings.run_dir} is where `cs336 quickstart`, or a verb like it, works: use another run_dir"
        )
    connect(settings.device)
    kept = settings.run_dir / "tokenizer.json"
    loaded = kept_tokenizer(settings.data.train) if tokenizer is None else convert.load(tokenizer)
    if loaded is None and kept.exists():
        loaded = convert.load(kept)
    if loaded is None and any(prompts):
        raise ValueError("--prompt needs a tokenizer, and none lies beside the shards: give --tokenizer FILE")
    sample = None if loaded is None else sampler(loaded, prompts, settings.seed)
    trainer = Trainer(settings, tokenizer=loaded, sample=sample)
    if loaded is not None:
        on_first(lambda: keep(loaded, settings.run_dir))
    try:
        result = trainer.train()
    except StepError:
        if rank() == 0:
            print(f"report: {write_report(settings.run_dir)}")  # it says why
        raise
    if rank() == 0:
        _tell(settings, loaded, result)
    if not result.finished and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun would call it a failure, or restart
        raise Stopped


def _tell(settings: "TrainConfig", loaded: "Tokenizer | None", result: "TrainResult") -> None:
    """The evaluation of a finished run, and the report."""
    from cs336.evaluation import evaluate
    from cs336.inference.load import load_model
    from cs336.report import write_report

    if result.export is not None and loaded is not None and "val/bpb" in result.val:
        assert settings.data.val is not None  # it was validated
        train = settings.data.train if settings.data.train.is_dir() else None
        model, loss = load_model(result.export, settings.device), result.val["val/loss"]
        found = evaluate(model, loaded, settings.data.val, train, loss=loss, step=result.step)
        found.save(settings.run_dir)
    print(f"report: {write_report(settings.run_dir)}")


def _own_options() -> argparse.ArgumentParser:
    parser = own_options("train")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="tokenizer.json of the data, ours or Hugging Face's, for samples and the export; the one beside the "
        "shards if not given. Kept in the run directory",
    )
    parser.add_argument(
        "--prompt", nargs="+", default=[""], help="what samples begin with; an empty one begins a document"
    )
    return parser
