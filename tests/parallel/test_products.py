"""Several ways of splitting at once, on four ranks, against one process."""

import pytest
import torch
from gloo_ranks import on_ranks

from cs336.models import BlockConfig, Transformer, TransformerConfig
from cs336.nn import AttentionConfig, MoEConfig
from cs336.parallel import (
    DDP,
    FSDP,
    Mesh,
    Pipeline,
    context_parallel,
    expert_parallel,
    expert_parameters,
    own_tokens,
    pipeline_stage,
    tensor_parallel,
)
from cs336.parallel.differentiable import gathered
from cs336.parallel.tensor import whole_state_dict

WORLD = 4
V, S, M, B = 16, 8, 16, 4
DENSE = TransformerConfig(V, S, 2, M, 4, 2, qk_norm=True, tie_embeddings=True)
MOE = TransformerConfig(V, S, 2, M, layers=(BlockConfig(AttentionConfig(2), MoEConfig(4, 2, balance="none")),))


def model(config=DENSE):
    torch.manual_seed(0)
    return Transformer(config)


def batch():
    return torch.randint(V, (2, B, S), generator=torch.Generator().manual_seed(1))


def rows_of(mesh, axis):
    size = B // mesh.size(axis)
    return slice(mesh.rank(axis) * size, (mesh.rank(axis) + 1) * size)


def gradients(net):
    return {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


def whole_gradients(divided):
    """Each rank's parts put together; names as in the whole model."""
    grads = gradients(divided)
    divided.state_dict = lambda: grads
    return whole_state_dict(divided)


def data_x_tensor(ids, targets):
    mesh = Mesh(data=2, tensor=2)
    net = tensor_parallel(model(), mesh.group("tensor"), sequence=True)
    ddp, rows = DDP(net, group=mesh.group("data")), rows_of(mesh, "data")
    ddp(ids[rows], targets=targets[rows]).backward()
    ddp.finish_gradient_synchronization()
    return whole_gradients(net)


def data_x_pipeline(ids, targets):
    mesh = Mesh(data=2, pipeline=2)
    stage = pipeline_stage(model(), mesh.group("pipeline"))
    ddp, rows = DDP(stage, group=mesh.group("data")), rows_of(mesh, "data")
    pipeline = Pipeline(ddp, mesh.group("pipeline"), num_microbatches=2)
    pipeline.step(ids[rows], targets[rows])
    ddp.finish_gradient_synchronization()
    return gradients(stage)


def context_x_tensor(ids, targets):
    mesh = Mesh(context=2, tensor=2)
    net = context_parallel(tensor_parallel(model(), mesh.group("tensor"), sequence=True), mesh.group("context"))
    ddp = DDP(net, group=mesh.group("context"))
    ids, targets = (own_tokens(x, mesh.group("context")) for x in (ids, targets))
    ddp(ids, targets=targets).backward()
    ddp.finish_gradient_synchronization()
    return whole_gradients(net)


def pipeline_x_tensor(ids, targets):
    mesh = Mesh(pipeline=2, tensor=2)
    net = tensor_parallel(model(), mesh.group("tensor"), sequence=True)
    stage = pipeline_stage(net, mesh.group("pipeline"))
    Pipeline(stage, mesh.group("pipeline"), num_microbatches=4).step(ids, targets, scale=0.5)
    return whole_gradients(stage)


def data_x_expert(ids, targets):
    mesh = Mesh(data=2, expert=2)
    net = expert_parallel(model(MOE), mesh.group("expert"))
    experts = torch.nn.ModuleList(layer.mlp.experts for layer in net.layers)
    ddp = DDP(net, group=mesh.group("data", "expert"), ignored=expert_parameters(net))
    ddp_of_experts = DDP(experts, group=mesh.group("data"))
    row = slice(mesh.rank("data") * 2 + mesh.rank("expert"), mesh.rank("data") * 2 + mesh.rank("expert") + 1)
    ddp(ids[row], targets=targets[row]).backward()
    ddp.finish_gradient_synchronization()
    ddp_of_experts.finish_gradient_synchronization()
    return gradients(net)


def fsdp_x_tensor(ids, targets):
    mesh = Mesh(data=2, tensor=2)
    net = tensor_parallel(model(), mesh.group("tensor"), sequence=True)
    fsdp, rows = FSDP(net, group=mesh.group("data")), rows_of(mesh, "data")
    for row in range(rows.start, rows.stop):
        fsdp(ids[row : row + 1], targets=targets[row : row + 1]).backward()
    fsdp.finish_gradient_synchronization()
    shapes = {n: p.shape for n, p in tensor_parallel(model(), mesh.group("tensor")).named_parameters()}
    grads = {}
    for n, p in fsdp.named_parameters():  # flat pieces, of the same size but for the last
        n, size = n.removeprefix("module."), -(-shapes[n.removeprefix("module.")].numel() // 2)
        both = gathered(torch.nn.functional.pad(p.grad, (0, size - p.grad.numel())), 0, mesh.group("data"))
        grads[n] = both[: shapes[n].numel()].view(shapes[n])
    net.state_dict = lambda: grads
    return whole_state_dict(net)


PRODUCTS = {
    "data x tensor": data_x_tensor,
    "data x pipeline": data_x_pipeline,
    "context x tensor": context_x_tensor,
    "pipeline x tensor": pipeline_x_tensor,
    "data x expert": data_x_expert,
    "FSDP x tensor": fsdp_x_tensor,
}


def case(rank):
    mesh = Mesh(data=2, tensor=-1)
    assert (mesh.axes, mesh.rank("data"), mesh.rank("tensor")) == ({"data": 2, "tensor": 2}, rank // 2, rank % 2)
    assert mesh.rows("tensor") == [[0, 1], [2, 3]]
    assert mesh.rows("data") == [[0, 2], [1, 3]]
    assert mesh.rows("tensor", "data") == [[0, 1, 2, 3]]
    return {name: product(*batch()) for name, product in PRODUCTS.items()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(case, tmp_path_factory.mktemp("products"), WORLD)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_equals_one_process(ranks, name):
    net, (ids, targets) = model(MOE if name == "data x expert" else DENSE), batch()
    net(ids, targets=targets).backward()
    scale = {"data x expert": 4}.get(name, 2)  # of a mean over ranks
    seen = set()
    for rank, grads in enumerate(r[name] for r in ranks):
        for n, got in grads.items():
            want = net.get_parameter(n).grad
            if ".experts." in n:
                want = want.chunk(2)[rank % 2]
            torch.testing.assert_close(scale * got, want, rtol=1e-4, atol=1e-5, msg=lambda m, n=n: f"{n}: {m}")
        seen |= grads.keys()
    assert seen == {n for n, _ in net.named_parameters()}
