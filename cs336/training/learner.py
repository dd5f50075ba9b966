"""A model, its objective, its optimizer and its precision: what happens within one step. B = batch, T = context."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from cs336.models import Transformer
from cs336.nn.moe import balance_experts
from cs336.ops import registry
from cs336.optim import clip_scale, grad_norm
from cs336.training.config import TrainConfig
from cs336.training.guard import first_non_finite
from cs336.training.objectives import Batch, Terms, gradient_scale, micro_batches, over_ranks
from cs336.utils.device import peak_flops, pick
from cs336.utils.nvtx import annotate


class Learner:
    """Weights drawn from config.seed, trained step by step.

    Raises ValueError if config.device is not there.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.device = pick(config.device)
        on_gpu = self.device.type == "cuda"
        low = config.precision == "bf16" or (config.precision == "auto" and on_gpu)
        self.dtype = torch.bfloat16 if low else torch.float32
        self.compiled = on_gpu if config.compile is None else config.compile
        self.deterministic = on_gpu and config.deterministic
        self.peak_flops = peak_flops(self.device, self.dtype)  # may draw random numbers: before the seed
        self.micro_batch_size = config.micro_batch_size or config.batch_size
        torch.manual_seed(config.seed)
        self.model = Transformer(config.model, device=self.device)
        self.model.gradient_checkpointing = config.gradient_checkpointing
        # The objective's call is compiled, not the model: so logits and cross-entropy are one graph.
        self._terms = torch.compile(self._eager_terms) if self.compiled else self._eager_terms
        self.optimizer = config.optimizer.build(self.model)

    def _eager_terms(self, *batch: Tensor) -> Terms:
        return self.config.objective(self.model, batch)

    def terms(self, batch: Batch) -> Terms:
        """The objective's sum, count and metrics, under the precision of training."""
        with registry.determinism(self.deterministic), self.autocast():
            return self._terms(*batch)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def update(self, batch: Batch, lr: float) -> dict[str, Tensor]:
        """One optimizer step.

        Returns scalars, still on the device: the mean "loss", "grad_norm" before clipping, and the objective's metrics.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        parts = []
        for part in micro_batches(batch, self.micro_batch_size):
            with annotate("forward"):
                loss, count, metrics = self.terms(part)
            with annotate("backward"), registry.determinism(self.deterministic):
                loss.backward()
            parts.append(torch.stack([count, loss.detach(), *(value.detach() for value in metrics.values())]))
        with annotate("optimizer"):
            count, *sums = over_ranks(torch.stack(parts).sum(0))
            scale = gradient_scale(count)
            norm = grad_norm(self.model.parameters()) * scale
            self.optimizer.step(grad_scale=scale * clip_scale(norm, self.config.optimizer.max_grad_norm))
            balance_experts(self.model)
            self.optimizer.zero_grad()
        means = [total / count.clamp(min=1) for total in sums]
        return dict(zip(("loss", *metrics), means, strict=True)) | {"grad_norm": norm}

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[Transformer]:
        """The model in eval mode, without gradients, under the precision of training."""
        self.model.eval()
        try:
            with torch.no_grad(), self.autocast():
                yield self.model
        finally:
            self.model.train()

    def first_non_finite(self, batch: Batch) -> str | None:
        """What first stops being finite in the step that the batch would make, as a phrase; None if nothing does."""
        for part in micro_batches(batch, self.micro_batch_size):
            with self.autocast():
                found = first_non_finite(self.model, lambda part=part: self._eager_terms(*part)[0])  # type: ignore[misc]
            if found:
                return found
        return None
