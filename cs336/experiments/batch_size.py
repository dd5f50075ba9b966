"""The critical batch size of a configuration: how many sequences a step may have before tokens are wasted.

Measured twice: by the gradient noise scale during a run (see noise.py), and by branching (arXiv:2505.23971): from
checkpoints of the run, train on with k times the batch and the learning rate times sqrt(k) (k for SGD), each branch
over the same number of tokens. The largest batch whose loss is within a tolerance of the smallest one's is critical.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from cs336.data import TokenDataset, TokenLoader
from cs336.experiments.noise import Noise, smoothed
from cs336.experiments.study import cost
from cs336.experiments.train import read_rows
from cs336.training import TrainConfig, Trainer
from cs336.training.budget import Budget
from cs336.training.checkpoint import load_checkpoint, step_path
from cs336.training.evaluators import mean_loss
from cs336.training.learner import Learner
from cs336.training.metrics import Display, json_line
from cs336.utils.counted import counted
from cs336.utils.files import write_text
from cs336.utils.stages import Interrupted, Outcome, Stage, run_stages

SMOOTHING = 0.5  # of the exponential mean of a branch's training losses, as in the paper
REACH = 5  # neighbours of a measurement of the noise scale that it is averaged with
LINEAR = {"sgd"}  # optimizers whose learning rate goes with the batch, not with its root
ALL = 1000  # checkpoints: more than there will be
SEED = 0x6272616E  # of the branches' batches


@dataclass(frozen=True)
class Branching:
    """How branches are made."""

    directory: pathlib.Path
    config: TrainConfig
    """Of the run, whose batch is the smallest."""
    factors: tuple[int, ...] = (1, 2, 4, 8)
    """Of the batch."""
    places: int = 3
    """Checkpoints that branches begin from, evenly over the run: its end excluded."""
    tokens: int | None = None
    """Of a branch. None: a tenth of the run's."""
    tolerance: float = 0.01
    """Nats that a larger batch may lose."""

    def __post_init__(self):
        if not self.factors or self.factors[0] != 1 or list(self.factors) != sorted(set(self.factors)):
            raise ValueError(f"factors go up from 1, got {self.factors}")
        if self.places < 1 or not self.tolerance > 0:
            raise ValueError(f"places and tolerance must be above zero, got {self.places} and {self.tolerance}")
        if Budget.parse(self.config.budget).kind == "seconds":
            raise ValueError(f"batch sizes are compared over tokens: give a budget of those, not {self.config.budget}")
        if self.steps < 2 * (self.places + 1):
            raise ValueError(f"{self.config.budget} are {self.steps} steps: too few for {self.places} checkpoints")
        largest = self.factors[-1] * self.tokens_per_step
        if self.branch_tokens < 2 * largest:
            raise ValueError(
                f"a branch of {self.branch_tokens:,} tokens has fewer than two steps of {largest:,}: give a larger "
                "budget or --tokens, or smaller factors"
            )

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.model.context_length

    @property
    def steps(self) -> int:
        return round((cost(self.config).tokens or 0) / self.tokens_per_step)

    @property
    def branch_tokens(self) -> int:
        return self.steps * self.tokens_per_step // 10 if self.tokens is None else self.tokens

    @property
    def every(self) -> int:
        """Steps between two places."""
        return self.steps // (self.places + 1)

    @property
    def trunk(self) -> TrainConfig:
        """The run: it keeps the checkpoints that branches begin from."""
        return dataclasses.replace(
            self.config,
            run_dir=self.directory / "trunk",
            checkpoint_interval=self.every,
            keep_checkpoints=ALL,
            cuda_graph=False,  # gradients are taken between its steps
        )


def measure_batch_size(branching: Branching, console: Console | None = None) -> dict[str, Any]:
    """Train the run and its branches, what is left of them, and write DIRECTORY/batch_size.json, which it returns.

    Raises Interrupted where a signal stopped it; the same call continues.
    """
    directory, trunk = branching.directory, branching.trunk
    settings = json.loads(json.dumps(dataclasses.asdict(trunk), default=str))
    inputs = tuple(path for path in (trunk.data.train, trunk.data.val) if path is not None)
    stages = [
        Stage(
            "trunk",
            "the run, with its noise scale",
            lambda: _train_trunk(trunk),
            outputs=("trunk/export/config.json",),
            inputs=inputs,
            settings={name: value for name, value in settings.items() if name not in ("run_dir", "data")},
            kept=("trunk",),
        )
    ]
    run_stages(directory, stages, console)
    points = [step_path(trunk.run_dir / "checkpoints", i * branching.every) for i in range(1, branching.places + 1)]
    results = {(point.name, k): f"branches/{point.name}-{k}.json" for point in points for k in branching.factors}
    for (name, k), output in results.items():
        stages.append(
            Stage(
                f"{name}x{k}",
                f"from {name} with {k * trunk.batch_size} sequences a step",
                lambda name=name, k=k, output=output: _branch(branching, name, k, directory / output),  # type: ignore[misc]
                outputs=(output,),
                inputs=(trunk.run_dir / "checkpoints" / name,),
                settings={"tokens": branching.branch_tokens, "factor": k},
            )
        )
    run_stages(directory, stages, console)
    branches = [json.loads((directory / output).read_text()) for output in results.values()]
    found = _summary(branching, branches)
    write_text(directory / "batch_size.json", json_line(found, indent=1))
    return found


def _train_trunk(config: TrainConfig) -> Outcome:
    with open(os.devnull, "w") as nowhere:
        trainer = Trainer(config, display=Display(Console(file=nowhere)))
        trainer.evaluators.append(Noise(trainer.train_data, config))
        done = trainer.train()
    if not done.finished:
        raise Interrupted
    return Outcome(f"{counted(done.step, 'step')}, {done.tokens:,} tokens", done.seconds)


def _branch(branching: Branching, name: str, factor: int, output: pathlib.Path) -> Outcome:
    """Train on from a checkpoint with a larger batch, and write where that led."""
    trunk = branching.trunk
    micro = trunk.micro_batch_size or trunk.batch_size  # what is known to fit
    config = dataclasses.replace(trunk, batch_size=factor * trunk.batch_size, micro_batch_size=micro)
    learner = Learner(config)
    step = load_checkpoint(trunk.run_dir / "checkpoints" / name, learner.model, learner.optimizer)
    rate = factor if config.optimizer.kind in LINEAR else math.sqrt(factor)
    lr = rate * learner.optimizer.param_groups[0]["lr"]
    data = TokenDataset(trunk.data.train, config.model.context_length, vocab_size=config.model.vocab_size)
    # Every branch of a checkpoint reads the same sequences in the same order, in other batches.
    loader = TokenLoader(data, config.batch_size, seed=config.seed ^ SEED ^ step, device=learner.device)
    steps = branching.branch_tokens // (config.batch_size * config.model.context_length)
    smooth, losses = None, []
    for _ in range(steps):
        loss = float(learner.update(next(loader), lr)["loss"])
        smooth = loss if smooth is None else SMOOTHING * smooth + (1 - SMOOTHING) * loss
        losses.append(loss)
    found = {"checkpoint": name, "step": step, "factor": factor, "lr": lr, "steps": steps, "train": smooth}
    if trunk.data.val is not None:
        found["val"] = _validate(learner, config)
    output.parent.mkdir(exist_ok=True)
    write_text(output, json_line(found | {"losses": losses}))
    return Outcome(f"loss {found.get('val', smooth):.4f} after {counted(steps, 'step')}")


def _validate(learner: Learner, config: TrainConfig) -> float:
    assert config.data.val is not None
    data = TokenDataset(config.data.val, config.model.context_length, vocab_size=config.model.vocab_size)
    size = min(config.micro_batch_size or 1, len(data))
    wanted = (config.eval_tokens or 262_144) // config.model.context_length
    count = max(size, min(len(data), wanted) // size * size)
    with learner.evaluating():
        return mean_loss(learner.terms, data, count, size, learner.device)


# ---- what it says ----


def critical(losses: dict[int, float], tolerance: float) -> int:
    """The largest factor up to which no loss is more than `tolerance` above that of the smallest batch."""
    smallest, *larger = sorted(losses)
    largest = smallest
    for factor in larger:
        if not losses[factor] <= losses[smallest] + tolerance:
            break
        largest = factor
    return largest


def _summary(branching: Branching, branches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    config, T = branching.config, branching.config.model.context_length
    noise = smoothed(read_rows(branching.trunk.run_dir), REACH)
    measured = "val" if config.data.val is not None else "train"
    points = []
    for step in sorted({branch["step"] for branch in branches}):
        losses = {branch["factor"]: branch[measured] for branch in branches if branch["step"] == step}
        factor = critical(losses, branching.tolerance)
        near = min(noise, key=lambda pair: abs(pair[0] - step), default=(step, math.inf))[1]
        points.append(
            {
                "step": step,
                "tokens": step * branching.tokens_per_step,
                "losses": losses,
                "critical": factor * config.batch_size,
                "at_least": factor == max(losses),
                "noise_scale": near,
            }
        )
    last = points[-1]
    recommended = last["critical"]
    rate = recommended / config.batch_size
    lr = config.optimizer.lr * (rate if config.optimizer.kind in LINEAR else math.sqrt(rate))
    found = {
        "batch_size": config.batch_size,
        "context_length": T,
        "parameters": config.model.num_parameters(),
        "tolerance": branching.tolerance,
        "branch_tokens": branching.branch_tokens,
        "measured": measured,
        "points": points,
        "noise": [{"step": step, "tokens": step * branching.tokens_per_step, "batch": size} for step, size in noise],
        "recommended": recommended,
        "lr": lr,
    }
    return found | {"reason": reason(found)}


def reason(found: dict[str, Any]) -> str:
    """Why a batch is recommended, in sentences."""
    last, base, recommended = found["points"][-1], found["batch_size"], found["recommended"]
    losses = {int(factor): loss for factor, loss in last["losses"].items()}
    first, factor = losses[1], recommended // base
    after = f"After {last['tokens']:,} tokens"
    said = [
        f"{after}, training {found['branch_tokens']:,} more in batches of {recommended} "
        f"sequences ends {losses[factor] - first:+.4f} nats from batches of {base}, within the {found['tolerance']:g} "
        "allowed."
        if factor > 1
        else f"{after} no batch larger than {base} stays within {found['tolerance']:g} nats of it."
    ]
    over = [f for f in sorted(losses) if f > factor]
    if over:
        said.append(f"Batches of {over[0] * base} end {losses[over[0]] - first:+.4f} from it.")
    else:
        said.append("It is the largest that was tried: the critical batch may be larger.")
    scale = last["noise_scale"]
    if math.isfinite(scale):
        said.append(f"The gradient noise scale there is {scale:.3g} sequences.")
    early = found["points"][0]
    if early["critical"] < recommended:
        said.append(
            f"Early in the run, at {early['tokens']:,} tokens, only {early['critical']} sequences do no harm: begin "
            "with those and double when the critical batch has."
        )
    return " ".join(said)
