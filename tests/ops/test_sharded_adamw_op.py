"""Every variant of the sharded step on one rank: against adamw_, its own schema, and arguments that do not fit.

Several ranks are in tests/parallel/test_sharded_adamw.py, the events of the native one in test_sharded_adamw_native.py.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from cs336 import ops
from cs336.ops import registry
from cs336.ops.ref import rounding
from cs336.ops.sharded_adamw import ALIGN, SQUARES
from cs336.optim import clip_scale
from cs336.parallel import nccl

NUMELS, NUMEL = [32, 16, 4112, 0], 4176  # the last 16 are nobody's
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
KINDS = {"float32": (torch.float32, False), "bfloat16": (torch.bfloat16, False), "remainder": (torch.bfloat16, True)}


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """One rank, unless this process is one of several already."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group(backend, rank=0, world_size=1, store=store)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(params=registry.NAMESPACE)
def variant(request, group, device):
    """Each variant in turn, forced, and a communicator for it."""
    native = request.param == "native"
    if native and (reason := nccl.missing(torch.device(device))):
        pytest.skip(reason)
    if reason := registry.missing("sharded_adamw_step_", request.param, torch.device(device)):
        pytest.skip(reason)
    with registry.use(request.param):
        yield request.param, nccl.connect(group, device=device, native=native).number


def make(device, kind="float32"):
    dtype, remainder = KINDS[kind]
    torch.manual_seed(0)
    wide, g, m = torch.randn(3, NUMEL, device=device)
    v = torch.rand(NUMEL, device=device)
    p, low = rounding.split(wide) if remainder else (wide.to(dtype), None)
    return [p.contiguous(), g.to(dtype), low, 0.1 * m, v]


def numbers(device):
    return {"steps": torch.tensor([3.0, 1, 7, 1], device=device), "used": torch.tensor([2.0, 0, 1, 1], device=device)}


def raw(tensors, comm, **changed):
    device = tensors[0].device
    lr = torch.tensor(HYPER["lr"], device=device)
    how = numbers(device) | {"numels": NUMELS, "lr": lr, "grad_scale": None} | HYPER | {"comm": comm} | {"lr": lr}
    return (*tensors, *(how | changed).values())


# ---- results ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_is_stepped_as_parameters_are(variant, device, kind):
    """By the same variant of adamw_, in the same bits; what is not used, and what is nobody's, stays."""
    _, comm = variant
    scale = torch.tensor(0.5, device=device)
    ours, theirs = make(device, kind), make(device, kind)
    ops.sharded_adamw_step_(*ours, **HYPER, **numbers(device), numels=NUMELS, comm=comm, grad_scale=scale)
    ops.sharded_adamw_wait_(ours[0], comm)
    for begin, end, step in ((0, 32, 3), (48, 4160, 7)):
        p, g, low, m, v = (None if t is None else t[begin:end] for t in theirs)
        wide = p if low is None else rounding.join(p, low)
        ops.adamw_([wide], [g], [m], [v], **HYPER, step=step, grad_scale=scale)
        if low is not None:
            p[:], low[:] = rounding.split(wide)
    for a, b in zip(ours, theirs, strict=True):
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("kind", KINDS)
def test_native_steps_have_the_bits_of_the_reference(group, device, kind, clip):
    if reason := nccl.missing(torch.device(device)):
        pytest.skip(reason)

    def trained(variant):
        comm = nccl.connect(group, device=device, native=variant == "native").number
        tensors, gradients = make(device, kind), torch.Generator(device).manual_seed(1)
        squares = torch.empty(SQUARES, device=device, dtype=torch.float64)
        for step in range(1, 6):
            tensors[1].copy_(torch.randn(NUMEL, device=device, generator=gradients))
            totals, count = torch.ones(5, device=device), torch.full((4,), float(step), device=device)
            with registry.use(variant):
                ops.sharded_adamw_reduce_(tensors[1], squares, comm)
                ops.sharded_adamw_total_(totals, squares, comm)
                scale = None if clip is None else clip_scale(totals[0].sqrt(), clip)
                how = HYPER | {"steps": count, "used": totals[1:], "numels": NUMELS, "grad_scale": scale}
                ops.sharded_adamw_step_(*tensors, **how, comm=comm)
                ops.sharded_adamw_wait_(tensors[0], comm)
        return tensors

    for a, b in zip(trained("native"), trained("ref"), strict=True):
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_sums_and_squares(variant, device, kind):
    _, comm = variant
    _, g, *_ = make(device, kind)
    squares, totals = (
        torch.full((2 * SQUARES,), 9.0, device=device, dtype=torch.float64),
        torch.tensor([7.0, 1, 0], device=device),
    )
    before = g.clone()
    ops.sharded_adamw_reduce_(g, squares[:SQUARES], comm)
    ops.sharded_adamw_reduce_(g, squares[SQUARES:], comm)
    ops.sharded_adamw_total_(totals, squares, comm)
    assert torch.equal(g, before)  # of one rank
    torch.testing.assert_close(totals[0].double(), 2 * g.double().square().sum(), rtol=1e-5, atol=0)
    assert totals[1:].tolist() == [1, 0]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # from the interpreter
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800000, 0x7F7FFFFF, 0x3F808000, 0x3F807FFF])
def test_remainders_of_special_weights(variant, device, bits):
    """NaN stays NaN; what rounds to infinity is not infinite. Nothing moves where lr is 0."""
    _, comm = variant
    wide = torch.full((ALIGN,), bits, dtype=torch.int32, device=device).view(torch.float32)
    p, low = rounding.split(wide)
    g, m, v = p.clone().zero_(), *torch.zeros(2, ALIGN, device=device)
    one = torch.ones(1, device=device)
    how = HYPER | {"lr": 0.0, "weight_decay": 0.0}
    ops.sharded_adamw_step_(p, g, low, m, v, **how, steps=one, used=one, numels=[ALIGN], comm=comm)
    ops.sharded_adamw_wait_(p, comm)
    torch.testing.assert_close(rounding.join(p, low), wide - 0.0 * wide, rtol=0, atol=0, equal_nan=True)


# ---- torch ----


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(variant, device, kind):
    name, comm = variant
    tensors = make(device, kind)
    squares, totals = torch.zeros(SQUARES, device=device, dtype=torch.float64), torch.zeros(3, device=device)
    for op, args in {
        "sharded_adamw_reduce_": (tensors[1], squares, comm),
        "sharded_adamw_total_": (totals, squares, comm),
        "sharded_adamw_step_": raw(tensors, comm),
        "sharded_adamw_wait_": (tensors[0], comm),
    }.items():
        torch.library.opcheck(registry.OPS[op].overloads[name], args)


# ---- refusals ----

BAD = {
    "param": lambda t: {0: t[0][1:]},
    "grad": lambda t: {1: t[1].double()},
    "remainder": lambda t: {2: torch.zeros(NUMEL, dtype=torch.int16)},
    "exp_avg ": lambda t: {3: t[3][:16]},
    "exp_avg_sq": lambda t: {4: t[4].bfloat16()},
    "steps": lambda t: {5: torch.ones(3)},
    "used": lambda t: {6: torch.ones(4).long()},
    "numels": lambda t: {7: [8, 24, 0, 0]},
    "numels must": lambda t: {7: [32, 16, 4128, 16]},
    "lr": lambda t: {8: torch.ones(2)},
    "grad_scale": lambda t: {9: torch.ones(())[None].double()},
    "beta": lambda t: {10: 1.0},
    "eps": lambda t: {12: -1.0},
    "comm": lambda t: {14: 1 << 40},
}


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_named(variant, device, what):
    name, comm = variant
    tensors = make(device)
    before = [None if t is None else t.clone() for t in tensors]
    args = list(raw(tensors, comm))
    for i, value in BAD[what](tensors).items():
        args[i] = value.to(device) if isinstance(value, torch.Tensor) else value
    with pytest.raises((ValueError, RuntimeError), match=what.split()[0]):
        registry.OPS["sharded_adamw_step_"].overloads[name](*args)
    assert all(a is None or torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_other_refusals(variant, device):
    name, comm = variant
    flat = torch.zeros(NUMEL, device=device)

    def refuse(op, *args, match):
        with pytest.raises((ValueError, RuntimeError), match=match):
            registry.OPS[op].overloads[name](*args)

    refuse(
        "sharded_adamw_reduce_",
        flat[:-1],
        torch.zeros(SQUARES, device=device, dtype=torch.float64),
        comm,
        match="grad must have a mult",
    )
    refuse("sharded_adamw_reduce_", flat, torch.zeros(3, device=device), comm, match="squares must")
    refuse(
        "sharded_adamw_reduce_",
        flat.half(),
        torch.zeros(SQUARES, device=device, dtype=torch.float64),
        comm,
        match="grad must be",
    )
    refuse("sharded_adamw_total_", flat[:0], flat.double(), comm, match="totals must have an element")
    refuse("sharded_adamw_wait_", flat[:0], comm, match="param must have a multiple")


def test_a_communicator_without_nccl_is_not_native(group):
    made = nccl.connect(group, device="cpu")
    assert nccl.connect(device="cpu") is made
    reason = registry.OPS["sharded_adamw_wait_"].supports["native"](torch.zeros(16), made.number)
    assert reason == f"communicator {made.number} was made without NCCL: connect with native=True"
    made.close()
    with pytest.raises(ValueError, match=f"comm must be the number of an open communicator.*got {made.number}"):
        ops.sharded_adamw_wait_(torch.zeros(16), made.number)
    assert nccl.connect(device="cpu") is not made


def test_ranks_read_the_id_that_rank_0_made(monkeypatch):
    """Of each connection its own; NCCL is a list of who came with which id."""
    came, store = [], dist.HashStore()

    def unique_id(buffer):
        buffer.raw = bytes([len(came)]) * nccl.ID_BYTES

    def connect(number, unique, *where):
        came.append((number, unique.raw[0], *where))

    library = SimpleNamespace(cs336_nccl_unique_id=unique_id, cs336_nccl_connect=connect)
    monkeypatch.setattr(nccl, "_library", lambda: library)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    for number in (1, 2):
        for rank in range(3):
            made = SimpleNamespace(rank=rank, size=3, number=number, device=torch.device("cuda", rank))
            nccl._connect_nccl(made, SimpleNamespace(get_group_store=lambda: store))
    assert came == [(number, 3 * (number - 1), rank, 3, rank) for number in (1, 2) for rank in range(3)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_in_a_cuda_graph_takes_new_numbers(group):
    if reason := nccl.missing(torch.device("cuda")):
        pytest.skip(reason)
    comm = nccl.connect(group, device="cuda", native=True).number
    lr, squares, totals = (
        torch.tensor(0.1, device="cuda"),
        torch.zeros(SQUARES, device="cuda", dtype=torch.float64),
        torch.ones(5, device="cuda"),
    )
    ours, theirs, how = make("cuda"), make("cuda"), HYPER | numbers("cuda") | {"lr": lr}

    def step(tensors):
        ops.sharded_adamw_reduce_(tensors[1], squares, comm)
        ops.sharded_adamw_total_(totals, squares, comm)
        ops.sharded_adamw_step_(*tensors, **how, numels=NUMELS, comm=comm)
        ops.sharded_adamw_wait_(tensors[0], comm)

    step(make("cuda"))  # makes what is made once
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(ours)
    for new in (0.1, 0.01):
        lr.fill_(new)
        graph.replay()
        step(theirs)
    assert all(a is None or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
