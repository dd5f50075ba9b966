"""A small float32 model divided in every way, on N processes, against the whole model on each."""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cs336.models import BlockConfig, Transformer, TransformerConfig
from cs336.nn import AttentionConfig, MoEConfig
from cs336.ops import registry
from cs336.optim import AdamW
from cs336.parallel import (
    DDP,
    Pipeline,
    ShardedAdamW,
    ShardedOptimizer,
    context_parallel,
    expert_parallel,
    expert_parameters,
    nccl,
    own_tokens,
    pipeline_stage,
    tensor_parallel,
)
from cs336.parallel.differentiable import own_part

Divided = tuple[Tensor, nn.Module, float]
"""The loss, what holds the gradients, and how many times they are the whole model's."""


def config(N: int, moe: bool) -> TransformerConfig:
    if not moe:
        return TransformerConfig(64 * N, 32 * N, N, 64 * N, 2 * N, N)
    block = BlockConfig(AttentionConfig(N), MoEConfig(2 * N, 2, balance="none"))
    return TransformerConfig(64 * N, 32 * N, 1, 64 * N, layers=(block,))


def _rows(x: Tensor) -> Tensor:
    return own_part(x, 0, None)


def _averaged(module: DDP, loss: Tensor) -> Divided:
    loss.backward()
    module.finish_gradient_synchronization()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total, module.module, 1 / dist.get_world_size()


def data(model: Transformer, ids: Tensor, targets: Tensor) -> Divided:
    ddp = DDP(model)
    return _averaged(ddp, ddp(_rows(ids), targets=_rows(targets)))


def tensor(model: Transformer, ids: Tensor, targets: Tensor) -> Divided:
    loss = tensor_parallel(model)(ids, targets=targets)
    loss.backward()
    return loss.detach(), model, 1


def tensor_and_sequence(model: Transformer, ids: Tensor, targets: Tensor) -> Divided:
    loss = tensor_parallel(model, sequence=True)(ids, targets=targets)
    loss.backward()
    return loss.detach(), model, 1


def pipeline(schedule: str) -> Callable[[Transformer, Tensor, Tensor], Divided]:
    def divided(model: Transformer, ids: Tensor, targets: Tensor) -> Divided:
        stage = pipeline_stage(model)
        return Pipeline(stage, num_microbatches=len(ids), schedule=schedule).step(ids, targets), stage, 1

    return divided


def context(kind: str) -> Callable[[Transformer, Tensor, Tensor], Divided]:
    def divided(model: Transformer, ids: Tensor, targets: Tensor) -> Divided:
        ddp = DDP(context_parallel(model, kind=kind))  # type: ignore[arg-type]
        return _averaged(ddp, ddp(own_tokens(ids, kind=kind), targets=own_tokens(targets, kind=kind)))  # type: ignore[arg-type]

    return divided


def expert(model: Transformer, ids: Tensor, targets: Tensor) -> Divided:
    ddp = DDP(expert_parallel(model), ignored=expert_parameters(model))
    return _averaged(ddp, ddp(_rows(ids), targets=_rows(targets)))


WAYS: dict[str, Callable[[Transformer, Tensor, Tensor], Divided]] = {
    "data": data,
    "tensor": tensor,
    "tensor and sequence": tensor_and_sequence,
    "pipeline gpipe": pipeline("gpipe"),
    "pipeline 1f1b": pipeline("1f1b"),
    "context ring": context("ring"),
    "context all_to_all": context("all_to_all"),
    "expert": expert,
}


def differences(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """Each way, how far the loss is from one process's, relatively, and the gradients, over each one's largest."""
    N = dist.get_world_size()
    for name, way in WAYS.items():
        shape = config(N, moe=name == "expert")
        torch.manual_seed(0)
        alone = Transformer(shape, device=device)
        ids, targets = torch.randint(shape.vocab_size, (2, 2 * N, shape.context_length), device=device)
        want = alone(ids, targets=targets)
        want.backward()
        torch.manual_seed(0)
        loss, module, scale = way(Transformer(shape, device=device), ids, targets)
        worst = 0.0
        for parameter, p in module.named_parameters():
            whole = scale * alone.get_parameter(parameter).grad
            for dim in range(whole.dim()):
                if whole.shape[dim] != p.shape[dim]:
                    whole = own_part(whole, dim, None)
            worst = max(worst, ((p.grad - whole).abs().max() / whole.abs().max()).item())
        yield name, ((loss - want).abs() / want).item(), worst


REFERENCE = "ShardedAdamW, its step in plain torch"
STEPPED: dict[str, Callable[[AdamW, bool], torch.optim.Optimizer]] = {
    "DDP": lambda optimizer, native: optimizer,
    "DDP + ShardedOptimizer": lambda optimizer, native: ShardedOptimizer.of(optimizer),
    "ShardedAdamW": lambda optimizer, native: ShardedAdamW.of(optimizer),
    REFERENCE: lambda optimizer, native: ShardedAdamW.of(optimizer),
    "ShardedAdamW(native=True)": lambda optimizer, native: ShardedAdamW.of(optimizer, native=native),
}


def steps_apart(device: torch.device, steps: int = 5) -> Iterator[tuple[str, float, float]]:
    """Each way to divide an optimizer: how far, after some steps, the loss is from that of one process which has
    the whole batch, relatively, and how far the weights are from those under DDP: 0 where they are the same bits."""
    N, shape = dist.get_world_size(), config(dist.get_world_size(), moe=False)
    torch.manual_seed(0)
    ids, targets = torch.randint(shape.vocab_size, (2, 2 * N, shape.context_length), device=device)

    def trained(make: Callable[[Transformer], torch.optim.Optimizer], rows: Callable[[Tensor], Tensor], name: str = ""):
        torch.manual_seed(0)
        model = Transformer(shape, device=device)
        optimizer = make(model)
        ddp = None if isinstance(optimizer, ShardedAdamW) or rows is not _rows else DDP(model)
        for _ in range(steps):
            loss = model(rows(ids), targets=rows(targets))
            (loss / rows(targets).numel()).backward()
            if ddp is not None:
                ddp.finish_gradient_synchronization()
            with registry.use("ref") if name == REFERENCE else contextlib.nullcontext():
                optimizer.step()
            optimizer.zero_grad()
        return model(ids, targets=targets).item(), [p.detach().clone() for p in model.parameters()]

    def adamw(model: Transformer) -> AdamW:
        return AdamW(model.parameters(), lr=1e-3)

    want, under_ddp = trained(adamw, lambda x: x)[0], None
    native = nccl.missing(device) is None
    for name, around in STEPPED.items():
        if "native" in name and not native:
            continue
        loss, weights = trained(lambda model, around=around: around(adamw(model), native), _rows, name)
        under_ddp = under_ddp or weights
        apart = max((a - b).abs().max().item() for a, b in zip(weights, under_ddp, strict=True))
        yield name, abs(loss - want) / want, apart
