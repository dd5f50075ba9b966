"""Training steps to look at: a learner that is warm, and its batch. Options that the scripts share."""

import argparse
import pathlib
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.end_to_end.bench_train import MODELS
from cs336.optim import AdamWConfig, MuonConfig
from cs336.training import DataConfig, TrainConfig
from cs336.training.learner import Learner
from cs336.utils import nvtx

OPTIMIZERS = {"adamw": AdamWConfig(), "muon": MuonConfig()}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="124M", choices=MODELS, help=", ".join(MODELS))
    parser.add_argument("--batch", type=int, default=32, help="sequences a step (%(default)s)")
    parser.add_argument("--optimizer", default="adamw", choices=OPTIMIZERS)


@dataclass
class Steps:
    """Steps of one learner on one batch of random tokens."""

    learner: Learner
    batch: tuple[Tensor, Tensor]

    @staticmethod
    def of(options: argparse.Namespace, *, compile: bool | None = None, graph: bool = False) -> "Steps":
        """graph: where `cs336 train` would capture a step. The ranges inside of it are in no trace then."""
        model, nowhere = MODELS[options.model], pathlib.Path("unused")  # a Learner reads and writes no files
        settings = {"optimizer": OPTIMIZERS[options.optimizer], "batch_size": options.batch, "compile": compile}
        settings |= {"cuda_graph": "auto" if graph else False}
        learner = Learner(TrainConfig(nowhere, DataConfig(nowhere), model, **settings))
        shape = (options.batch, model.context_length)
        x_BT, y_BT = (torch.randint(model.vocab_size, shape, device=learner.device) for _ in range(2))
        return Steps(learner, (x_BT, y_BT))

    def make(self, count: int) -> None:
        for _ in range(count):
            with nvtx.annotate("step"):
                self.learner.update(self.batch, lr=1e-4)
        if self.learner.device.type == "cuda":
            torch.cuda.synchronize()
