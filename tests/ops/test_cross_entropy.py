import pytest
import torch
import torch.nn.functional as F
from close import assert_close_to_ref

from cs336 import ops


def by_hand(logits, targets, ignore_index=-100, softcap=None, reduction="mean"):
    """-log p(target), probabilities and all, in the logits' dtype."""
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    kept = targets != ignore_index
    p = z.softmax(-1).gather(-1, torch.where(kept, targets, 0)[..., None].long())[..., 0]
    loss = torch.where(kept, -p.log(), 0)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / kept.sum()}[reduction]


def check(logits, targets, **options):
    loss = ops.cross_entropy(logits, targets, **options)
    assert loss.dtype == torch.float32
    dloss = torch.randn_like(loss)
    got = torch.autograd.grad(loss, logits, dloss)

    def plain(dtype):
        logits_ = logits.detach().to(dtype).requires_grad_()
        loss_ = by_hand(logits_, targets, **options)
        return loss_, *torch.autograd.grad(loss_, logits_, dloss.to(loss_.dtype))

    loss64, grad64 = plain(torch.float64)
    assert_close_to_ref(loss, loss64, plain(torch.float32)[0])
    assert_close_to_ref(*got, grad64, plain(logits.dtype)[1])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 257), (2, 3, 5, 11), (1, 1), (64,), (33, 1000)])
def test_against_fp64(device, shape, dtype, reduction):
    logits = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    check(logits, torch.randint(0, shape[-1], shape[:-1], device=device), reduction=reduction)


@pytest.mark.parametrize("ignore_index", [-100, 3, -1])
def test_ignored_rows(device, ignore_index):
    logits = torch.randn(6, 5, 11, device=device, requires_grad=True)
    targets = torch.randint(0, 11, (6, 5), device=device)
    targets[::2] = ignore_index
    check(logits, targets, ignore_index=ignore_index)
    loss = ops.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
    assert torch.equal(loss[::2], torch.zeros_like(loss[::2]))
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index)
    torch.testing.assert_close(ops.cross_entropy(logits, targets, ignore_index=ignore_index), want)


def test_nothing_to_count(device):
    logits = torch.randn(4, 5, device=device, requires_grad=True)
    loss = ops.cross_entropy(logits, torch.full((4,), -100, device=device))
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0
    assert torch.equal(grad, torch.zeros_like(grad))
    assert ops.cross_entropy(logits[:0], torch.zeros(0, dtype=torch.long, device=device)).item() == 0


@pytest.mark.parametrize("softcap", [0.5, 15.0])
def test_softcap(device, softcap):
    logits = (3 * torch.randn(9, 41, device=device)).requires_grad_()
    check(logits, torch.randint(0, 41, (9,), device=device), softcap=softcap)


def test_logits_far_apart(device):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], device=device, requires_grad=True)
    loss = ops.cross_entropy(logits, torch.tensor([0, 0], device=device), reduction="none")
    torch.testing.assert_close(loss, torch.tensor([0.0, 2e4], device=device))
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(grad, torch.tensor([[0.0, 0.0, 0.0], [-1.0, 1.0, 0.0]], device=device))


def test_leaves_the_logits_alone(device):
    logits = torch.randn(4, 5, device=device, requires_grad=True)
    before = logits.detach().clone()
    ops.cross_entropy(logits, torch.arange(4, device=device)).backward()
    assert torch.equal(logits.detach(), before)


def test_int32_targets_and_strided_logits(device):
    logits = torch.randn(11, 7, device=device).T
    targets = torch.randint(0, 11, (7,), device=device)
    want = F.cross_entropy(logits, targets)
    torch.testing.assert_close(ops.cross_entropy(logits, targets.int()), want)


def test_gradcheck():
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([4, -100, 0])
    assert torch.autograd.gradcheck(lambda x: ops.cross_entropy(x, targets, softcap=2.0), logits)


def test_second_derivatives_are_refused():
    logits = torch.randn(3, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(ops.cross_entropy(logits, torch.zeros(3, dtype=torch.long)), logits, create_graph=True)


def test_target_outside_the_vocabulary():
    for bad in (5, -1):
        with pytest.raises((IndexError, RuntimeError)):
            ops.cross_entropy(torch.zeros(2, 5), torch.tensor([0, bad]))


def test_compiles_whole():
    logits, targets = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 4, -100, 2])
    compiled = torch.compile(ops.cross_entropy, backend="aot_eager", fullgraph=True)
    for options in ({}, {"softcap": 3.0, "reduction": "sum"}):
        losses = [f(logits, targets, **options) for f in (compiled, ops.cross_entropy)]
        grads = [torch.autograd.grad(loss, logits)[0] for loss in losses]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*grads)


Z, T = torch.zeros(3, 5), torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((Z[:, :0], T), {}, "V >= 1"),
        ((Z.int(), T), {}, "floating point"),
        ((Z, T.float()), {}, "class indices, got torch.float32"),
        ((Z, T[:2]), {}, r"targets must be \(3,\) on cpu to fit logits \(3, 5\), got \(2,\)"),
        ((Z, T.to("meta")), {}, "on cpu"),
        ((Z, T), {"softcap": -1.0}, "softcap must be positive"),
        ((Z, T), {"reduction": "max"}, "'mean', 'sum' or 'none'"),
    ],
)
def test_bad_arguments(args, options, message):
    with pytest.raises(ValueError, match=message):
        ops.cross_entropy(*args, **options)
