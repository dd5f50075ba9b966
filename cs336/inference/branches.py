"""Work of a step that goes on beside other work: branches of a graph that is captured."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch


@contextmanager
def beside(device: torch.device) -> Iterator[Callable[[], None]]:
    """While a graph is captured, a branch of its own for small launches that would each wait for the one before. Yields
    what makes all that follows wait for it."""
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        yield lambda: None
        return
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield lambda: main.wait_stream(side)


@contextmanager
def branches(device: torch.device) -> Iterator[list[Callable[[], AbstractContextManager]]]:
    """Two places for work that is not each other's: on a GPU two streams, which begin behind what is there, and are
    waited for."""
    if device.type != "cuda":
        yield [nullcontext, nullcontext]
        return
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(main)
    yield [partial(torch.cuda.stream, main), partial(torch.cuda.stream, side)]
    main.wait_stream(side)
