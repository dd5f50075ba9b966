"""Engines of a divided model: each rank has one, and all make the same steps.

Every rank is asked the same, in the same order: so all lay out the same steps, logits are the same on all of them, and
so is what is drawn. Of a server rank 0 alone is asked; before each step its `leading` engine tells the others, which
`follow`, what has come since the last.
"""

import contextlib
import dataclasses
import datetime
import os
import signal
from collections.abc import Iterator
from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from cs336.inference.load import load_model
from cs336.inference.sampling import SamplingParams
from cs336.models import Transformer
from cs336.parallel import tensor_parallel
from cs336.parallel.launch import agreed, connect, together, world_size
from cs336.parallel.tensor import TensorParallelTransformer

if TYPE_CHECKING:
    from cs336.inference.engine import Engine, Request, Update

IDLE = datetime.timedelta(days=3650)  # that ranks wait for a request


def is_divided(model: Transformer) -> bool:
    return isinstance(model, TensorParallelTransformer)


def size(model: Transformer) -> int:
    """How many ranks divide a model."""
    return model.region.size if isinstance(model, TensorParallelTransformer) else 1


def load_part(
    path: str | os.PathLike, device: str = "auto", dtype: torch.dtype | None = None, max_len: int | None = None
) -> Transformer:
    """This rank's part of the model at `path`, for inference: read on the CPU, divided among the processes of
    torchrun, and moved to this one's device. One process has all of it.

    Raises what `load_model` does and, on every rank, ValueError for a model that has no such division.
    """
    here = connect(device)
    if world_size() == 1:
        return load_model(path, str(here), dtype, max_len)
    return together(lambda: tensor_parallel(load_model(path, "cpu", dtype, max_len)).to(here))


def least(value: int, model: Transformer) -> int:
    """The smallest of all ranks' values; of a model that is not divided its own."""
    if not isinstance(model, TensorParallelTransformer):
        return value
    value_ = torch.tensor(value, device=model.device)
    dist.all_reduce(value_, dist.ReduceOp.MIN, group=model.region.group)
    return int(value_)


def generator_of_seeds(model: Transformer) -> torch.Generator:
    """Of requests that have none: torch's global one, or where a model is divided one that all ranks have alike."""
    if not isinstance(model, TensorParallelTransformer):
        return torch.default_generator
    drawn = int(torch.randint(2**62, (), device="cpu"))
    return torch.Generator().manual_seed(least(drawn, model))


# ---- one rank is asked ----


class Leader:
    """Rank 0's engine, with what the others have to be told."""

    def __init__(self, engine: "Engine", group: dist.ProcessGroup):
        self.engine, self._group = engine, group
        self._news: list[Any] = []

    @property
    def busy(self) -> bool:
        return self.engine.busy

    def add(self, prompt_token_ids: Rows[int], params: SamplingParams) -> "Request":
        request = self.engine.add(prompt_token_ids, params)
        self._news.append(["add", request.prompt_token_ids, dataclasses.asdict(params)])
        return request

    def cancel(self, request: "Request") -> None:
        self.engine.cancel(request)
        self._news.append(["cancel", request.id])

    def step(self) -> "list[Update]":
        agreed(self._news, self._group)
        self._news = []
        return self.engine.step()

    def close(self) -> None:
        """The others need not follow any more."""
        agreed(None, self._group)


@contextlib.contextmanager
def leading(engine: "Engine") -> Iterator["Engine | Leader"]:
    """The engine itself, or of a divided model one whose requests and steps are those of the other ranks too.

    After an error the others are told nothing: they may wait in the middle of a step, and end when this process does.
    """
    if not is_divided(engine.model):
        yield engine
        return
    leader = Leader(engine, _waiting_group())
    yield leader
    leader.close()


def follow(engine: "Engine") -> None:
    """Do what rank 0's engine does, until its `leading` ends. Signals are for rank 0. Call it in the main thread."""
    group = _waiting_group()
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    requests: dict[int, Request] = {}
    try:
        while (news := agreed(None, group)) is not None:
            for what, *said in news:
                if what == "add":
                    request = engine.add(said[0], SamplingParams(**said[1]))
                    requests[request.id] = request
                elif said[0] in requests:
                    engine.cancel(requests[said[0]])
            engine.step()
            requests = {i: request for i, request in requests.items() if not request.finished}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _waiting_group() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=IDLE)
