import weakref

import pytest
import torch
import torch.nn.functional as F
from close import assert_close_to_ref
from torch._subclasses.fake_tensor import FakeTensorMode

from cs336 import ops
from cs336.ops import dispatch, registry
from cs336.ops.linear_cross_entropy import (
    CHUNK_BYTES,
    ROW_UNIT,
    _backward_op,
    _chunks,
    _forward_op,
    _gradient_op,
    default_chunk_size,
)

CUDA = torch.cuda.is_available()
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under Triton's interpreter


@pytest.fixture(params=[None, "native", "triton"])
def variant(request, device):
    """Whose kernels the chunks' logits go through."""
    logits, targets = torch.zeros(1, 2, device=device), torch.zeros(1, dtype=torch.long, device=device)
    if request.param and (
        reason := registry.why_not("cross_entropy_fwd", request.param, logits, targets, -100, None, 0.0, 0.0, False)
    ):
        pytest.skip(reason)
    with registry.use(request.param):
        yield request.param


def leaves_of(lead, H, V, dtype, device, bias=True):
    x = torch.randn(*lead, H, device=device).to(dtype)
    weight = (torch.randn(V, H, device=device) / H**0.5).to(dtype)
    layer = [x, weight, torch.randn(V, device=device).to(dtype)] if bias else [x, weight]
    return [t.requires_grad_() for t in layer]


def plain(leaves, targets, dtype, douts, **options):
    """The losses in fp32 or wider, of logits in `dtype`."""
    again = [t.detach().to(dtype).requires_grad_() for t in leaves]
    logits = F.linear(*again)
    outs = ops.cross_entropy(logits if dtype == F64 else logits.float(), targets, **options)
    outs = outs if isinstance(outs, tuple) else (outs,)
    return *outs, *torch.autograd.grad(outs, again, [d.to(o.dtype) for d, o in zip(douts, outs, strict=True)])


def check(leaves, targets, chunk_size, **options):
    x, weight, *bias = leaves
    outs = ops.linear_cross_entropy(
        x, weight, targets, bias=bias[0] if bias else None, chunk_size=chunk_size, **options
    )
    outs = outs if isinstance(outs, tuple) else (outs,)
    # what scales the gradient of weight after its rounding scales it exactly
    douts = [torch.randn_like(out) if out.dim() else torch.full_like(out, -0.5) for out in outs]
    got = *outs, *torch.autograd.grad(outs, leaves, douts)
    with registry.use("ref"):
        wide, torchs = (plain(leaves, targets, dtype, douts, **options) for dtype in (F64, x.dtype))
    for ours, want, torchs_own in zip(got, wide, torchs, strict=True):
        scale = 1.0 if ours.dtype == F32 else 0.0  # sums of many terms
        assert_close_to_ref(ours, want, torchs_own.to(ours.dtype), scale)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [F32, BF16, *([F16] if CUDA else [])])
@pytest.mark.parametrize(
    ("lead", "H", "V", "chunk_size"),
    [
        ((21,), 24, 101, 8),
        ((2, 40), 16, 160, None),
        ((2, 20), 16, 64, None),
        ((5,), 1, 1, 2),
        (((700,), 256, 3001, 128) if CUDA else ((9,), 8, 33, 4)),
    ],
)
def test_against_fp64(variant, device, lead, H, V, chunk_size, dtype, reduction):
    leaves, targets = leaves_of(lead, H, V, dtype, device), torch.randint(0, V, lead, device=device)
    if len(lead) == 1:
        targets[1::4] = -100
    check(leaves, targets, chunk_size, reduction=reduction)


TERMS = [
    {"softcap": 2.0, "z_loss": 1e-2},
    {"label_smoothing": 0.2, "ignore_index": 0},
    {"return_entropy": True, "reduction": "sum"},
    {"return_lse": True, "return_entropy": True, "softcap": 5.0, "reduction": "none"},
]


@pytest.mark.parametrize("options", TERMS)
@pytest.mark.parametrize("chunk_size", [5, None])
def test_terms(variant, device, chunk_size, options):
    leaves, targets = leaves_of((12,), 24, 50, F32, device, bias=False), torch.randint(0, 50, (12,), device=device)
    check(leaves, targets, chunk_size, **options)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "options", [{}, {"z_loss": 1e-2}, {"label_smoothing": 0.2}, TERMS[0] | {"label_smoothing": 0.2}]
)
@pytest.mark.parametrize("chunk_size", [5, None])
def test_what_is_minimised_and_the_cross_entropy(variant, device, monkeypatch, chunk_size, options, dtype):
    leaves, targets = leaves_of((2, 9), 24, 50, dtype, device, bias=False), torch.randint(0, 50, (2, 9), device=device)
    targets[0, 2:5] = -100
    loss, alone = ops.linear_loss_sums(*leaves, targets, chunk_size=chunk_size, **options)
    assert not alone.requires_grad
    same = ops.linear_cross_entropy(*leaves, targets, chunk_size=chunk_size, reduction="sum", **options)
    both = [(out, *torch.autograd.grad(out, leaves)) for out in (loss, same)]
    torch.testing.assert_close(*both, rtol=0, atol=0)
    softcap = options.get("softcap")
    with registry.use("ref"):
        want = ops.linear_cross_entropy(
            *(t.detach().double() for t in leaves), targets, softcap=softcap, reduction="sum"
        )
    assert alone.item() == pytest.approx(want.item(), rel=1e-6 if dtype == F32 else 1e-2)

    def refuses(*_):
        raise AssertionError("gradients of what learns nothing")

    monkeypatch.setitem(ops.linear_loss_sums.__globals__, "_gradient_op", refuses)
    with torch.no_grad():
        again = ops.linear_loss_sums(*leaves, targets, chunk_size=chunk_size, **options)
    torch.testing.assert_close(again, (loss.detach(), alone), rtol=1e-6, atol=0)


def test_sums_under_a_transform(device):
    x, weight = leaves_of((2, 9), 24, 50, F32, device, bias=False)
    targets, options = torch.randint(0, 50, (2, 9), device=device), {"z_loss": 1e-2, "label_smoothing": 0.1}

    def total(x):
        return ops.linear_loss_sums(x, weight, targets, **options)[0]

    want = torch.autograd.grad(total(x), x)[0]
    torch.testing.assert_close(torch.func.grad(total)(x.detach()), want)


def test_log_probs(variant, device):
    x, weight = leaves_of((2, 9), 24, 50, F32, device, bias=False)
    targets = torch.randint(0, 50, (2, 9), device=device)
    targets[0, 3] = -100
    log_probs, entropy = ops.linear_log_probs(x, weight, targets, chunk_size=4, return_entropy=True)
    assert torch.equal(log_probs, ops.linear_log_probs(x, weight, targets, chunk_size=4))
    log_p = F.linear(x, weight).log_softmax(-1)
    kept = targets != -100
    want = torch.where(kept, log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0], 0)
    want_entropy = torch.where(kept, -(log_p.exp() * log_p).sum(-1), 0)
    torch.testing.assert_close((log_probs, entropy), (want, want_entropy))
    advantages = torch.randn_like(want)
    got, wanted = (
        torch.autograd.grad((p * advantages + 0.1 * h).sum(), (x, weight))
        for p, h in ((log_probs, entropy), (want, want_entropy))
    )
    torch.testing.assert_close(got, wanted)


def test_a_vocabulary_in_shards(variant, device):
    """Each shard's log-sum-exp and its logit of the targets that it holds make the whole loss, and its gradients."""
    x, weight = leaves_of((10,), 8, 21, F32, device, bias=False)
    targets = torch.randint(0, 21, (10,), device=device)
    lses, picked = [], []
    for first, shard in ((0, weight[:9]), (9, weight[9:])):
        inside = (targets >= first) & (targets < first + len(shard))
        local = torch.where(inside, targets - first, 0)
        loss, lse = ops.linear_cross_entropy(x, shard, local, reduction="none", return_lse=True, chunk_size=4)
        lses.append(lse)
        picked.append(torch.where(inside, lse - loss, 0))
    got = (torch.stack(lses).logsumexp(0) - sum(picked)).mean()
    want = ops.cross_entropy(F.linear(x, weight), targets)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss, (x, weight)) for loss in (got, want)))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_one_chunks_gradient_of_weight_is_rounded_and_then_scaled(variant, device, dtype):
    leaves, targets = leaves_of((40,), 16, 64, dtype, device), torch.randint(0, 64, (40,), device=device)
    x, weight, bias = leaves
    rounded, scaled = (
        torch.autograd.grad(ops.linear_cross_entropy(x, weight, targets, bias=bias, reduction="sum") * scale, leaves)
        for scale in (1.0, 0.3)
    )
    assert torch.equal(scaled[1], (rounded[1].float() * torch.tensor(0.3, device=device)).to(dtype))


def test_many_chunks_sum_weights_gradient_in_fp32(device):
    """A bfloat16 sum over 256 chunks would stop growing."""
    x = torch.ones(256, 8, dtype=BF16, device=device)
    weight = torch.zeros(16, 8, dtype=BF16, device=device, requires_grad=True)
    targets = torch.zeros(256, dtype=torch.long, device=device)
    ops.linear_cross_entropy(x, weight, targets, reduction="sum", chunk_size=1).backward()
    assert weight.grad[0].tolist() == [-240.0] * 8
    assert weight.grad[1].tolist() == [16.0] * 8


def test_float16_holds_what_many_tokens_add_up_to(device):
    """Before the mean divides it, the gradient of a row of weight is beyond 65504."""
    x = torch.full((512, 8), 300.0, dtype=F16, device=device)
    weight = torch.zeros(4, 8, dtype=F16, device=device, requires_grad=True)
    ops.linear_cross_entropy(x, weight, torch.zeros(512, dtype=torch.long, device=device)).backward()
    want = torch.tensor([-225.0, 75, 75, 75], dtype=F16, device=device)[:, None].expand(4, 8)
    torch.testing.assert_close(weight.grad, want)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_only_the_wanted_gradients(variant, device, reduction):
    for wanted in range(3):
        leaves, targets = leaves_of((6,), 8, 11, F32, device), torch.arange(6, device=device)
        everything = torch.autograd.grad(ops.cross_entropy(F.linear(*leaves), targets, reduction="sum"), leaves)
        x, weight, bias = (t.detach().requires_grad_(i == wanted) for i, t in enumerate(leaves))
        loss = ops.linear_cross_entropy(x, weight, targets, bias=bias, reduction=reduction).sum()
        loss.backward()
        torch.testing.assert_close((x, weight, bias)[wanted].grad, everything[wanted])


def test_the_upstream_gradient_scales_all(variant, device):
    leaves, targets = leaves_of((6,), 8, 11, F32, device, bias=False), torch.arange(6, device=device)
    for scale in (0.0, 3.0):
        got = torch.autograd.grad(scale * ops.linear_cross_entropy(*leaves, targets), leaves)
        want = torch.autograd.grad(scale * ops.cross_entropy(F.linear(*leaves), targets), leaves)
        torch.testing.assert_close(got, want)


def test_a_second_backward(device):
    leaves, targets = leaves_of((6,), 8, 11, F32, device, bias=False), torch.arange(6, device=device)
    loss = ops.linear_cross_entropy(*leaves, targets)
    first, second = (
        torch.autograd.grad(loss, leaves, torch.tensor(3.0, device=device), retain_graph=True) for _ in range(2)
    )
    torch.testing.assert_close(first, second)


@pytest.mark.skipif(not CUDA, reason="in place on a GPU alone")
def test_a_second_backward_where_the_first_has_scaled_nothing_in_place(device):
    """The weight's gradient becomes float32 on its way, or is not wanted."""
    targets = torch.arange(6, device=device)
    x, weight = leaves_of((6,), 8, 11, F32, device, bias=False)
    with torch.autocast(device, torch.bfloat16):
        of_both = ops.linear_cross_entropy(x, weight, targets)
    of_x_alone = ops.linear_cross_entropy(x.bfloat16(), weight.detach().bfloat16(), targets)
    for loss, leaves in ((of_both, [x, weight]), (of_x_alone, [x])):
        first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
        torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.skipif(not CUDA, reason="in place on a GPU alone")
def test_a_second_backward_is_refused_where_the_first_has_scaled_in_place(device):
    leaves, targets = leaves_of((6,), 8, 11, BF16, device, bias=False), torch.arange(6, device=device)
    loss = ops.linear_cross_entropy(*leaves, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="scaled in place by its first backward"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(device, reduction):
    """float32 weights, bfloat16 matmuls, gradients in float32: as F.linear has it."""
    x, weight = leaves_of((40,), 16, 64, F32, device, bias=False)
    targets = torch.randint(0, 64, (40,), device=device)
    with torch.autocast(device, BF16):
        loss = ops.linear_cross_entropy(x, weight, targets, reduction=reduction, chunk_size=16)
        want = ops.cross_entropy(F.linear(x, weight), targets, reduction=reduction)
    assert loss.dtype == F32
    got, wanted = (torch.autograd.grad(out.sum(), (x, weight)) for out in (loss, want))
    assert {g.dtype for g in got} == {F32}
    torch.testing.assert_close((loss, *got), (want, *wanted), rtol=2e-2, atol=2e-3)


def test_without_gradients(variant, device):
    x, weight = leaves_of((6,), 8, 11, F32, device, bias=False)
    targets = torch.arange(6, device=device)
    want = ops.cross_entropy(F.linear(x, weight), targets)
    with torch.no_grad():
        torch.testing.assert_close(ops.linear_cross_entropy(x, weight, targets, chunk_size=4), want)


def test_no_tokens(device):
    x, weight = leaves_of((0,), 8, 11, F32, device, bias=False)
    targets = torch.zeros(0, dtype=torch.long, device=device)
    loss = ops.linear_cross_entropy(x, weight, targets)
    grads = torch.autograd.grad(loss, (x, weight))
    assert loss.item() == 0
    assert [g.shape for g in grads] == [x.shape, weight.shape]
    assert not grads[1].any()
    assert ops.linear_log_probs(x, weight, targets).shape == (0,)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction):
    leaves, targets = leaves_of((5,), 3, 4, F64, "cpu"), torch.tensor([3, -100, 0, 1, 2])

    def loss(x, weight, bias):
        return ops.linear_cross_entropy(
            x, weight, targets, bias=bias, softcap=2.0, z_loss=0.1, reduction=reduction, chunk_size=2
        )

    assert torch.autograd.gradcheck(loss, leaves)


def test_second_derivatives_are_refused():
    leaves = leaves_of((3,), 4, 5, F32, "cpu", bias=False)
    for reduction in ("mean", "none"):
        loss = ops.linear_cross_entropy(*leaves, torch.arange(3), reduction=reduction).sum()
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(loss, leaves, create_graph=True)


def test_transforms_of_torch_func():
    x, weight = torch.randn(3, 4, 8), torch.randn(6, 8)
    targets = torch.randint(0, 6, (3, 4))

    def gradients(loss):
        return torch.func.vmap(torch.func.grad(lambda x, t: loss(x, t)), in_dims=0)(x, targets)

    got = gradients(lambda x, t: ops.linear_cross_entropy(x, weight, t))
    torch.testing.assert_close(got, gradients(lambda x, t: F.cross_entropy(F.linear(x, weight), t)))


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"reduction": "sum", "return_entropy": True}])
def test_compiles_whole(variant, device, options):
    torch.compiler.reset()
    leaves, targets = leaves_of((6,), 8, 11, BF16, device, bias=False), torch.arange(6, device=device)

    def loss(x, weight):
        out = ops.linear_cross_entropy(x, weight, targets, chunk_size=4, **options)
        return out if isinstance(out, torch.Tensor) else out[0] + out[1].sum()

    compiled = torch.compile(loss, backend="inductor" if CUDA else "aot_eager", fullgraph=True)
    for got, want in zip(
        *(((out := f(*leaves)), *torch.autograd.grad(out.sum(), leaves)) for f in (compiled, loss)), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_opcheck(device):
    x, weight, bias = (t.detach() for t in leaves_of((6,), 8, 11, BF16, device))
    targets, scale, stat = torch.arange(6, device=device), torch.ones((), device=device), torch.rand(6, device=device)
    options, wanted = (-100, None, 0.0, 0.0), [True, True, False]
    for op, args in (
        (_forward_op, (x, weight, bias, targets, *options, True, 4)),
        (_gradient_op, (x, weight, bias, targets, scale, *options, 4, wanted)),
        (_gradient_op, (x, weight, None, targets, scale, *options, 8, wanted)),
        (_gradient_op, (x, weight, None, targets, scale, -100, 2.0, 1e-2, 0.1, 4, wanted)),
        (_backward_op, (x, weight, bias, targets, stat, stat, stat, None, stat, *options, 4, wanted)),
    ):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("num_tokens", "V"), [(1, 50257), (4096, 128256), (32768, 50304), (100, 300000)])
def test_default_chunks(num_tokens, V):
    size = default_chunk_size(num_tokens, V, 2, "cuda")
    count = len(_chunks(num_tokens, size))
    assert size % ROW_UNIT == 0
    assert size <= ROW_UNIT or (size - ROW_UNIT) * V * 2 < CHUNK_BYTES["cuda"]
    assert count <= -(-num_tokens * V * 2 // CHUNK_BYTES["cuda"])


def test_a_chunks_gradient_is_gone_before_the_next(device, monkeypatch):
    made, run = [], dispatch.run

    def watched(name, *args):
        out = run(name, *args)
        if name == "cross_entropy_bwd":
            assert not any(earlier() is not None for earlier in made)
            made.append(weakref.ref(out))
        return out

    monkeypatch.setattr(dispatch, "run", watched)
    x, weight = leaves_of((12,), 8, 20, F32, device, bias=False)
    targets = torch.arange(12, device=device)
    ops.linear_cross_entropy(x, weight, targets, reduction="none", chunk_size=3).sum().backward()
    assert len(made) == 4


@pytest.mark.skipif(not CUDA, reason="torch counts a GPU's memory alone")
def test_logits_are_never_whole():
    x, weight = leaves_of((4096,), 128, 65536, BF16, "cuda", bias=False)
    targets = torch.randint(0, 65536, (4096,), device="cuda")
    for reduction, chunks in (("sum", 1), ("none", 2)):
        ops.linear_cross_entropy(x, weight, targets, reduction=reduction, chunk_size=512).sum().backward()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ops.linear_cross_entropy(x, weight, targets, reduction=reduction, chunk_size=512).sum().backward()
        chunk, gradient = 512 * 65536 * 2, weight.numel() * (4 + 4 + 2)
        assert torch.cuda.max_memory_allocated() - before < chunks * chunk + gradient + (16 << 20)


X, W, T = torch.zeros(3, 5), torch.zeros(7, 5), torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((X[0, 0], W, T), {}, r"x must be \(..., H\)"),
        ((X, W.T, T), {}, r"weight must be \(V, 5\) on cpu with V >= 1, got \(5, 7\)"),
        ((X, W[:0], T), {}, "V >= 1"),
        ((X, W.bfloat16(), T), {}, "weight must have x's dtype torch.float32, got torch.bfloat16"),
        ((X, W, T[:2]), {}, r"targets must be \(3,\) on cpu to fit x, got \(2,\)"),
        ((X, W, T.float()), {}, "class indices"),
        ((X, W, T), {"bias": W[0]}, r"bias must be \(7,\)"),
        ((X, W, T), {"chunk_size": 0}, "chunk_size must be 1 or more, got 0"),
        ((X, W, T), {"softcap": 0.0}, "softcap must be positive"),
        ((X, W, T), {"reduction": "max"}, "'mean', 'sum' or 'none'"),
    ],
)
def test_bad_arguments(args, options, message):
    with pytest.raises(ValueError, match=message):
        ops.linear_cross_entropy(*args, **options)


def test_target_outside_the_vocabulary():
    with pytest.raises(IndexError, match="targets must be 0 to 6"):
        ops.linear_cross_entropy(X, W, T + 7)


def test_what_is_traced_has_no_targets_to_look_at():
    """As where a backend of torch.compile traces a graph that calls the op, outside of Dynamo."""
    with FakeTensorMode():
        x, weight, targets = torch.randn(3, 8), torch.randn(11, 8), torch.randint(0, 11, (3,))
        assert ops.linear_cross_entropy(x, weight, targets).shape == ()
        assert ops.cross_entropy(x, targets).shape == ()
