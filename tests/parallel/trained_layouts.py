"""`cs336 train` of one configuration after the other, in processes that torchrun started once.

arguments: CONFIG, or CONFIG:STEP to be stopped by a signal after a step. Samples are of the whole model.
"""

import functools
import signal
import sys

import torch

from cs336 import training
from cs336.cli import main
from cs336.parallel import connect
from cs336.parallel.launch import rank, world_size

stops = {}


def sample(model):
    logits_V = model(torch.arange(6)[None])[0, -1]
    return [{"prompt": f"{model.training}", "text": " ".join(map(str, logits_V.tolist()))}]


class Trainer(training.Trainer):
    def __init__(self, config, **options):
        super().__init__(config, **(options | {"sample": sample}))

    def _update(self):
        super()._update()
        if self.step == stops.get("step") and rank() == world_size() - 1:
            signal.raise_signal(signal.SIGTERM)


def run(argument):
    path, _, step = argument.partition(":")
    stops["step"] = int(step or -1)
    code = main(["train", "--config", path])
    sys.stdout.flush()  # by itself: ranks share a pipe, which keeps short writes whole
    print(f"\n{argument}: {code}", flush=True)


if __name__ == "__main__":
    connect("cpu")
    training.Trainer = Trainer
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # no half minute of a C++ compiler
    for argument in sys.argv[1:]:
        run(argument)
