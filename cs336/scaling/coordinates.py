"""The coordinate check: how far activations move in a model's first steps, against its width.

A parametrisation under which one learning rate serves every width moves an activation's coordinates equally far at
every width; where they move further as the model widens, the best learning rate falls with it. Yang et al. 2022,
arXiv:2203.03466, appendix D.1, here as the RMS of x_t - x_0 over a batch. B = batch, T = tokens, W = widths.
"""

import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cs336.models import TransformerConfig
from cs336.optim.config import AdamWConfig
from cs336.training.config import DataConfig, TrainConfig
from cs336.training.learner import Learner

NOWHERE = pathlib.Path("runs/coordinates")  # a Learner writes nothing
BATCH = 8


@dataclass(frozen=True)
class Coordinates:
    """Of one parametrisation."""

    widths: tuple[int, ...]
    moved: dict[str, np.ndarray]
    """By activation, (W, steps): the RMS of its change after 1, 2, ... steps, mean over seeds."""

    def slopes(self) -> dict[str, float]:
        """By activation: the power of the width with which it has moved after the last step; 0 is flat."""
        x = np.log(self.widths)
        return {name: float(np.polyfit(x, np.log(moved[:, -1]), 1)[0]) for name, moved in self.moved.items()}


def measure(
    widths: Sequence[int],
    *,
    mup: bool,
    base_width: int | None = None,
    steps: int = 4,
    lr: float = 3e-3,
    seeds: int = 3,
    head_dim: int = 16,
    num_layers: int = 2,
    vocab_size: int = 256,
    context_length: int = 32,
    progress: bool = False,
) -> Coordinates:
    """Train models of each width on one batch of Zipf-distributed tokens with AdamW, at one learning rate.

    Args:
        widths: of d_model, multiples of head_dim.
        mup: by muP from base_width, the smallest width if None; else the same initial weights' size and rate for all.
        progress: write a line a width to standard error.

    Raises ValueError for fewer than two widths, and where a width is no multiple of head_dim.
    """
    if len(set(widths)) < 2 or min(steps, seeds) < 1:
        raise ValueError(f"a slope takes two widths, a step and a seed; got {list(widths)}, {steps} and {seeds}")
    if odd := [width for width in widths if width < 1 or width % head_dim]:
        raise ValueError(f"widths must be multiples of head_dim {head_dim}, got {odd[0]}")
    base = min(widths) if base_width is None else base_width
    moved: dict[str, np.ndarray] = {}
    for place, width in enumerate(widths):
        if progress:
            print(f"{'muP' if mup else 'standard'}: width {width}, {place + 1} of {len(widths)}", file=sys.stderr)
        model = TransformerConfig(
            vocab_size, context_length, num_layers, width, width // head_dim, mup_base_width=base if mup else None
        )
        for seed in range(seeds):
            config = TrainConfig(
                NOWHERE, DataConfig(NOWHERE), model, AdamWConfig(), batch_size=BATCH,
                device="cpu", compile=False, seed=seed,
            )  # fmt: skip
            for step, sizes in enumerate(_moves(Learner(config), steps, lr)):
                for name, size in sizes.items():
                    moved.setdefault(name, np.zeros((len(widths), steps)))[place, step] += size / seeds
    return Coordinates(tuple(widths), moved)


def _moves(learner: Learner, steps: int, lr: float) -> Iterator[dict[str, float]]:
    """After each step, how far each activation has moved."""
    batch = _batch(learner.config)
    before = _activations(learner, batch[0])
    for _ in range(steps):
        learner.update(batch, lr)
        after = _activations(learner, batch[0])
        yield {name: float((after[name] - before[name]).square().mean().sqrt()) for name in before}


def _batch(config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) and those after them, from the seed."""
    model = config.model
    weight_V = 1 / np.arange(1, model.vocab_size + 1)
    shape = (config.batch_size, model.context_length + 1)
    drawn = np.random.default_rng(config.seed).choice(model.vocab_size, shape, p=weight_V / weight_V.sum())
    tokens = torch.from_numpy(drawn)
    return tokens[:, :-1], tokens[:, 1:]


def _activations(learner: Learner, tokens_BT: Tensor) -> dict[str, Tensor]:
    """What each layer's mixer and MLP return, what the head reads, and the logits."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: found.update({name: output})

    model = learner.model
    parts = ("attention", "mlp")
    watched = [(f"{part} {i}", getattr(layer, part)) for i, layer in enumerate(model.layers) for part in parts]
    hooks = [module.register_forward_hook(keep(name)) for name, module in watched]
    try:
        with learner.evaluating():
            found["features"] = model.features(tokens_BT)
            found["logits"] = model.logits(found["features"])
    finally:
        for hook in hooks:
            hook.remove()
    return found
