"""A run's configuration: dataclasses, and the TOML file that they are."""

import dataclasses
import difflib
import json
import os
import pathlib
import tomllib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from cs336.models import TransformerConfig
from cs336.training.budget import Budget
from cs336.utils.files import replacing


@dataclass(frozen=True)
class DataConfig:
    train: pathlib.Path
    """Directory of token shards, or one .bin file."""
    val: pathlib.Path | None = None
    """The same for validation; without it there is none."""


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 1e-3
    """Highest learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Of matrices; norms have none."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are scaled down to it; inf: never."""


@dataclass(frozen=True)
class ScheduleConfig:
    warmup_steps: int | None = None
    """Steps of linear warm-up, in a time budget at the speed measured first. None: a twentieth of the run."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end, over the highest: a cosine leads there."""

    def __post_init__(self):
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {self.warmup_steps}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio must be in 0..1, got {self.min_lr_ratio}")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a run computes, and where it is written. An interval of 0 means never.

    An interval of None is lengthened where a time budget would lose more than a twentieth to it.
    """

    run_dir: pathlib.Path
    """Where everything about the run is written; a run that is already there goes on."""
    data: DataConfig
    model: TransformerConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    budget: str = "1000steps"
    """When to stop: 90m, 1.5h, 2e18flops, 500Mtok or 1000steps."""
    batch_size: int = 32
    """Sequences an optimizer step."""
    micro_batch_size: int | None = None
    """Sequences a forward pass; gradients add up to those of batch_size. None: batch_size."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the matrix products; weights are fp32. auto: bf16 on a GPU, fp32 on a CPU."""
    compile: bool | None = None
    """torch.compile the model. None: on a GPU."""
    deterministic: bool = False
    """On a GPU, repeat a run bit for bit, stopped and continued or not: 8 % slower for a GPT-2 of 124M on an H200,
    where torch's faster gradients of attention add in any order. A CPU is deterministic without it."""
    seed: int = 0
    """Of the weights and of the order of the data."""
    log_interval: int = 10
    """Steps a row of metrics.jsonl. On a GPU each row waits for the device."""
    eval_interval: int | None = None
    """Steps between validations. None: a twentieth of the run."""
    eval_tokens: int | None = None
    """Validation tokens read each time, spread evenly over the set. None: as many as 32 steps read, at most 262,144."""
    sample_interval: int | None = None
    """Steps between samples. None: a tenth of the run."""
    checkpoint_interval: int | None = None
    """Steps between checkpoints. None: a tenth of the run."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""

    def __post_init__(self):
        Budget.parse(self.budget)
        micro = self.batch_size if self.micro_batch_size is None else self.micro_batch_size
        at_least_one = {"batch_size": self.batch_size, "micro_batch_size": micro, "log_interval": self.log_interval}
        at_least_one |= {"keep_checkpoints": self.keep_checkpoints}
        at_least_one |= {} if self.eval_tokens is None else {"eval_tokens": self.eval_tokens}
        for name, value in at_least_one.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("seed", "eval_interval", "sample_interval", "checkpoint_interval"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.batch_size % micro:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_batch_size {micro}")
        if self.precision not in typing.get_args(_hints(TrainConfig)["precision"]):
            raise ValueError(f"precision must be auto, bf16 or fp32, got {self.precision!r}")

    def to_toml(self) -> str:
        """The configuration as TOML; fields that are None are left out."""
        return "\n".join(_toml_lines(self, "")) + "\n"

    @staticmethod
    def from_toml(path: str | os.PathLike) -> "TrainConfig":
        """Read a TOML file. Raises ValueError, naming the key, for one that is unknown, missing or of another type."""
        try:
            table = tomllib.loads(pathlib.Path(path).read_text(encoding="utf-8"))
            return _build(TrainConfig, table, "")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path: str | os.PathLike) -> None:
        with replacing(path) as file:
            file.write(self.to_toml())


# What a run that goes on may change: none of it alters a step but in rounding, and a new budget plans anew.
FREE = {"run_dir", "budget", "micro_batch_size", "device", "compile", "log_interval", "eval_interval", "eval_tokens"}
FREE |= {"sample_interval", "checkpoint_interval", "keep_checkpoints"}


def differences(saved: TrainConfig, wanted: TrainConfig) -> list[str]:
    """How a configuration differs from that of the run it would continue, one "key: saved -> wanted" each."""
    before, after = dict(_flat(saved, "")), dict(_flat(wanted, ""))
    return [f"{k}: {before[k]} -> {after[k]}" for k in before if before[k] != after[k] and k.split(".")[0] not in FREE]


def _flat(config: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from _flat(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value


# ---- writing TOML ----


def _toml_lines(config: Any, table: str) -> Iterator[str]:
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for name, value in values.items():
        if not dataclasses.is_dataclass(value) and value is not None:
            yield f"{name} = {_toml_value(value)}"
    for name, value in values.items():
        if dataclasses.is_dataclass(value):
            yield f"\n[{table}{name}]"
            yield from _toml_lines(value, f"{table}{name}.")


def _toml_value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


# ---- reading TOML ----


def _build(kind: type, table: dict[str, Any], prefix: str) -> Any:
    hints = _hints(kind)
    for key in table:
        if key not in hints:
            raise ValueError(f"unknown key {prefix}{key}{_nearest(key, prefix)}")
    required = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [prefix + name for name in required if name not in table]:
        raise ValueError(f"missing: {', '.join(missing)}")
    values = {key: _convert(hints[key], value, prefix + key) for key, value in table.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"[{prefix[:-1]}] {error}" if prefix else str(error)) from None


def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _nearest(key: str, prefix: str) -> str:
    """The known key that looks most like an unknown one, of its own table or of any other."""
    known = list(_keys(TrainConfig, ""))
    own = [k.removeprefix(prefix) for k in known if k.rpartition(".")[0] == prefix[:-1]]
    if near := difflib.get_close_matches(key, own, 1, 0.7):
        return f"; did you mean {prefix}{near[0]}?"
    elsewhere = {k.rpartition(".")[2]: k for k in known}
    if near := difflib.get_close_matches(key, elsewhere, 1, 0.7):
        return f"; did you mean {elsewhere[near[0]]}?"
    return f": known are {', '.join(prefix + k for k in own)}"


def _keys(kind: type, prefix: str) -> Iterator[str]:
    for name, hint in _hints(kind).items():
        yield prefix + name
        if dataclasses.is_dataclass(hint):
            yield from _keys(hint, f"{prefix}{name}.")  # type: ignore[arg-type]


def _convert(hint: Any, value: Any, key: str) -> Any:
    """A TOML value as the type a field is declared with."""
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _build(hint, value, f"{key}.")  # type: ignore[arg-type]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _convert(next(a for a in args if a is not types.NoneType), value, key)
    if origin is tuple and isinstance(value, list) and len(value) == len(args):
        return tuple(_convert(a, v, key) for a, v in zip(args, value, strict=True))
    if origin is Literal and value in args:
        return value
    if hint is pathlib.Path and isinstance(value, str):
        return pathlib.Path(value)
    if hint is float and type(value) is int:
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    if dataclasses.is_dataclass(hint):
        expected = f"a table [{key}]"
    else:
        expected = " or ".join(map(repr, args)) if origin is Literal else getattr(hint, "__name__", hint)
    raise ValueError(f"{key} must be {expected}, got {value!r}")
