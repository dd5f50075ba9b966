"""A model, its optimizer and its precision: what happens within one step. B = batch, T = context length."""

import contextlib
import functools
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from cs336 import ops
from cs336.data import TokenDataset
from cs336.data.dataset import to_device
from cs336.models import Transformer
from cs336.ops import registry
from cs336.optim import AdamW, clip_scale, grad_norm, param_groups
from cs336.training.config import TrainConfig
from cs336.training.guard import first_non_finite
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
        self._loss = torch.compile(self._mean_loss) if self.compiled else self._mean_loss
        settings = config.optimizer
        groups = param_groups(self.model, weight_decay=settings.weight_decay)
        self.optimizer = AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def update(self, x_BT: Tensor, y_BT: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """One optimizer step. Returns the mean loss and the gradients' norm before clipping, still on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses = []
        for x_bT, y_bT in self._micro_batches(x_BT, y_BT):
            with registry.determinism(self.deterministic):
                with annotate("forward"):
                    loss = self._forward(x_bT, y_bT)
                with annotate("backward"):
                    (loss * (len(x_bT) / len(x_BT))).backward()
            losses.append(loss.detach())
        with annotate("optimizer"):
            norm = grad_norm(self.model.parameters())
            self.optimizer.step(grad_scale=clip_scale(norm, self.config.optimizer.max_grad_norm))
            self.optimizer.zero_grad()
        return torch.stack(losses).mean(), norm

    def evaluate(self, data: TokenDataset) -> dict[str, float]:
        """Mean loss over config.eval_tokens of the data: "val/loss" in nats per token, "val/bpb" in bits per byte.

        The windows are spread evenly, whole batches of them, and are the same each time. Bits per byte need the data's
        sidecar.
        """
        size = min(self.micro_batch_size, len(data))
        tokens = self.config.eval_tokens
        if tokens is None:
            tokens = min(262_144, 32 * self.config.batch_size * data.context_length)
        count = min(len(data), max(size, tokens // data.context_length)) // size * size
        index_N = np.arange(count) * len(data) // count
        total = torch.zeros((), device=self.device)
        # A compiled loss keeps its gradients and mode: without them it would be compiled again.
        with contextlib.nullcontext() if self.compiled else self.evaluating():
            for index_B in np.split(index_N, range(size, count, size)):
                loss = self._forward(*to_device(data.windows(index_B), self.device))
                total += loss.detach() * len(index_B)
        mean = total.item() / count
        if data.meta is None or not data.meta.text_bytes:
            return {"val/loss": mean}
        return {"val/loss": mean, "val/bpb": mean * data.meta.tokens / (math.log(2) * data.meta.text_bytes)}

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[Transformer]:
        """The model in eval mode, without gradients, under the precision of training."""
        self.model.eval()
        try:
            with torch.no_grad(), self.autocast():
                yield self.model
        finally:
            self.model.train()

    def first_non_finite(self, x_BT: Tensor, y_BT: Tensor) -> str | None:
        """What first stops being finite in the step that (x, y) would make, as a phrase; None if nothing does."""
        for x_bT, y_bT in self._micro_batches(x_BT, y_BT):
            with self.autocast():
                if found := first_non_finite(self.model, functools.partial(self._mean_loss, x_bT, y_bT)):
                    return found
        return None

    def _forward(self, x_BT: Tensor, y_BT: Tensor) -> Tensor:
        with self.autocast():
            return self._loss(x_BT, y_BT)

    def _mean_loss(self, x_BT: Tensor, y_BT: Tensor) -> Tensor:
        return ops.cross_entropy(self.model(x_BT), y_BT)

    def _micro_batches(self, x_BT: Tensor, y_BT: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(x_BT.split(self.micro_batch_size), y_BT.split(self.micro_batch_size), strict=True)
