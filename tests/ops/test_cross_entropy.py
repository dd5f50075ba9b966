import pytest
import torch
import torch.nn.functional as F
from close import assert_close_to_ref

from cs336 import ops
from cs336.ops import registry

CUDA = torch.cuda.is_available()
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
SHAPES = [(7, 257), (2, 3, 5, 11), (1, 1), (64,), (9, 1000), (2, 8193)]
if CUDA:
    SHAPES += [(5, 50257), (3, 128256), (300, 32000), (2, 262144), (2, 262147)]
IN_PLACE = [(96, BF16), (1001, F32), (8200, F16)]
if CUDA:  # rows of two blocks a multiprocessor, and longer ones
    IN_PLACE += [(50304, BF16), (60000, F16), (128256, BF16), (131072, F32)]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under Triton's interpreter


@pytest.fixture(params=[None, *registry.NAMESPACE])
def variant(request, device):
    """The variant that is chosen, and each in turn, forced."""
    logits, targets = torch.zeros(1, 2, device=device), torch.zeros(1, dtype=torch.long, device=device)
    if request.param and (
        reason := registry.why_not("cross_entropy_fwd", request.param, logits, targets, -100, None, 0.0, 0.0, False)
    ):
        pytest.skip(reason)
    with registry.use(request.param):
        yield request.param


def by_hand(
    logits,
    targets,
    ignore_index=-100,
    softcap=None,
    z_loss=0.0,
    label_smoothing=0.0,
    reduction="mean",
    return_lse=False,
    return_entropy=False,
):
    """-log p(target), probabilities and all, in the logits' dtype."""
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    kept = targets != ignore_index
    p, log_p, lse = z.softmax(-1), z.log_softmax(-1), z.logsumexp(-1)
    smooth = torch.full_like(p, label_smoothing / p.shape[-1])
    index = torch.where(kept, targets, 0)[..., None].long()
    q = smooth.scatter_add(-1, index, torch.full_like(p[..., :1], 1 - label_smoothing))
    loss = torch.where(kept, -(q * log_p).sum(-1) + z_loss * lse.square(), 0)
    loss = {"none": loss, "sum": loss.sum(), "mean": loss.sum() / kept.sum()}[reduction]
    extra = [lse] if return_lse else []
    extra += [-(p * log_p).sum(-1)] if return_entropy else []
    return loss, *(torch.where(kept, t, 0) for t in extra)


def as_tuple(out):
    return out if isinstance(out, tuple) else (out,)


def check(logits, targets, scale=0.0, **options):
    outs = as_tuple(ops.cross_entropy(logits, targets, **options))
    assert {out.dtype for out in outs} == {F32}
    douts = [torch.randn_like(out) for out in outs]
    got = torch.autograd.grad(outs, logits, douts)

    def plain(dtype):
        logits_ = logits.detach().to(dtype).requires_grad_()
        outs_ = by_hand(logits_, targets, **options)
        return *outs_, *torch.autograd.grad(outs_, logits_, [d.to(o.dtype) for d, o in zip(douts, outs_, strict=True)])

    *outs64, grad64 = plain(F64)
    for out, out64, torchs in zip(outs, outs64, plain(F32), strict=False):
        assert_close_to_ref(out, out64, torchs, scale)
    assert_close_to_ref(*got, grad64, plain(logits.dtype)[-1], scale)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(variant, device, shape, dtype, reduction):
    logits = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    check(logits, torch.randint(0, shape[-1], shape[:-1], device=device), reduction=reduction)


TERMS = [
    {"softcap": 0.5},
    {"softcap": 15.0, "z_loss": 1e-2},
    {"z_loss": 1e-2, "return_lse": True},
    {"label_smoothing": 0.1},
    {"label_smoothing": 1.0, "z_loss": 0.1, "softcap": 3.0},
    {"return_entropy": True},
    {"return_lse": True, "return_entropy": True, "label_smoothing": 0.2, "softcap": 5.0, "z_loss": 0.1},
]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("options", TERMS)
@pytest.mark.parametrize("V", [41, 9000])
def test_terms(variant, device, V, options, dtype):
    logits = (3 * torch.randn(4, V, device=device)).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (4,), device=device)
    targets[2] = -100
    # of the gradient's terms, p (log p + entropy) among them: the log-sum-exp, rounded, is in all
    scale = 0.0 if dtype == BF16 else 2.0 if V < 100 else 1.0 if options == {"return_entropy": True} else 0.02
    check(logits, targets, reduction="none", scale=scale, **options)
    check(logits, targets, reduction="mean", scale=scale, **options)


def relaid(t, layout):
    """The values of t in another layout, with NaN in between."""
    if layout == "strided rows":
        return F.pad(t, (0, 3), value=torch.nan)[..., :-3]
    if layout == "unaligned":
        return F.pad(t.reshape(-1), (1, 0), value=torch.nan)[1:].view(t.shape)
    return F.pad(t[..., None], (0, 1), value=torch.nan)[..., 0]


@pytest.mark.parametrize("layout", ["strided rows", "unaligned", "strided features"])
@pytest.mark.parametrize(("shape", "dtype"), [((5, 96), BF16), ((3, 2, 33), F32), ((2, 1001), F16)])
def test_layouts(variant, device, shape, dtype, layout):
    logits = relaid(torch.randn(shape, device=device).to(dtype), layout).requires_grad_()
    check(logits, torch.randint(0, shape[-1], shape[:-1], device=device))


@pytest.mark.parametrize("with_terms", [False, True])
@pytest.mark.parametrize("layout", [None, "strided rows", "unaligned"])
@pytest.mark.parametrize(("V", "dtype"), IN_PLACE)
def test_gradient_in_place(variant, device, V, dtype, layout, with_terms):
    """Losses and gradient are what forward and backward give; NaN beside the logits stay."""
    logits, targets = torch.randn(6, V, device=device).to(dtype), torch.randint(0, V, (6,), device=device)
    targets[2] = -1
    logits = relaid(logits, layout) if layout else logits
    options = (-1, 20.0, 1e-2, 0.1) if with_terms else (-1, None, 0.0, 0.0)
    scale = torch.tensor(0.3, device=device)
    loss, lse, entropy = registry.call("cross_entropy_fwd", logits, targets, *options, False)
    dlogits = registry.call(
        "cross_entropy_bwd", logits, targets, lse, entropy, scale.expand(6).contiguous(), None, None, *options
    )
    whole = logits if layout is None else logits._base
    nans, version = whole.isnan().sum(), logits._version
    got = registry.call("cross_entropy_gradient_", logits, targets, scale, *options)
    torch.testing.assert_close(got, (loss, lse))
    torch.testing.assert_close(logits, dlogits)
    assert logits._version > version
    assert whole.isnan().sum() == nans


def computed(shape, dtype, device):
    """Logits that something has computed, and what from."""
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    return x, 2 * x


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_gradient_that_takes_the_place_of_the_logits(variant, device, reduction, dtype):
    x, logits = computed((2, 5, 41), dtype, device)
    targets = torch.randint(0, 41, (2, 5), device=device)
    targets[0, 3] = -100
    options = {"reduction": reduction, "z_loss": 0.01, "label_smoothing": 0.1}
    want = ops.cross_entropy(logits, targets, **options)
    (of_logits,) = torch.autograd.grad(3 * want, logits, retain_graph=True)
    (of_x,) = torch.autograd.grad(3 * want, x, retain_graph=True)
    got = ops.cross_entropy(logits, targets, in_place=True, **options)
    torch.testing.assert_close(got, want)
    (gradient,) = torch.autograd.grad(3 * got, logits, retain_graph=True)
    torch.testing.assert_close(gradient, of_logits)
    if registry.forced() == "ref" or (registry.forced() is None and device == "cpu"):  # there is no kernel
        assert gradient.data_ptr() != logits.data_ptr()
        return
    assert gradient.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="the first backward has scaled the logits' gradient in their place"):
        got.backward()
    x.grad, logits = None, 2 * x
    (3 * ops.cross_entropy(logits, targets, in_place=True, **options)).backward()
    torch.testing.assert_close(x.grad, of_x)


def test_logits_stay_where_they_are_asked_for(variant, device):
    """By other results, by float16's scale, without a backward, as nothing's result or a view of it, with gaps between
    rows, or where rows are the same."""
    targets = torch.arange(6, device=device)

    def kept(logits, **options):
        before = logits.detach().clone()
        loss = ops.cross_entropy(logits, targets, in_place=True, **options)
        if isinstance(loss, torch.Tensor) and loss.requires_grad:
            torch.autograd.grad(loss.sum(), logits)
        return torch.equal(logits.detach(), before)

    x, logits = computed((6, 41), F32, device)
    assert kept(logits, reduction="none")
    assert kept(logits, return_lse=True)
    assert kept(x)
    assert kept(x.view(6, 41))
    assert kept(x[:, :])
    assert kept(logits.detach())
    with torch.no_grad():
        assert kept(logits)
    assert kept(computed((6, 41), F16, device)[1])
    assert kept(computed((6, 48), F32, device)[1][:, :41])
    assert kept(computed((1, 41), F32, device)[1].expand(6, 41))


def test_logits_that_went_are_read_no_more(variant, device):
    """What was kept for a backward, and a second derivative, are refused."""
    x, targets = torch.randn(6, 41, device=device, requires_grad=True), torch.arange(6, device=device)
    for read in (lambda loss: loss.backward(), lambda loss: torch.autograd.grad(loss, x, create_graph=True)):
        y = torch.tanh(x)
        before = y.detach().clone()
        loss = ops.cross_entropy(y, targets, in_place=True)
        if torch.equal(y.detach(), before):
            assert registry.forced() in (None, "ref")
            pytest.skip("there is no kernel")
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation|differentiable once"):
            read(loss)


@pytest.mark.parametrize("ignore_index", [-100, 3, -1])
def test_ignored_rows(variant, device, ignore_index):
    logits = torch.randn(6, 5, 11, device=device, requires_grad=True)
    targets = torch.randint(0, 11, (6, 5), device=device)
    targets[::2] = ignore_index
    check(logits, targets, ignore_index=ignore_index)
    loss = ops.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
    assert torch.equal(loss[::2], torch.zeros_like(loss[::2]))
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index)
    torch.testing.assert_close(ops.cross_entropy(logits, targets, ignore_index=ignore_index), want)


def test_nothing_to_count(variant, device):
    logits = torch.randn(4, 5, device=device, requires_grad=True)
    loss = ops.cross_entropy(logits, torch.full((4,), -100, device=device))
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0
    assert torch.equal(grad, torch.zeros_like(grad))
    assert ops.cross_entropy(logits[:0], torch.zeros(0, dtype=torch.long, device=device)).item() == 0


def test_logits_far_apart(variant, device):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], device=device, requires_grad=True)
    loss = ops.cross_entropy(logits, torch.tensor([0, 0], device=device), reduction="none")
    torch.testing.assert_close(loss, torch.tensor([0.0, 2e4], device=device))
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(grad, torch.tensor([[0.0, 0.0, 0.0], [-1.0, 1.0, 0.0]], device=device))


def test_leaves_the_logits_alone(variant, device):
    logits = torch.randn(4, 5, device=device, requires_grad=True)
    before = logits.detach().clone()
    ops.cross_entropy(logits, torch.arange(4, device=device)).backward()
    assert torch.equal(logits.detach(), before)


def test_int32_targets_and_strided_logits(variant, device):
    logits = torch.randn(11, 7, device=device).T
    targets = torch.randint(0, 11, (7,), device=device)
    want = F.cross_entropy(logits, targets)
    torch.testing.assert_close(ops.cross_entropy(logits, targets.int()), want)


@pytest.mark.parametrize("options", TERMS)
def test_gradcheck(options):
    logits = torch.randn(3, 5, dtype=F64, requires_grad=True)
    targets = torch.tensor([4, -100, 0])
    assert torch.autograd.gradcheck(lambda x: ops.cross_entropy(x, targets, **options), logits)


@pytest.mark.parametrize("options", TERMS)
def test_gradgradcheck(options):
    logits, targets = torch.randn(3, 5, dtype=F64, requires_grad=True), torch.tensor([4, -100, 0])
    assert torch.autograd.gradgradcheck(lambda x: ops.cross_entropy(x, targets, **options), logits)


def test_transforms_of_torch_func(variant):
    logits, targets = torch.randn(3, 4, 5), torch.randint(0, 5, (3, 4))

    def transforms(loss):
        yield torch.func.vmap(torch.func.grad(loss))(logits, targets)
        yield torch.func.hessian(loss)(logits[0], targets[0])

    for got, want in zip(transforms(ops.cross_entropy), transforms(F.cross_entropy), strict=True):
        torch.testing.assert_close(got, want)


def test_target_outside_the_vocabulary(variant, device):
    """An error where the host sees it, else a row of NaN: never what lies beside the logits in memory."""
    for bad in (5, -1, 2**40):
        logits, targets = torch.zeros(2, 5, device=device), torch.tensor([0, bad], device=device)
        if device == "cpu":
            with pytest.raises(IndexError, match=f"targets must be 0 to 4, or ignore_index -100, got {bad}"):
                ops.cross_entropy(logits, targets)
        if variant is None:
            continue
        options = -100, None, 0.0, 0.0
        loss, lse, entropy = registry.call("cross_entropy_fwd", logits, targets, *options, False)
        assert loss.isnan().tolist() == [False, True]
        dlogits = registry.call(
            "cross_entropy_bwd", logits, targets, lse, entropy, torch.ones_like(loss), None, None, *options
        )
        assert dlogits.isnan().all(1).tolist() == [False, True]
        registry.call("cross_entropy_gradient_", logits, targets, torch.ones((), device=device), *options)
        assert logits.isnan().all(1).tolist() == [False, True]


def test_a_bad_row_spoils_only_itself(variant, device):
    logits, targets = torch.randn(4, 40, device=device), torch.arange(4, device=device)
    want = ops.cross_entropy(logits, targets, reduction="none")
    logits[2, 7] = torch.nan
    loss = ops.cross_entropy(logits, targets, reduction="none")
    assert loss[2].isnan()
    assert torch.equal(loss[[0, 1, 3]], want[[0, 1, 3]])
    ignored = targets.where(targets != 2, -100)
    assert ops.cross_entropy(logits, ignored).isfinite()


def test_masked_logits(variant, device):
    """Tokens of probability 0, as a grammar makes them: many, and at the row's start."""
    logits = torch.randn(2, 9000, device=device)
    logits[:, :8500] = -torch.inf
    logits.requires_grad_()
    targets = torch.tensor([8999, 8600], device=device)
    loss, entropy = ops.cross_entropy(logits, targets, reduction="none", return_entropy=True)
    z = logits.detach()[:, 8500:].double().requires_grad_()
    want, want_entropy = by_hand(z, targets - 8500, reduction="none", return_entropy=True)
    torch.testing.assert_close((loss, entropy), (want.float(), want_entropy.float()))
    (grad,) = torch.autograd.grad((loss + entropy).sum(), logits)
    (want_grad,) = torch.autograd.grad((want + want_entropy).sum(), z)
    assert not grad[:, :8500].any()
    torch.testing.assert_close(grad[:, 8500:], want_grad.float(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("V", [257, 8192, *((50304, 128256) if CUDA else ())])
def test_batch_invariant(variant, device, V, dtype):
    """A row's result does not depend on the rows beside it, nor on where it lies."""
    if variant == "ref" or (variant is None and device == "cpu"):
        pytest.skip("plain torch does not promise it")
    logits, targets = torch.randn(9, V, device=device).to(dtype), torch.randint(0, V, (9,), device=device)
    loss = ops.cross_entropy(logits, targets, reduction="none")
    for row in (0, 8):
        for layout in (None, "unaligned"):
            alone = logits[row : row + 1].clone()
            alone = relaid(alone, layout) if layout else alone
            assert torch.equal(ops.cross_entropy(alone, targets[row : row + 1], reduction="none"), loss[row : row + 1])


def raw_args(name, N, V, device, dtype=F32):
    logits, targets = torch.randn(N, V, device=device).to(dtype), torch.randint(0, V, (N,), device=device)
    options, stats = (-100, 5.0, 0.1, 0.1), list(torch.rand(5, N, device=device).unbind())
    return {
        "cross_entropy_fwd": (logits, targets, *options, True),
        "cross_entropy_bwd": (logits, targets, *(s.clone() for s in stats), *options),
        "cross_entropy_gradient_": (logits, targets, torch.rand((), device=device), *options),
    }[name]


NAMES = ["cross_entropy_fwd", "cross_entropy_bwd", "cross_entropy_gradient_"]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(variant, device, name, dtype):
    overload = registry.OPS[name].overloads[variant or "ref"]
    torch.library.opcheck(overload, raw_args(name, 3, 7, device, dtype), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", NAMES)
def test_raw_ops_refuse_bad_tensors(variant, device, name):
    """Each tensor argument spoilt in each way: an error, never a crash nor a result."""
    spoilt = {
        "int32": lambda t: t.int(),
        "one dim more": lambda t: t[None].expand(2, *t.shape),
        "no element": lambda t: t[..., :0] if t.dim() else t.new_empty(0),
        "last dim strided": lambda t: t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t.double(),
        "another device": lambda t: t.to("cpu" if device == "cuda" else "meta"),
    }
    args, overload = raw_args(name, 4, 6, device), registry.OPS[name].overloads[variant or "ref"]
    overload(*args)
    for i, arg in enumerate(args):
        for how, spoil in spoilt.items() if isinstance(arg, torch.Tensor) else ():
            bad = (*args[:i], spoil(arg), *args[i + 1 :])
            with pytest.raises((ValueError, RuntimeError)):
                pytest.fail(f"argument {i} with {how} was taken: {overload(*bad)}")


def test_compiles_whole(variant, device):
    logits = torch.randn(4, 5, device=device, requires_grad=True)
    targets = torch.tensor([0, 4, -100, 2], device=device)
    torch.compiler.reset()
    compiled = torch.compile(ops.cross_entropy, backend="inductor" if CUDA else "aot_eager", fullgraph=True)
    for options in ({}, {"softcap": 3.0, "reduction": "sum"}, {"return_entropy": True}):
        losses = [f(logits, targets, **options) for f in (compiled, ops.cross_entropy)]
        grads = [torch.autograd.grad(as_tuple(loss)[0], logits)[0] for loss in losses]
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
        ((Z, T), {"softcap": float("inf")}, "softcap must be positive and finite, got inf"),
        ((Z, T), {"z_loss": -1.0}, "z_loss must be finite and not negative"),
        ((Z, T), {"z_loss": float("inf")}, "z_loss must be finite and not negative, got inf"),
        ((Z, T), {"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\]"),
        ((Z, T), {"reduction": "max"}, "'mean', 'sum' or 'none'"),
    ],
)
def test_bad_arguments(args, options, message):
    with pytest.raises(ValueError, match=message):
        ops.cross_entropy(*args, **options)
