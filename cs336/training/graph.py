"""A training step as one CUDA graph: the host launches one thing instead of hundreds of kernels.

A small model's step is over before the host has launched the next kernels: the GPU waits for the host. So the first
steps are made as they are, which compiles and allocates, then one is captured, and from there on replayed: forward,
backward and optimizer of all micro-batches, on the same memory. What changes from step to step is read from the device:
the batch is copied into the captured one, and the learning rate is a tensor.
"""

import gc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cs336.training.objectives import Batch

Values = dict[str, Tensor]
Step = Callable[[Batch], Values]
Capture = Callable[[Step, Batch, torch.cuda.Stream | None], tuple[Callable[[], None], Values]]

WARM_UP = 2  # steps before the capture: compilation, the optimizer's state, the libraries' workspaces


def capture_cuda(step: Step, batch: Batch, stream: torch.cuda.Stream | None) -> tuple[Callable[[], None], Values]:
    """What makes the step again on what `batch` then holds, and the tensors in which it leaves its results.

    Nothing is computed yet. Raises RuntimeError for a step that waits for the device or otherwise cannot be captured.
    """
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()  # the graph allocates from a pool of its own
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        values = step(batch)
    return graph.replay, values


class StepGraph:
    """Calls `step` a few times, then captures it and replays that.

    A batch of other shapes than the captured one is made as it is. When one of `weights` has moved in memory, as an
    engine that shares the model may do, the step is captured anew. `required`: a step that cannot be captured is an
    error; otherwise it goes on without a graph, and `refused` says why.
    """

    def __init__(
        self,
        step: Step,
        device: torch.device,
        *,
        weights: Sequence[Tensor] = (),
        required: bool = True,
        capture: Capture = capture_cuda,
    ):
        self.step, self.device, self.required, self.capture = step, device, required, capture
        self.weights = weights
        self.refused: str | None = None
        self._made = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._batch: Batch = ()
        self._replay: Callable[[], None] | None = None
        self._values: Values = {}
        self._places: list[int] = []

    def __call__(self, batch: Batch) -> Values:
        if self._replay is not None and self._places != [w.data_ptr() for w in self.weights]:
            self._replay = None
        if self._replay is None and self._made >= WARM_UP and self.refused is None:
            self._try_to_capture(batch)
        if self._replay is None or [t.shape for t in batch] != [t.shape for t in self._batch]:
            self._made += 1
            return self._beside(batch)
        for captured, given in zip(self._batch, batch, strict=True):
            captured.copy_(given)
        self._replay()
        return {name: value.clone() for name, value in self._values.items()}

    @property
    def captured(self) -> bool:
        return self._replay is not None

    def _try_to_capture(self, batch: Batch) -> None:
        self._batch = tuple(t.clone() for t in batch)
        self._places = [w.data_ptr() for w in self.weights]
        try:
            self._replay, self._values = self.capture(self.step, self._batch, self._stream)
        except RuntimeError as error:
            self.refused = str(error).partition("\n")[0]
            if self.required:
                raise RuntimeError(f"the step cannot be captured ({self.refused}): set cuda_graph = false") from error

    def _beside(self, batch: Batch) -> Values:
        """On the stream of the capture, so that the libraries' workspaces are those of the graph."""
        if self._stream is None:
            return self.step(batch)
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            values = self.step(batch)
        current.wait_stream(self._stream)
        for tensor in batch:
            tensor.record_stream(self._stream)
        for tensor in values.values():
            tensor.record_stream(current)
        return values
