"""A run's configuration: dataclasses, and the TOML file that they are."""

import dataclasses
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cs336.models import TransformerConfig
from cs336.optim import AdamWConfig, CosineConfig, LionConfig, OptimizerConfig, ScheduleConfig
from cs336.parallel import ParallelConfig
from cs336.training.budget import Budget
from cs336.training.guard import GuardConfig
from cs336.training.loggers import LoggerName
from cs336.training.objectives import NextToken
from cs336.training.weights import model_config
from cs336.utils import config as configs
from cs336.utils.files import replacing

PRECISIONS = ("auto", "bf16", "bf16_weights", "fp32")


@dataclass(frozen=True)
class DataConfig:
    train: pathlib.Path
    """Directory of token shards, or one .bin file."""
    val: pathlib.Path | None = None
    """The same for validation; without it there is none."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a run computes, and where it is written. An interval of 0 means never.

    An interval of None is lengthened where more than a twentieth of the run would be spent on it.
    """

    run_dir: pathlib.Path
    """Where everything about the run is written; a run that is already there goes on."""
    data: DataConfig
    model: TransformerConfig
    optimizer: OptimizerConfig = field(default_factory=AdamWConfig)
    schedule: ScheduleConfig = field(default_factory=CosineConfig)
    objective: NextToken = field(default_factory=NextToken)
    init_from: pathlib.Path | None = None
    """Weights to begin with: an export, a checkpoint, a run directory, or a directory in the Hugging Face layout, which
    also gives [model] where that is left out. None: drawn from the seed."""
    branch_from: pathlib.Path | None = None
    """A checkpoint of another run that this one goes on from, with its weights, optimizer, step and place in the data,
    under its own schedule and budget: a decay that leaves a trunk. None: the run begins at step 0."""
    budget: str = "1000steps"
    """When to stop: 90m, 1.5h, 2e18flops, 500Mtok or 1000steps."""
    batch_size: int = 32
    """Sequences an optimizer step."""
    micro_batch_size: int | None = None
    """Sequences a forward pass, of one process; gradients add up to those of batch_size. None: all that it has."""
    gradient_checkpointing: bool | Literal["none", "selective", "full", "auto"] = False
    """Compute again in the backward instead of keeping: none; selective, all but the products, for little work; full,
    each layer, for a third more work (true and false are full and none). auto: the first of these that fits."""
    memory_limit: float | None = None
    """GiB that a step may take. None: what the device has. A run whose step would take more is refused."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1."""
    precision: Literal["auto", "bf16", "bf16_weights", "fp32"] = "auto"
    """Of the matrix products; weights are fp32. auto: bf16 on a GPU, fp32 on a CPU. bf16_weights: weights are bf16 too,
    which generation reads as training writes them; optimizer.rounding says what becomes of their other 16 bits."""
    fp8: bool = False
    """Multiply in floats of 8 bits in the layers' linear layers as they are trained (ops.linear_scaled), those with
    fewer than 128 features on a side, or no multiple of 16, left out; evaluation does not. A pass must have tokens in
    multiples of 16, a GPU capability 8.9 or newer."""
    compile: bool | None = None
    """torch.compile the layers, those of one kind once for all of them. None: on a GPU."""
    cuda_graph: bool | Literal["auto"] = "auto"
    """Capture a step once and replay it, where the host would be slower than the GPU. auto: on a GPU, if the memory of
    a step is less than half of the device's and the optimizer can."""
    deterministic: bool = False
    """On a GPU, repeat a run bit for bit, stopped and continued or not: 0.2 % slower for a GPT-2 of 124M on an H200,
    more where sequences are longer, for faster gradients of attention add in any order there. A CPU is deterministic
    without it."""
    seed: int = 0
    """Of the weights and of the order of the data."""
    log_interval: int = 10
    """Steps a row of metrics.jsonl. On a GPU each row waits for the device."""
    eval_interval: int | None = None
    """Steps between validations. None: a twentieth of the run."""
    eval_tokens: int | None = None
    """Validation tokens read each time, spread evenly over the set. None: so many that validation takes
    about a twentieth of the run, at most those of 32 steps and 262,144."""
    sample_interval: int | None = None
    """Steps between samples. None: a tenth of the run."""
    checkpoint_interval: int | None = None
    """Steps between checkpoints. None: a tenth of the run. 0: at the end or when it is stopped; a run that is killed
    begins anew."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    async_checkpoints: bool | None = None
    """Write checkpoints while training goes on, from a copy on the host. None: on a GPU."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    loggers: tuple[LoggerName, ...] = ()
    """Also write metrics to: tensorboard, wandb, trackio. Each is a package of its own."""

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
        if self.init_from is not None and self.branch_from is not None:
            raise ValueError("init_from and branch_from are two beginnings: give one")
        if self.memory_limit is not None and not self.memory_limit > 0:
            raise ValueError(f"memory_limit must be more than 0 GiB, got {self.memory_limit}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}")
        if self.batch_size % micro:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_batch_size {micro}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.precision == "bf16_weights" and isinstance(self.optimizer, LionConfig):
            raise ValueError(
                'precision = "bf16_weights" loses the steps of lion, each of lr, on weights above 256 lr: use adamw or '
                'muon, which keep them, or precision = "bf16"'
            )

    @staticmethod
    def from_table(table: Mapping[str, Any]) -> "TrainConfig":
        """A table, as a TOML file holds it; without [model] that of init_from.

        Raises ValueError, naming the key: see cs336.utils.config.parse.
        """
        source = table.get("init_from")
        if "model" not in table and isinstance(source, str):
            table = {**table, "model": configs.to_table(model_config(pathlib.Path(source)))}
        return configs.parse(TrainConfig, table)

    @staticmethod
    def from_toml(path: str | os.PathLike) -> "TrainConfig":
        """Read a TOML file. Raises ValueError, naming the key, for one that is unknown, missing or of another type."""
        table = configs.read_table(path)
        try:
            return TrainConfig.from_table(table)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_toml(self) -> str:
        """The configuration as TOML; fields that are None are left out."""
        return configs.dumps(self)

    def save(self, path: str | os.PathLike) -> None:
        with replacing(path) as file:
            file.write(self.to_toml())


# What a run that goes on may change: none of it alters a step but in rounding, and a new budget plans anew. Whether the
# data are the same is asked of their content: see cs336.training.identity.
FREE = {
    "run_dir",
    "data",
    "budget",
    "micro_batch_size",
    "device",
    "compile",
    "cuda_graph",
    "log_interval",
    "eval_interval",
}
FREE |= {"eval_tokens", "sample_interval", "checkpoint_interval", "keep_checkpoints", "gradient_checkpointing"}
FREE |= {"memory_limit", "cuda_graph", "async_checkpoints", "loggers", "parallel", "objective.fused_head"}


def differences(saved: Any, wanted: Any, free: Collection[str] = FREE) -> list[str]:
    """How a configuration differs from that of the run it would continue, one "key: saved -> wanted" each.

    free: fields of it that may, or dotted keys.
    """
    before, after = dict(flat(saved)), dict(flat(wanted))
    names = [key for key in before | after if key not in free and key.split(".")[0] not in free]
    return [f"{k}: {before.get(k)} -> {after.get(k)}" for k in names if before.get(k) != after.get(k)]


def flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of each field."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from flat(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value.resolve() if isinstance(value, pathlib.Path) else value
