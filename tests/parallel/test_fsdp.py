"""FSDP on three processes, which split nothing evenly, against plain training on the whole batch."""

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import error_of, on_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

from cs336.parallel import FSDP, count_traffic
from cs336.parallel.unit import Unit

RANKS, ROWS, STEPS = 3, 12, 3
KINDS = (torch.float16, torch.float32, torch.float64)  # as wide as a master in bfloat16, and wider


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(7, 11)
        self.back = nn.Linear(11, 7, bias=False)
        self.unused = nn.Parameter(torch.ones(2))
        self.rare = nn.Parameter(torch.ones(7))
        self.gain = nn.Parameter(torch.ones(()))
        self.frozen = nn.Parameter(torch.full((7,), 0.5), requires_grad=False)

    def forward(self, x, rare):
        y = self.back(self.inner(x).tanh()) * self.gain * self.frozen
        return x + (y * self.rare if rare else y)


class Net(nn.Module):
    """A tied head, frozen and unused parameters, and one that only rank 0 uses."""

    def __init__(self, recompute=False, rounds=1):
        super().__init__()
        torch.manual_seed(3)
        self.rounds = rounds
        self.embed = nn.Embedding(13, 7)
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("offset", torch.randn(7))
        self.recompute = recompute

    def forward(self, ids, rare=False):
        x = self.embed(ids) + self.offset.to(self.embed.weight.dtype)
        for layer in [*self.layers] * self.rounds:
            x = checkpoint(layer, x, rare, use_reentrant=False) if self.recompute else layer(x, rare)
        return self.head(x)


def loss_of(net, step, rows, rare=False):
    ids = torch.randint(13, (2, ROWS, 5), generator=torch.Generator().manual_seed(step))[:, rows]
    return nn.functional.cross_entropy(net(ids[0], rare).flatten(0, 1), ids[1].flatten())


def train(net, params, parts, finish=lambda: None, unsynced=None, together=False):
    optimizer = torch.optim.AdamW(params, lr=0.01)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        if together:
            sum(loss_of(net, step, rows, rare) / len(parts) for rows, rare in parts).backward()
            finish()
            optimizer.step()
            continue
        for i, (rows, rare) in enumerate(parts):
            loss = loss_of(net, step, rows, rare) / len(parts)
            if unsynced is not None and i < len(parts) - 1:
                with unsynced():
                    loss.backward()
            else:
                loss.backward()
                finish()
            losses.append(loss.item())
        optimizer.step()
    return losses


def part(rank, half=None):
    size = ROWS // RANKS
    if half is None:
        return slice(rank * size, (rank + 1) * size)
    return slice(rank * size + half * size // 2, rank * size + (half + 1) * size // 2)


def sharded(rank, parts, *, recompute=False, unsynced=False, cast=False, together=False, rounds=1, **options):
    net = Net(recompute, rounds)
    if rank:
        nn.init.zeros_(net.embed.weight)  # rank 0's is taken
    if cast:
        linears = [m for m in net.layers.modules() if isinstance(m, nn.Linear)]
        options |= {"compute_dtype": torch.bfloat16, "computed": [p for m in linears for p in m.parameters()]}
    model = FSDP(net, **options)
    finish, no_sync = model.finish_gradient_synchronization, model.no_sync if unsynced else None
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        train(model, model.parameters(), parts, finish, no_sync, together)
    with model.gathered() as whole:
        gathered = {name: t.detach().clone() for name, t in whole.state_dict().items()}
    everywhere, of_zero = model.full_state_dict(None), model.full_state_dict()
    assert (of_zero is None) == (rank > 0)
    assert all(torch.equal(value, everywhere[name]) for name, value in (of_zero or {}).items())
    return everywhere, gathered


def gathered_as(dtype):
    """Whole parameters of which every other one computes in another dtype than the masters'."""
    net = Net().to(torch.bfloat16)
    model = FSDP(net, dtype, computed=list(net.parameters())[::2])
    with count_traffic() as traffic, model.gathered() as whole:
        return {name: p.detach().clone() for name, p in whole.named_parameters()}, traffic.bytes["all_gather"]


def most_whole(rank):
    """How many units are whole at once, at most, beside the root; bytes that are whole afterwards; messages."""
    model = FSDP(Net(recompute=True))
    whole, most = set(), 0
    wait, release = Unit.wait, Unit.release

    def waited(self):
        nonlocal most
        wait(self)
        if self is not model._root:
            whole.add(id(self))
            most = max(most, len(whole))

    def released(self):
        release(self)
        whole.discard(id(self))

    Unit.wait, Unit.release = waited, released
    try:
        with count_traffic() as traffic:
            loss_of(model, 0, part(rank)).backward()
            model.finish_gradient_synchronization()
    finally:
        Unit.wait, Unit.release = wait, release
    left = sum(p.untyped_storage().nbytes() for p in model.module.parameters())
    return most, left, dict(traffic.calls)


def on_a_rank(rank):
    mine = [(part(rank), False)]
    halves = [(part(rank, 0), False), (part(rank, 1), False)]
    results = {
        "zero3": sharded(rank, mine),
        "zero2": sharded(rank, mine, reshard=False),
        "recomputed": sharded(rank, mine, recompute=True),
        "accumulated": sharded(rank, halves),
        "no_sync": sharded(rank, halves, unsynced=True),
        "rare": sharded(rank, [(part(rank), rank == 0)]),
        "zero2 accumulated": sharded(rank, halves, reshard=False),
        "zero2 no_sync": sharded(rank, halves, unsynced=True, reshard=False),
        "two forwards": sharded(rank, halves, together=True),
        "two forwards zero2": sharded(rank, halves, together=True, reshard=False),
        "two forwards recomputed": sharded(rank, halves, together=True, recompute=True),
        "twice": sharded(rank, mine, rounds=2),
        "twice zero2": sharded(rank, mine, rounds=2, reshard=False),
        "twice recomputed": sharded(rank, mine, rounds=2, recompute=True),
        "bf16": sharded(rank, mine, compute_dtype=torch.bfloat16),
        "bf16 zero2": sharded(rank, mine, compute_dtype=torch.bfloat16, reshard=False),
        "bf16 recomputed": sharded(rank, mine, compute_dtype=torch.bfloat16, recompute=True),
        "bf16 no_sync": sharded(rank, halves, unsynced=True, compute_dtype=torch.bfloat16),
        "cast": sharded(rank, halves, cast=True),
        "cast zero2": sharded(rank, halves, cast=True, reshard=False),
        "cast recomputed": sharded(rank, halves, cast=True, recompute=True),
        "gathered": {str(dtype): gathered_as(dtype) for dtype in KINDS},
        "whole": most_whole(rank),
    }
    model = FSDP(Net())
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    results["pieces"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss_of(model, 0, part(rank)).backward()
    model.finish_gradient_synchronization()
    results["frozen"] = frozen
    results["norm"] = model.grad_norm()
    results["unused"] = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    torch.manual_seed(rank)
    wide = nn.Linear(2, 2 + rank)
    results["shape"] = error_of(lambda: FSDP(wide))
    net = Net()
    results["computed"] = error_of(lambda: FSDP(net, torch.bfloat16, computed=list(net.layers[rank].parameters())))
    results["no float"] = [error_of(lambda dtype=dtype: FSDP(net, dtype)) for dtype in ("bfloat16", torch.int8)]
    results["no dtype"] = error_of(lambda: FSDP(net, computed=net.parameters()))
    results["state_dict"] = error_of(model.state_dict)
    results["module's state_dict"] = error_of(model.module.state_dict)
    results["fit"] = error_of(lambda: model.load_whole({"embed.weight": torch.zeros(13, 7)}))
    dist.barrier()
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(on_a_rank, tmp_path_factory.mktemp("gloo"), RANKS)


def alone(rare=(False,) * RANKS, rounds=1):
    net = Net(rounds=rounds)
    train(net, net.parameters(), [(part(rank), rare[rank]) for rank in range(RANKS)])
    return net.state_dict()


ALIKE = ["zero3", "zero2", "recomputed", "accumulated", "no_sync", "zero2 accumulated", "zero2 no_sync", "rare"]
ALIKE += [f"{name}{kind}" for name in ("two forwards", "twice") for kind in ("", " zero2", " recomputed")]


@pytest.mark.parametrize("name", ALIKE)
def test_three_ranks_train_as_one_process(ranks, name):
    want = alone((True, False, False) if name == "rare" else (False,) * RANKS, 2 if "twice" in name else 1)
    for found in ranks:
        for ours in found[name]:
            assert ours.keys() == want.keys()
            for key, value in want.items():
                torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("zero3", ["zero2", "recomputed"]),
        ("accumulated", ["zero2 accumulated"]),
        ("no_sync", ["zero2 no_sync"]),
        ("bf16", ["bf16 zero2", "bf16 recomputed"]),
        ("cast", ["cast zero2", "cast recomputed"]),
    ],
)
def test_units_do_not_change_what_is_computed(ranks, name, others):
    for found in ranks:
        for other in others:
            assert all(torch.equal(found[other][0][key], value) for key, value in found[name][0].items()), other


@pytest.mark.parametrize("name", ["bf16", "bf16 no_sync"])
def test_masters_stay_in_float32(ranks, name):
    want = alone()
    for found in ranks:
        masters, whole = found[name]
        assert {t.dtype for t in masters.values()} == {torch.float32}
        assert whole["embed.weight"].dtype == torch.bfloat16
        for key, value in want.items():
            assert (masters[key] - value).abs().max() < 0.05
        assert not torch.equal(masters["embed.weight"], masters["embed.weight"].bfloat16().float())


def test_what_autocast_casts_is_gathered_in_its_dtype(ranks):
    for found in ranks:
        masters, whole = found["cast"]
        low = {name for name, t in whole.items() if t.dtype == torch.bfloat16}
        assert low == {f"layers.{i}.{name}" for i in range(4) for name in ("inner.weight", "inner.bias", "back.weight")}
        for name, t in whole.items():
            assert torch.equal(t, masters[name].to(t.dtype)), name


@pytest.mark.parametrize("dtype", KINDS)
def test_parameters_of_several_dtypes_are_one_message(ranks, dtype):
    want = dict(Net().to(torch.bfloat16).named_parameters())
    for found in ranks:
        gathered, sent = found["gathered"][str(dtype)]
        padded = [-(-p.numel() // RANKS) * RANKS * p.itemsize for p in gathered.values()]
        assert sent <= (sum(padded) + 5 * RANKS * 16) * (RANKS - 1) / RANKS
        assert list(gathered) == list(want)
        for i, (name, p) in enumerate(want.items()):
            as_computed = p.detach() if i % 2 else p.detach().to(dtype)
            assert gathered[name].dtype == as_computed.dtype
            assert torch.equal(gathered[name], as_computed), name


def test_one_unit_is_whole_at_a_time(ranks):
    for found in ranks:
        most, left, calls = found["whole"]
        assert (most, left) == (1, 0)  # the next is on its way meanwhile, in one buffer
        assert calls["reduce_scatter"] == 5  # four units and the root
        assert calls["all_gather"] == 1 + 4 + 3  # the last is still whole when its backward begins


def test_pieces_make_the_whole(ranks):
    want = dict(Net().named_parameters())
    for name, p in want.items():
        pieces = [found["pieces"][name] for found in ranks]
        assert torch.equal(torch.cat(pieces).view(p.shape), p)
        assert max(piece.numel() for piece in pieces) == -(-p.numel() // RANKS)


def test_gradients(ranks):
    net = Net()
    for rank in range(RANKS):
        (loss_of(net, 0, part(rank)) / RANKS).backward()
    norm = torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None]).norm()
    for found in ranks:
        torch.testing.assert_close(found["norm"], norm)
        assert found["frozen"] == [f"layers.{i}.frozen" for i in range(4)]
        assert found["unused"] == [f"layers.{i}.{name}" for i in range(4) for name in ("unused", "rare")]


def test_mistakes(ranks):
    for found in ranks:
        assert "rank 0 has weight: float32 [2, 2], trained; rank 1 has weight: float32 [3, 2]" in found["shape"]
        assert "rank 0 has layers.0.unused: float32 [2], trained, computed in bfloat16; rank 1" in found["computed"]
        assert [error.partition(", got ")[2] for error in found["no float"]] == ["'bfloat16'", "torch.int8"]
        assert "give that too" in found["no dtype"]
        assert "full_state_dict()" in found["state_dict"]
        assert found["module's state_dict"] == found["state_dict"]
        assert "missing ['offset', 'layers.0.unused'" in found["fit"]
