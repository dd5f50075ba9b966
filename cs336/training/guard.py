"""Steps that are not like the others, and where a non-finite number came from."""

import contextlib
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn


@dataclass(frozen=True)
class GuardConfig:
    """What becomes of a step that is not like the others. All but the defaults read each step's loss at once, so that
    the host waits for the device."""

    non_finite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is infinite or not a number. stop: repeat the steps from the newest checkpoint on to find
    the module it comes from, and end. skip: name the module, and leave the step out."""
    spike: Literal["keep", "skip", "stop"] = "keep"
    """A loss or gradient norm far above those of the latest steps: nothing, leave the step out, or end."""
    sigmas: float = 6.0
    """How far: so many standard deviations above the mean."""
    window: int = 128
    """Of so many steps; there are no spikes before half of them are made."""
    most_skipped: int = 10
    """In a row; more end the run."""

    def __post_init__(self):
        if not 0 < self.sigmas < math.inf:
            raise ValueError(f"sigmas must be more than 0 and finite, got {self.sigmas}")
        for name in ("window", "most_skipped"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, got {getattr(self, name)}")

    @property
    def reads_each_step(self) -> bool:
        return self.non_finite != "stop" or self.spike != "keep"


class StepError(FloatingPointError):
    """A step that ends a run; `record` is what failure.json says of it."""

    def __init__(self, message: str, **record: Any):
        super().__init__(message)
        self.record = record


class NonFiniteError(StepError):
    """A loss or a gradient became infinite or not a number."""


class SpikeError(StepError):
    """A loss or a gradient far above those of the steps before."""


class StepGuard:
    """Tells steps that are not like the others, from the losses and gradient norms of the latest."""

    def __init__(self, config: GuardConfig):
        self.config = config
        self.skipped = 0
        """In a row."""
        self._latest: dict[str, deque[float]] = {name: deque(maxlen=config.window) for name in ("loss", "grad_norm")}

    def spike(self, values: dict[str, float]) -> str | None:
        """What of a step is a spike, as a phrase; the others are remembered."""
        for name, latest in self._latest.items():
            if len(latest) >= self.config.window // 2:
                mean, sigma = statistics.fmean(latest), statistics.pstdev(latest)
                if values[name] > mean + self.config.sigmas * sigma:
                    return f"{name} {values[name]:.4g}, {mean:.4g} ± {sigma:.2g} in the {len(latest)} steps before"
        for name, latest in self._latest.items():
            latest.append(values[name])
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"latest": {name: list(latest) for name, latest in self._latest.items()}, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = state["skipped"]
        for name, latest in self._latest.items():
            latest.extend(state["latest"][name])


class NonFiniteStep(Exception):
    """A step whose loss or gradient is not finite, before its cause is known."""

    def __init__(self, step: int, values: dict[str, float]):
        super().__init__(f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}")
        self.step, self.values = step, values


def first_non_finite(model: nn.Module, loss: Callable[[], Tensor]) -> str | None:
    """Run `loss` and its backward, and name the first thing in them that is not finite; None if all is.

    In this order: a parameter as it stands, the output of a module (the innermost that finishes first), the loss, the
    gradient of a parameter (the first that the backward reaches). Gradients are left cleared.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the parameter {name}"
    found: list[str] = []
    model.zero_grad()  # those of the step may be what other ranks spoiled
    try:
        with _watched(model, found):
            value = loss()
            if not found and not value.isfinite().all():
                found.append("the loss: every module's output is finite")
            if not found:
                value.backward()
    finally:
        model.zero_grad()
    return found[0] if found else None


@contextlib.contextmanager
def _watched(model: nn.Module, found: list[str]) -> Iterator[None]:
    def watch_module(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            if not found and not all(t.isfinite().all() for t in _tensors(output)):
                largest = max((t.detach().abs().max().item() for t in _tensors(inputs) if t.numel()), default=0.0)
                found.append(
                    f"the output of {name or 'the model'} ({type(module).__name__}), its inputs at most {largest:.3g}"
                )

        return hook

    def watch_gradient(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if not found and parameter.grad is not None and not parameter.grad.isfinite().all():
                found.append(f"the gradient of {name}: the forward pass is finite")

        return hook

    handles = [m.register_forward_hook(watch_module(n)) for n, m in model.named_modules()]
    handles += [
        p.register_post_accumulate_grad_hook(watch_gradient(n)) for n, p in model.named_parameters() if p.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def steepest(model: nn.Module) -> str:
    """The parameter with the longest gradient, of this rank's pieces where they are split, as a phrase."""
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    name = max(norms, key=norms.__getitem__)
    return f"the longest gradient is that of {name}"
