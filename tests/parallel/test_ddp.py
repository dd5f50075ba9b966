import pytest
import torch
import torch.distributed as dist
from gloo_ranks import WORLD, error_of, on_two_ranks
from torch import nn

from cs336.parallel import DDP, count_traffic
from cs336.parallel import collectives as c

STEPS, ROWS = 3, 8
BUCKETS = {"each": 0, "flat": None, "25": 25.0, "small": 0.0005}  # the last: 524 bytes, several buckets


class Net(nn.Module):
    """Odd sizes, a tied head, a frozen layer, one that nobody uses and one that only rows with a mark use."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(13, 7)
        self.frozen = nn.Linear(7, 7)
        self.frozen.requires_grad_(False)
        self.hidden = nn.Linear(7, 11)
        self.back = nn.Linear(11, 7, bias=False)
        self.gain = nn.Parameter(torch.ones(()))
        self.unused = nn.Linear(3, 5)
        self.rare = nn.Linear(7, 7)
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("offset", torch.randn(7))
        self.register_buffer("count", torch.tensor(seed))

    def forward(self, ids, rare):
        x = self.frozen(self.embed(ids)) + self.offset
        x = x + self.back(self.hidden(x).relu()) * self.gain
        return self.head(self.rare(x) if rare else x)


def rows(step):
    return torch.randint(13, (2, ROWS, 5), generator=torch.Generator().manual_seed(step))


def loss_of(net, step, part, rare):
    x, y = rows(step)[:, part]
    return nn.functional.cross_entropy(net(x, rare).flatten(0, 1), y.flatten())


def train(net, parts, rares, finish=lambda: None, no_sync=None, set_to_none=True):
    """Losses, gradients and weights after each step of AdamW, whose loss is the mean over the parts."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    record = []
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=set_to_none)
        losses = []
        for i, (part, rare) in enumerate(zip(parts, rares, strict=True)):
            loss = loss_of(net, step, part, rare) / len(parts)
            if no_sync is not None and i < len(parts) - 1:
                with no_sync():
                    loss.backward()
            else:
                loss.backward()
            losses.append(loss.detach())
        finish()
        module = net.module if isinstance(net, DDP) else net
        grads = {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}
        optimizer.step()
        record.append((sum(losses), grads, {n: p.detach().clone() for n, p in module.state_dict().items()}))
    return record


def parts_of(rank, count=1):
    size = ROWS // WORLD // count
    return [slice(rank * ROWS // WORLD + i * size, rank * ROWS // WORLD + (i + 1) * size) for i in range(count)]


def the_collectives(rank):
    mine = torch.arange(4.0) + 10 * rank
    results = {"all_reduce": mine.clone()}
    with count_traffic() as traffic:
        c.all_reduce(results["all_reduce"])
        c.reduce_scatter(scattered := torch.empty(2), mine.clone())
        c.all_gather(gathered := torch.empty(8), mine)
        c.all_to_all(exchanged := torch.empty(4), mine)
        c.broadcast(sent := mine.clone(), 1)
    c.all_reduce(torch.ones(3))  # not counted
    results |= {"reduce_scatter": scattered, "all_gather": gathered, "all_to_all": exchanged, "broadcast": sent}
    return results, dict(traffic.bytes), dict(traffic.calls)


def mistakes(rank):
    def late_gradient():
        net = DDP(nn.Linear(2, 2))
        for _ in range(2):
            net(torch.ones(1, 2)).sum().backward()

    def thawed():
        net = DDP(Net(0))
        net.module.frozen.requires_grad_(True)
        loss_of(net, 0, parts_of(rank)[0], False).backward()
        net.finish_gradient_synchronization()

    wide = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4 + rank), nn.Linear(4 + rank, 1 + rank))
    frozen = nn.Linear(2, 2)
    frozen.bias.requires_grad_(rank == 0)
    found = {
        "shape": error_of(lambda: DDP(wide)),
        "more": error_of(lambda: DDP(nn.Linear(2, 2, bias=rank == 0))),
        "frozen": error_of(lambda: DDP(frozen)),
        "bucket": error_of(lambda: DDP(nn.Linear(2, 2), bucket_mb=1.0 + rank)),
        "negative": error_of(lambda: DDP(nn.Linear(2, 2), bucket_mb=-1)),
        "thawed": error_of(thawed),
        "late": error_of(late_gradient),
    }
    dist.barrier()
    return found


def case(rank):
    results = {"collectives": the_collectives(rank), "mistakes": mistakes(rank)}
    for name, bucket_mb in BUCKETS.items():
        for kept in (True, False):
            net = DDP(Net(seed=rank), bucket_mb)
            results[name, kept] = train(
                net, parts_of(rank), [False], net.finish_gradient_synchronization, set_to_none=kept
            )
        net = DDP(Net(seed=rank), bucket_mb)
        results[name, "accumulate"] = train(
            net, parts_of(rank, 2), [False] * 2, net.finish_gradient_synchronization, net.no_sync
        )
        net = DDP(Net(seed=rank), bucket_mb)
        results[name, "rare"] = train(net, parts_of(rank), [rank == 1], net.finish_gradient_synchronization)
        net = DDP(Net(seed=rank), bucket_mb)
        with count_traffic() as traffic:
            loss_of(net, 0, parts_of(rank)[0], True).backward()
            overlapped = traffic.calls["all_reduce"]
            net.finish_gradient_synchronization()
        storages = {p.grad.untyped_storage().data_ptr() for p in net.parameters() if p.grad is not None}
        results[name, "traffic"] = (overlapped, dict(traffic.calls), dict(traffic.bytes), len(storages))
    net = DDP(nn.BatchNorm1d(3).to(torch.bfloat16))
    with net.no_sync():
        net(torch.full((2, 3), float(rank), dtype=torch.bfloat16)).sum().backward()
    net.finish_gradient_synchronization()  # no backward outside no_sync: what was accumulated is averaged
    results["bf16"] = net.module.bias.grad
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_ranks(case, tmp_path_factory.mktemp("ddp"))


def assert_same(got, want):
    """Gradients, and weights after steps of AdamW, which turns the rounding of tiny gradients into 1e-5 of weight."""
    for (_, grads, weights), (_, want_grads, want_weights) in zip(got, want, strict=True):
        assert {n for n, g in grads.items() if g is None} == {n for n, g in want_grads.items() if g is None}
        for name, grad in want_grads.items():
            if grad is not None:
                torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)
        for name, weight in want_weights.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("kind", [True, False, "accumulate", "rare"])
@pytest.mark.parametrize("bucket", BUCKETS)
def test_two_ranks_equal_one_process(ranks, bucket, kind):
    parts = {"accumulate": 2}.get(kind, 1)
    every = [p for rank in range(WORLD) for p in parts_of(rank, parts)]
    want = train(Net(seed=0), every, [kind == "rare" and p.start > 0 for p in every], set_to_none=kind is not False)
    assert_same(ranks[0][bucket, kind], want)
    assert_same(ranks[1][bucket, kind], want)
    for step, (loss, *_) in enumerate(want):
        mean = sum(ranks[rank][bucket, kind][step][0] for rank in range(WORLD)) / WORLD
        torch.testing.assert_close(mean, loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bucket", BUCKETS)
def test_ranks_stay_equal_bit_for_bit(ranks, bucket):
    for (_, grads, weights), (_, other_grads, other_weights) in zip(*(r[bucket, "rare"] for r in ranks), strict=True):
        assert all(torch.equal(w, other_weights[n]) for n, w in weights.items())
        assert all(torch.equal(g, other_grads[n]) for n, g in grads.items() if g is not None)
    assert grads["unused.weight"] is None
    assert weights["count"] == 0  # rank 0's


def test_buckets_start_in_the_backward_and_hold_the_gradients(ranks):
    trained = [p for p in Net(0).parameters() if p.requires_grad]
    used = len(trained) - 2
    size = 4 * (sum(p.numel() for p in trained) + len(trained))  # gradients and a flag each
    for rank in ranks:
        overlapped, calls, sent, storages = rank["each", "traffic"]
        assert (calls["all_reduce"], storages) == (len(trained), used)
        assert overlapped == 2  # rare; the next, unused, waits for the end and so do those behind it
        assert sent["all_reduce"] == size
        assert rank["flat", "traffic"] == (0, {"all_reduce": 1}, {"all_reduce": size}, 1)
        assert 2 < rank["small", "traffic"][1]["all_reduce"] < len(trained)


def test_collectives_and_their_bytes(ranks):
    for rank, (results, sent, calls) in enumerate(r["collectives"] for r in ranks):
        whole = torch.tensor([10.0, 12, 14, 16])
        assert torch.equal(results["all_reduce"], whole)
        assert torch.equal(results["reduce_scatter"], whole[2 * rank : 2 * rank + 2])
        assert results["all_gather"].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
        assert results["all_to_all"].tolist() == [2 * rank, 2 * rank + 1, 2 * rank + 10, 2 * rank + 11]
        assert results["broadcast"].tolist() == [10, 11, 12, 13]
        assert sent == {"all_reduce": 16, "reduce_scatter": 8, "all_gather": 16, "all_to_all": 8, "broadcast": 16}
        assert set(calls.values()) == {1}


@pytest.mark.parametrize(
    ("size", "world", "want"), [(1024, 1, (0, 0, 0)), (1024, 8, (1792, 896, 1024)), (0, 8, (0, 0, 0))]
)
def test_ring_bytes(size, world, want):
    assert tuple(c.ring_bytes(name, size, world) for name in ("all_reduce", "all_gather", "broadcast")) == want


def test_mistakes_are_named_on_every_rank(ranks):
    for rank in ranks:
        found = rank["mistakes"]
        assert "rank 0 has 1.weight: float32 [4, 3], trained; rank 1 has 1.weight: float32 [5, 3]" in found["shape"]
        assert "rank 0 has bias: float32 [2], trained; rank 1 has nothing more" in found["more"]
        assert "rank 0 has bias: float32 [2], trained; rank 1 has bias: float32 [2]." in found["frozen"]
        assert "rank 0 has bucket_mb: 1.0; rank 1 has bucket_mb: 2.0" in found["bucket"]
        assert found["negative"] == "ValueError: bucket_mb must be 0 or more, or None for one bucket, got -1"
        assert found["thawed"].startswith("ValueError: frozen.weight was frozen or not there when DDP was made")
        assert found["late"].startswith("RuntimeError: a second gradient of a parameter of shape")


def test_bfloat16(ranks):
    assert all(torch.equal(r["bf16"], torch.full((3,), 2.0, dtype=torch.bfloat16)) for r in ranks)
