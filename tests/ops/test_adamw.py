"""Every variant of adamw_ here, against fp64 and against torch.optim.AdamW; the CUDA kernel where there is a GPU."""

import itertools
import math

import pytest
import torch
from close import assert_close_to_ref

from cs336.ops import adamw_, registry

CUDA = torch.cuda.is_available()
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
PAIRS = list(itertools.product((F32, F16, BF16), repeat=2))  # dtypes of parameters, of gradients
SHAPES = [(), (0,), (1,), (3, 0, 5), (7,), (2, 127), (64, 64), (4097,), (5, 13, 67)]
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
CHUNK, MAX_TENSORS = 1024, 544  # of the CUDA kernel: elements a block, tensors a launch


def raw_args(lists, grad_scale=None, step=3):
    lr, *others = HYPER.values()
    device = lists[0][0].device
    steps = [torch.tensor(float(step), device=device) for _ in lists[0]]
    return *lists, steps, torch.tensor(lr, device=device), grad_scale, *others


@pytest.fixture(params=registry.NAMESPACE)
def variant(request, device):
    """Each variant in turn, forced: a test that asks for it cannot be served by another one."""
    if reason := registry.why_not("adamw_", request.param, *raw_args(make([(1,)], device))):
        pytest.skip(reason)
    with registry.use(request.param):
        yield request.param


def make(shapes, device, p_dtype=F32, g_dtype=F32):
    """Parameters, gradients and moments as after some steps: gradients of very different sizes, some of them zero."""

    def normal(shape):
        return torch.randn(shape, device=device)

    params = [normal(s).to(p_dtype) for s in shapes]
    grads = [(normal(s) * normal(s).exp() * (normal(s) > -1)).to(g_dtype) for s in shapes]
    return [params, grads, [0.1 * normal(s) for s in shapes], [normal(s).square() + 1e-6 for s in shapes]]


def copied(lists):
    return [[t.clone(memory_format=torch.preserve_format) for t in tensors] for tensors in lists]


def flat(lists):
    return [t for tensors in lists for t in tensors]


def formula(p, g, m, v, dtype, *, lr, beta1, beta2, eps, weight_decay, step, scale=1.0):
    """The paper's algorithm 2 as it is written there, in one dtype throughout."""
    p, g, m, v = (t.to(dtype) for t in (p, g, m, v))
    g = g * scale
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    return p - lr * weight_decay * p - lr * m_hat / (v_hat.sqrt() + eps), m, v


def check_step(lists, **changed):
    """One step of adamw_ on copies of the lists, each result against the formula. Returns the copies."""
    hyper = HYPER | {"step": 3} | changed
    scale = hyper.pop("scale", None)
    ours = copied(lists)
    adamw_(*ours, **hyper, grad_scale=None if scale is None else torch.tensor(scale, device=lists[0][0].device))
    for p, g, m, v, *results in zip(*lists, ours[0], *ours[2:], strict=True):
        hyper["scale"] = 1.0 if scale is None else scale
        for out, fp64, fp32 in zip(
            results, *(formula(p, g, m, v, d, **hyper) for d in (torch.float64, F32)), strict=True
        ):
            assert_close_to_ref(out, fp64, fp32.to(out.dtype))
    return ours


# ---- results ----


@pytest.mark.parametrize(("p_dtype", "g_dtype"), PAIRS)
def test_one_step(variant, device, p_dtype, g_dtype):
    check_step(make(SHAPES, device, p_dtype, g_dtype), scale=0.37)


@pytest.mark.parametrize(
    "changed",
    [
        {"step": 1},
        {"step": 100_000},
        {"weight_decay": 0.0},
        {"lr": 0.0},
        {"lr": 1.0},
        {"eps": 0.1},
        {"beta1": 0.0},
        {"beta2": 0.0},
        {"beta1": 0.4, "beta2": 0.3},
        {"beta2": 0.9999, "step": 2},
    ],
    ids=str,
)
def test_numbers(variant, device, changed):
    check_step(make([(1031,)], device), **changed)


@pytest.mark.skipif(not CUDA, reason="the CPU kernel fuses products as its compiler likes")
@pytest.mark.parametrize("step", [1, 7, 1000])
@pytest.mark.parametrize("beta1", [0.9, 0.0, 0.3])
@pytest.mark.parametrize("scale", [None, 0.37])
def test_the_kernel_has_the_bits_of_the_reference(device, step, beta1, scale):
    start = make(SHAPES, device)
    found = []
    for variant in ("native", "ref"):
        found.append(copied(start))
        with registry.use(variant):
            scale_ = None if scale is None else torch.tensor(scale, device=device)
            adamw_(*found[-1], **HYPER | {"beta1": beta1}, step=step, grad_scale=scale_)
    assert all(torch.equal(a, b) for a, b in zip(*map(flat, found), strict=True))


def test_first_step_from_zero_moments(variant, device):
    params, grads, *_ = make([(257,), (3, 5)], device)
    zeros = [torch.zeros_like(p) for p in params]
    check_step((params, grads, zeros, zeros), step=1)


@pytest.mark.parametrize("p_dtype", [F32, BF16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_trajectory(variant, device, p_dtype, weight_decay):
    """60 steps: as close to the fp64 trajectory as torch.optim.AdamW is."""
    steps, hyper = 60, HYPER | {"weight_decay": weight_decay}
    start, *grads = torch.randn(1 + steps, 517, device=device).to(p_dtype)

    def torchs(dtype):
        p = start.to(dtype, copy=True).requires_grad_()
        optimizer = torch.optim.AdamW(
            [p], hyper["lr"], (hyper["beta1"], hyper["beta2"]), hyper["eps"], weight_decay, foreach=False
        )
        for g in grads:
            p.grad = g.to(dtype)
            optimizer.step()
        return p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]

    p, m, v = start.clone(), *torch.zeros(2, 517, device=device)
    for step, g in enumerate(grads, 1):
        adamw_([p], [g], [m], [v], **hyper, step=step)
    for ours, fp64, same in zip((p, m, v), torchs(torch.float64), torchs(p_dtype), strict=True):
        assert_close_to_ref(ours, fp64, same.to(ours.dtype))


def test_many_tensors(variant, device):
    num_tensors = 40 if variant == "triton" and registry.INTERPRET else 1000
    shapes = [(n % 23,) for n in range(num_tensors)]
    shapes[MAX_TENSORS % num_tensors], shapes[-1] = (2 * CHUNK + 1,), (3 * CHUNK - 1,)
    lists = make(shapes, device)
    ours, whole = copied(lists), [[torch.cat(tensors)] for tensors in copied(lists)]
    adamw_(*ours, **HYPER, step=3)
    adamw_(*whole, **HYPER, step=3)
    for parts, (joined,) in zip(ours, whole, strict=True):
        torch.testing.assert_close(torch.cat(parts), joined, rtol=1e-6, atol=1e-6)
    check_step(whole)


def test_mixed_dtypes_in_one_list(variant, device):
    lists = [flat(group) for group in zip(*(make([(5,), (130,)], device, *pair) for pair in PAIRS), strict=True)]
    order = torch.randperm(len(lists[0])).tolist()
    check_step([[tensors[i] for i in order] for tensors in lists])


def test_one_list_for_everything_equals_one_call_a_tensor(variant, device):
    lists = make(SHAPES, device)
    together, alone = copied(lists), copied(lists)
    adamw_(*together, **HYPER, step=3)
    for tensors in zip(*alone, strict=True):
        adamw_(*([t] for t in tensors), **HYPER, step=3)
    assert all(torch.equal(a, b) for a, b in zip(flat(together), flat(alone), strict=True))


@pytest.mark.parametrize(("p_dtype", "g_dtype"), [(F32, F32), (BF16, BF16), (F32, BF16)])
def test_an_element_does_not_depend_on_its_place(variant, device, p_dtype, g_dtype):
    """Shards of a tensor, at any alignment, are updated to the same bits as the whole."""
    lists = make([(3 * CHUNK + 77,)], device, p_dtype, g_dtype)
    whole = copied(lists)
    adamw_(*whole, **HYPER, step=3)
    bounds = [0, 1, 2, 5, 12, 1000, CHUNK, 2 * CHUNK + 9, lists[0][0].numel()]
    shards = [[tensors[0][a:b] for a, b in itertools.pairwise(bounds)] for tensors in copied(lists)]
    adamw_(*shards, **HYPER, step=3)
    assert all(torch.equal(torch.cat(parts), joined) for parts, (joined,) in zip(shards, whole, strict=True))


@pytest.mark.parametrize("misaligned", range(4))
@pytest.mark.parametrize("p_dtype", [F32, BF16])
def test_stays_inside_its_tensors(variant, device, p_dtype, misaligned):
    """One of the four arrays starts off its vector boundary; what lies around all four is NaN before and after."""
    lists = make([(4 * n + 3,) for n in (0, 5, CHUNK // 2)], device, p_dtype, p_dtype)
    padded = [
        [torch.nn.functional.pad(t, (4 + (k == misaligned), 9), value=math.nan) for t in tensors]
        for k, tensors in enumerate(lists)
    ]
    check_step([[t[4 + (k == misaligned) : -9] for t in tensors] for k, tensors in enumerate(padded)])
    inside = [[t[4 + (k == misaligned) : -9] for t in tensors] for k, tensors in enumerate(padded)]
    adamw_(*inside, **HYPER, step=3)
    for k, tensors in enumerate(padded):
        for t in tensors:
            assert t[: 4 + (k == misaligned)].isnan().all()
            assert t[-9:].isnan().all()


def test_any_order_of_dims(variant, device):
    lists = make([(2, 6, 5, 7)], device)
    want = check_step(lists)
    for layout in (
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    ):
        ours = [[layout(t.clone()) for t in tensors] for tensors in lists]
        adamw_(*ours, **HYPER, step=3)
        assert all(torch.equal(a, b) for a, b in zip(flat(ours), flat(want), strict=True))


def test_stride_of_a_dim_of_size_one_does_not_matter(variant, device):
    lists = make([(1, 6)], device)
    lists[0][0] = torch.randn(6, 4, device=device).t()[:1].clone(memory_format=torch.contiguous_format)
    lists[1][0] = lists[1][0].as_strided((1, 6), (99, 1))
    check_step(lists)


def test_grad_scale_is_one_more_factor(variant, device):
    lists = make([(1031,)], device)
    scale = torch.tensor([[0.37]], device=device)
    ours, want = copied(lists), copied(lists)
    adamw_(*ours, **HYPER, step=3, grad_scale=scale)
    assert torch.equal(ours[1][0], lists[1][0])
    want[1] = [g * scale.view(()) for g in want[1]]
    adamw_(*want, **HYPER, step=3)
    for a, b in zip(flat([ours[0], *ours[2:]]), flat([want[0], *want[2:]]), strict=True):
        if variant == "triton":  # its compiler may fuse the factor into the next sum
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_decay_is_decoupled(variant, device, dtype):
    """Without gradients or moments only the decay is left; without decay nothing moves at all."""
    p, zeros = torch.randn(259, device=device).to(dtype), torch.zeros(259, device=device)
    for weight_decay in (0.0, 0.5):
        q, m, v = p.clone(), zeros.clone(), zeros.clone()
        adamw_([q], [zeros.to(dtype)], [m], [v], **HYPER | {"weight_decay": weight_decay}, step=1)
        assert torch.equal(q, (p.double() * (1 - HYPER["lr"] * weight_decay)).to(F32).to(dtype)) or dtype == F32
        torch.testing.assert_close(q.double(), p.double() * (1 - HYPER["lr"] * weight_decay), rtol=1e-2, atol=1e-6)
        assert weight_decay > 0 or torch.equal(q, p)
        assert not m.any()
        assert not v.any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # from the interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_gradients_show(variant, device, bad):
    """In the parameters that had them, and in no others."""
    lists = make([(1031,)], device)
    where = [0, 517, 1030]
    lists[1][0][where] = bad
    ours = copied(lists)
    adamw_(*ours, **HYPER, step=3)
    expected = torch.zeros(1031, dtype=torch.bool, device=device)
    expected[where] = True
    assert torch.equal(ours[0][0].isnan(), expected)
    for moments in ours[2:]:
        assert torch.equal(~moments[0].isfinite(), expected)


def test_nan_grad_scale_reaches_everything(variant, device):
    lists = make([(5,), (1031,)], device)
    adamw_(*lists, **HYPER, step=3, grad_scale=torch.tensor(math.nan, device=device))
    assert all(p.isnan().all() for p in lists[0])


def test_empty_list():
    adamw_([], [], [], [], **HYPER, step=1)


def test_deterministic(variant, device):
    lists = make([(3 * CHUNK + 77,)], device)
    first, second = copied(lists), copied(lists)
    adamw_(*first, **HYPER, step=3)
    adamw_(*second, **HYPER, step=3)
    assert all(torch.equal(a, b) for a, b in zip(flat(first), flat(second), strict=True))


def test_threads_change_nothing():
    """The CPU kernel cuts the list at any element: inside tensors, and between them."""
    lists = make([(3,), (50_001,), (0,), (7,), (70_000,)], "cpu")
    if reason := registry.why_not("adamw_", "native", *raw_args(lists)):
        pytest.skip(reason)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            with registry.use("native"):
                results.append(check_step(lists, scale=0.5))
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(flat(results[0]), flat(other), strict=True))


# ---- torch ----


@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize(("p_dtype", "g_dtype"), [(F32, F32), (BF16, F32)])
def test_opcheck(variant, device, p_dtype, g_dtype, with_scale):
    args = raw_args(
        make([(5,), (3, 4)], device, p_dtype, g_dtype), torch.tensor(0.5, device=device) if with_scale else None
    )
    torch.library.opcheck(registry.OPS["adamw_"].overloads[variant], args)


def test_compile(variant, device):
    def step(params, grads, exp_avgs, exp_avg_sqs, grad_scale):
        adamw_(params, grads, exp_avgs, exp_avg_sqs, **HYPER, step=3, grad_scale=grad_scale)
        return [2 * p for p in params]

    lists = make([(5,), (3, 4)], device)
    got, want = copied(lists), copied(lists)
    scale = torch.tensor(0.5, device=device)
    doubled = torch.compile(step, fullgraph=True, backend="inductor" if CUDA else "aot_eager")(*got, scale)
    step(*want, scale)
    assert all(torch.equal(a, b) for a, b in zip(flat(got), flat(want), strict=True))
    assert all(torch.equal(a, 2 * p) for a, p in zip(doubled, want[0], strict=True))


def test_new_numbers_need_no_new_compilation(variant, device):
    graphs = []

    def backend(graph_module, _):
        graphs.append(graph_module)
        return graph_module

    compiled = torch.compile(adamw_, fullgraph=True, backend=backend)
    ours, want = (copied(make([(5,), (3, 4)], device)) for _ in range(2))
    want = copied(ours)
    lr, step, scale = (torch.tensor(x, device=device) for x in (1e-2, 0.0, 1.0))
    for i in range(6):
        step.add_(1)
        lr.fill_(1e-2 / (i + 1))
        scale.fill_(0.5 + i)
        compiled(*ours, **HYPER | {"lr": lr}, step=step, grad_scale=scale)
        adamw_(*want, **HYPER | {"lr": 1e-2 / (i + 1)}, step=i + 1, grad_scale=scale)
    assert len(graphs) == 1
    assert all(torch.equal(a, b) for a, b in zip(flat(ours), flat(want), strict=True))


def test_each_parameter_may_have_its_own_step(variant, device):
    lists = make([(5,), (7,)], device)
    ours, want = copied(lists), copied(lists)
    adamw_(*ours, **HYPER, step=[torch.tensor(float(t), device=device) for t in (1, 9)])
    for i, t in enumerate((1, 9)):
        adamw_(*([tensors[i]] for tensors in want), **HYPER, step=t)
    assert all(torch.equal(a, b) for a, b in zip(flat(ours), flat(want), strict=True))


def test_float64_runs_the_reference(device):
    lists = [[t.double() for t in tensors] for tensors in make([(5,), (3, 4)], device)]
    ours = copied(lists)
    adamw_(*ours, **HYPER, step=3)
    for p, g, m, v, *results in zip(*lists, ours[0], *ours[2:], strict=True):
        for out, want in zip(results, formula(p, g, m, v, torch.float64, **HYPER, step=3), strict=True):
            torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    with registry.use("native"), pytest.raises(NotImplementedError, match="float64 in the reference alone"):
        adamw_(*ours, **HYPER, step=3)
    with pytest.raises(ValueError, match=r"lr must be one torch.float32 or torch.float64 element on"):
        adamw_(*ours, **HYPER | {"step": 3, "lr": torch.ones(2)})
    ours[1][1] = ours[1][1].float()
    with pytest.raises(ValueError, match=r"grads\[1\] must be dense torch.float64"):
        adamw_(*ours, **HYPER, step=3)


@pytest.mark.parametrize("name", ["lr", "step"])
def test_bad_elements(variant, device, name):
    for bad in (torch.ones(2), torch.ones((), dtype=torch.float64), torch.ones((), device="meta")):
        lists = make([(3,)], device)
        with pytest.raises(ValueError, match=r"must be one torch\.float32 element on"):
            adamw_(*lists, **HYPER | {"step": 3, name: bad.to(device) if not bad.is_meta else bad})


@pytest.mark.parametrize("which", [0, 2, 3])
def test_autograd_notices(variant, device, which):
    lists = make([(5,)], device)
    w = torch.randn(5, device=device, requires_grad=True)
    lists[0][0].requires_grad_()
    loss = (w * lists[which][0]).sum()
    adamw_(*lists, **HYPER, step=1)
    assert lists[0][0].requires_grad
    assert lists[0][0].is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode(variant, device):
    with torch.inference_mode():
        check_step(make([(5,)], device))


# ---- refusals ----

SPOILT = {
    "float64": lambda t: t.double(),
    "int32": lambda t: t.int(),
    "complex": lambda t: t.to(torch.complex64),
    "another shape": lambda t: t.mT.contiguous(),
    "one dim more": lambda t: t[None],
    "shorter": lambda t: t[:-1],
    "empty": lambda t: t[:0],
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda t: t.mT.contiguous().mT,
    "repeated by stride": lambda t: t[:1].expand(t.shape),
    "overlapping": lambda t: t.as_strided(t.shape, (1, 1)),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
}


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("which", range(4))
def test_bad_tensors(variant, device, which, how):
    """ValueError from the public function, an error from the raw op, and no tensor has changed."""
    lists = make([(3,), (4, 6), (2,)], device)
    before = copied(lists)
    bad = [list(tensors) for tensors in lists]
    bad[which][1] = SPOILT[how](bad[which][1])
    with pytest.raises(ValueError, match=r"(params|grads|exp_avgs|exp_avg_sqs)\[1\] must "):
        adamw_(*bad, **HYPER, step=3)
    with pytest.raises((ValueError, RuntimeError)):
        registry.OPS["adamw_"].overloads[variant](*raw_args(bad))
    assert all(torch.equal(a, b) for a, b in zip(flat(lists), flat(before), strict=True))


@pytest.mark.parametrize("which", [2, 3])
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_moments_are_float32(variant, device, which, dtype):
    lists = make([(3,)], device, dtype, dtype)
    lists[which] = [t.to(dtype) for t in lists[which]]
    with pytest.raises(ValueError, match=r"must be dense torch\.float32"):
        adamw_(*lists, **HYPER, step=3)
    with pytest.raises((ValueError, RuntimeError), match="float32"):
        registry.OPS["adamw_"].overloads[variant](*raw_args(lists))


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("lr must not be negative, got -0.1", {"lr": -0.1}),
        ("lr must not be negative, got nan", {"lr": math.nan}),
        ("eps must not be negative", {"eps": -1e-8}),
        ("weight_decay must not be negative", {"weight_decay": -0.1}),
        ("beta1 and beta2 must be in .0, 1.", {"beta1": 1.0}),
        ("beta1 and beta2 must be in .0, 1.", {"beta2": -0.1}),
        ("step counts from 1, got 0", {"step": 0}),
    ],
)
def test_bad_numbers(variant, device, message, changed):
    lists = make([(3,)], device)
    hyper = HYPER | {"step": 3} | changed
    with pytest.raises(ValueError, match=message):
        adamw_(*lists, **hyper)
    with pytest.raises(ValueError, match=message):
        adamw_([], [], [], [], **hyper)
    if message.startswith(("lr", "step")):
        return  # the raw op has them on the device, and does not wait for their values
    args = raw_args(lists)
    with pytest.raises((ValueError, RuntimeError)):
        registry.OPS["adamw_"].overloads[variant](*args[:-4], *(hyper[k] for k in list(HYPER)[1:]))


@pytest.mark.parametrize("which", range(4))
def test_lists_of_different_lengths(variant, device, which):
    lists = make([(3,), (4,)], device)
    lists[which].pop()
    with pytest.raises(ValueError, match="must have one length"):
        adamw_(*lists, **HYPER, step=3)
    with pytest.raises((ValueError, RuntimeError), match="one length"):
        registry.OPS["adamw_"].overloads[variant](*raw_args(lists))


@pytest.mark.parametrize(
    "spoil",
    [lambda s: s.repeat(2), lambda s: s[:0], lambda s: s.double(), lambda s: s.to("meta")],
    ids=["two elements", "none", "float64", "another device"],
)
def test_bad_grad_scale(variant, device, spoil):
    lists, scale = make([(3,)], device), spoil(torch.ones(1, device=device))
    with pytest.raises(ValueError, match="grad_scale must be"):
        adamw_(*lists, **HYPER, step=3, grad_scale=scale)
    with pytest.raises((ValueError, RuntimeError)):
        registry.OPS["adamw_"].overloads[variant](*raw_args(lists, scale))


# ---- CUDA ----


@pytest.mark.skipif(not CUDA, reason="devices need a GPU")
@pytest.mark.parametrize("which", range(4))
def test_two_devices_are_refused(variant, device, which):
    lists = make([(3,), (4,)], device)
    lists[which][1] = lists[which][1].cpu()
    with pytest.raises(ValueError, match=r"\[1\] must be .* on cuda"):
        adamw_(*lists, **HYPER, step=3)
    with pytest.raises((ValueError, RuntimeError)):
        registry.OPS["adamw_"].overloads[variant](*raw_args(lists))


@pytest.mark.skipif(not CUDA, reason="launches need a GPU")
@pytest.mark.parametrize(("num_tensors", "launches"), [(1, 1), (MAX_TENSORS, 1), (MAX_TENSORS + 1, 2)])
def test_launches(device, num_tensors, launches):
    lists = make([(n % 3 * CHUNK + 5,) for n in range(num_tensors)], device)
    with registry.use("native"):
        adamw_(*lists, **HYPER, step=3)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            adamw_(*lists, **HYPER, step=3)
            torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert sum("adamw_kernel" in name for name in names) == launches
    assert not [name for name in names if name.startswith(("Memcpy", "Memset"))]


@pytest.mark.skipif(not CUDA, reason="CUDA graphs need a GPU")
def test_cuda_graph(variant, device):
    """Step, learning rate and factor are read on the device at every replay."""
    lists = make(SHAPES, device)
    scale, lr, step = (torch.tensor(x, device=device) for x in (0.5, 1e-2, 3.0))
    numbers = HYPER | {"lr": lr, "step": step, "grad_scale": scale}
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        adamw_(*copied(lists), **numbers)  # first calls compile
    side.synchronize()
    ours, graph = copied(lists), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adamw_(*ours, **numbers)
    assert all(torch.equal(a, b) for a, b in zip(flat(ours), flat(lists), strict=True))
    for factor in (0.5, 0.25):
        scale.fill_(factor)
        lr.mul_(factor)
        step.add_(1)
        graph.replay()
        adamw_(*lists, **HYPER | {"lr": lr.item()}, step=int(step.item()), grad_scale=scale)
        assert all(torch.equal(a, b) for a, b in zip(flat(ours), flat(lists), strict=True))


@pytest.mark.skipif(not CUDA, reason="streams need a GPU")
def test_runs_on_the_current_stream(variant, device):
    lists = make([(1 << 22,)], device)
    want = copied(lists)
    adamw_(*want, **HYPER, step=3)
    grad, lists[1][0] = lists[1][0], torch.zeros_like(lists[1][0])
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # a kernel on any other stream would still see zeros
        lists[1][0].copy_(grad)
        adamw_(*lists, **HYPER, step=3)
    torch.cuda.synchronize()
    assert torch.equal(lists[0][0], want[0][0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_that_is_not_current(variant):
    with torch.cuda.device(0):
        check_step(make(SHAPES, "cuda:1"), scale=0.5)


@pytest.mark.skipif(not CUDA, reason="2^31 elements are for the GPU")
@pytest.mark.parametrize("variant", ["native", "triton"])
def test_more_than_2_31_elements(device, variant):
    n = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 13 * n:
        pytest.skip("needs 28 GB of GPU memory")
    lists = [
        [torch.full((n,), x, dtype=dtype, device=device)]
        for x, dtype in zip((1, 2, 0, 0), (BF16, BF16, F32, F32), strict=True)
    ]
    want = [[tensors[0][:1].clone()] for tensors in lists]
    with registry.use(variant):
        adamw_(*lists, **HYPER, step=1)
        adamw_(*want, **HYPER, step=1)
    for (t,), (one,) in zip(lists, want, strict=True):
        assert all(bool((part == one).all()) for part in t.split(1 << 28))
