"""Whether the run in a directory is the one that is asked for: the same configuration and data, no less budget."""

import pathlib
from typing import TYPE_CHECKING, NoReturn

import torch

from cs336 import __version__
from cs336.data import TokenDataset
from cs336.data.tokenize import tokenizer_of
from cs336.parallel.collectives import check_alike
from cs336.parallel.launch import control_device, world_size
from cs336.training.budget import Budget
from cs336.training.config import TrainConfig, differences, flat
from cs336.utils.commit import source_digest
from cs336.utils.counted import counted
from cs336.utils.duration import duration

if TYPE_CHECKING:
    from cs336.tokenizer import Tokenizer

Fingerprints = dict[str, str | None]


def fingerprints(train: TokenDataset, val: TokenDataset | None) -> Fingerprints:
    return {"train": train.fingerprint, "val": None if val is None else val.fingerprint}


def check_same_config(saved: TrainConfig | None, wanted: TrainConfig) -> None:
    """Raises ValueError if the run that is there cannot go on as another configuration."""
    if saved is not None and (changed := differences(saved, wanted)):
        _refuse(wanted, changed)


def check_ranks(config: TrainConfig, data: Fingerprints) -> None:
    """Raises ValueError, on every rank, that names the first setting, data or version of code that is not rank 0's."""
    if world_size() == 1:
        return
    what = [("cs336", __version__), ("the code of cs336", source_digest()), ("torch", torch.__version__)]
    what += [(key, str(value)) for key, value in flat(config)]
    what += [(f"content of data.{side}", str(found)) for side, found in data.items()]
    check_alike(what, control_device(), advice="Start every process with the same command, code and data")


def check_same_data(
    saved: Fingerprints | None, data: Fingerprints, saved_config: TrainConfig | None, wanted: TrainConfig
) -> None:
    """Raises ValueError if the data are not those that the run began with.

    They are known by their content; in a run from before that was saved, by their paths.
    """
    if saved is None:
        before, now = _resolved(saved_config or wanted), _resolved(wanted)
        if changed := [f"data.{side}: {before[side]} -> {now[side]}" for side in now if before[side] != now[side]]:
            _refuse(wanted, changed)
    elif others := [side for side in data if data[side] != saved.get(side)]:
        paths = ", ".join(f"data.{side} = {getattr(wanted.data, side)}" for side in others)
        raise ValueError(
            f"{wanted.run_dir} holds a run with other {' and '.join(others)} data: those of {paths} are not the "
            "tokens that it began with. Use another run_dir, or the same data to continue it"
        )


def _refuse(wanted: TrainConfig, changed: list[str]) -> NoReturn:
    raise ValueError(
        f"{wanted.run_dir} holds a run with another configuration ({'; '.join(changed)}): "
        "use another run_dir, or the same configuration to continue it"
    )


def _resolved(config: TrainConfig) -> dict[str, pathlib.Path | None]:
    sides = {"train": config.data.train, "val": config.data.val}
    return {side: None if path is None else path.resolve() for side, path in sides.items()}


def check_budget(budget: Budget, total_steps: int | None, step: int, seconds: float, run_dir: pathlib.Path) -> None:
    """Raises ValueError for a new budget that is less than what the run has done already."""
    advice = "give a larger budget to go on, or use another run_dir"
    if total_steps is not None and total_steps < step:
        raise ValueError(
            f"{run_dir} has done {counted(step, 'step')}, and a budget of {budget.text} makes {total_steps:,}: {advice}"
        )
    if budget.kind == "seconds" and budget.amount < seconds:
        raise ValueError(
            f"{run_dir} has trained for {duration(seconds)}, longer than the budget of {budget.text}: {advice}"
        )


def kept_tokenizer(data: pathlib.Path) -> "Tokenizer | None":
    """The tokenizer that lies beside token shards, if one does. Raises FileNotFoundError for one that did."""
    path = tokenizer_of(data)
    if path is None:
        return None
    if not path.exists():
        raise FileNotFoundError(f"{path}, which made these shards, is gone: put it back, or give --tokenizer FILE")
    from cs336.tokenizer import Tokenizer

    return Tokenizer.load(path)
