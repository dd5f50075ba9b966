"""A model, its objective, its optimizer and its precision: what happens within one step. B = batch, T = context."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cs336.models import Transformer
from cs336.models.memory import Memory
from cs336.models.recompute import call_layer
from cs336.nn.moe import balance_experts, experts_of, forget_loads
from cs336.nn.quantized import FP8_FEATURES, train_in_fp8
from cs336.ops import registry
from cs336.ops.linear_scaled import MULTIPLE
from cs336.optim import clip_scale
from cs336.parallel import ShardedAdamW, ShardedOptimizer
from cs336.parallel.launch import from_ranks, place, rank, world_size
from cs336.training.checkpoint import load_whole
from cs336.training.config import TrainConfig
from cs336.training.division import DESCRIBED, Division, compiled_call_layer, why_not
from cs336.training.fit import Numerics, choose_recompute, predicted_memory, room
from cs336.training.graph import StepGraph
from cs336.training.guard import first_non_finite
from cs336.training.objectives import Batch, Terms, gradient_scale, micro_batches
from cs336.training.weights import load_weights
from cs336.utils.device import peak_flops
from cs336.utils.nvtx import annotate

Accept = Callable[[dict[str, Tensor]], bool]


class Learner:
    """Weights drawn from config.seed, trained step by step; where there are several ranks each takes its share of a
    batch, and the steps are those of one process.

    Raises ValueError if config.device is not there, or cannot do what the configuration asks of it.
    """

    def __init__(self, config: TrainConfig):
        rows = config.parallel.share(world_size(), config.batch_size, config.micro_batch_size)
        sizes = config.parallel.axes(world_size())
        if reason := why_not(config, sizes):
            raise ValueError(f"parallel: {reason}")
        self.config = config = dataclasses.replace(config, batch_size=rows)  # this rank's
        self.device = place(config.device)
        on_gpu = self.device.type == "cuda"
        low = config.precision.startswith("bf16") or (config.precision == "auto" and on_gpu)
        self.dtype = torch.bfloat16 if low else torch.float32
        self.weight_dtype = torch.bfloat16 if config.precision == "bf16_weights" else torch.float32
        divided = config.parallel.zero >= 2 or max(size for axis, size in sizes.items() if axis != "data") > 1
        divided &= world_size() > 1
        self.compiled = on_gpu and not divided if config.compile is None else config.compile
        self.deterministic = on_gpu and config.deterministic
        self.peak_flops = peak_flops(self.device, self.dtype)  # may draw random numbers: before the seed
        self.micro_batch_size = config.micro_batch_size or rows
        widths = self.weight_dtype.itemsize, self.dtype.itemsize
        self.numerics = Numerics(*widths, compiled=on_gpu, layers_compiled=self.compiled)
        self.room = room(self.device, config.memory_limit)
        self.recompute = choose_recompute(config, self.numerics, self.room, world_size())
        torch.manual_seed(config.seed)
        self.model = Transformer(config.model, device=self.device, dtype=self.weight_dtype)
        self.model.gradient_checkpointing = self.recompute
        if config.fp8:
            self._train_in_fp8(self.micro_batch_size * config.model.context_length // sizes["context"])
        precision = ("bf16" if low else "fp32") if config.precision == "auto" else config.precision
        self.division = Division(self.model, dataclasses.replace(config, compile=self.compiled, precision=precision))
        self.optimizer = self.division.optimizer
        # A layer at a time: a deep model is compiled as fast as a shallow one, and gradients come as the backward goes.
        # What is outside is our own kernels. Of weights that come and go the division compiles the layers.
        self._call_layer = call_layer
        if self.compiled and self.division.fsdp is None:
            self._call_layer = compiled_call_layer()
        if rank():
            torch.manual_seed(_seed_of_rank(config.seed))
        self._decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        self.graph = self._graph()
        self._lrs = [torch.zeros((), device=self.device) for _ in self._decays]  # of the graph

    def _train_in_fp8(self, tokens: int) -> None:
        """tokens: that this rank's products have at once."""
        if self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) < (8, 9):
            raise ValueError(f"fp8 = true wants a GPU of compute capability 8.9 or newer: {self.device} is older")
        if not train_in_fp8(self.model.layers):
            raise ValueError(f"fp8 = true: no linear layer has {FP8_FEATURES} features or more on both sides")
        if tokens % MULTIPLE:
            raise ValueError(
                f"fp8 = true takes tokens in multiples of {MULTIPLE}, and a pass has {tokens} on each rank: change "
                "batch_size, micro_batch_size or context_length"
            )

    def terms(self, batch: Batch) -> Terms:
        """The objective's sum, count and metrics, under the precision of training."""
        call = self._call_layer if self.model.training else call_layer  # validation is not worth a compilation
        with registry.determinism(self.deterministic), self.autocast(), calling_layers(self.model, call):
            return self.division.objective(self.division.called, self.division.own(batch))

    def autocast(self) -> torch.autocast:
        enabled = self.dtype == torch.bfloat16 != self.weight_dtype
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def update(self, batch: Batch, lr: float, done: float = 0.0, accept: Accept | None = None) -> dict[str, Tensor]:
        """One optimizer step.

        Args:
            done: the part of the run that is over, which the weight decay follows.
            accept: called with what is returned while gradients are there; if it is false they are dropped, and
                weights and state stay as they are.

        Returns scalars, still on the device: the mean "loss", "grad_norm" before clipping, and the objective's metrics.
        """
        groups = self.optimizer.param_groups
        decay = 1 - done * (1 - self.config.optimizer.weight_decay_end)
        for group, whole in zip(groups, self._decays, strict=True):
            group["lr"], group["weight_decay"] = lr * group.get("lr_scale", 1.0), whole * decay
        if self.graph is None:
            return self._step(batch, accept)
        rates = [group["lr"] for group in groups]
        for group, rate, captured in zip(groups, rates, self._lrs, strict=True):
            group["lr"] = captured.fill_(rate)
        try:
            return self.graph(batch)
        finally:
            for group, rate in zip(groups, rates, strict=True):  # what a checkpoint keeps
                group["lr"] = rate

    def _step(self, batch: Batch, accept: Accept | None = None) -> dict[str, Tensor]:
        self.optimizer.zero_grad()  # of a step that failed midway, as one that cannot be captured does
        parts = []
        micro = list(micro_batches(batch, self.division.passes(self.micro_batch_size)))
        for i, part in enumerate(micro):
            with annotate("forward"):
                loss, count, metrics = self.terms(part)
            last = i == len(micro) - 1
            with annotate("backward"), registry.determinism(self.deterministic), self.division.backward(last):
                if loss.requires_grad:  # a pipeline has been backward
                    loss.backward()
            parts.append(torch.stack([count, loss.detach(), *(value.detach() for value in metrics.values())]))
        with annotate("optimizer"):
            own = torch.stack(parts).sum(0)
            self.own_loss = own[1] / own[0].clamp(min=1)
            norm = self.division.grad_norm()  # first: what gradients travel by is done before anything else travels
            count, *sums = self.division.total(own)
            scale = gradient_scale(count, self.division.averaged)
            norm = norm * scale
            means = [total / count.clamp(min=1) for total in sums]
            values = dict(zip(("loss", *metrics), means, strict=True)) | {"grad_norm": norm}
            if accept is None or accept(values):
                self.optimizer.step(grad_scale=scale * clip_scale(norm, self.config.optimizer.max_grad_norm))
                balance_experts(self.model)
            else:
                forget_loads(self.model)
            self.optimizer.zero_grad()
        return values

    def load_weights(self, path: pathlib.Path) -> None:
        """Take the weights at `path`: see cs336.training.weights. No rank waits for another."""
        division = self.division
        if division.parts is None and division.fsdp is None:
            load_weights(self.model, path)
            return
        source = Transformer(self.config.model, device="cpu", dtype=self.weight_dtype)
        load_weights(source, path)
        load_whole(division.trained, source.state_dict(), division.parts)
        for name in DESCRIBED:
            setattr(self.model, name, getattr(source, name))

    def predicted_memory(self) -> Memory:
        """What a step will take of the device's memory."""
        return predicted_memory(self.config, self.numerics, self.recompute, self.micro_batch_size, world_size())

    def _graph(self) -> StepGraph | None:
        """Where a CUDA graph is asked for; by itself, where its memory beside that of other steps is no matter."""
        wanted = self.config.cuda_graph
        if wanted is False or (wanted == "auto" and self.device.type != "cuda"):
            return None
        reason = None
        if self.device.type != "cuda":
            reason = f"it is a GPU's, and the device is {self.device}"
        elif world_size() > 1 or isinstance(self.optimizer, ShardedOptimizer | ShardedAdamW):
            reason = "several processes take a step together"
        elif not self.optimizer.capturable:
            reason = f"a step of {self.config.optimizer.kind} waits for the GPU"
        elif self.config.guard.reads_each_step:
            reason = "guard reads each step's loss before the optimizer's step"
        elif self.config.optimizer.weight_decay_end != 1:
            reason = "the weight decay is captured as a number, and weight_decay_end changes it"
        large = 2 * self.predicted_memory().total > self.room  # steps of other shapes are made beside it
        if wanted == "auto" and (large or world_size() > 1 or next(experts_of(self.model), None) is not None):
            return None  # mixtures of experts may ask on the host how many tokens each has
        if reason is not None:
            if wanted is True:
                raise ValueError(f"cuda_graph = true is not possible: {reason}")
            return None
        return StepGraph(self._step, self.device, weights=list(self.model.parameters()), required=wanted is True)

    @contextlib.contextmanager
    def evaluating(self, model: Transformer | None = None) -> Iterator[Transformer]:
        """The model, or one with all its weights, in eval mode, without gradients, under the precision of training."""
        model = model or self.model
        model.eval()
        try:
            with torch.no_grad(), self.autocast():
                yield model
        finally:
            model.train()

    def first_non_finite(self, batch: Batch) -> str | None:
        """What first stops being finite in the step that the batch would make, as a phrase; None if nothing does.

        Of several ranks the first that finds something is named, on all.
        """
        own = self._first_non_finite(batch)
        found = [
            f"{text}{f' on rank {r}' if world_size() > 1 else ''}" for r, text in enumerate(from_ranks(own)) if text
        ]
        return found[0] if found else None

    def _first_non_finite(self, batch: Batch) -> str | None:
        # Whole for all parts: ranks find theirs in different ones.
        with self.autocast(), self.division.alone(), self.division.whole(everywhere=True) as model:
            called = self.division.called if model is self.model else model
            for part in micro_batches(batch, self.micro_batch_size):
                found = first_non_finite(model, lambda part=part: self.division.objective(called, part)[0])  # type: ignore[misc]
                if found:
                    return found
        return None


@contextlib.contextmanager
def calling_layers(model: Transformer, call: Callable[..., Any]) -> Iterator[None]:
    """Inside, `call` calls its layers: what looks at modules one by one, or decodes, does not want compiled ones."""
    before, model.call_layer = model.call_layer, call
    try:
        yield
    finally:
        model.call_layer = before


def _seed_of_rank(seed: int) -> int:
    """Dropout draws other numbers on each rank."""
    return int(np.random.SeedSequence([seed, rank()]).generate_state(1, np.uint64)[0]) >> 1
