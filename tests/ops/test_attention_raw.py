"""The raw ops of attention, what they promise to torch and what they refuse, and what wraps them: autograd, autocast,
checkpoints, compilation, streams and graphs."""

import pytest
import torch
from attentions import BF16, CUDA, F32, check, definition, leaves, packed, varlen_definition
from launches_in_a_row import check_without_waiting
from torch.utils.checkpoint import checkpoint

from cs336 import ops
from cs336.ops import registry
from cs336.ops.attention_raw import _native_refuses
from cs336.ops.attention_varlen import attention_varlen

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under Triton's interpreter
NAMES = ("attention", "attention_varlen", "attention_general")
OPTIONS = (0.3, True, -1, -1, 0.0)
DTYPE = BF16 if CUDA else F32
D = 64 if CUDA else 8


def raw_args(name, suffix, device, dtype=DTYPE):
    if name == "attention_varlen":
        (q, k, v), cus, _ = packed([3, 4], [5, 4], 2, 1, D, None, dtype, device)
        more, lse = (*cus, 4, 5), torch.zeros(2, 7, device=device)
    else:
        q, k, v = leaves(1, 2, 1, 4, 6, D, None, dtype, device)
        more, lse = (), torch.zeros(1, 2, 4, device=device)
    q, k, v = (x.detach().clone() for x in (q, k, v))
    extras = ()
    if name == "attention_general":
        more, extras = (None, None, 0, 0), (torch.rand(2, device=device), 0.2, torch.tensor([5], device=device))
    if suffix == "fwd":
        return (q, k, v, *more, *OPTIONS, *extras)
    return (
        torch.randn_like(q),
        torch.randn_like(lse),
        q,
        k,
        v,
        torch.randn_like(q),
        lse,
        *more,
        *OPTIONS,
        False,
        *extras,
    )


@pytest.fixture(params=registry.NAMESPACE)
def variant(request, device):
    for name in NAMES:
        if reason := registry.why_not(name + "_fwd", request.param, *raw_args(name, "fwd", device)):
            if name == "attention_general" and request.param == "native":
                continue
            pytest.skip(reason)
    with registry.use(request.param):
        yield request.param


@pytest.mark.parametrize("suffix", ["fwd", "bwd"])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(variant, device, name, suffix):
    args = raw_args(name, suffix, device)
    if reason := registry.why_not(f"{name}_{suffix}", variant, *args):
        pytest.skip(reason)
    overload = registry.OPS[f"{name}_{suffix}"].overloads[variant]
    tests = ("test_schema", "test_faketensor") if variant == "triton" and not CUDA else None
    torch.library.opcheck(overload, args, **({"test_utils": tests} if tests else {}))
    outs = overload(*args)
    assert all(o.data_ptr() != a.data_ptr() for o in outs for a in args if isinstance(a, torch.Tensor))


def test_output_is_stored_by_token(variant, device):
    q, k, v = leaves(2, 2, 1, 3, 5, D, None, DTYPE, device)
    o = registry.call("attention_fwd", q.detach(), k.detach(), v.detach(), *OPTIONS)[0]
    assert o.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("varlen", [False, True])
def test_compiles_whole_with_its_backward(variant, device, varlen):
    """Against fp64 and not against what runs without it: inductor keeps in float32 what that rounds between steps."""
    if varlen:
        tensors, (cu, _), lists = packed([3, 4], [3, 4], 2, 1, D, None, DTYPE, device)
        f = lambda q, k, v: attention_varlen(q, k, v, cu, None, 4, 4, causal=True, return_lse=True)  # noqa: E731
        formula = lambda q, k, v: varlen_definition(q, k, v, *lists, causal=True)  # noqa: E731
    else:
        tensors = leaves(1, 2, 1, 4, 6, D, None, DTYPE, device)
        f = lambda q, k, v: ops.attention(q, k, v, causal=True, return_lse=True)  # noqa: E731
        formula = lambda q, k, v: definition(q, k, v, causal=True)  # noqa: E731
    compiled = torch.compile(f, backend="inductor" if CUDA else "aot_eager", fullgraph=True)
    check(compiled, formula, tensors)


def test_checkpoints_make_dropouts_draw_again(variant, device):
    if variant == "native":
        pytest.skip("dropout has no native kernel")
    tensors = leaves(1, 2, 1, 4, 6, D, None, DTYPE, device)

    def f(q, k, v):
        return ops.attention(q, k, v, dropout_p=0.5).square()

    def gradients(g):
        torch.manual_seed(3)
        return torch.autograd.grad(g(*tensors).sum(), tensors)

    want = gradients(f)
    for got, w in zip(gradients(lambda *args: checkpoint(f, *args, use_reentrant=False)), want, strict=True):
        assert torch.equal(got, w)
    torch.manual_seed(4)
    other = torch.autograd.grad(f(*tensors).sum(), tensors)
    assert not torch.equal(other[0], want[0])


def test_autocast(variant, device):
    q, k, v = leaves(1, 2, 1, 4, 6, 64, None, F32, device)
    with torch.autocast(device, dtype=BF16):
        o = ops.attention(q, k, v.bfloat16(), causal=True)
    assert torch.equal(o, ops.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=True))
    assert [g.dtype for g in torch.autograd.grad(o.sum(), (q, k))] == [F32, F32]
    with torch.autocast(device, dtype=BF16), pytest.raises(ValueError, match="q must be floating point"):
        ops.attention(q.int(), k.int(), v.int())


def test_one_output_alone(variant, device):
    """Of o or of lse: what is not used has no gradient."""
    tensors = leaves(1, 2, 1, 4, 6, D, None, DTYPE, device)
    o, lse = ops.attention(*tensors, return_lse=True)
    both = torch.autograd.grad(o.sum() + lse.sum(), tensors, retain_graph=True)
    alone = torch.autograd.grad(o.sum(), tensors, retain_graph=True), torch.autograd.grad(lse.sum(), tensors[:2])
    torch.testing.assert_close(
        alone[0][0] + alone[1][0], both[0], atol=0.02 if CUDA else 1e-6, rtol=0.02 if CUDA else 1e-5
    )
    torch.testing.assert_close(alone[0][2], both[2])


def assert_near(got, want):
    assert (got - want).float().norm() <= (0.05 if CUDA else 1e-4) * want.float().norm()


def test_create_graph(variant, device):
    """A penalty on the gradients, of tensors that are their own keys too; and create_graph that nothing uses."""
    tensors = leaves(1, 2, 1, 4, 6, D, None, DTYPE, device)
    x, _, values = (t.detach()[:, :1].requires_grad_() for t in tensors)

    def second(attend, q, k, v, wanted):
        o, lse = attend(q, k, v)
        first = torch.autograd.grad(o.square().sum() + lse.sum(), wanted, create_graph=True)
        return *(g.detach() for g in first), *torch.autograd.grad(sum(g.square().sum() for g in first), wanted)

    def ours(q, k, v):
        return ops.attention(q, k, v, causal=True, return_lse=True)

    def formula(q, k, v):
        return definition(q, k, v, causal=True)

    def doubles(*leaves):
        return [t.detach().double().requires_grad_() for t in leaves]

    q, k, v = doubles(*tensors)
    x64, values64 = doubles(x, values)
    for leaves_, leaves64 in (
        ((*tensors, tensors), (q, k, v, (q, k, v))),
        ((x, x, values[:, :, :4], (x,)), (x64, x64, values64[:, :, :4], (x64,))),
    ):
        all_three = second(ours, *leaves_), second(formula, *leaves64), second(formula, *leaves_)
        for got, want, plain in zip(*all_three, strict=True):
            error, plains = ((g.double() - want).norm() for g in (got, plain))
            assert error <= max(2 * plains, (0.02 if CUDA else 1e-4) * want.norm())
    (only,) = torch.autograd.grad(ours(*tensors)[1].sum(), tensors[:1], create_graph=True)
    assert_near(only, torch.autograd.grad(ours(*tensors)[1].sum(), tensors[:1])[0])


def test_second_derivative_of_a_pack(variant, device):
    tensors, cu, lists = packed([3, 0, 5], [4, 2, 5], 2, 1, D, None, DTYPE, device)

    def second(attend):
        first = torch.autograd.grad(attend().square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    ours = second(lambda: ops.attention_varlen(*tensors, *cu, 5, 5))
    for got, want in zip(ours, second(lambda: varlen_definition(*tensors, *lists)[0]), strict=True):
        assert_near(got, want)


def test_transforms_are_plain_torchs(variant, device):
    q, k, v = (t.detach() for t in leaves(2, 2, 1, 4, 6, D, None, DTYPE, device))

    def transformed(attend):
        return *torch.func.jvp(attend, (q,), (q,)), torch.func.grad(lambda q: attend(q).square().sum())(q)

    ours = transformed(lambda q: ops.attention(q, k, v, causal=True))
    for got, want in zip(ours, transformed(lambda q: definition(q, k, v, causal=True)[0]), strict=True):
        assert_near(got, want)
    assert_near(torch.vmap(lambda q, k, v: ops.attention(q, k, v))(q, k, v), ops.attention(q, k, v))


def test_a_copy_is_made_where_the_last_dim_is_strided(variant, device):
    q, k, v = (t.detach() for t in leaves(1, 2, 1, 4, 6, D, None, DTYPE, device))
    strided = (t.repeat_interleave(2, -1)[..., ::2] for t in (q, k, v))
    torch.testing.assert_close(ops.attention(*strided), ops.attention(q, k, v))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_expanded_tensors_are_read_as_they_are(variant, device, dim):
    """A stride of zero: bit for bit what a copy gives."""
    if variant == "ref":
        pytest.skip("torch's matmuls")
    tensors = [t.detach() for t in leaves(2, 2, 2, 6, 6, D, None, DTYPE, device)]
    one = [t.narrow(dim, 0, 1).expand_as(t) for t in (*tensors, torch.randn_like(tensors[0]))]

    def run(q, k, v, do):
        o, lse = registry.call("attention_fwd", q, k, v, *OPTIONS)
        return o, lse, *registry.call("attention_bwd", do, None, q, k, v, o, lse, *OPTIONS, True)

    for got, want in zip(run(*one), run(*(t.contiguous() for t in one)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dim", [0, 1])
def test_expanded_packs_are_read_as_they_are(variant, device, dim):
    if variant == "ref":
        pytest.skip("torch's matmuls")
    tensors, cu, _ = packed([30, 0, 75], [30, 0, 75], 2, 2, D, None, DTYPE, device)
    one = [t.detach().narrow(dim, 0, 1).expand_as(t) for t in (*tensors, torch.randn_like(tensors[0]))]

    def run(q, k, v, do):
        options = *cu, 75, 75, *OPTIONS
        o, lse = registry.call("attention_varlen_fwd", q, k, v, *options)
        return o, lse, *registry.call("attention_varlen_bwd", do, None, q, k, v, o, lse, *options, True)

    for got, want in zip(run(*one), run(*(t.contiguous() for t in one)), strict=True):
        assert torch.equal(got, want)


# ---- refusals ----


def test_raw_ops_refuse_bad_tensors(variant, device):
    """Each tensor argument spoilt in each way: an error that names it, never a crash nor a result."""
    spoilt = {
        "int32": lambda t: t.float().int(),
        "one dim more": lambda t: t[None],
        "one dim less": lambda t: t[0],
        "last dim strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
        "another device": lambda t: t.to("cpu" if device == "cuda" else "meta"),
    }
    names = ["do", "dlse", "q", "k", "v", "o", "lse"]
    for name in NAMES[:2]:
        args = raw_args(name, "bwd", device)
        overload = registry.OPS[f"{name}_bwd"].overloads[variant]
        overload(*args)
        for i, argument in enumerate(names):
            for how, spoil in spoilt.items():
                with pytest.raises((ValueError, RuntimeError)):
                    pytest.fail(
                        f"{argument} with {how} was taken: {overload(*args[:i], spoil(args[i]), *args[i + 1 :])}"
                    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_left": -2}, "window_left must be at least 0, or -1 for none, got -2"),
        ({"window_right": -5}, "window_right must be at least 0"),
        ({"softcap": float("inf")}, "softcap must be positive and finite, got inf"),
        ({"softcap": float("nan")}, "softcap must be positive and finite, got nan"),
        ({"scale": float("nan")}, "scale must be finite, got nan"),
        ({"softcap": -1.0}, "softcap must be positive and finite, got -1.0"),
    ],
)
def test_raw_numbers(change, message):
    q, k, v = (t.detach() for t in leaves(1, 2, 1, 4, 6, 8))
    names = dict(zip(("scale", "causal", "window_left", "window_right", "softcap"), OPTIONS, strict=True)) | change
    with pytest.raises(ValueError, match=message):
        torch.ops.cs336_ref.attention_fwd(q, k, v, *names.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cu_seqlens_q": [0, 5, 3, 7]},
            r"cu_seqlens_q must rise from 0 to q's 7 tokens and never fall, got \[0, 5, 3, 7\]",
        ),
        ({"cu_seqlens_q": [0, 3, 5, 9]}, "cu_seqlens_q must rise from 0 to q's 7 tokens"),
        ({"cu_seqlens_k": [1, 3, 5, 7]}, "cu_seqlens_k must rise from 0"),
        ({"cu_seqlens_k": [0, 3, 7]}, "cu_seqlens_k must be as long as cu_seqlens_q, 4, got 3"),
        ({"max_seqlen_q": 2}, "max_seqlen_q must be at least the longest sequence, 3, got 2"),
        ({"max_seqlen_k": -1}, "max_seqlen_k must not be negative"),
        ({"window": (0, -3)}, "window's right"),
        ({"softcap": 0.0}, "softcap must be positive and finite, got 0.0"),
        ({"softcap": float("inf")}, "softcap must be positive and finite"),
        ({"scale": float("inf")}, "scale must be finite, got inf"),
        ({"v": torch.zeros(6, 1, 8)}, "q, k and v must fit each other"),
        ({"k": torch.zeros(7, 3, 8)}, "q, k and v must fit each other"),
    ],
)
def test_varlen_refuses(change, message):
    args = {"cu_seqlens_q": [0, 3, 5, 7], "cu_seqlens_k": [0, 3, 5, 7], "q": torch.zeros(7, 2, 8)}
    args |= {"k": torch.zeros(7, 1, 8), "v": torch.zeros(7, 1, 8)} | change
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        args[name] = torch.tensor(args[name], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        ops.attention_varlen(**args)


def test_varlen_refuses_int64_lengths():
    with pytest.raises(ValueError, match=r"cu_seqlens_q must be contiguous \(N \+ 1,\) torch.int32"):
        ops.attention_varlen(*torch.zeros(3, 7, 1, 8), torch.tensor([0, 7]))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((torch.zeros(1, 2, 4, 80, dtype=BF16),) * 3, "head dims .* not 80 and 80"),
        ((torch.zeros(1, 2, 4, 64),) * 3, "take float16 and bfloat16, not torch.float32"),
        ((torch.zeros(1, 2, 4, 68, dtype=BF16)[..., :64],) * 3, "rows at multiples of 16 bytes, not at strides"),
        ((torch.zeros(1, 1, 4, 64, dtype=BF16).expand(1, 2, 4, 64),) * 3, None),
        ((torch.zeros(1, 2, 4, 72, dtype=BF16)[..., 3:67],) * 3, "starts between two of them"),
        ((torch.zeros(1, 2, 4, 64, dtype=BF16),) * 3, None),
    ],
)
def test_why_not_native(tensors, message):
    reason = _native_refuses("backward", *tensors)
    assert reason is None if message is None else pytest.importorskip("re").search(message, reason)


@pytest.mark.parametrize("D", [64, 96, 128, 256])
@pytest.mark.parametrize("suffix", ["fwd", "bwd"])
def test_why_not_native_by_numbers(suffix, D):
    """Where the arguments of each raw op stand: the sentence names the one that was refused."""
    q = torch.zeros(1, 2, 4, D, dtype=BF16)
    lse = torch.zeros(1, 2, 4)
    ask = registry.OPS[f"attention_{suffix}"].supports["native"]
    tensors, last = ((q, q, q), ()) if suffix == "fwd" else ((q, None, q, q, q, q, lse), (False,))
    assert ask(*tensors, 0.1, True, -1, -1, 0.0, *last) is None
    assert "positive scale, not -0.5" in ask(*tensors, -0.5, True, -1, -1, 0.0, *last)
    capped = ask(*tensors, 0.1, True, -1, -1, 5.0, *last)
    assert (f"96 and 128 features, not of {D}" in capped) if suffix == "bwd" and D in (64, 256) else capped is None


@pytest.mark.skipif(not CUDA, reason="on a CPU wrong starts are refused")
@pytest.mark.parametrize("starts", [[0, 1000, 0, 1000], [0, 2000, 500, 1000], [-5, 300, 1000, 10**6], [900, 10, 5, 0]])
@pytest.mark.parametrize("D", [64, 256])
def test_wrong_starts_do_not_hang(variant, device, D, starts):
    """Key tiles that take turns would wait for those that wrong starts leave out."""
    tensors = leaves(1, 4, 2, 1000, 1000, D, None, DTYPE, device)
    cu, right = (torch.tensor(s, dtype=torch.int32, device=device) for s in (starts, [0, 300, 700, 1000]))
    for cus in ((cu, cu), (cu, right), (right, cu)):
        args = *(x[0].transpose(0, 1) for x in tensors), *cus, 1000, 1000
        if reason := registry.why_not("attention_varlen_fwd", variant, *args, *OPTIONS):
            pytest.skip(reason)
        with registry.determinism(True):
            torch.autograd.grad(ops.attention_varlen(*args, causal=True).sum(), tensors)
        torch.cuda.synchronize()


def test_the_choice_of_a_kernel_breaks_no_graph():
    """Also where there is no GPU to choose it for."""

    def choose(*tensors):
        return tensors[0] + 1, _native_refuses("backward", *tensors, scale=0.5, softcap=2.0)

    tensors = [torch.randn(2, 5, 4, 128, dtype=BF16).transpose(1, 2) for _ in range(5)]
    assert torch.compile(choose, backend="eager", fullgraph=True)(*tensors)[1] is None


def test_a_forced_kernel_never_falls_back(device):
    q, k, v = (t.detach() for t in leaves(1, 2, 1, 4, 6, 80, None, BF16, device))
    with registry.use("native"), pytest.raises(NotImplementedError, match=r"80|no native kernel|_C_cuda|capability"):
        ops.attention(q, k, v)
    wide = torch.zeros(1, 1, 2, 300, device=device)
    with registry.use("triton"), pytest.raises(NotImplementedError, match=r"up to 256 features|no triton kernel"):
        ops.attention(wide, wide, wide)
    with registry.use("triton"), pytest.raises(NotImplementedError, match="no triton kernel for a mask"):
        ops.attention(q, k, v, mask=torch.ones(4, 6, dtype=torch.bool, device=device))


# ---- CUDA ----


@pytest.mark.skipif(not CUDA, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("options", [{"causal": True}, {"dropout_p": 0.5}])
def test_cuda_graph(variant, device, options):
    if variant == "ref" or (variant == "native" and "dropout_p" in options):
        pytest.skip("the kernels' promise")
    q, k, v = leaves(2, 4, 2, 300, 300, 64, None, BF16, device)

    def step():
        o = ops.attention(q, k, v, **options)
        return o, *torch.autograd.grad(o.square().sum(), (q, k, v))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()  # first calls compile and allocate
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        q.normal_()
    graph.replay()
    if "dropout_p" in options:
        first = captured[0].clone()
        graph.replay()
        assert not torch.equal(first, captured[0])  # each replay draws anew
    else:
        assert torch.equal(captured[0], step()[0])
        for c, e in zip(captured, step(), strict=True):
            torch.testing.assert_close(c, e, atol=0.05, rtol=0.05)


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize(("S", "causal"), [(512, False), (512, True), (1100, True)])
@pytest.mark.parametrize("width", [64, 128])
def test_a_chain_in_a_graph_on_another_stream_reads_what_was_just_written(variant, device, width, S, causal):
    """The next kernel starts while the one before still runs: it must not read too early what that one writes last."""
    q, k, v = (x.detach() for x in leaves(16, 16, 16, S, S, width, None, BF16, device))

    def chain(wait):
        x = q
        for _ in range(10):
            y = ops.attention(x, k, v, causal=causal)
            wait()
            x = ops.attention(y[-1:], y[-1:], y[-1:], causal=causal).expand_as(q)
            wait()
        return x

    check_without_waiting(chain, times=3)


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("S", [300, 1100])
@pytest.mark.parametrize("width", [64, 96, 128, 256])
def test_a_chain_of_backwards_reads_what_was_just_written(variant, device, width, S):
    """Each takes the gradient of the one before, in a workspace that that one has just given back."""
    q, k, v = (x.detach() for x in leaves(4, 8, 4, S, S, width, None, BF16, device))
    o, lse = registry.call("attention_fwd", q, k, v, *OPTIONS)

    def chain(wait):
        do, both = o, []
        for _ in range(6):
            do, *keys = registry.call("attention_bwd", do, None, q, k, v, o, lse, *OPTIONS, True)
            wait()
            both += keys
        return torch.stack(both)

    check_without_waiting(chain, times=3)


@pytest.mark.skipif(not CUDA, reason="streams need a GPU")
def test_runs_on_the_current_stream(variant, device):
    q = torch.zeros(1, 4, 2048, 64, device=device, dtype=BF16)
    ops.attention(q, q, q)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # a kernel on any other stream would still see zeros
        q.normal_()
        got = ops.attention(q, q, q)
    torch.cuda.synchronize()
    assert torch.equal(got, ops.attention(q, q, q))


@pytest.mark.skipif(not CUDA, reason="2^31 elements need a GPU")
def test_offsets_of_64_bits(variant, device):
    """The last head of a tensor of more than 2^31 elements, forward and backward."""
    if variant == "ref":
        pytest.skip("torch's indexing")
    storage = torch.zeros(2**31 + 2**22, device=device, dtype=BF16)
    far = storage.as_strided((2, 1, 256, 64), (2**31, 64, 64, 1), 0)
    far.copy_(torch.randn(2, 1, 256, 64, device=device))
    near = far.clone()
    got, want = (
        (o := ops.attention(x, x, x, causal=True), *torch.autograd.grad(o.float().square().sum(), x))
        for x in (far.detach().requires_grad_(), near.detach().requires_grad_())
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=0.05, rtol=0.05)
