"""Expert parallel: rank r of N has experts r E/N to (r+1) E/N of each mixture; tokens travel to theirs and back.

Ranks have tokens of their own, as in data parallel. Each sorts its tokens by expert, tells every rank how many it sends
to each of its experts, and sends them: no token is dropped or padded for, whatever the router says (arXiv:2211.15841;
the exchange is arXiv:2006.16668's). A rank sends about K (N-1)/N of its tokens' features, forth and back, and as many
in the backward. N = ranks, E = experts, n = tokens of a rank times their K choices, M = d_model.
"""

from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cs336.nn.moe import Experts, experts_of
from cs336.parallel.collectives import all_to_all
from cs336.parallel.differentiable import Group, exchange, own_part

Model = TypeVar("Model", bound=nn.Module)


class ShardedExperts(Experts):
    """Experts of which each rank has E/N: up_proj, gate_proj (E/N, F, M), down_proj (E/N, M, F).

    forward(x, token_r, load_E) as Experts': x (n, M) are this rank's tokens, load_E (E,) how many of its rows go to
    each of all ranks' experts. The host waits for the counts.
    """

    group: Group

    def forward(self, x_nM: Tensor, token_r: Tensor, load_E: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x_nM.device.type):
            x_nM = x_nM.to(torch.get_autocast_dtype(x_nM.device.type))
        N, here = dist.get_world_size(self.group), self.up_proj.shape[0]
        sent_NE = load_E.view(N, here)
        came_NE = torch.empty_like(sent_NE)  # from rank i to this rank's expert j
        all_to_all(came_NE, sent_NE, self.group)
        sent, came = sent_NE.sum(1).tolist(), came_NE.sum(1).tolist()
        rows_M = exchange(x_nM[token_r], sent, came, self.group)
        expert = torch.arange(here, device=x_nM.device).repeat(N).repeat_interleave(came_NE.flatten())
        order = expert.argsort(stable=True)  # by expert, then by rank: the order that one process has
        y_M = super().forward(rows_M, order, came_NE.sum(0))
        return exchange(y_M[order.argsort()], came, sent, self.group)


def expert_parallel(model: Model, group: Group = None) -> Model:
    """Divide the experts of a whole model, the same on every rank, among the ranks of a group, in place: return it.

    Each rank then trains on rows of its own. What its experts learn from all of the group's rows is divided by N, so
    that it is the gradient of the mean of the ranks' losses, as DDP's is. DDP averages the other parameters:

        model = DDP(expert_parallel(model, group), ignored=expert_parameters(model))

    The balance loss of a router is of this rank's tokens alone; balance = "bias" counts those of all ranks.
    Raises ValueError, and leaves the model as it was, without mixtures of experts or where they do not divide.
    """
    N, mixtures = dist.get_world_size(group), list(experts_of(model))
    if reason := why_not(model, N):
        raise ValueError(reason)
    for moe in mixtures:
        experts = moe.experts
        for name, p in list(experts.named_parameters()):
            mine = nn.Parameter(own_part(p.detach(), 0, group).clone(), p.requires_grad)
            if mine.requires_grad:
                mine.register_hook(lambda grad: grad / N)
            setattr(experts, name, mine)
        experts.__class__ = ShardedExperts
        cast(ShardedExperts, experts).group = group
    return model


def why_not(model: nn.Module, N: int) -> str | None:
    """The reason why N ranks cannot divide the experts of a model."""
    mixtures = list(experts_of(model))
    if not mixtures:
        return "the model has no mixtures of experts: give its layers mlp = {kind = 'moe', ...}"
    for moe in mixtures:
        E = moe.config.num_experts
        if isinstance(moe.experts, ShardedExperts):
            return "the experts have been divided before"
        if E % N != 0:
            return f"{E} experts cannot be divided among {N} ranks: {E} / {N} = {E / N:g}"
    return None


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those that each rank has for itself."""
    return [p for m in model.modules() if isinstance(m, ShardedExperts) for p in m.parameters()]
