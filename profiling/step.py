"""A few training steps for Nsight Systems: warm ones first, then the ones to look at, between profiler start and stop.

python -m profiling.step 124M --batch 32 --steps 5
"""

import argparse
import pathlib

import torch

from benchmarks.end_to_end.bench_train import MODELS
from cs336.training import DataConfig, TrainConfig
from cs336.training.learner import Learner
from cs336.utils import nvtx

WARM_UP = 5  # steps: compile, allocate, settle


def main() -> None:
    parser = argparse.ArgumentParser("python -m profiling.step", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="124M", choices=MODELS, help=", ".join(MODELS))
    parser.add_argument("--batch", type=int, default=32, help="sequences a step (%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="to look at (%(default)s)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("Nsight Systems would see no GPU here: torch sees none")
    model, nowhere = MODELS[options.model], pathlib.Path("unused")  # a Learner reads and writes no files
    learner = Learner(TrainConfig(nowhere, DataConfig(nowhere), model, batch_size=options.batch))
    shape = (options.batch, model.context_length)
    x_BT, y_BT = (torch.randint(model.vocab_size, shape, device=learner.device) for _ in range(2))
    for step in range(WARM_UP + options.steps):
        if step == WARM_UP:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        with nvtx.annotate("step"):
            learner.update((x_BT, y_BT), lr=1e-4)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
