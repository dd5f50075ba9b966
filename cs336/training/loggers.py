"""Where rows of metrics go besides metrics.jsonl. Each needs a package of its own, and none is needed to train."""

import importlib
import importlib.util
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

LoggerName = Literal["tensorboard", "wandb", "trackio"]
PROJECT = "cs336"


class Logger(Protocol):
    def log(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl: numbers by name, and its "step"."""

    def close(self) -> None: ...


def check_installed(names: tuple[str, ...]) -> None:
    """Raises ValueError, with the command that helps, for a logger whose package is not here."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"loggers names {name}, which is not installed: pip install {name}")


def open_loggers(names: tuple[str, ...], run_dir: pathlib.Path, config: Mapping[str, Any], step: int) -> list[Logger]:
    """Loggers of a run that has done `step` steps; what they had of later steps is void."""
    check_installed(names)
    kinds: dict[str, Callable[..., Logger]] = {"tensorboard": TensorBoard, "wandb": Tracked, "trackio": Tracked}
    return [kinds[name](name, run_dir, config, step) for name in names]


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, _: str, run_dir: pathlib.Path, config: Mapping[str, Any], step: int):
        tensorboard = importlib.import_module("torch.utils.tensorboard")
        self._writer = tensorboard.SummaryWriter(run_dir / "tensorboard", purge_step=step + 1 if step else None)

    def log(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name not in ("step", "tokens", "seconds"):
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Tracked:
    """wandb and trackio, which has wandb's functions. A run goes by its directory's name, and goes on under it."""

    def __init__(self, name: str, run_dir: pathlib.Path, config: Mapping[str, Any], step: int):
        self._module = importlib.import_module(name)
        whole = run_dir.resolve()
        place: dict[str, Any] = {} if name == "trackio" else {"dir": whole, "id": whole.name}
        self._module.init(project=PROJECT, name=whole.name, config=dict(config), resume="allow", **place)

    def log(self, row: Mapping[str, Any]) -> None:
        self._module.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def close(self) -> None:
        self._module.finish()
