import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import cs336
from cs336 import ops
from cs336.backend import REPLACEMENTS, Backend
from cs336.ops import registry, torch_cross_entropy
from cs336.ops.dispatch import has_kernel

BF16 = torch.bfloat16


@pytest.fixture
def calls(monkeypatch):
    """The names of our ops that ran, in order."""
    names = []
    for name in ("rms_norm", "layer_norm"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, op=op, name=name: (names.append(name), op(*args))[1])
    return names


def modules(device, dtype=torch.float32):
    return [
        torch.nn.RMSNorm(24, device=device, dtype=dtype),
        torch.nn.RMSNorm(24, eps=1e-3, device=device, dtype=dtype),
        torch.nn.LayerNorm(24, device=device, dtype=dtype),
        torch.nn.LayerNorm(24, bias=False, device=device, dtype=dtype),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
def test_modules_run_our_ops_and_give_what_torch_gives(device, calls, dtype):
    x = 0.01 * torch.randn(4, 5, 24, device=device, dtype=dtype)  # small, so that eps matters
    for module in modules(device, dtype):
        with torch.no_grad():
            module.weight.normal_()
        want = module(x)
        assert not calls
        with Backend():
            got = module(x)
        assert calls.pop() in type(module).__name__.lower().replace("norm", "_norm")
        torch.testing.assert_close(got, want)
        assert torch.equal(module(x), want)
        assert not calls


def test_gradients(device, calls):
    x = torch.randn(4, 24, device=device, requires_grad=True)
    for module in modules(device):
        leaves = [x, *module.parameters()]
        want = torch.autograd.grad(module(x).square().sum(), leaves)
        with Backend():
            got = torch.autograd.grad(module(x).square().sum(), leaves)
        assert calls.pop()
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("compiled_first", [False, True])
def test_compiled_modules_follow_the_switch(device, compiled_first):
    graphs = []

    def backend(graph_module, _):
        graphs.append(str(graph_module.graph))
        return graph_module

    x = torch.randn(4, 24, device=device)
    for module in modules(device):
        torch.compiler.reset()
        compiled = torch.compile(module, fullgraph=True, backend=backend)
        with torch.no_grad():
            want = compiled(x) if compiled_first else module(x)
            with Backend():
                torch.testing.assert_close(compiled(x), want)
            assert "cs336" in graphs[-1]


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch's own, about its fused kernel
@pytest.mark.parametrize("input_dtype", [torch.float32, BF16])
def test_autocast(device, calls, input_dtype):
    """Autocast runs torch's norms in float32 on a GPU, and leaves them alone on a CPU."""
    x = torch.randn(4, 24, device=device, dtype=input_dtype)
    for module in modules(device):
        with torch.autocast(device, dtype=BF16):
            want = module(x)
            with Backend():
                got = module(x)
        assert calls.pop()
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)


class Wrapped(torch.Tensor):
    pass


def forward_derivative(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x))).tangent


def test_the_rest_goes_to_torch(device, calls):
    x, w = torch.randn(4, 6, 24, device=device), torch.randn(24, device=device)
    cases = [
        lambda: F.rms_norm(x, (24,)),
        lambda: F.layer_norm(x, (24,)),
        lambda: F.layer_norm(x, (24,), None, w),
        lambda: F.rms_norm(x, (6, 24), w.expand(6, 24)),
        lambda: F.layer_norm(x.double(), (24,), w.double()),
        lambda: F.rms_norm(x[:0], (24,), w),
        lambda: F.layer_norm(x.as_subclass(Wrapped), (24,), w),
        lambda: torch.func.vmap(lambda row: F.layer_norm(row, (24,), w))(x),
        lambda: torch.func.grad(lambda row: F.rms_norm(row, (24,), w).sum())(x),
        lambda: torch.func.jvp(lambda row: F.layer_norm(row, (24,), w), (x,), (x,))[1],
        lambda: forward_derivative(lambda row: F.rms_norm(row, (24,), w), x),
    ]
    for case in cases:
        want = case()
        with Backend():
            got = case()
        assert type(got) is type(want)
        assert torch.equal(got, want)
    assert not calls


def test_torch_raises_its_own_errors(device):
    x, w = torch.randn(4, 24, device=device), torch.randn(24, device=device)
    for case in (
        lambda: F.layer_norm(x, (23,), w[:23]),
        lambda: F.rms_norm(x, (24,), w[:23]),
        lambda: F.layer_norm(x, (24,), w, w[:23]),
        lambda: F.layer_norm(x, (24,), w.to("meta")),
    ):
        with pytest.raises(RuntimeError) as want:
            case()
        with Backend(), pytest.raises(RuntimeError) as got:
            case()
        assert str(got.value) == str(want.value)


def test_traces_as_torch(device):
    x = torch.randn(4, 24, device=device)
    module = torch.nn.LayerNorm(24, device=device)
    with Backend():
        graph = str(torch.jit.trace(module, x).graph)
    assert "aten::layer_norm" in graph


def test_folders_are_attributes_of_the_package():
    code = (
        "import cs336; cs336.backend.Backend; cs336.ops.rms_norm; cs336.nn.Linear; assert not hasattr(cs336, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nesting_and_exceptions():
    originals = {name: getattr(F, name) for name in REPLACEMENTS}

    def swapped():
        return {getattr(F, name) is not original for name, original in originals.items()}

    cs336.enable()
    with pytest.raises(KeyError), Backend():
        raise KeyError
    assert swapped() == {True}
    cs336.disable()
    assert swapped() == {False}
    with pytest.raises(RuntimeError, match="without a cs336"):
        cs336.disable()


def test_replacements_keep_name_and_documentation():
    before = F.rms_norm.__doc__
    with Backend():
        assert (F.rms_norm.__name__, F.rms_norm.__doc__) == ("rms_norm", before)


def test_a_gradient_of_a_gradient(device, calls):
    """A penalty on the input's gradient, as WGAN-GP has it; and create_graph that nothing uses."""
    x = torch.randn(4, 24, device=device, requires_grad=True)
    for module in modules(device):
        net = torch.nn.Sequential(module, torch.nn.Linear(24, 1, device=device))

        def penalty(net=net):
            (dx,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
            return dx.detach(), *torch.autograd.grad(dx.norm(dim=-1).sub(1).square().sum(), [x, net[0].weight])

        want = penalty()
        with Backend():
            got = penalty()
        assert calls.pop()
        torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under Triton's interpreter
class TestCrossEntropy:
    """Where a kernel runs: on a GPU, or interpreted."""

    @pytest.fixture(autouse=True)
    def _kernel(self, device):
        variant = None if device == "cuda" else "triton"
        with registry.use(variant):
            if not has_kernel("cross_entropy_fwd", torch.zeros(1, 2, device=device)):
                pytest.skip("no kernel runs here")
            yield

    @pytest.fixture
    def ran(self, monkeypatch):
        names, op = [], torch_cross_entropy.cross_entropy
        monkeypatch.setattr(torch_cross_entropy, "cross_entropy", lambda *a, **k: (names.append(1), op(*a, **k))[1])
        return names

    @pytest.mark.parametrize("dtype", [torch.float32, BF16])
    @pytest.mark.parametrize(
        "options", [{}, {"reduction": "sum", "ignore_index": 3}, {"reduction": "none", "label_smoothing": 0.1}]
    )
    def test_gives_what_torch_gives(self, device, ran, dtype, options):
        logits = torch.randn(6, 11, device=device, dtype=dtype, requires_grad=True)
        targets = torch.tensor([3, 1, 4, 1, 5, 10], device=device)
        want = F.cross_entropy(logits, targets, **options)
        with Backend():
            got = F.cross_entropy(logits, targets, **options)
        assert len(ran) == 1
        tolerance = {"rtol": 2e-2, "atol": 4e-3} if dtype == BF16 else {}  # torch's rounds its log-probabilities
        torch.testing.assert_close(got, want, **tolerance)
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), logits)[0] for y in (got, want)), **tolerance)

    def test_autocast(self, device, ran):
        logits, targets = torch.randn(6, 11, device=device, dtype=BF16), torch.arange(6, device=device)
        with torch.autocast(device, BF16):
            want = F.cross_entropy(logits, targets)
            with Backend():
                torch.testing.assert_close(F.cross_entropy(logits, targets), want)
        assert ran

    def test_the_rest_goes_to_torch(self, device, ran):
        z, t = torch.randn(4, 5, 3, device=device), torch.zeros(4, 3, dtype=torch.long, device=device)
        for case in (
            lambda: F.cross_entropy(z, t),
            lambda: F.cross_entropy(z[..., 0], z[..., 0].softmax(-1)),
            lambda: F.cross_entropy(z[..., 0], t[:, 0], weight=z[0, :, 0].abs()),
            lambda: F.cross_entropy(z[0, :, 0], t[0, 0]),
            lambda: F.cross_entropy(z[..., 0].double(), t[:, 0]),
        ):
            want = case()
            with Backend():
                assert torch.equal(case(), want)
        assert not ran
        with Backend():
            assert F.cross_entropy(z[..., 0], t[:, 0] - 100).isnan()  # a mean of nothing, as torch's
