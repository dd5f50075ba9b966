"""Runs without a GPU, for practice and tests: their loss is a law's, their time that of their FLOPs.

    L = L(N, D) (1 + 0.01 ln^2(lr / lr*) + 0.004 ln^2(batch / batch*)) exp(noise z),   at most ln 32768

L(N, D) is Epoch's fit (arXiv:2404.10102), lr* and batch* the Step Law's (arXiv:2503.04715), z standard normal by the
run and its seed. How flat the Step Law's valley is has no published formula: the two curvatures are chosen, so that
half of the best rate costs 0.5 % of the loss and half of the best batch 0.2 %. On its way a run is above the law by up
to 6 %, as one is before its learning rate has come down.
"""

import hashlib
import json
import math
import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from cs336.scaling.api.jobs import Interrupted, Job
from cs336.scaling.api.protocol import RunRequest
from cs336.scaling.laws import EPOCH, FLOPS_A_TOKEN, Allocation, check_positive, step_law
from cs336.utils.rows import read_rows

POINTS = 40  # rows of a run
LR_CURVATURE, BATCH_CURVATURE = 0.01, 0.004
BEFORE_DECAY = 0.06
STOP_POLL = 0.1  # seconds between two looks whether a run shall stop
GUESSING = math.log(32_768)  # nats a token


@dataclass(frozen=True)
class Simulator:
    """A Backend."""

    kind: Literal["simulator"] = "simulator"
    speed: float = 4e14
    """FLOPs a second: about an H100's in training."""
    time_scale: float = 1e-5
    """Real seconds a second that is simulated: 1e18 FLOPs are then over in 25 ms."""
    noise: float = 0.002
    """Of the loss, relative: standard deviation between seeds."""

    def __post_init__(self):
        check_positive(speed=self.speed)
        for name in ("time_scale", "noise"):
            if not (0 <= getattr(self, name) < math.inf):
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")

    def plan(self, asked: RunRequest) -> Job:
        if asked.config is not None:
            from cs336.scaling.api.training import plan_config  # and torch with it

            job = plan_config(asked.config, {"data": {"train": "simulated"}})
            if job.seconds is not None:
                return replace(job, tokens=max(1.0, job.seconds * self.speed / job.flops_per_token))
            assert job.flops is not None
            return replace(job, seconds=job.flops / self.speed)
        assert asked.parameters is not None
        assert asked.tokens is not None
        lr, batch = step_law(asked.parameters, asked.tokens)
        numbers: dict[str, Any] = {"parameters": asked.parameters, "tokens": asked.tokens, "seed": asked.seed}
        numbers["learning_rate"] = lr if asked.learning_rate is None else asked.learning_rate
        numbers["batch_tokens"] = min(batch if asked.batch_tokens is None else asked.batch_tokens, asked.tokens)
        per_token = FLOPS_A_TOKEN * asked.parameters
        seconds = per_token * asked.tokens / self.speed
        return Job(digest(numbers), flops_per_token=per_token, seconds=seconds, **numbers)

    def loss(self, job: Job) -> float:
        """At the end of a run."""
        assert job.tokens is not None
        z = np.random.default_rng(int(job.identity, 16)).standard_normal()
        return self._at(job, job.tokens) * math.exp(self.noise * z)

    def best(self, flops: float) -> Allocation:
        """The true optimum of a budget."""
        return EPOCH.optimum(flops)

    def _at(self, job: Job, tokens: float) -> float:
        """Without noise, if the run ended there."""
        assert job.tokens is not None
        lr, batch = step_law(job.parameters, job.tokens)
        off = LR_CURVATURE * math.log(job.learning_rate / lr) ** 2
        off += BATCH_CURVATURE * math.log(job.batch_tokens / batch) ** 2
        return min(GUESSING, float(EPOCH.loss(job.parameters, tokens)) * (1 + off))

    def run(self, job: Job, folder: pathlib.Path, stopped: Callable[[], bool]) -> float:
        assert job.tokens is not None
        assert job.seconds is not None
        folder.mkdir(parents=True, exist_ok=True)
        path, end = folder / "metrics.jsonl", self.loss(job)
        done = len(read_rows(folder))
        if path.exists():  # a torn line has no end, and nothing may be written behind it
            whole = path.read_bytes()
            path.write_bytes(whole[: whole.rfind(b"\n") + 1])
        noise = end / self._at(job, job.tokens)
        with open(path, "a", encoding="utf-8") as file:
            for row in range(done + 1, POINTS + 1):
                _pass(job.seconds * self.time_scale / POINTS, stopped)
                part = row / POINTS
                loss = min(GUESSING, self._at(job, part * job.tokens) * noise * (1 + BEFORE_DECAY * (1 - part)))
                numbers = {"step": row, "tokens": part * job.tokens, "seconds": part * job.seconds, "train/loss": loss}
                file.write(json.dumps(numbers) + "\n")
                file.flush()
        return end


def _pass(seconds: float, stopped: Callable[[], bool]) -> None:
    """Let time pass. Raises Interrupted once it is stopped."""
    end = time.monotonic() + seconds
    while not stopped():
        if (left := end - time.monotonic()) <= 0:
            return
        time.sleep(min(left, STOP_POLL))
    raise Interrupted


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
