"""ShardedAdamW over two and three ranks against AdamW in one process; the native step's own parts are in tests/ops."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import error_of, on_ranks
from torch import nn

from cs336.ops import registry
from cs336.optim import AdamW, clip_scale, grad_norm
from cs336.parallel import ShardedAdamW, ShardedOptimizer, count_traffic
from cs336.parallel.pieces import Piece, assembled

STEPS, HYPER = 4, {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}
SHAPES = [(3, 5), (40,), (1,), (17, 4), (2, 2)]
VARIANTS = [v for v in ("ref", "triton") if registry.missing("sharded_adamw_step_", v, torch.device("cpu")) is None]


# ---- gradients whose sums are exact: the same bits as in one process ----


def params_of(dtype):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]


def gradients(step, rank, unused):
    """Integers; of the last parameter none in the second step, of the second one on the first rank alone."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    found = [torch.randint(-8, 9, shape, generator=generator).float() for shape in SHAPES]
    if unused and step == 1:
        found[-1] = None
    if unused and rank > 0:
        found[1] = None
    return found


def exact_steps(optimizer, params, ranks, dtype, *, unused, max_norm, world):
    """`ranks`: whose gradients are this process's, their mean over `world`."""
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        found = [gradients(step, rank, unused) for rank in ranks]
        for p, gs in zip(params, zip(*found, strict=True), strict=True):
            gs = [g for g in gs if g is not None]
            if gs:
                share = sum(gs) if isinstance(optimizer, ShardedAdamW) else sum(gs) / world
                (p * share.to(dtype)).sum().backward()
        norms.append(optimizer.grad_norm() if isinstance(optimizer, ShardedAdamW) else grad_norm(params))
        optimizer.step(grad_scale=None if max_norm is None else clip_scale(norms[-1], max_norm))
    return {"weights": [p.detach().clone() for p in params], "norms": torch.stack(norms)}


EXACT = {
    "float32": {"dtype": torch.float32, "rounding": "nearest", "bucket_mb": 25.0},
    "a bucket a parameter": {"dtype": torch.float32, "rounding": "nearest", "bucket_mb": 0},
    "clipped": {"dtype": torch.float32, "rounding": "nearest", "bucket_mb": None, "max_norm": 1.0},
    "bfloat16": {"dtype": torch.bfloat16, "rounding": "nearest", "bucket_mb": 0.0001},
    "remainder": {"dtype": torch.bfloat16, "rounding": "remainder", "bucket_mb": 25.0},
}


def exact(rank, variant, world):
    found = {}
    for name, case in EXACT.items():
        with registry.use(variant):
            params = params_of(case["dtype"])
            options = {"rounding": case["rounding"], "bucket_mb": case["bucket_mb"]}
            optimizer = ShardedAdamW(params, **HYPER, **options)
            how = {"unused": name != "clipped", "max_norm": case.get("max_norm"), "world": world}
            found[name] = exact_steps(optimizer, params, [rank], case["dtype"], **how)
            found[name]["state"] = optimizer.consolidate(to=None)["state"]
            found[name]["elements"] = sum(b.state["exp_avg"].numel() for b in optimizer._buckets)
    return found


def alone(name, world):
    case = EXACT[name]
    params = params_of(case["dtype"])
    optimizer = AdamW(params, **HYPER, rounding=case["rounding"])
    how = {"unused": name != "clipped", "max_norm": case.get("max_norm"), "world": world}
    found = exact_steps(optimizer, params, range(world), case["dtype"], **how)
    return found | {"state": optimizer.state_dict()["state"]}


@pytest.fixture(scope="module", params=VARIANTS)
def two(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"two_{request.param}")
    return request.param, 2, on_ranks(functools.partial(exact, variant=request.param, world=2), folder, 2)


@pytest.mark.parametrize("name", EXACT)
def test_as_many_bits_as_one_process(two, name):
    """Where sums and means are exact, two ranks hold what one process holds under the same variant."""
    variant, world, ranks = two
    with registry.use(variant):
        want = alone(name, world)
    assert all(torch.equal(p, q) for p, q in zip(*(r[name]["weights"] for r in ranks), strict=True))
    for got in (r[name] for r in ranks):
        torch.testing.assert_close(got["norms"], want["norms"], rtol=1e-6, atol=0)
        bitwise = name != "clipped"  # the norm's sum has another order
        assert_alike(got["weights"], want["weights"], bitwise)
        assert got["state"].keys() == want["state"].keys()
        for i, state in want["state"].items():
            assert got["state"][i].keys() == state.keys()
            for key, value in state.items():
                if variant == "ref" or key == "step":
                    assert_alike([got["state"][i][key]], [value], bitwise)
                else:  # triton's compiler may fuse the scale into the next sum
                    torch.testing.assert_close(got["state"][i][key].float(), value.float(), rtol=1e-5, atol=2)


def assert_alike(ours, theirs, bitwise):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        if bitwise:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


# ---- a model ----


def model():
    torch.manual_seed(0)
    net = nn.Module()
    net.embedding = nn.Embedding(13, 7)
    net.layers = nn.ModuleList(nn.Linear(7, 7) for _ in range(3))
    net.head = nn.Linear(7, 13, bias=False)
    net.head.weight = net.embedding.weight
    net.unused = nn.Parameter(torch.ones(5))
    net.layers[1].bias.requires_grad_(False)
    net.forward = functools.partial(forward, net)
    return net


def forward(net, x):
    h = net.embedding(x)
    for layer in net.layers:
        h = h + layer(h).relu()
    return net.head(h)


def backward(net, step, rank=None, world=1, part=slice(None)):
    x, y = torch.randint(13, (2, 12, 5), generator=torch.Generator().manual_seed(step))
    if rank is not None:
        x, y = x[rank::world], y[rank::world]
    x, y = x[part], y[part]
    nn.functional.cross_entropy(net(x).flatten(0, 1), y.flatten()).backward()


def train(net, optimizer, steps, rank=None, world=1, accumulate=False):
    for step in steps:
        optimizer.zero_grad()
        if accumulate:
            with optimizer.no_sync():
                backward(net, step, rank, world, slice(0, None, 2))
            backward(net, step, rank, world, slice(1, None, 2))
        else:
            backward(net, step, rank, world)
        norm = optimizer.grad_norm() if isinstance(optimizer, ShardedAdamW) else grad_norm(net.parameters())
        scale = clip_scale(norm, 0.5) * (0.5 if accumulate else 1)
        optimizer.step(grad_scale=scale)
        for group in optimizer.param_groups:
            group["lr"] *= 0.7
    return [p.detach().clone() for p in net.parameters()]


def trained(rank, world):
    net = model()
    if rank:  # the start is rank 0's
        nn.init.zeros_(net.layers[2].weight)
    optimizer = ShardedAdamW(net.parameters(), **HYPER, bucket_mb=0.0003)
    optimizer.overlap(net)
    begin = len(optimizer._buckets)
    with count_traffic() as traffic:
        weights = train(net, optimizer, range(2), rank, world)
    waiting = [bucket.gathering for bucket in optimizer._buckets]
    net.state_dict()
    still = [bucket.gathering for bucket in optimizer._buckets]
    whole, own = optimizer.consolidate(to=None), optimizer.state_dict()
    only = optimizer.consolidate()
    assert (only is None) == (rank != 0)
    resumed = {}
    for way, state in (("whole", whole), ("pieces", own)):
        other = copy.deepcopy(net)
        other.forward = functools.partial(forward, other)
        ShardedAdamW(other.parameters())  # which the next one takes the parameters from
        bucket_mb = {"whole": None, "pieces": 0.0003}[way]
        again = ShardedAdamW(other.parameters(), **{**HYPER, "lr": 5.0}, bucket_mb=bucket_mb)
        again.load_state_dict(copy.deepcopy(state))
        resumed[way] = train(other, again, range(2, 4), rank, world)
    return {
        "weights": weights,
        "waiting": waiting,
        "still": still,
        "buckets": begin,
        "resumed": resumed,
        "sent": dict(traffic.bytes),
        "calls": dict(traffic.calls),
        "into ShardedOptimizer": into_sharded_optimizer(net, whole),
        "taken over": bool(taken_over()),
        "accumulated": accumulated(rank, world),
        "dropped": dropped(rank, world),
        "dropped unevenly": dropped_unevenly(rank),
        "groups": groups_added(rank),
        "mistakes": mistakes(rank, world),
    }


def into_sharded_optimizer(net, whole):
    optimizer = ShardedOptimizer(copy.deepcopy(net).parameters(), AdamW, **HYPER)
    optimizer.load_state_dict(whole)
    both = optimizer.consolidate(to=None), whole
    return (
        all(
            torch.equal(both[0]["state"][i][key], value)
            for i, state in both[1]["state"].items()
            for key, value in state.items()
        )
        and both[0]["state"].keys() == both[1]["state"].keys()
    )


def taken_over():
    """A second optimizer's steps are as if there had been no first."""
    after = []
    for first in (False, True):
        p = nn.Parameter(torch.ones(3))
        if first:
            ShardedAdamW([p])
        optimizer = ShardedAdamW([p])
        (2 * p).sum().backward()
        optimizer.step()
        after.append(p.detach().clone())
    return torch.equal(*after) and not after[0].eq(1).any()


def accumulated(rank, world):
    net = model()
    optimizer = ShardedAdamW(net.parameters(), **HYPER, bucket_mb=0.0003)
    return train(net, optimizer, range(2), rank, world, accumulate=True)


def dropped(rank, world):
    """The gradients of a step that is not taken, on its way or not, change nothing."""
    net = model()
    optimizer = ShardedAdamW(net.parameters(), **HYPER, bucket_mb=0.0003)
    backward(net, 7, rank, world)
    optimizer.zero_grad()
    return train(net, optimizer, range(2), rank, world)


def dropped_unevenly(rank):
    """The first rank has sent all its gradients when they are dropped, the others wait for one they do not have."""
    a, b = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = ShardedAdamW([a, b], lr=0.1, weight_decay=0.0, bucket_mb=0)  # b's gradient goes first
    (5 * a + 5 * b if rank == 0 else 5 * a).sum().backward()
    optimizer.zero_grad()
    (a - b).sum().backward()
    norm = optimizer.grad_norm()
    optimizer.step()
    return torch.cat([a.detach(), b.detach(), norm[None]])


def groups_added(rank):
    """One group before the first step and one after it; the weights, as ranks leave them and as one process does."""
    both = []
    for cls in (ShardedAdamW, AdamW):
        params = params_of(torch.float32)
        optimizer = cls(params[:1], **HYPER)
        optimizer.add_param_group({"params": params[1:3], "lr": 0.02})
        for step in range(3):
            if step == 2:
                optimizer.add_param_group({"params": params[3:], "weight_decay": 0.5})
            optimizer.zero_grad()
            for p in params:
                (p * (step + 1)).sum().backward()
            optimizer.step()
        both.append([p.detach().clone() for p in params])
    return both


def mistakes(rank, world):
    def second_backward():
        net = model()
        optimizer = ShardedAdamW(net.parameters())
        backward(net, 0)
        for p in (net.unused, *net.parameters()):
            (p * 1).sum().backward() if p.requires_grad else None
        optimizer.step()

    def moved():
        p = nn.Parameter(torch.ones(3))
        optimizer = ShardedAdamW([p])
        p.data = torch.ones(3)
        optimizer.step()

    def unfrozen():
        frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        optimizer = ShardedAdamW([nn.Parameter(torch.ones(3)), frozen])
        frozen.requires_grad_().sum().backward()
        optimizer.step()

    def other_pieces():
        optimizer = ShardedAdamW([nn.Parameter(torch.ones(3))])
        optimizer.load_state_dict({**optimizer.state_dict(), "shard": {"rank": 0, "world_size": world + 1}})

    def other_shape():
        states = []
        for n in (3, 4):
            p = nn.Parameter(torch.ones(n))
            optimizer = ShardedAdamW([p])
            p.sum().backward()
            optimizer.step()
            states.append(optimizer.consolidate(to=None))
        optimizer.load_state_dict(states[0])

    def bad_lr():
        p = nn.Parameter(torch.ones(3))
        optimizer = ShardedAdamW([p])
        p.sum().backward()
        optimizer.param_groups[0]["lr"] = -1.0
        error = error_of(optimizer.step)
        assert p.detach().eq(1).all()
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()  # still whole: as the first step
        assert torch.allclose(p.detach(), torch.full((3,), 1 - 0.1 - 0.1 * 0.01))
        raise ValueError(error)

    wide = torch.randn(4, 6).t()
    found = {
        "native": error_of(lambda: ShardedAdamW([nn.Parameter(torch.ones(3))], native=True)),
        "dtype": error_of(lambda: ShardedAdamW([nn.Parameter(torch.ones(3).double())])),
        "stride": error_of(lambda: ShardedAdamW([nn.Parameter(wide)])),
        "bucket": error_of(lambda: ShardedAdamW([nn.Parameter(torch.ones(3))], bucket_mb=-1)),
        "rounding": error_of(lambda: ShardedAdamW([nn.Parameter(torch.ones(3))], rounding="stochastic")),
        "misspelt": error_of(lambda: ShardedAdamW([{"params": [nn.Parameter(torch.ones(3))], "weigth_decay": 0.0}])),
        "alike": error_of(lambda: ShardedAdamW([nn.Parameter(torch.ones(3 + rank))])),
        "alike options": error_of(lambda: ShardedAdamW([nn.Parameter(torch.ones(3))], lr=-1.0 if rank else 0.1)),
        "alike strides": error_of(lambda: ShardedAdamW([nn.Parameter(wide if rank else wide.contiguous())])),
        "second": error_of(second_backward),
        "moved": error_of(moved),
        "unfrozen": error_of(unfrozen),
        "pieces": error_of(other_pieces),
        "shape": error_of(other_shape),
        "lr": error_of(bad_lr),
    }
    dist.barrier()
    return found


WORLD = 3


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return on_ranks(functools.partial(trained, world=WORLD), tmp_path_factory.mktemp("three"), WORLD)


@pytest.fixture(scope="module")
def one():
    net = model()
    optimizer = AdamW(net.parameters(), **HYPER)
    after_two = train(net, optimizer, range(2))
    return after_two, train(net, optimizer, range(2, 4))


def assert_near(ours, theirs):
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["weights", "accumulated", "dropped"])
def test_three_ranks_equal_one_process(three, one, how):
    """Tied, frozen and unused parameters; whole batches, in parts, and after gradients that were dropped."""
    for rank in three:
        assert_near(rank[how], one[0])
        assert all(torch.equal(p, q) for p, q in zip(rank[how], three[0][how], strict=True))


def test_dropped_gradients_that_not_every_rank_has_sent(three):
    for rank in three:
        want = torch.tensor([0.9] * 3 + [1.1] * 3 + [6**0.5])
        torch.testing.assert_close(rank["dropped unevenly"], want)


def test_saved_state_goes_on(three, one):
    for rank in three:
        assert rank["into ShardedOptimizer"]
        assert rank["taken over"]
        for way in ("whole", "pieces"):
            assert_near(rank["resumed"][way], one[1])


def test_a_forward_waits_for_what_it_needs(three):
    """After a step buckets are on their way until a forward, or a state_dict, asks for them."""
    for rank in three:
        assert all(rank["waiting"])
        assert not any(rank["still"])


def test_what_moves(three):
    """Gradients and parameters once each, in one message a bucket, beside one small sum a step."""
    for rank in three:
        buckets, unit = rank["buckets"], 4 * 16 * WORLD
        assert buckets > 2
        assert rank["calls"] == {"reduce_scatter": 2 * buckets, "all_gather": 2 * buckets, "all_reduce": 2}
        assert rank["sent"]["reduce_scatter"] == rank["sent"]["all_gather"]
        elements = sum(p.numel() for p in model().parameters() if p.requires_grad)
        least = 2 * 4 * elements * (WORLD - 1) / WORLD
        assert least <= rank["sent"]["all_gather"] <= least + 2 * buckets * 2 * unit


def test_groups_may_come_later(three):
    for rank in three:
        got, want = rank["groups"]
        assert_near(got, want)


def test_mistakes_are_named(three):
    for i, rank in enumerate(three):
        found = rank["mistakes"]
        assert "the native step is not possible on rank 0: NCCL moves what is on CUDA devices" in found["native"]
        assert "contiguous float32 or bfloat16, got torch.float64 (3,)" in found["dtype"]
        assert "with stride (1, 6)" in found["stride"]
        assert "bucket_mb must be 0 or more" in found["bucket"]
        assert "rounding must be nearest or remainder, got 'stochastic'" in found["rounding"]
        assert "ShardedAdamW has no option weigth_decay" in found["misspelt"]
        assert "rank 0 has parameter 0 of group 0: float32 [3]" in found["alike"]
        assert "rank 0 has group 0: {'lr': 0.1" in found["alike options"]
        assert "rank 1 has parameter 0 of group 0: float32 [6, 4], trained, stride (1, 6)" in found["alike strides"]
        assert "a second gradient of a parameter of shape" in found["second"]
        assert "is no longer where ShardedAdamW put it" in found["moved"]
        assert "has a gradient that was frozen" in found["unfrozen"]
        assert f"the pieces of rank 0 of 4, loaded on rank {i} of 3" in found["pieces"]
        assert "exp_avg has shape (3,), its parameter (4,)" in found["shape"]
        assert "lr must not be negative, got -1.0" in found["lr"]


def test_a_rank_keeps_its_part_of_the_state(two):
    _, ranks, results = two
    whole = sum(torch.Size(shape).numel() for shape in SHAPES)
    assert whole / ranks <= results[0]["float32"]["elements"] <= whole / ranks + 16 * (len(SHAPES) + 1)


# ---- what a checkpoint holds ----


def named(state):
    return {f"{i}.{name}": t for i, of in state.items() for name, t in of.items()}


def in_pieces(rank):
    """Each piece's place, the whole, and whether parts of the whole are what was saved."""
    params = params_of(torch.bfloat16)
    optimizer = ShardedAdamW.of(AdamW(params, rounding="remainder", **HYPER))
    exact_steps(optimizer, params, [rank], torch.bfloat16, unused=True, max_norm=None, world=3)
    saved, whole = named(optimizer.state_dict()["state"]), named(optimizer.consolidate(to=None)["state"])
    pieces = optimizer.pieces(saved)
    said = {key: (t.start, t.tensor, list(t.shape)) for key, t in pieces.items() if isinstance(t, Piece)}
    kept = {key: optimizer.part_of(int(key.split(".")[0]), key.split(".")[1], t) for key, t in whole.items()}
    same = all(torch.equal(kept[key], t) and kept[key].shape == t.shape for key, t in saved.items())
    return said, whole, same and kept.keys() == saved.keys(), sorted(pieces.keys() - said.keys())


def test_pieces_are_parts_of_the_whole(tmp_path):
    """Of three ranks, so that a parameter is on two."""
    saids, wholes, sames, steps = zip(*on_ranks(in_pieces, tmp_path, 3), strict=True)
    assert all(sames)
    assert {key for key in wholes[0] if not key.endswith("step")} == {key for said in saids for key in said}
    assert any(start > 0 for said in saids for start, _, _ in said.values())
    for key in {key for said in saids for key in said}:
        found = [said[key] for said in saids if key in said]
        assert all(len(t) for _, t, _ in found), "a rank writes what it has elements of"
        pieces = [Piece(t, torch.Size(shape), start) for start, t, shape in found]
        assert torch.equal(assembled(pieces), wholes[0][key])
    for said, written in zip(saids, steps, strict=True):
        assert written == sorted({f"{key.split('.')[0]}.step" for key in said})
