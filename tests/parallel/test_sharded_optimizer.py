import copy

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import WORLD, error_of, on_two_ranks
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cs336.optim import SOAP, AdamW, Muon, clip_scale, muon_param_groups
from cs336.parallel import DDP, ShardedOptimizer, count_traffic
from cs336.parallel.sharded_optimizer import deal

STEPS = 4
OPTIMIZERS = {
    "torch.AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "torch.SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "torch.Adagrad": (torch.optim.Adagrad, {"lr": 0.1}),  # makes its state before the first step
    "AdamW": (AdamW, {"lr": 0.01}),
    "Muon": (Muon, {"lr": 0.01}),
    "SOAP": (SOAP, {"lr": 0.01, "frequency": 2}),
}


def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(13, 7), nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 7), nn.Linear(7, 13, False))
    net[4].weight = net[0].weight
    net.unused = nn.Parameter(torch.ones(5))
    net[3].bias.requires_grad_(False)
    return net


def backward(net, step, rank=None):
    """Of the mean over 8 rows; with a rank over its half."""
    x, y = torch.randint(13, (2, 8, 5), generator=torch.Generator().manual_seed(step))
    if rank is not None:
        x, y = x[rank::WORLD], y[rank::WORLD]
    h = x
    for layer in list(net.children())[:-1]:
        h = layer(h)
    nn.functional.cross_entropy(nn.functional.linear(h, net[4].weight).flatten(0, 1), y.flatten()).backward()


def groups(net, name):
    return muon_param_groups(net, 0.1) if name in ("Muon", "SOAP") else net.parameters()


def steps(net, optimizer, first, last, sync=lambda: None, rank=None):
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step), last_epoch=-1)
    for step in range(first, last):
        optimizer.zero_grad()
        backward(net, step, rank)
        sync()
        optimizer.step()
        schedule.step()
    return weights(net)


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


def sharded(rank, name):
    """Weights after the steps; the numbers of elements of state kept here; the whole state."""
    optimizer_cls, options = OPTIMIZERS[name]
    net = model()
    ddp = DDP(net)
    optimizer = ShardedOptimizer(groups(net, name), optimizer_cls, **options)
    after = steps(net, optimizer, 0, STEPS, ddp.finish_gradient_synchronization, rank)
    kept = sum(v.numel() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.dim())
    whole = optimizer.consolidate(to=None)
    only = optimizer.consolidate()
    assert (only is None) == (rank != 0)

    resumed = {}
    for way, state in (("whole", whole), ("shard", optimizer.state_dict())):
        other = copy.deepcopy(net)
        again = ShardedOptimizer(groups(other, name), optimizer_cls, **{**options, "lr": 5.0})
        again.load_state_dict(copy.deepcopy(state))
        backward(other, 9)
        again.step()
        resumed[way] = weights(other)
    backward_and_step = copy.deepcopy(net)
    plain = optimizer_cls(groups(backward_and_step, name), **options)
    plain.load_state_dict(copy.deepcopy(whole))
    backward(backward_and_step, 9)
    plain.step()
    resumed["one process"] = weights(backward_and_step)
    return {"weights": after, "kept": kept, "state": whole["state"], "resumed": resumed}


def groups_added(rank):
    """One group before the first step and one after it; the weights, as ranks leave them and as one process does."""
    both = []
    for make in (ShardedOptimizer, lambda params, optimizer_cls, **options: optimizer_cls(params, **options)):
        net = model()
        first, *middle, last = [p for p in net.parameters() if p.requires_grad]
        optimizer = make([first], torch.optim.AdamW, lr=0.01)
        optimizer.add_param_group({"params": middle, "lr": 0.02})
        for step in range(STEPS):
            if step == 2:
                optimizer.add_param_group({"params": [last], "weight_decay": 0.5})
            optimizer.zero_grad()
            backward(net, step)
            last.grad = torch.full_like(last, 0.5)
            optimizer.param_groups[1]["lr"] *= 0.5
            optimizer.step()
        both.append(weights(net))
    return both


def alike(rank, name):
    """Steps from the same gradients on every rank; the weights, as ranks leave them and as one process does."""
    optimizer_cls, options = OPTIMIZERS[name]
    both = []
    for sharded in (True, False):
        net = model()
        made = (ShardedOptimizer, optimizer_cls) if sharded else (optimizer_cls,)
        both.append(steps(net, made[0](groups(net, name), *made[1:], **options), 0, STEPS))
    return both


def one_large(rank):
    """More ranks than parameters of one group; closure and grad_scale go through."""
    p = nn.Parameter(torch.arange(5.0))
    optimizer = ShardedOptimizer([p], AdamW, lr=0.1)

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    with count_traffic() as traffic:
        loss = optimizer.step(closure, grad_scale=clip_scale(torch.tensor(100.0), 1.0))
    return {"p": p.detach(), "loss": loss.detach(), "states": len(optimizer.state), "sent": traffic.bytes["broadcast"]}


def mistakes(rank):
    def other_share():
        p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        optimizer = ShardedOptimizer([p, q], torch.optim.AdamW)
        state = optimizer.state_dict()
        state["shard"]["rank"] = 1 - rank
        optimizer.load_state_dict(state)

    def other_groups():
        state = torch.optim.SGD([nn.Parameter(torch.ones(3))] * 1).state_dict()
        ShardedOptimizer([nn.Parameter(torch.ones(3)) for _ in range(2)], torch.optim.SGD).load_state_dict(state)

    def later_group():
        optimizer = ShardedOptimizer([nn.Parameter(torch.ones(3))], torch.optim.SGD)
        error = error_of(lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2 + rank))]}))
        assert len(optimizer.param_groups) == 1
        optimizer.step()  # still whole
        ours = ShardedOptimizer([nn.Parameter(torch.ones(3))], AdamW)
        group = {"params": [nn.Parameter(torch.ones(3))], "weigth_decay": 0.0}
        assert "AdamW has no option weigth_decay" in error_of(lambda: ours.add_param_group(group))
        assert len(ours.param_groups) == 1
        ours.step()
        return error

    sizes = [nn.Parameter(torch.ones(n)) for n in (4, 5 + rank, 6 + rank)]
    named = [("a", nn.Parameter(torch.ones(2))), ("b", nn.Parameter(torch.ones(2, dtype=DTYPES[rank])))]
    found = {
        "shape": error_of(lambda: ShardedOptimizer(sizes, torch.optim.SGD)),
        "dtype": error_of(lambda: ShardedOptimizer(named, torch.optim.SGD)),
        "integers": error_of(lambda: ShardedOptimizer([torch.ones(3, dtype=torch.int32)], AdamW)),
        "lbfgs": error_of(lambda: ShardedOptimizer([nn.Parameter(torch.ones(3))], torch.optim.LBFGS)),
        "share": error_of(other_share),
        "groups": error_of(other_groups),
        "later": later_group(),
    }
    dist.barrier()
    return found


DTYPES = (torch.float32, torch.bfloat16)


def case(rank):
    results = {name: {**sharded(rank, name), "alike": alike(rank, name)} for name in OPTIMIZERS}
    return results | {"added": groups_added(rank), "large": one_large(rank), "mistakes": mistakes(rank)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_ranks(case, tmp_path_factory.mktemp("sharded"))


def one_process(name):
    optimizer_cls, options = OPTIMIZERS[name]
    net = model()
    optimizer = optimizer_cls(groups(net, name), **options)
    return steps(net, optimizer, 0, STEPS), optimizer


# Rounding alone turns the bases that SOAP finds for what a gradient of 8 rows does not reach: its test is the next one.
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "SOAP"])
def test_two_ranks_equal_one_process(ranks, name):
    want, optimizer = one_process(name)
    for got in (ranks[0][name], ranks[1][name]):
        for p, q in zip(got["weights"], want, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-5)
        state = optimizer.state_dict()["state"]
        assert got["state"].keys() == state.keys()
        for i, entries in state.items():
            assert got["state"][i].keys() == entries.keys()
            for key, value in entries.items():
                torch.testing.assert_close(got["state"][i][key], value, rtol=1e-3, atol=1e-5)
    assert all(torch.equal(p, q) for p, q in zip(*(r[name]["weights"] for r in ranks), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_gradients_lead_to_the_same_weights(ranks, name):
    """Whoever steps a parameter; matrices of one shape are multiplied together, or apart on two ranks."""
    for rank in ranks:
        for p, q in zip(*rank[name]["alike"], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6 if name in ("Muon", "SOAP") else 0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rank_keeps_its_share_of_the_state(ranks, name):
    _, optimizer = one_process(name)
    whole = sum(v.numel() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.dim())
    kept = [r[name]["kept"] for r in ranks]
    assert sum(kept) == whole
    if name not in ("Muon", "SOAP"):  # theirs is dealt by what their matrices cost
        assert max(kept) - min(kept) <= 2 * 13 * 7  # the state of the largest parameter


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saved_state_goes_on_sharded_whole_and_in_one_process(ranks, name):
    for rank in ranks:
        resumed = rank[name]["resumed"]
        assert not torch.equal(resumed["one process"][1], rank[name]["weights"][1])  # 0 is unused
        for way in ("whole", "shard"):
            for p, q in zip(resumed[way], resumed["one process"], strict=True):
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_groups_may_come_later_and_options_change(ranks):
    for rank in ranks:
        got, want = rank["added"]
        assert all(torch.equal(p, q) for p, q in zip(got, want, strict=True))


def test_one_parameter_closure_and_grad_scale(ranks):
    p = nn.Parameter(torch.arange(5.0))
    p.square().sum().backward()
    AdamW([p], lr=0.1).step(grad_scale=clip_scale(torch.tensor(100.0), 1.0))
    for rank, got in enumerate(r["large"] for r in ranks):
        assert torch.equal(got["p"], p.detach())
        assert (got["loss"].item(), got["states"], got["sent"]) == (30.0, int(rank == 0), 20)


def test_mistakes_are_named_on_every_rank(ranks):
    for i, rank in enumerate(ranks):
        found = rank["mistakes"]
        want = "rank 0 has parameter 1 of group 0: float32 [5]; rank 1 has parameter 1 of group 0: float32 [6]"
        assert want in found["shape"]
        assert "rank 0 has b of group 0: float32 [2]; rank 1 has b of group 0: bfloat16 [2]" in found["dtype"]
        assert "LBFGS looks at all gradients at once" in found["lbfgs"]
        assert found["integers"].startswith("ValueError: parameters must be float32")
        assert f"this is the share of rank {1 - i} of 2, loaded on rank {i} of 2" in found["share"]
        assert "the saved groups have [1] parameters, this optimizer's [2]" in found["groups"]
        assert "parameter 0 of group 1: float32 [2]; rank 1 has parameter 0 of group 1: float32 [3]" in found["later"]


# ---- the deal ----


def gpt_groups(layers=12, d_model=768, vocab_size=50257):
    """As muon_param_groups makes them, without memory."""
    sizes = [(d_model, d_model)] * 4 + [(4 * d_model, d_model)] * 2 + [(d_model, 4 * d_model)]
    matrices = [nn.Parameter(torch.empty(size, device="meta")) for _ in range(layers) for size in sizes]
    others = [nn.Parameter(torch.empty(vocab_size, d_model, device="meta"))]
    vectors = [nn.Parameter(torch.empty(d_model, device="meta")) for _ in range(2 * layers)]
    return [{"params": matrices, "use_muon": True}, {"params": others + vectors, "use_muon": False}]


@pytest.mark.parametrize("cls", [Muon, SOAP])
@pytest.mark.parametrize("ranks", [1, 2, 8, 16])
def test_a_deal_is_balanced_by_cost(cls, ranks):
    optimizer = cls(gpt_groups())
    costs = [optimizer.step_cost(p, group) for group in optimizer.param_groups for p in group["params"]]
    loads = [0] * ranks
    owners = deal(costs, loads)
    assert loads == [sum(c for c, owner in zip(costs, owners, strict=True) if owner == r) for r in range(ranks)]
    least = max(sum(costs) / ranks, max(costs))  # no deal is better than this
    assert max(loads) <= (4 / 3 - 1 / (3 * ranks)) * least
    assert ranks > 8 or max(loads) <= 1.05 * least


def test_a_step_costs_what_its_matrix_products_do():
    """Counted by torch as they run, gram whole; a matrix that lies flat is cheap for its elements."""

    def gram(x, *_, **__):
        batch, rows, columns = x
        return 2 * batch * rows**2 * columns

    for cls, shapes in ((Muon, [(48, 96), (96, 48), (3, 32, 64)]), (SOAP, [(48, 96), (64, 64)])):
        for shape in shapes:
            p = nn.Parameter(torch.randn(shape))
            optimizer = cls([p])
            group = optimizer.param_groups[0]
            for _ in range(2):  # SOAP's first step only sets its bases
                p.grad = torch.randn(shape)
                with FlopCounterMode(display=False, custom_mapping={torch.ops.cs336_ref.gram: gram}) as counter:
                    optimizer.step()
            matrix_cost = optimizer.step_cost(p, group) - AdamW([p]).step_cost(p, group)
            if cls is SOAP:  # its decompositions, which this step does not have and nobody counts
                matrix_cost -= sum(14 * side**3 // (3 * group["frequency"]) for side in shape)
            assert matrix_cost == counter.get_total_flops()
    flat, square = (torch.empty(shape, device="meta") for shape in ((8, 8192), (256, 256)))
    optimizer = Muon([nn.Parameter(flat), nn.Parameter(square)])
    costs = [optimizer.step_cost(p, optimizer.param_groups[0]) for p in optimizer.param_groups[0]["params"]]
    assert costs[1] > 2 * costs[0]


def test_the_costliest_come_first_and_what_is_there_counts():
    assert deal([3, 5, 4], [0, 0]) == [1, 0, 1]
    assert deal([1, 1], [10, 0, 0]) == [1, 2]
    assert deal([], [0]) == []
