"""Pipeline parallel: rank r of N has the r-th run of layers; micro-batches flow forward, their gradients back.

    GPipe  arXiv:1811.06965     F0 F1 F2 F3 .. .. B0 B1 B2 B3         every forward, then every backward
    1F1B   arXiv:2006.09503     F0 F1 B0 F2 B1 F3 B2 B3               one of each in turn, after N-1-r forwards

Either way a rank idles (N-1) of m + N-1 turns, for m micro-batches. GPipe keeps the activations of m of them, 1F1B of
N-r. Gradients add up in the order of micro-batches, as they do in one process: bit for bit the same.
"""

import contextlib
import functools
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cs336.models import Transformer
from cs336.models.block import Stream
from cs336.models.recompute import KEEPS_ALL, recomputed
from cs336.nn import Context
from cs336.nn.moe import add_loads
from cs336.parallel.collectives import broadcast, receive, send
from cs336.parallel.ddp import DDP
from cs336.parallel.differentiable import Group

Action = tuple[Literal["forward", "backward"], int]
"""What a rank does next, to which micro-batch."""


def gpipe(rank: int, num_stages: int, num_microbatches: int) -> list[Action]:
    """Every forward, then every backward."""
    forwards: list[Action] = [("forward", i) for i in range(num_microbatches)]
    return [*forwards, *(("backward", i) for i in range(num_microbatches))]


def one_forward_one_backward(rank: int, num_stages: int, num_microbatches: int) -> list[Action]:
    """As many forwards as there are stages behind, then one of each in turn, then the backwards that are left."""
    ahead = min(num_stages - 1 - rank, num_microbatches)
    actions: list[Action] = [("forward", i) for i in range(ahead)]
    for i in range(num_microbatches - ahead):
        actions += [("forward", ahead + i), ("backward", i)]
    return [*actions, *(("backward", i) for i in range(num_microbatches - ahead, num_microbatches))]


SCHEDULES: dict[str, Callable[[int, int, int], list[Action]]] = {"gpipe": gpipe, "1f1b": one_forward_one_backward}


def most_in_flight(actions: list[Action]) -> int:
    """Of how many micro-batches a rank keeps the activations at once."""
    kept = most = 0
    for kind, _ in actions:
        kept += 1 if kind == "forward" else -1
        most = max(most, kept)
    return most


def layers_of(rank: int, num_stages: int, num_layers: int) -> range:
    """The layers of a stage. Raises ValueError for more stages than layers."""
    if num_layers < num_stages:
        raise ValueError(f"{num_layers} layers cannot be {num_stages} stages: {num_layers} / {num_stages} < 1")
    return range(rank * num_layers // num_stages, (rank + 1) * num_layers // num_stages)


class Stage(Transformer):
    """A run of a Transformer's layers, with the embedding if it is the first and the head if it is the last.

    Its parameters are named as those of the whole. forward(x, targets): x is token_ids (B, S) for the first stage, else
    (B, S, d_model); it returns (B, S, d_model), or the last what the whole model's `loss` does, whose options are
    `options`; and what its routers add to the loss a token, if it has mixtures of experts, else None.
    """

    first: bool
    last: bool

    def forward(  # type: ignore[override]
        self, x: Tensor, targets: Tensor | None = None, ignore_index: int = -100, **options: float
    ) -> Any:
        context = Context()
        stream = Stream(self._embed(x, context) if self.first else x, None)
        for layer in cast(nn.ModuleDict, self.layers).values():
            if self.gradient_checkpointing not in KEEPS_ALL and torch.is_grad_enabled():
                stream = recomputed(self.gradient_checkpointing, layer, stream, context)
            else:
                stream = layer(stream, context)
        added = None
        if stream.routing is not None:
            added = stream.routing.balance + stream.routing.z
            if self.training and torch.is_grad_enabled():
                add_loads(self, stream.routing)
        if not self.last:
            return stream.value, added
        assert targets is not None
        return self.loss(self._normed(stream), targets, ignore_index, **options), added

    @property
    def tied(self) -> nn.Parameter | None:
        """The table that the first stage and the last have both, if it is trained."""
        ends = self.first != self.last and self.config.tie_embeddings
        return cast(nn.Parameter, self.embedding.weight) if ends and self.embedding.weight.requires_grad else None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def compute_dtype(self) -> torch.dtype:
        kind = self.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return next(p for p in self.parameters() if p.dim() > 1).dtype  # norms may be wider

    def hidden_shape(self, B: int, S: int) -> tuple[int, int, int]:
        """Of what one stage sends to the next."""
        region = getattr(self, "region", None)  # of a TensorParallelTransformer
        divided = region.size if region is not None and region.sequence else 1
        return B, S // divided, self.config.d_model


def pipeline_stage(model: Transformer, group: Group = None) -> Stage:
    """Keep this rank's layers of a whole model, the same on every rank, and drop the others, in place: return it.

    After tensor_parallel, if it is to be both; before DDP. A stage knows no positions: context_parallel is not for it.
    Raises ValueError, and leaves the model as it was, for more stages than layers.
    """
    N, rank = dist.get_world_size(group), dist.get_rank(group)
    mine = layers_of(rank, N, len(model.layers))
    first, last = rank == 0, rank == N - 1
    model.layers = nn.ModuleDict({str(i): model.layers[i] for i in mine})  # type: ignore[assignment]
    if not first:
        model.position_embedding = None
    if not (first or (last and model.head is None)):
        del model.embedding
    if not last:
        model.norm = model.head = None
    model.__class__ = type("Stage", (Stage, type(model)), {})
    stage = cast(Stage, model)
    stage.first, stage.last = first, last
    return stage


class Pipeline:
    """Runs micro-batches through the stages of a group; every rank makes one.

        stage = pipeline_stage(model, group)
        optimizer = AdamW(stage.parameters())
        pipeline = Pipeline(stage, group, num_microbatches=8)
        loss = pipeline.step(token_ids, targets, scale=1 / targets.numel())
        optimizer.step()

    Args:
        module: a stage, or DDP of it: call finish_gradient_synchronization() after the last `step` of an update.
        num_microbatches: m equal parts of a batch.
        schedule: "1f1b" or "gpipe": see the top of the file.
    """

    def __init__(
        self, module: nn.Module, group: Group = None, *, num_microbatches: int, schedule: str = "1f1b"
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        if num_microbatches < 1:
            raise ValueError(f"num_microbatches must be 1 or more, got {num_microbatches}")
        self.module, self.stage = module, cast(Stage, module.module if isinstance(module, DDP) else module)
        self.rank, self.num_stages = dist.get_rank(group), dist.get_world_size(group)
        self.actions = SCHEDULES[schedule](self.rank, self.num_stages, num_microbatches)
        self.num_microbatches, self.group = num_microbatches, group
        # Gradients have a communicator of their own: two neighbours that send first would wait for each other in one.
        self._forward, self._back = _Messages(group), _Messages(_second(group or dist.group.WORLD))

    def step(
        self,
        token_ids_BS: Tensor,
        targets_BS: Tensor,
        *,
        scale: float = 1.0,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Any:
        """Add the gradients of scale * (sum of the losses) to .grad; return that sum, unscaled, on every rank: two sums
        where the whole model returns two.

        Under torch.no_grad() the losses alone. Every rank is given the batch, (B, S) int64; the first stage reads the
        tokens and the last the targets. Raises ValueError where B does not divide by the micro-batches.
        """
        more = {"label_smoothing": label_smoothing, "z_loss": z_loss} if label_smoothing or z_loss else {}
        B, m = token_ids_BS.shape[0], self.num_microbatches
        if B % m != 0:
            raise ValueError(f"{B} sequences do not divide into {m} micro-batches: {B} / {m} = {B / m:g}")
        micro = [(ids, targets) for ids, targets in zip(token_ids_BS.chunk(m), targets_BS.chunk(m), strict=True)]
        total = torch.zeros(2 if more else 1, device=token_ids_BS.device)
        training, kept = torch.is_grad_enabled(), dict[int, tuple[Any, Any, Any]]()
        quiet = self.module.no_sync() if isinstance(self.module, DDP) else contextlib.nullcontext()
        with quiet, _TiedGradient(self, training):
            for kind, i in self.actions:
                if kind == "forward":
                    x, out, added = self._run(*micro[i], ignore_index, more)
                    if self.stage.last:
                        sums = out if more else (out,)
                        total += torch.stack(sums).detach()
                        out = sums[0]
                    if training:
                        count = (micro[i][1] != ignore_index).sum()
                        kept[i] = x, out, None if added is None else scale * count * added
                elif training:
                    self._pull(*kept.pop(i), scale)
        self._forward.finish()
        self._back.finish()
        broadcast(total, self.num_stages - 1, self.group)
        return total.unbind() if more else total[0]

    def _run(
        self, ids_BS: Tensor, targets_BS: Tensor, ignore_index: int, more: dict[str, float]
    ) -> tuple[Tensor, Any, Tensor | None]:
        """The forward of a micro-batch: what came in, what goes out, and what the routers add."""
        stage, x = self.stage, ids_BS
        if not stage.first:
            x = torch.empty(stage.hidden_shape(*ids_BS.shape), dtype=stage.compute_dtype, device=ids_BS.device)
            receive(x, self.rank - 1, self._forward.group)
            x.requires_grad_(torch.is_grad_enabled())
        out, added = self.module(x, targets_BS, ignore_index, **more)
        if not stage.last:
            self._forward.send(out.detach(), self.rank + 1)
        return x, out, added

    def _pull(self, x: Tensor, out: Tensor, added: Tensor | None, scale: float) -> None:
        """The backward of a micro-batch."""
        if self.stage.last:
            gradient = out.new_full((), scale)
        else:
            receive(gradient := torch.empty_like(out), self.rank + 1, self._back.group)
        pairs = [(out, gradient)] if added is None else [(out, gradient), (added, torch.ones_like(added))]
        if pairs := [(y, dy) for y, dy in pairs if y.requires_grad]:
            with torch.autocast(x.device.type, enabled=False):  # a step may be within it; a backward is not
                torch.autograd.backward([y for y, _ in pairs], [dy for _, dy in pairs])
        if not self.stage.first:
            self._back.send(torch.zeros_like(x) if x.grad is None else x.grad, self.rank - 1)


@functools.lru_cache(maxsize=8)
def _second(group: Any) -> Any:
    """Another group of the same processes, one for all pipelines of these: a step leaves no message behind."""
    return dist.new_group(dist.get_process_group_ranks(group), use_local_synchronization=True)


class _Messages:
    """What a rank sends in one direction: at most one message is under way, and it is kept until it has arrived."""

    def __init__(self, group: Group) -> None:
        self.group, self._under_way = group, deque[tuple[dist.Work, Tensor]]()

    def send(self, x: Tensor, rank: int) -> None:
        self.finish()
        x = x.contiguous()
        self._under_way.append((send(x, rank, self.group), x))

    def finish(self) -> None:
        while self._under_way:
            self._under_way.popleft()[0].wait()


class _TiedGradient:
    """Around a step: what the first stage and the last add to their table's gradients is summed on both."""

    def __init__(self, pipeline: Pipeline, training: bool) -> None:
        self.pipeline, self.table = pipeline, pipeline.stage.tied if training else None

    def __enter__(self) -> None:
        if self.table is not None:
            self.before = None if self.table.grad is None else self.table.grad.clone()
            self.table.grad = None

    def __exit__(self, *error: Any) -> None:
        if self.table is None or error[0] is not None:
            return
        pipeline, last = self.pipeline, self.pipeline.num_stages - 1
        mine = torch.zeros_like(self.table) if self.table.grad is None else self.table.grad.clone()
        theirs = torch.empty_like(mine)
        outwards, inwards = (pipeline._forward, pipeline._back)[:: 1 if pipeline.stage.first else -1]
        other = last if pipeline.stage.first else 0
        outwards.send(mine, other)
        receive(theirs, other, inwards.group)
        total = mine + theirs
        self.table.grad = total if self.before is None else self.before + total
