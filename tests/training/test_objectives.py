"""A step is the same however its batch is cut: into micro-batches, over ranks, under DDP and FSDP."""

import dataclasses
import importlib

import pytest
import tiny_run
import torch
from parallel.gloo_ranks import on_two_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from cs336.models import BlockConfig, Transformer, TransformerConfig
from cs336.nn import AttentionConfig, MoEConfig
from cs336.optim import grad_norm
from cs336.training.decisions import agreed
from cs336.training.learner import Learner
from cs336.training.objectives import NextToken, gradient_scale, micro_batches

MODEL = dataclasses.replace(tiny_run.MODEL, d_model=8, vocab_size=31)  # 31: nothing divides evenly
EXPERTS = TransformerConfig(31, 8, 1, 8, layers=(BlockConfig(AttentionConfig(2), MoEConfig(4, 2, balance_loss=0.5)),))


def batch():
    """Four rows with 8, 1, 5 and 2 targets that count."""
    x_BT1 = torch.randint(31, (4, 9), generator=torch.Generator().manual_seed(0))
    targets = x_BT1[:, 1:].clone()
    for row, count in zip(targets, (8, 1, 5, 2), strict=True):
        row[count:] = -100
    return x_BT1[:, :-1], targets


def step(model, parts):
    """Loss, norm and whole gradients of one step over micro-batches of this rank's rows."""
    totals = torch.zeros(2)
    for part in parts:
        loss, count, _ = NextToken()(model, part)
        loss.backward()
        totals += torch.stack([loss.detach(), count])
    world = 1
    if torch.distributed.is_initialized():
        world = torch.distributed.get_world_size()
        torch.distributed.all_reduce(totals)
    loss, count = totals
    scale = gradient_scale(count, world)
    grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    return (loss / count).item(), [g * scale for g in grads]


def model():
    torch.manual_seed(0)
    return Transformer(MODEL)


def test_ignored_targets_weigh_the_same_in_every_micro_batch_size(tmp_path):
    found = []
    for size in (4, 2, 1):
        learner = Learner(tiny_run.config(tmp_path, model=MODEL, batch_size=4, micro_batch_size=size))
        found.append(learner.update(batch(), lr=0.0))
    learner.model.load_state_dict(Learner(tiny_run.config(tmp_path, model=MODEL)).model.state_dict())
    logits = learner.model(batch()[0])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch()[1].flatten()).backward()
    expected = grad_norm(learner.model.parameters())
    for values in found:
        assert values["loss"].item() == pytest.approx(found[0]["loss"].item(), rel=1e-6)
        assert values["grad_norm"].item() == pytest.approx(expected.item(), rel=1e-5)


MORE = {"label_smoothing": 0.1, "z_loss": 0.01}


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.01}, MORE])
@pytest.mark.parametrize("model", [MODEL, EXPERTS, dataclasses.replace(MODEL, logit_softcap=3.0)])
def test_a_fused_head_trains_the_same(tmp_path, model, options):
    found = []
    for fused in (False, True):
        settings = {"model": model, "batch_size": 4, "objective": NextToken(fused_head=fused, **options)}
        learner = Learner(tiny_run.config(tmp_path, micro_batch_size=2, **settings))
        values = learner.update(batch(), lr=1e-2)
        assert ("cross_entropy" in values) == bool(options or model is EXPERTS)
        found.append([*values.items(), *learner.model.state_dict().items()])
    for (name, plain), (fused_name, fused) in zip(*found, strict=True):
        assert name == fused_name
        torch.testing.assert_close(fused, plain)


@pytest.mark.parametrize("options", [{}, MORE])
def test_a_loss_in_place_of_the_logits_trains_the_same(tmp_path, monkeypatch, options):
    """As on a GPU; what is reported beside the loss is read before."""
    op, found = importlib.import_module("cs336.ops.cross_entropy"), []  # the package has a function of that name
    for in_place in (False, True):
        monkeypatch.setattr(op, "_becomes_its_gradient", lambda *args, is_so=in_place: is_so)
        settings = {"model": MODEL, "batch_size": 4, "micro_batch_size": 2, "objective": NextToken(**options)}
        learner = Learner(tiny_run.config(tmp_path, **settings))
        values = [*learner.update(batch(), lr=1e-2).values(), *learner.update(batch(), lr=1e-2).values()]
        found.append([*values, *(p.detach() for p in learner.model.parameters())])
    for plain, in_place in zip(*found, strict=True):
        torch.testing.assert_close(in_place, plain)


def test_a_soft_cap_fuses_the_head(tmp_path, monkeypatch):
    capped = dataclasses.replace(MODEL, logit_softcap=5.0)
    assert not NextToken().of(MODEL).fused_head
    assert NextToken().of(capped).fused_head
    assert not NextToken(fused_head=False).of(capped).fused_head
    assert NextToken(z_loss=1e-4).of(capped).fused_head
    assert NextToken(fused_head=True).of(MODEL).fused_head
    learner = Learner(tiny_run.config(tmp_path, model=capped, objective=NextToken(z_loss=1e-4)))
    monkeypatch.setattr(learner.model, "logits", None)  # never made whole, by the search for what is not finite either
    learner.update(batch(), lr=1e-3)
    assert learner.first_non_finite(batch()) is None


def test_means_of_means_are_not_what_is_computed():
    """The case that was wrong: rows with few targets would count as much as rows with many."""
    net = model()
    whole = step(net, [batch()])[0]
    means = [step(net, [part])[0] for part in micro_batches(batch(), 1)]
    assert abs(sum(means) / 4 - whole) > 1e-3


def test_nothing_that_counts_is_no_gradient_and_no_nan(tmp_path):
    learner = Learner(tiny_run.config(tmp_path, model=MODEL))
    before = [p.clone() for p in learner.model.parameters()]
    x, y = batch()
    values = learner.update((x, torch.full_like(y, -100)), lr=0.0)
    assert (values["loss"], values["grad_norm"]) == (0, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.model.parameters(), strict=True))


def test_metrics_are_means_over_the_same_count(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Accuracy(NextToken):
        def __call__(self, model: nn.Module, batch):
            loss, count, _ = super().__call__(model, batch)
            return loss, count, {"twice": 2 * loss.detach()}

    tiny = tiny_run.config(tmp_path, model=MODEL, micro_batch_size=1)
    learner = Learner(dataclasses.replace(tiny, objective=Accuracy()))
    values = learner.update(batch(), lr=0.0)
    assert values["twice"].item() == pytest.approx(2 * values["loss"].item())


@pytest.mark.parametrize(("smoothing", "z"), [(0.1, 0.0), (0.0, 0.01), (0.2, 0.02)])
def test_label_smoothing_and_z_loss(smoothing, z):
    net, (x, y) = model(), batch()
    loss, count, metrics = NextToken(label_smoothing=smoothing, z_loss=z)(net, (x, y))
    logits = net(x).flatten(0, 1).double()
    want = nn.functional.cross_entropy(logits, y.flatten(), label_smoothing=smoothing, reduction="sum")
    want = want + z * logits[y.flatten() != -100].logsumexp(-1).square().sum()
    torch.testing.assert_close(loss.double(), want)
    plain, plain_count, no_metrics = NextToken()(net, (x, y))
    assert torch.equal(metrics["cross_entropy"], plain)
    assert (count, no_metrics) == (plain_count, {})
    params = list(net.parameters())
    for got, grad in zip(torch.autograd.grad(loss, params), torch.autograd.grad(want, params), strict=True):
        torch.testing.assert_close(got, grad.float(), atol=1e-5, rtol=1e-4)


def test_bad_regularisers():
    with pytest.raises(ValueError, match="label_smoothing must be a number from 0 to below 1, got 1"):
        NextToken(label_smoothing=1.0)
    with pytest.raises(ValueError, match="z_loss must be a finite number, 0 or more, got -1"):
        NextToken(z_loss=-1.0)


def on_a_rank(rank):
    rows = tuple(t[rank::2] for t in batch())  # 8 + 5 and 1 + 2 targets
    found = {name: step(wrap(model()), micro_batches(rows, 1)) for name, wrap in WRAPPERS.items()}
    return found | {"agreed": agreed(f"of rank {rank}")}


WRAPPERS = {"ddp": DistributedDataParallel, "fsdp": fully_shard}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_ranks(on_a_rank, tmp_path_factory.mktemp("gloo"))


@pytest.mark.parametrize("name", WRAPPERS)
def test_two_ranks_equal_one_process(ranks, name):
    loss, gradients = step(model(), [batch()])
    for rank in range(2):
        their_loss, theirs = ranks[rank][name]
        assert their_loss == pytest.approx(loss, rel=1e-6)
        for ours, grad in zip(gradients, theirs, strict=True):
            torch.testing.assert_close(grad, ours, rtol=1e-4, atol=1e-6)


def test_decisions_are_those_of_rank_0(ranks):
    assert [ranks[rank]["agreed"] for rank in range(2)] == ["of rank 0", "of rank 0"]
