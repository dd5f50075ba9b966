import pytest
import torch
import torch.nn.functional as F

from cs336 import ops
from cs336.nn import Linear, quantized
from cs336.nn.linear import join, joined
from cs336.nn.quantized import TOKEN, QuantizedLinear, rounded
from cs336.ops import registry
from cs336.ops.linear_few_rows import pays


def test_is_torchs_function():
    x = torch.randn(2, 3, 8)
    for bias in (False, True):
        layer, theirs = Linear(8, 5, bias=bias), torch.nn.Linear(8, 5, bias)
        theirs.load_state_dict(layer.state_dict())  # the same names and shapes
        assert torch.equal(layer(x), theirs(x))
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_starts_as_the_field_does():
    layer = Linear(300, 500, bias=True)
    std = (2 / 800) ** 0.5
    assert abs(layer.weight.std() / std - 1) < 0.03  # the cut takes 1.3 %
    assert 2.9 * std < layer.weight.abs().max() <= 3 * std
    assert abs(layer.weight.mean()) < 0.01 * std
    assert not layer.bias.any()


def test_device_and_dtype():
    layer = Linear(2, 3, bias=True, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}


def test_is_found_by_type():
    assert isinstance(Linear(2, 3), torch.nn.Linear)


def test_a_device_is_no_bias():
    with pytest.raises(TypeError, match="positional"):
        Linear(4, 5, "cpu")


def test_joined_layers_are_what_they_were():
    torch.manual_seed(0)
    layers = [Linear(12, n) for n in (8, 4, 4)]
    x = torch.randn(2, 3, 12)
    weights = [layer.weight for layer in layers]
    want = [layer(x) for layer in layers]
    join(layers)
    assert all(layer.weight is weight for layer, weight in zip(layers, weights, strict=True))
    with torch.no_grad():
        whole = joined(x, layers)
        assert whole[1].data_ptr() - whole[0].data_ptr() == 8 * 4  # parts of one product
        layers[1].weight.mul_(2)
        assert torch.allclose(joined(x, layers)[1], 2 * want[1])
        layers[1].weight.mul_(0.5)
    for found in (whole, joined(x, layers), [layer(x) for layer in layers]):
        for a, b in zip(found, want, strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    assert joined(x, layers)[2].grad_fn is not None
    joined(x, layers)[2].sum().backward()
    assert layers[2].weight.grad.shape == (4, 12)
    assert layers[0].weight.grad is None


def test_layers_made_in_inference_mode_are_joined():
    with torch.inference_mode():
        layers = [Linear(8, n) for n in (4, 6)]
        x = torch.randn(3, 8)
        want = [layer(x) for layer in layers]
    join(layers)
    with torch.inference_mode():
        assert layers[0].weight.untyped_storage().data_ptr() == layers[1].weight.untyped_storage().data_ptr()
        for found, right in zip(joined(x, layers), want, strict=True):
            assert torch.allclose(found, right, atol=1e-6)


@torch.no_grad()
def test_what_is_not_side_by_side_is_computed_by_itself():
    torch.manual_seed(0)
    x = torch.randn(3, 12)
    apart = [Linear(12, 8), Linear(12, 4)]
    biased = [Linear(12, 8, bias=True), Linear(12, 4, bias=True)]
    replaced = [Linear(12, 8), Linear(12, 4)]
    join(replaced)
    replaced[1].weight = torch.nn.Parameter(torch.randn(4, 12))
    join(biased)
    for layers in (apart, biased, replaced, replaced[:1]):
        for a, layer in zip(joined(x, layers), layers, strict=True):
            assert torch.allclose(a, layer(x), atol=1e-6)
    # one allocation's end may be another's beginning
    memory = torch.randn(12, 12)
    near = [Linear(12, 8), Linear(12, 4)]
    near[0].weight.data, near[1].weight.data = memory[:8], memory[8:]
    assert torch.allclose(joined(x, near)[1], x @ memory[8:].T, atol=1e-6)


@torch.no_grad()
def test_joined_layers_are_joined_once():
    """A second engine of a model leaves the memory that the first one has captured."""
    layers = [Linear(12, 8), Linear(12, 4)]
    apart = layers[0].weight.data_ptr()
    join(layers)
    places = [layer.weight.data_ptr() for layer in layers]
    assert places[0] != apart
    join(layers)
    assert [layer.weight.data_ptr() for layer in layers] == places


@torch.no_grad()
def test_joined_layers_call_their_hooks():
    layers, x, calls = [Linear(12, 8), Linear(12, 4)], torch.randn(3, 12), []
    join(layers)
    layers[0].register_forward_pre_hook(lambda module, inputs: calls.append("before"))
    layers[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    first, second = joined(x, layers)
    assert calls == ["before"]
    assert torch.equal(first, x @ layers[0].weight.T)
    assert torch.equal(second, 2 * (x @ layers[1].weight.T))


@torch.no_grad()
@pytest.mark.parametrize(("method", "zeros"), [("int8", True), ("int4", False), ("fp8", False)])
def test_quantised_layers_are_joined(monkeypatch, method, zeros):
    torch.manual_seed(0)
    model = torch.nn.ModuleList([Linear(64, n) for n in (24, 8, 8)])
    quantized.replace_linears(model, method, 16, zeros=zeros)
    layers, x = list(model), torch.randn(3, 64)
    for layer in layers:
        layer.packed.copy_(torch.randint(0, 100, layer.packed.shape))
        layer.scales.uniform_(0.5, 2)
        if zeros:
            layer.zeros.random_(-8, 9)
    want, saved = [layer(x) for layer in layers], {k: v.clone() for k, v in model.state_dict().items()}
    op, rows = getattr(ops, f"linear_{method}"), []
    monkeypatch.setattr(ops, f"linear_{method}", lambda x, w, *args, **kw: rows.append(len(w)) or op(x, w, *args, **kw))
    joined(x, layers)
    assert rows == [24, 8, 8]
    join(layers)
    torch.testing.assert_close(list(joined(x, layers)), want)
    assert rows[3:] == [40]
    assert all(torch.equal(saved[name], t) for name, t in model.state_dict().items())
    layers[1].order = torch.arange(64)
    torch.testing.assert_close(list(joined(x, layers)), want)
    assert rows[4:] == [24, 8, 8]


def test_few_rows_go_to_their_op_in_inference_alone(monkeypatch):
    """nn asks one function, whose answer on this device is what the kernel is for."""
    calls = []

    def op(x, weight, bias=None, *, constant=False):
        calls.append((tuple(x.shape), constant))
        return F.linear(x, weight, bias)

    monkeypatch.setattr(ops, "linear_few_rows", op)
    x, layers = torch.randn(3, 8), [Linear(8, 4), Linear(8, 6)]
    with torch.no_grad():
        want = [layer(x) for layer in layers]
        assert not calls  # no kernel of a CPU's
        join(layers)
        monkeypatch.setattr("cs336.nn.linear.pays", lambda x, weight, bias: len(weight) != 6)
        assert all(torch.equal(a, b) for a, b in zip([layer(x) for layer in layers], want, strict=True))
        assert calls == [((3, 8), False)]
        torch.testing.assert_close(list(joined(x, layers)), want)
        assert calls == [((3, 8), False)] * 2


def test_layers_promise_constant_weights_in_captured_graphs_alone(monkeypatch):
    """Called on its own, a layer may follow the kernel that has just written its weight."""
    promised = []

    def op(x, weight, *args, constant=False, **options):
        promised.append(constant)
        return x.new_zeros(*x.shape[:-1], 4)

    for name in ("linear_few_rows", "linear_int8", "linear_int4", "linear_fp8"):
        monkeypatch.setattr(ops, name, op)
    monkeypatch.setattr("cs336.nn.linear.pays", lambda *args: True)
    x = torch.randn(3, 8, device="cuda" if torch.cuda.is_available() else "cpu")
    layers = [QuantizedLinear(8, 4, method, None, device=x.device) for method in ("int8", "int4", "fp8")]
    layers.append(Linear(8, 4, device=x.device))
    with torch.no_grad():
        for layer in layers:
            layer(x)
        assert promised == [False] * 4
        if x.is_cuda:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                for layer in layers:
                    layer(x)
            assert promised[4:] == [True] * 4


def test_what_the_few_row_kernel_is_not_asked_for():
    x, w = torch.randn(1, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    with torch.no_grad():
        assert not pays(x, w, None)  # on a CPU
        if not torch.cuda.is_available():
            return
        x, w = x.cuda(), w.cuda()
        wanted = registry.missing("linear_few_rows", "native", x.device) is None
        assert pays(x, w, None) == wanted
        large = torch.empty(2**13, 2**12, dtype=x.dtype, device="cuda")
        refused = (x.float(), w.float(), None), (x.expand(9, 8), w, None), (x[:, :4], w[:, :4], None)
        for args in (*refused, (large[:1], large, None), (large.view(-1, 2**14)[:8], large.view(-1, 2**14)[:9], None)):
            assert not pays(*args)
        with torch.autocast("cuda", torch.bfloat16):
            assert not pays(x, w, None)
        with registry.use("triton"):
            assert not pays(x, w, None)
    assert not pays(x, w, None)  # where gradients are recorded


@pytest.mark.parametrize("x_group", [TOKEN, 8])
def test_gradients_pass_rounding_compiled_and_in_transforms_too(x_group):
    x = torch.randn(3, 20)
    slope = torch.randn_like(x)

    def loss(x):
        return (rounded(x, x_group) * slope).sum()

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    assert torch.equal(leaf.grad, slope)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(torch.autograd.grad(compiled(leaf), leaf)[0], slope)
    assert torch.equal(torch.func.grad(loss)(x), slope)
    assert torch.equal(torch.vmap(lambda x: rounded(x, x_group))(x), rounded(x, x_group))
    assert torch.equal(torch.func.jvp(lambda x: rounded(x, x_group), (x,), (slope,))[1], slope)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, slope)
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(rounded(dual, x_group)).tangent, slope)
