"""Where a non-finite number came from."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn


class NonFiniteError(FloatingPointError):
    """A loss or a gradient became infinite or not a number; `record` is what failure.json says of it."""

    def __init__(self, message: str, **record: Any):
        super().__init__(message)
        self.record = record


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
