"""Designs: which runs to make so that a law can be fitted to them, each run whole steps of a model that can be built.

isoflop     for each budget C, sizes around sqrt(C / (6 ratio)) on C / (FLOPs a token)    arXiv:2203.15556, section 3.2
ladder      every size N at every ratio of tokens to parameters, D = ratio N              arXiv:2412.04403
anneal      the same, but the runs of a size branch off one trunk                         arXiv:2405.18392

FLOPs are exact (TransformerConfig.flops_per_token), not 6 N D: of a model of 10^5 parameters attention is a fifth.
Learning rate and batch follow the Step Law of each run's size and tokens, times a factor that is measured once.
"""

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cs336.models import TransformerConfig
from cs336.optim.config import WSDConfig
from cs336.scaling.laws import ChinchillaLaw, check_positive, step_law
from cs336.utils import config as configs

RATIO = 20  # tokens a parameter that are about optimal: arXiv:2203.15556
LEAST_SIZES = 3  # of a parabola
WARMUP = 20  # the part of a trunk's shortest run in which the rate rises
Table = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """Models that differ in size alone: whole heads, about one ratio of width to depth, MLPs of 8/3 d_model."""

    vocab_size: int
    context_length: int = 128
    head_dim: int = 16
    """Of every size, so that the scale of attention is one; even."""
    aspect: int = 24
    """d_model / num_layers: 25 to 400 are within 3 % of the best (arXiv:2001.08361, figure 5)."""
    d_ff_multiple: int = 16
    """64 or 128 fill a GPU's tiles."""
    lr_factor: float = 1.0
    """Over the Step Law's learning rate, which was fitted to models of 60M parameters and more."""
    highest_lr: float = 2e-2
    batch_factor: float = 1.0
    """Over the Step Law's batch."""
    num_layers: int | None = None
    """Of every size, in place of aspect: the width alone grows."""

    def __post_init__(self):
        for name in ("vocab_size", "context_length", "head_dim", "aspect", "num_layers", "d_ff_multiple"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        check_positive(lr_factor=self.lr_factor, highest_lr=self.highest_lr, batch_factor=self.batch_factor)

    def shape(self, heads: int) -> TransformerConfig:
        """The model of so many heads."""
        width = heads * self.head_dim
        d_ff = max(1, round(8 * width / (3 * self.d_ff_multiple))) * self.d_ff_multiple
        layers = self.num_layers or max(2, round(width / self.aspect))
        return TransformerConfig(
            self.vocab_size, self.context_length, layers, width, heads, d_ff=d_ff, qk_norm=True, tie_embeddings=True
        )

    def nearest(self, parameters: float) -> TransformerConfig:
        """The model whose number of parameters, embeddings counted, is nearest by its logarithm."""
        return self.shape(self.heads(parameters))

    def heads(self, parameters: float) -> int:
        """Of the nearest model."""
        check_positive(parameters=parameters)
        above = 1
        while self.shape(above).num_parameters() < parameters:
            above *= 2
        upper = 1 + bisect.bisect_left(range(1, above), parameters, key=lambda n: self.shape(n).num_parameters())
        return min((max(1, upper - 1), upper), key=lambda n: _distance(self.shape(n), parameters))

    def rates(self, model: TransformerConfig, tokens: float) -> tuple[float, int]:
        """Learning rate, and sequences a batch: the law's, at least one."""
        lr, batch = step_law(model.num_parameters(embeddings=False), tokens)
        sequences = self.batch_factor * batch / self.context_length
        step = 8 if sequences >= 16 else 1
        return float(f"{min(self.highest_lr, self.lr_factor * lr):.3g}"), max(1, round(sequences / step) * step)


@dataclass(frozen=True)
class Run:
    """One run of a design."""

    model: TransformerConfig
    batch_size: int
    """Sequences."""
    steps: int
    lr: float
    wanted: float
    """FLOPs, or tokens, that were asked for, in the unit of `of`."""
    of: str = "flops"
    schedule: WSDConfig | None = None
    """Of a branch, which leaves its trunk where this falls. None: a run of its own, under the study's schedule."""

    @property
    def parameters(self) -> int:
        return self.model.num_parameters()

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_size * self.model.context_length

    @property
    def flops(self) -> int:
        """Of the model as it ends, its trunk's part counted: what the loss belongs to."""
        return self.tokens * self.model.flops_per_token()

    @property
    def begins(self) -> int:
        """The step at which it leaves its trunk; 0 of a run of its own."""
        return self.schedule.stable_steps(self.steps) if self.schedule else 0

    @property
    def shared(self) -> int:
        """FLOPs of its trunk up to there."""
        return self.flops // self.steps * self.begins

    @property
    def residual(self) -> float:
        """What whole steps leave of what was asked for, relative: half a step at most."""
        return getattr(self, self.of) / self.wanted - 1

    @property
    def options(self) -> Table:
        """The keys of `cs336 train` that make it, in a study."""
        shape = ("num_layers", "d_model", "num_heads", "d_ff")
        table: Table = {f"model.{name}": getattr(self.model, name) for name in shape}
        table |= {"batch_size": self.batch_size, "optimizer.lr": self.lr, "budget": f"{self.steps}steps"}
        return table | ({"schedule": configs.to_table(self.schedule)} if self.schedule else {})


def isoflop(
    family: Family, budgets: Sequence[float], sizes: int = 5, span: float = 4.0, ratio: float = RATIO
) -> list[Run]:
    """Runs of equal FLOPs: at each budget `sizes` models evenly in the logarithm, from 1 / span to span times the size
    of `ratio` tokens a parameter. Where two are the same model it is trained once, and the span is widened until there
    are three.

    Raises ValueError for a budget that is not one step of a model.
    """
    _several(budgets=budgets)
    check_positive(ratio=ratio)
    if sizes < LEAST_SIZES or not 1 < span < math.inf:
        raise ValueError(f"a valley takes at least {LEAST_SIZES} sizes and a span above 1, got {sizes} and {span}")
    runs = []
    for budget in budgets:
        middle = math.sqrt(budget / (6 * ratio))
        reach, models = span, list[TransformerConfig]()
        while len(models) < LEAST_SIZES:
            models = list(dict.fromkeys(map(family.nearest, np.geomspace(middle / reach, middle * reach, sizes))))
            reach *= 1.5
        runs += [_run(family, model, budget / model.flops_per_token(), budget, "flops") for model in models]
    return runs


def ladder(family: Family, sizes: Sequence[float], ratios: Sequence[float]) -> list[Run]:
    """Every size, in parameters, at every ratio of tokens to parameters."""
    _several(sizes=sizes, ratios=ratios)
    models = {family.nearest(N): None for N in sizes}
    asked = [(model, ratio * model.num_parameters()) for model in models for ratio in ratios]
    return [_run(family, model, tokens, tokens, "tokens") for model, tokens in asked]


def anneal(family: Family, sizes: Sequence[float], ratios: Sequence[float], decay_part: float = 0.2) -> list[Run]:
    """`ladder` with one trunk a size: the rate stays at its top, and for each ratio a branch leaves the trunk for the
    last decay_part of its tokens. All of a size have the batch and rate of the geometric mean of their tokens."""
    if not 0 < decay_part < 1:
        raise ValueError(f"decay_part must be between 0 and 1, got {decay_part}")
    runs = []
    for model, group in _by_model(ladder(family, sizes, ratios)):
        lr, batch_size = family.rates(model, math.exp(np.mean([math.log(run.wanted) for run in group])))
        steps = [_steps(run.wanted, batch_size * model.context_length) for run in group]
        schedule = WSDConfig(max(1, min(steps) // WARMUP), min_lr_ratio=0.0, decay_part=decay_part)
        runs += [
            replace(run, batch_size=batch_size, steps=count, lr=lr, schedule=schedule)
            for run, count in zip(group, steps, strict=True)
        ]
    return runs


def best(family: Family, flops: float, law: ChinchillaLaw) -> Run:
    """The run of so many FLOPs that the law expects the least loss of."""
    middle = family.heads(law.optimum(flops).parameters)  # of 6 N D, which is near
    found = []
    for heads in range(max(1, middle // 2), 2 * middle + 1):
        model = family.shape(heads)
        tokens = flops / model.flops_per_token()
        if tokens >= family.rates(model, tokens)[1] * family.context_length:
            found.append(_run(family, model, tokens, flops, "flops"))
    if not found:
        raise ValueError(f"{flops:g} FLOPs are less than a step of a model that the law would spend them on")
    return min(found, key=lambda run: float(law.loss(run.parameters, run.tokens)))


@dataclass(frozen=True)
class Accounts:
    """What a design takes."""

    flops: int
    """Trunks once, and every branch's decay; runs of their own whole."""
    separately: int
    """If every run were one of its own."""

    @property
    def saved(self) -> float:
        """The part of `separately` that trunks save."""
        return 1 - self.flops / self.separately


def accounts(runs: Sequence[Run]) -> Accounts:
    """FLOPs of a design, with and without its trunks."""
    trunks = sum(max(run.shared for run in group) for _, group in _by_model(runs))
    return Accounts(trunks + sum(run.flops - run.shared for run in runs), sum(run.flops for run in runs))


def study(runs: Sequence[Run], base: Mapping[str, Any]) -> Table:
    """A design as the table of a study, which `cs336 sweep` runs. base: keys of `cs336 train` that all runs share."""
    if not runs:
        raise ValueError("a design holds at least one run")
    shared = configs.to_table(runs[0].model)
    own = [run.options for run in runs]
    for name in ("num_layers", "d_model", "num_heads", "d_ff"):
        del shared[name]
    table = dict(base) | {"model": shared | configs.to_table(base.get("model", {}))}
    kind = "anneal" if any(run.schedule for run in runs) else "list"
    return {"base": table, "search": {"kind": kind, "runs": own}}


def table(runs: Iterable[Run]) -> str:
    """A row a run."""
    lines = ["parameters   d_model  layers   d_ff     tokens  ratio  batch   steps        lr      FLOPs  off target"]
    for r in runs:
        shape = f"{r.parameters:>10,} {r.model.d_model:9} {r.model.num_layers:7} {r.model.ff_size:6}"
        data = f"{r.tokens:10,} {r.tokens / r.parameters:6.1f} {r.batch_size:6} {r.steps:7,}"
        lines.append(f"{shape} {data} {r.lr:9.3g} {r.flops:10.3g} {100 * r.residual:+9.2f} %")
    return "\n".join(lines)


def _run(family: Family, model: TransformerConfig, tokens: float, wanted: float, of: str) -> Run:
    lr, batch_size = family.rates(model, tokens)
    return Run(model, batch_size, _steps(tokens, batch_size * model.context_length), lr, wanted, of)


def _steps(tokens: float, per_step: int) -> int:
    if (steps := round(tokens / per_step)) < 1:
        raise ValueError(f"{tokens:,.0f} tokens are less than a step of {per_step:,}: give more, or a shorter context")
    return steps


def _by_model(runs: Iterable[Run]) -> list[tuple[TransformerConfig, list[Run]]]:
    groups: dict[TransformerConfig, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.model, []).append(run)
    return list(groups.items())


def _distance(model: TransformerConfig, parameters: float) -> float:
    return abs(math.log(model.num_parameters() / parameters))


def _several(**values: Sequence[float]) -> None:
    for name, numbers in values.items():
        if not numbers:
            raise ValueError(f"{name} must be at least one number")
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"{name} must differ, got {list(numbers)}")
        for number in numbers:
            check_positive(**{name: number})
