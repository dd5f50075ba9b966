"""How the processes of a run divide a model and its steps, as [parallel] says: what the trainer asks of a layout.

    rows      are split along the axes data and expert; the ranks of a context group have parts of the same rows'
              tokens, those of a tensor or pipeline group the same rows and tokens
    weights   are alike along data and context, and along expert but for the experts; ZeRO splits what is alike
    sums      of losses: each token once; of squared gradients: each parameter once

One process holds everything, and is asked the same.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cs336.models import Transformer
from cs336.models.block import Stream
from cs336.models.recompute import call_layer
from cs336.nn import MoEConfig
from cs336.nn.hyena import HyenaFilter
from cs336.nn.moe import Experts
from cs336.optim import grad_norm
from cs336.optim.optimizer import Optimizer
from cs336.parallel import (
    DDP,
    FSDP,
    Mesh,
    Pipeline,
    ShardedAdamW,
    ShardedOptimizer,
    context,
    context_parallel,
    expert,
    expert_parallel,
    expert_parameters,
    own_tokens,
    pipeline_stage,
    tensor,
    tensor_parallel,
)
from cs336.parallel.collectives import all_reduce
from cs336.parallel.launch import world_size
from cs336.parallel.layout import AXES
from cs336.parallel.parts import Parts, gather_whole, groups_of
from cs336.parallel.pieces import Cut
from cs336.parallel.pipeline import layers_of
from cs336.training.config import AdamWConfig, TrainConfig
from cs336.training.objectives import Batch, NextToken, for_model

MOST_LAYERS = 128  # graphs of layers in a process: two a kind, for the first one adds nothing before its norm
ELEMENTWISE = ("adamw", "lion", "sgd")  # optimizers that update each element by itself
DESCRIBED = ("special_ids", "generation_config", "chat_template")  # of a model, beside its weights


class Division:
    """A model that is divided in place, the optimizer of this rank's part, and what its steps need of other ranks.

    Args:
        model: whole, the same on every rank, on the device it trains on.
        config: of the run, which `why_not` does not refuse, with the batch_size of this rank; `compile` and `precision`
            say whether and which.

    Raises ValueError for processes that do not make up the layout.
    """

    parts: Parts | None
    """What of the whole model this rank has, if more is divided than rows; None: all of it, or what FSDP says."""
    optimizer: Optimizer | ShardedOptimizer | ShardedAdamW

    def __init__(self, model: Transformer, config: TrainConfig):
        self.model, self.config = model, config
        self.sizes = config.parallel.axes(world_size())
        self.mesh = _mesh(dist.group.WORLD, **self.sizes) if world_size() > 1 else None
        self._tied = False
        whole = {name: t.shape for name, t in model.state_dict().items()}
        groups = groups_of(model, config.optimizer.build(model))
        cuts = self._divide()
        self._synced = self._average()
        self.fsdp = next((s for s in self._synced if isinstance(s, FSDP)), None)
        self.called: nn.Module = self._synced[0] if self._synced else model
        self.optimizer = self._optimizer()
        self.flat = self.optimizer if isinstance(self.optimizer, ShardedAdamW) else None
        self.parts = None
        if any(size > 1 for axis, size in self.sizes.items() if axis != "data"):
            zero = config.parallel.zero
            self.parts = Parts(
                shapes=whole,
                cuts=cuts,
                written=frozenset(name for name in whole if self._first(name, cuts, split=zero >= 2)),
                written_state=frozenset(name for name in whole if self._first(name, cuts, split=zero >= 1)),
                whole=groups,
                own=groups_of(self.trained, self.optimizer),
            )
        self._alike = self._copies(cuts)
        self.objective = for_model(config.objective, config.model)
        if self.sizes["pipeline"] > 1:
            self.called = _Piped(self.called, self._group("pipeline"), config)
            self.objective = dataclasses.replace(config.objective, fused_head=True)  # it is with the last stage

    # ---- the division ----

    def _group(self, *axes: str) -> Any:
        return None if self.mesh is None else self.mesh.group(*axes)

    def place(self, axis: str) -> int:
        return 0 if self.mesh is None else self.mesh.rank(axis)

    def _divide(self) -> dict[str, Cut]:
        """Keep this rank's part of the model; which parts of which tensors it has."""
        model, parallel, cuts = self.model, self.config.parallel, dict[str, Cut]()
        if (size := parallel.tensor) > 1:
            divided = tensor_parallel(model, self._group("tensor"), sequence=True).divided
            cuts |= {name: Cut(dim, self.place("tensor"), size) for name, dim in divided.items()}
        if parallel.context > 1:
            context_parallel(model, self._group("context"), parallel.attention)
        if (size := parallel.expert) > 1:
            mine = {id(p) for p in expert_parameters(expert_parallel(model, self._group("expert")))}
            cuts |= {n: Cut(0, self.place("expert"), size) for n, p in model.named_parameters() if id(p) in mine}
        if parallel.pipeline > 1:
            self._tied = pipeline_stage(model, self._group("pipeline")).config.tie_embeddings
        return cuts

    def _average(self) -> list[DDP | FSDP]:
        """What averages gradients over the ranks that have other rows or tokens."""
        parallel, alike = self.config.parallel, self.sizes["data"] * self.sizes["context"]
        if self.averaged == 1 or parallel.native_step:  # whose optimizer does so
            return []
        if parallel.zero >= 2:
            cast: dict[str, Any] = {}
            if self.config.precision == "bf16":
                cast = {"compute_dtype": torch.bfloat16, "computed": cast_weights(self.model)}
            group = self._group("data", "context")
            fsdp = FSDP(self.model, **cast, reshard=parallel.zero == 3, group=group)
            if self.config.compile:  # by layers: what gathers their weights, and lets go of them, is outside
                for layer in self.model.layers:
                    compile_layer(layer)
            return [fsdp]
        experts = expert_parameters(self.model)
        found: list[DDP | FSDP] = [
            DDP(self.model, group=self._group("data", "context", "expert"), ignored=experts),
        ]
        if experts and alike > 1:  # divided by the ranks of their own axis already
            found.append(DDP(nn.ParameterList(experts), group=self._group("data", "context")))
        return found

    def _optimizer(self) -> Optimizer | ShardedOptimizer | ShardedAdamW:
        if self.fsdp is not None:  # whose whole weights are not all of the dtype that is trained
            model = Transformer(self.config.model, device="meta", dtype=next(self.fsdp.parameters()).dtype)
            optimizer = self.config.optimizer.build(model)
            self.fsdp.split(optimizer, model)
            return optimizer
        optimizer = self.config.optimizer.build(self.model)
        if self.config.parallel.native_step and self.averaged > 1:
            flat = ShardedAdamW.of(optimizer, self._group("data"), native=self.model.device.type == "cuda")
            if not self.config.compile:  # inside compiled layers nothing can wait for their weights
                flat.overlap(self.model)
            return flat
        if self.config.parallel.zero and self.averaged > 1:
            return ShardedOptimizer.of(optimizer, self._group("data", "context"))
        return optimizer

    @property
    def trained(self) -> nn.Module:
        """What has the parameters that the optimizer steps, and their gradients."""
        return self.model if self.fsdp is None else self.fsdp

    # ---- who has what ----

    def _differs(self, name: str, cuts: dict[str, Cut], split: bool) -> set[str]:
        """The axes along which ranks have different parts of a tensor; split: of what is alike each has a piece."""
        axes = {"data", "context"} if split else set[str]()
        if name in cuts:
            axes.add("tensor" if self.sizes["tensor"] > 1 else "expert")
        return axes if self._tied and name == "embedding.weight" else axes | {"pipeline"}

    def _first(self, name: str, cuts: dict[str, Cut], split: bool) -> bool:
        """Whether this rank is the first of those that have the same part."""
        differs = self._differs(name, cuts, split)
        return all(self.place(axis) == 0 for axis in AXES if axis not in differs)

    def _copies(self, cuts: dict[str, Cut]) -> dict[int, list[nn.Parameter]]:
        """The parameters that so many ranks have alike."""
        found: dict[int, list[nn.Parameter]] = {}
        for name, p in self.trained.named_parameters():
            differs = self._differs(name, cuts, self.fsdp is not None)
            ends = {"pipeline": min(2, self.sizes["pipeline"])}  # have a tied table
            copies = math.prod((self.sizes | ends)[axis] for axis in AXES if axis not in differs)
            found.setdefault(copies, []).append(p)
        return found

    # ---- a step ----

    @property
    def row_place(self) -> tuple[int, int]:
        """Which part of a batch's rows this rank takes, of how many."""
        size = self.sizes["expert"]
        return self.place("data") * size + self.place("expert"), self.sizes["data"] * size

    @property
    def averaged(self) -> int:
        """Ranks whose gradients are averaged."""
        return math.prod(self.sizes[axis] for axis in ("data", "context", "expert"))

    def own(self, batch: Batch) -> Batch:
        """This rank's tokens of its rows."""
        if self.sizes["context"] == 1:
            return batch
        kind = self.config.parallel.attention
        return tuple(own_tokens(t, self._group("context"), kind=kind) for t in batch)

    def passes(self, rows: int) -> int:
        """Rows of a pass, forward and backward; a pipeline cuts a batch by itself."""
        return self.config.batch_size if isinstance(self.called, _Piped) else rows

    @contextlib.contextmanager
    def backward(self, last: bool) -> Iterator[None]:
        """Around a backward: the last of a step averages gradients; where they are split each does, for whole ones are
        not kept."""
        averages = last or self.fsdp is not None
        with contextlib.nullcontext() if averages else self.alone():
            yield
        for synced in self._synced if averages else ():
            synced.finish_gradient_synchronization()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Around backwards whose gradients stay this rank's own, with the weights of `whole`."""
        with contextlib.ExitStack() as stack:
            for synced in (*self._synced, *([self.flat] if self.flat else [])):
                stack.enter_context(synced.no_sync())
            yield

    def total(self, own: Tensor) -> Tensor:
        """The sum over all ranks; of those that have the same rows and tokens the first counts."""
        if world_size() > 1:
            counts = self.place("tensor") == self.place("pipeline") == 0
            own = own if counts else torch.zeros_like(own)
            all_reduce(own)
        return own

    def grad_norm(self) -> Tensor:
        """The 2-norm of all gradients of the whole model together, the same on every rank: a float32 scalar."""
        if self.flat is not None:
            return self.flat.grad_norm()
        if self.parts is None and self.fsdp is None:
            return grad_norm(self.model.parameters())
        device = self.model.device
        squares = [grad_norm(params).to(device).square() / copies for copies, params in self._alike.items()]
        total = torch.stack(squares).sum()
        all_reduce(total)
        return total.sqrt()

    # ---- the whole model ----

    @contextlib.contextmanager
    def whole(self, device: torch.device | None = None, *, everywhere: bool = False) -> Iterator[Transformer]:
        """The model with all its weights, on rank 0 or on every rank; every rank enters it.

        device: where one that is divided is put together; None: where it trains.
        """
        if self.flat is not None:
            self.flat.wait()
        if self.parts is None and (self.fsdp is None or device is None):
            with contextlib.nullcontext() if self.fsdp is None else self.fsdp.gathered():
                yield self.model
            return
        state = self.model.state_dict() if self.fsdp is None else self.fsdp.local_state()[0]
        pieces = state if self.parts is None else self.parts.pieces(state)
        tensors = gather_whole(pieces, device or self.model.device, everywhere=everywhere)
        if not tensors:
            yield self.model
            return
        model = Transformer(self.config.model, device="meta")
        model.load_state_dict(tensors, assign=True)
        for name in DESCRIBED:
            setattr(model, name, getattr(self.model, name))
        yield model


def cast_weights(model: Transformer) -> list[nn.Parameter]:
    """What of its layers autocast reads in its own dtype alone: of linear layers and experts, not of Hyena's filter."""
    wide = {p for m in model.modules() if isinstance(m, HyenaFilter) for p in m.parameters()}
    casts = (m for m in model.layers.modules() if isinstance(m, nn.Linear | Experts))
    return [p for m in casts for p in m.parameters(recurse=False) if p not in wide]


@functools.lru_cache(maxsize=1)
def _mesh(world: Any, **sizes: int) -> Mesh:
    """Of the processes of `world`: a run that goes back to a checkpoint takes the groups that are there."""
    return Mesh(**sizes)


def compiled_call_layer() -> Callable[..., tuple]:
    """torch.compile of call_layer, for layers of as many kinds and models as a process has."""
    limits = torch._dynamo.config  # of all of these together; past it layers would run uncompiled
    limits.recompile_limit = max(limits.recompile_limit, MOST_LAYERS)
    return torch.compile(call_layer)


def compile_layer(layer: nn.Module) -> None:
    """Compile a block's forward in training, by itself. It is given a Stream, as a model's blocks are."""
    eager, compiled = layer.forward, compiled_call_layer()

    def forward(stream: Stream, *rest: Any) -> Stream:
        return Stream.of(compiled("none", eager, stream.flat(), *rest)) if layer.training else eager(stream, *rest)

    layer.forward = forward  # type: ignore[method-assign]


class _Piped(nn.Module):
    """A stage as the whole model is called, with targets: the sums of the losses, on every rank of the pipeline.

    Where gradients are wanted they are there when it returns: the backward of a micro-batch comes before the forward of
    another.
    """

    def __init__(self, module: nn.Module, group: Any, config: TrainConfig):
        super().__init__()
        self.module = module
        count = config.batch_size // (config.micro_batch_size or config.batch_size)
        self._training = Pipeline(module, group, num_microbatches=count, schedule=config.parallel.schedule)
        self._evaluating = Pipeline(module, group, num_microbatches=1)

    def forward(self, token_ids_BS: Tensor, *, targets: Tensor, ignore_index: int = -100, **more: float) -> Any:
        pipeline = self._training if torch.is_grad_enabled() else self._evaluating
        return pipeline.step(token_ids_BS, targets, ignore_index=ignore_index, **more)


def why_not(config: TrainConfig, sizes: dict[str, int]) -> str | None:
    """The reason why so many ranks along each axis cannot train what a configuration says, with the arithmetic."""
    model, parallel, optimizer = config.model, config.parallel, config.optimizer.kind
    zero = parallel.zero if math.prod(sizes.values()) > 1 else 0
    if zero >= 2 and optimizer not in ELEMENTWISE:
        others = ", ".join(ELEMENTWISE)
        return f"zero = {zero} splits every matrix, and {optimizer} needs whole ones: use zero = 1, or {others}"
    divided = [axis for axis in AXES if axis != "data" and sizes[axis] > 1]
    if parallel.native_step and math.prod(sizes.values()) > 1 and (reason := _why_not_native(config, divided)):
        return f"native_step = true {reason}"
    if not divided:
        return None
    if config.compile:
        return f"{divided[0]} = {sizes[divided[0]]}: compile = true follows no messages between ranks; leave it out"
    empty = Transformer(model, device="meta")
    if (N := sizes["tensor"]) > 1:
        if reason := tensor.why_not(empty, N):
            return f"tensor = {N}: {reason}"
        if config.fp8:
            return f"tensor = {N} splits every matrix, and fp8 = true rounds whole ones, with one scale: leave one out"
        if optimizer not in ELEMENTWISE:
            others = ", ".join(ELEMENTWISE)
            return f"tensor = {N} splits every matrix, and {optimizer} needs whole ones: use {others}"
        tokens = model.context_length // sizes["context"]
        if tokens % N:
            return f"tensor = {N}: {tokens} tokens / {N} = {tokens / N:g}, and between matrices each has its part"
    if (N := sizes["context"]) > 1:
        if reason := context.why_not(empty, N, parallel.attention):
            return f"context = {N}: {reason}"
        chunks = 2 * N if parallel.attention == "ring" else N
        if model.context_length % chunks:
            parts = f"{chunks} equal parts, {chunks // N} a rank"
            share = model.context_length / chunks
            return f"context = {N} takes {parts}: context_length {model.context_length} / {chunks} = {share:g}"
    if (N := sizes["expert"]) > 1:
        if reason := expert.why_not(empty, N):
            return f"expert = {N}: {reason}"
        if parallel.zero:
            return f"expert = {N} goes with zero = 0: its ranks have other experts, and ZeRO splits what is alike"
        if optimizer == "soap":
            return f"expert = {N}: soap keeps a basis for a whole stack of experts; use adamw, lion, sgd or muon"
    if (N := sizes["pipeline"]) > 1:
        return _why_no_pipeline(config, sizes, N)
    return None


def _why_not_native(config: TrainConfig, divided: list[str]) -> str | None:
    optimizer, low = config.optimizer, config.precision == "bf16_weights"
    if config.parallel.zero != 1:
        return f"divides the optimizer's state, which is zero = 1, and zero is {config.parallel.zero}"
    if divided:
        return f"goes with data parallel alone, and {divided[0]} is {getattr(config.parallel, divided[0])}"
    if not isinstance(optimizer, AdamWConfig):
        return f"steps AdamW, and optimizer.kind is {optimizer.kind}"
    if optimizer.state_dtype != "float32" or (low and optimizer.rounding == "stochastic"):
        return 'keeps moments in float32, and bfloat16 weights rounded to "nearest" or with their "remainder"'
    if config.guard.reads_each_step:
        return "has no gradients left when [guard] looks at a step: leave its settings out"
    return None


def _why_no_pipeline(config: TrainConfig, sizes: dict[str, int], N: int) -> str | None:
    objective = config.objective
    try:
        layers_of(0, N, config.model.num_layers)
    except ValueError as error:
        return f"pipeline = {N}: {error}"
    if config.parallel.zero >= 2:
        return f"pipeline = {N} goes with zero = 0 or 1: each micro-batch would send all gradients again"
    if sizes["context"] > 1:
        return (
            f"pipeline = {N} and context = {sizes['context']} do not go together: a stage does not know its positions"
        )
    if any(isinstance(block.mlp, MoEConfig) for block in config.model.blocks):
        return f"pipeline = {N}: what the routers of a mixture of experts measure stays on their stage"
    if not isinstance(objective, NextToken):
        return f"pipeline = {N}: the last stage gives the loss of next tokens, and this objective has another"
    return None
