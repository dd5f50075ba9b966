"""A study: one configuration, what varies, how often, under which budget, and where its runs are trained.

    directory = "runs/lr"
    base = "small.toml"                     # of `cs336 train`, or its tables here as [base]
    seeds = 2
    budget = "2e15flops"                    # of all runs together: FLOPs, tokens, or seconds of training

    [vary]
    "optimizer.lr" = [1e-3, 3e-3, 1e-2]

    [search]
    kind = "grid"                           # or random, halving, list, anneal

    [where]
    kind = "local"                          # processes of this machine, each with its GPU; or here, or ray
    workers = 2

A run is known by what its configuration says, not by where it stands in the file: a study that is edited trains what
is new in it.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from cs336.experiments import space
from cs336.experiments.anneal import segments
from cs336.training import Budget, TrainConfig
from cs336.training.budget import Plan
from cs336.training.config import FREE
from cs336.utils import config as configs

UNITS = {"seconds": "s", "tokens": "tok", "flops": "flops", "steps": "steps"}
TRUNK = "trunk"  # the option that names a part of a trunk in tables
NO_PART = FREE - {"data", "budget"}  # of what a run is


@dataclass(frozen=True)
class Cost:
    """What a run takes. None: not known before it has run."""

    flops: float | None = None
    tokens: float | None = None
    seconds: float | None = None

    def minus(self, other: "Cost") -> "Cost":
        both = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*(None if a is None or b is None else max(0.0, a - b) for a, b in both))


@dataclass(frozen=True)
class Trial:
    """One run that a study asks for."""

    options: space.Options
    seed: int
    table: dict[str, Any]
    """The whole configuration but for run_dir."""
    id: str
    folder: str
    """Where it is trained; a rung goes on in the folder of the one before."""
    planned: Cost
    rung: int = 0

    @staticmethod
    def of(config: TrainConfig, options: space.Options) -> "Trial":
        """A run of a configuration, wherever that says it is trained. options: how it is called in tables."""
        table = {name: value for name, value in configs.to_table(config).items() if name != "run_dir"}
        return Trial(options, config.seed, table, identity(config), identity(config), cost(config))


class Outcome(Protocol):
    """What a search is told of a trial: see cs336.experiments.ledger.Entry."""

    @property
    def id(self) -> str: ...

    @property
    def ended(self) -> bool: ...

    def score(self, metric: str) -> float: ...


@dataclass(frozen=True)
class Grid:
    """Every combination of the values."""

    kind: Literal["grid"] = "grid"

    def first(self, vary: Mapping[str, space.Axis]) -> list[space.Options]:
        return space.grid(vary)


@dataclass(frozen=True)
class Random:
    """Points drawn at random (Bergstra and Bengio, JMLR 13, 2012)."""

    trials: int
    """How many."""
    kind: Literal["random"] = "random"
    seed: int = 0

    def __post_init__(self):
        if self.trials < 1:
            raise ValueError(f"trials must be at least 1, got {self.trials}")

    def first(self, vary: Mapping[str, space.Axis]) -> list[space.Options]:
        return space.sample(vary, self.trials, self.seed)


@dataclass(frozen=True)
class Halving:
    """Successive halving (arXiv:1502.07943): all begin with a small part of base.budget; the best go on.

    Rung r of R trains to base.budget / eta^(R - 1 - r); the best 1/eta of a rung continue from their checkpoints.
    """

    kind: Literal["halving"] = "halving"
    rungs: int = 3
    eta: int = 3
    trials: int | None = None
    """How many to draw at random. None: the grid."""
    seed: int = 0

    def __post_init__(self):
        if self.rungs < 2 or self.eta < 2:
            raise ValueError(f"halving takes at least 2 rungs and eta 2, got {self.rungs} and {self.eta}")
        if self.trials is not None and self.trials < 1:
            raise ValueError(f"trials must be at least 1, got {self.trials}")

    def first(self, vary: Mapping[str, space.Axis]) -> list[space.Options]:
        return space.grid(vary) if self.trials is None else space.sample(vary, self.trials, self.seed)


@dataclass(frozen=True)
class Listed:
    """These runs, as a design lists them, each with every combination of the values in [vary]."""

    runs: tuple[space.Options, ...]
    """Dotted keys of base, and the value of each: [[search.runs]]."""
    kind: Literal["list"] = "list"

    def __post_init__(self):
        if not self.runs:
            raise ValueError("a list holds at least one run")

    def first(self, vary: Mapping[str, space.Axis]) -> list[space.Options]:
        return [run | others for run in self.runs for others in space.grid(vary)]


@dataclass(frozen=True)
class Annealed(Listed):
    """These runs, where those that differ in their budget alone share a trunk: see cs336.experiments.anneal."""

    kind: Literal["anneal"] = "anneal"  # type: ignore[assignment]


@dataclass(frozen=True)
class Here:
    """One run after the other, in this process."""

    kind: Literal["here"] = "here"


@dataclass(frozen=True)
class Local:
    """Processes of this machine."""

    kind: Literal["local"] = "local"
    workers: int | None = None
    """Runs at once. None: as many as there are gpus, else 1."""
    gpus: tuple[int, ...] = ()
    """The GPU of each worker in turn, counted among those that this process sees: more workers than GPUs share them, as
    small models do well, whose steps wait for the host. Empty: workers see what this process sees."""
    threads: int | None = None
    """OMP_NUM_THREADS of a worker. None: the cores divided by the workers."""

    def __post_init__(self):
        if self.num_workers < 1 or (self.threads is not None and self.threads < 1):
            raise ValueError(f"workers and threads must be at least 1, got {self.workers} and {self.threads}")

    @property
    def num_workers(self) -> int:
        return (len(self.gpus) or 1) if self.workers is None else self.workers


@dataclass(frozen=True)
class Ray:
    """Tasks of a Ray cluster, which sees this directory and the data at the same paths. Needs ray."""

    kind: Literal["ray"] = "ray"
    address: str = "auto"
    """ray://head:10001, or auto for the cluster that this machine is part of."""
    workers: int = 1
    cpus: float = 1
    """Of a run."""
    gpus: float = 0


Search = Annotated[Grid | Random | Halving | Listed | Annealed, Field(discriminator="kind")]
Where = Annotated[Here | Local | Ray, Field(discriminator="kind")]


class Runs(Protocol):
    """What `run_study` trains: a Study, or whatever else says which runs there are."""

    @property
    def directory(self) -> pathlib.Path:
        """Where the ledger, the runs and the report are written."""

    @property
    def runs(self) -> pathlib.Path:
        """Where the runs are, a folder each."""

    @property
    def budget(self) -> str | None:
        """Of all runs together."""

    @property
    def metric(self) -> str:
        """The lower the better."""

    @property
    def where(self) -> Where: ...

    def trials(self, ended: Iterable[Outcome] = ()) -> list[Trial]:
        """The runs, as far as those that have ended let it say."""


@dataclass(frozen=True)
class Study:
    """See the top of the file. Raises ValueError, naming the key or the run, for what cannot be trained."""

    directory: pathlib.Path
    """Where the ledger, the runs and the report are written."""
    base: dict[str, Any]
    """Keys of `cs336 train`, but for run_dir."""
    vary: dict[str, Any] = field(default_factory=dict)
    """Dotted keys of base: a list of values, or a range."""
    search: Search = field(default_factory=Grid)
    seeds: int | tuple[int, ...] = 1
    """How many, from base.seed on, or which."""
    budget: str | None = None
    """Of all runs together: 2e15flops, 500Mtok, or 2h, which are seconds of training of all workers added up."""
    metric: str = "val/loss"
    """The lower the better."""
    where: Where = field(default_factory=Local)

    def __post_init__(self):
        if self.budget is not None and Budget.parse(self.budget).kind == "steps":
            raise ValueError(f"budget must be of flops, tokens or seconds, for steps are not alike; got {self.budget}")
        if isinstance(self.seeds, int) and self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        if not isinstance(self.seeds, int) and len(set(self.seeds)) != max(1, len(self.seeds)):
            raise ValueError(f"seeds must be different numbers, got {self.seeds}")

    @staticmethod
    def load(path: str | os.PathLike) -> "Study":
        """Read a TOML file, and check every run that it asks for.

        Raises ValueError, naming the file and the key or the run; `base` may be a path beside the file.
        """
        path = pathlib.Path(path)
        table = configs.read_table(path)
        try:
            return Study.from_table(table, path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @staticmethod
    def from_table(table: Mapping[str, Any], path: pathlib.Path | None = None) -> "Study":
        """A table as the file holds it; path: of the file, whose name the directory has if it is left out."""
        table = dict(table)
        if isinstance(table.get("base"), str):
            table["base"] = configs.read_table((path.parent if path else pathlib.Path()) / table["base"])
        if path is not None:
            table.setdefault("directory", f"runs/{path.stem}")
        study = configs.parse(Study, table)
        study.trials()
        return study

    @property
    def runs(self) -> pathlib.Path:
        return self.directory / "runs"

    @property
    def axes(self) -> dict[str, space.Axis]:
        return space.axes(self.vary)

    def trials(self, ended: Iterable[Outcome] = ()) -> list[Trial]:
        """The runs that the study asks for, those of each rung once the one before has ended.

        Raises ValueError, naming the run, for a configuration that cannot be trained.
        """
        known = {outcome.id: outcome for outcome in ended if outcome.ended}
        if isinstance(self.search, Annealed):
            return self._annealed(known)
        found = self._rung(self.search.first(self.axes), 0)
        if isinstance(self.search, Halving):
            rung = found
            for number in range(1, self.search.rungs):
                if not all(trial.id in known for trial in rung):
                    break
                rung = self._rung(self._best(rung, known), number)
                found = found + rung
        return found

    def _best(self, rung: Sequence[Trial], known: Mapping[str, Outcome]) -> list[space.Options]:
        """The best part of a rung, by the mean over seeds; what has failed goes no further."""
        assert isinstance(self.search, Halving)
        scores: dict[str, list[float]] = {}
        options = {_canonical(trial.options): trial.options for trial in rung}
        for trial in rung:
            scores.setdefault(_canonical(trial.options), []).append(known[trial.id].score(self.metric))
        means = {key: sum(values) / len(values) for key, values in scores.items()}
        order = sorted((key for key in means if means[key] < float("inf")), key=lambda key: means[key])
        return [options[key] for key in order[: -(-len(means) // self.search.eta)]]

    def _rung(self, points: Sequence[space.Options], rung: int) -> list[Trial]:
        """Trials of a rung, each once: points drawn at random may coincide."""
        return list({t.id: t for options in points for t in self._of(options, rung)}.values())

    def _annealed(self, known: Mapping[str, Outcome]) -> list[Trial]:
        """Each part of a trunk once the one before is done, and the branch that leaves there with it."""
        groups: dict[str, list[tuple[space.Options, TrainConfig]]] = {}
        for options in self.search.first(self.axes):
            for config in self._configs(options):
                shared = _canonical(configs.to_table(dataclasses.replace(config, budget="1steps")))
                groups.setdefault(shared, []).append((options, config))
        found = []
        for group in groups.values():
            lengths = {int(Budget.parse(config.budget).amount): options for options, config in group}
            before = Cost(0, 0, 0)
            parts = segments([config for _, config in group], lambda first: self.runs / identity(first))
            for number, (trunk, branch) in enumerate(parts):
                options = lengths[int(Budget.parse(branch.budget).amount)]
                part = Trial.of(trunk, options | {TRUNK: trunk.budget})
                spent, folder = part.planned, identity(parts[0].trunk)
                found.append(dataclasses.replace(part, folder=folder, planned=spent.minus(before), rung=2 * number))
                if part.id not in known or not known[part.id].score(self.metric) < math.inf:
                    break
                leaf = Trial.of(branch, options)
                found.append(dataclasses.replace(leaf, planned=leaf.planned.minus(spent), rung=2 * number + 1))
                before = spent
        return found

    def _configs(self, options: space.Options) -> list[TrainConfig]:
        """A configuration a seed."""
        try:
            base = space.apply(configs.override(TrainConfig, self.base, ()), options)
            config = TrainConfig.from_table(base | {"run_dir": "."})
        except ValueError as error:
            raise ValueError(f"the run with {space.label(options)}: {error}" if options else f"base: {error}") from None
        if self.metric.startswith("val/") and config.data.val is None:
            raise ValueError(f"metric {self.metric} needs base.data.val")
        seeds = range(config.seed, config.seed + self.seeds) if isinstance(self.seeds, int) else self.seeds
        return [dataclasses.replace(config, seed=seed) for seed in seeds]

    def _of(self, options: space.Options, rung: int) -> list[Trial]:
        """A trial a seed."""
        rungs = self.search.rungs if isinstance(self.search, Halving) else 1
        found = []
        for config in self._configs(options):
            stages = [config]
            if isinstance(self.search, Halving):
                parts = [self.search.eta ** (rungs - 1 - r) for r in range(rungs)]
                stages = [dataclasses.replace(config, budget=scaled(config.budget, 1 / part)) for part in parts]
            costs = [Cost(0, 0, 0), *map(cost, stages)]
            planned = costs[rung + 1].minus(costs[rung])
            trial = Trial.of(stages[rung], options)
            found.append(dataclasses.replace(trial, folder=identity(stages[0]), planned=planned, rung=rung))
        return found


def cost(config: TrainConfig) -> Cost:
    """What a run is going to take, as far as its configuration says it."""
    budget, tokens = Budget.parse(config.budget), config.batch_size * config.model.context_length
    per_token = config.model.flops_per_token()
    if budget.kind == "seconds":
        return Cost(seconds=budget.amount)
    steps = Plan(budget, tokens_per_step=tokens, flops_per_step=per_token * tokens).total_steps
    assert steps is not None  # of a budget that is not of seconds
    return Cost(steps * tokens * per_token, steps * tokens)


def scaled(budget: str, factor: float) -> str:
    """A part of a budget, in words: "90s", "1e+15flops"."""
    parsed = Budget.parse(budget)
    amount = parsed.amount * factor
    if parsed.kind == "steps":
        amount = max(1, round(amount))
    return f"{amount:.12g}{UNITS[parsed.kind]}"


def identity(config: TrainConfig) -> str:
    """Twelve hexadecimal digits of what a run is: nothing of where it is written, or how fast it is computed."""
    table = {name: value for name, value in configs.to_table(config).items() if name not in NO_PART}
    if config.branch_from is not None:
        table["branch_from"] = str(config.branch_from.resolve())
    sides = {"train": config.data.train, "val": config.data.val}
    table["data"] = {side: str(path.resolve()) for side, path in sides.items() if path is not None}
    return hashlib.sha256(_canonical(table).encode()).hexdigest()[:12]


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
