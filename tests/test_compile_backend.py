"""torch.compile(model, backend="cs336"), with aot_eager in inductor's place but for one test."""

import shutil
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from tiny_models import assert_like_its_own, tiny, train
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

from cs336 import compile_backend

COUNTS = {
    "llama": {"rms_norm": 5, "rope": 4, "attention": 2, "swiglu": 2, "cross_entropy": 1},
    "qwen3": {"rms_norm": 9, "rope": 4, "attention": 2, "swiglu": 2, "cross_entropy": 1},
    "gpt2": {"layer_norm": 5, "attention": 2, "cross_entropy": 1},
}


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def counts():
    """What was replaced in each graph that `backend` compiled."""
    return []


@pytest.fixture
def backend(counts):
    def compile(graph_module, inputs):
        counts.append(dict(compile_backend.replace(graph_module)))
        return aot_eager(graph_module, inputs)

    return compile


@pytest.mark.parametrize("name", COUNTS)
def test_transformers_models(counts, backend, name):
    pytest.importorskip("transformers")
    model = tiny(name, "sdpa")
    assert_like_its_own(name, train(model, call=torch.compile(model, backend=backend)))
    assert sum((Counter(c) for c in counts), Counter()) == COUNTS[name]


class Plain(nn.Module):
    """Written by hand: a norm spelt out, interleaved names, another order of factors."""

    def __init__(self):
        super().__init__()
        self.w, self.norm, self.rms = nn.Parameter(torch.rand(16)), nn.LayerNorm(16), nn.RMSNorm(16)
        angles = torch.rand(6, 8)
        self.register_buffer("angles", angles)

    def forward(self, x):
        x = self.w * (x * (1e-5 + (x * x).mean(-1, keepdim=True)).rsqrt())
        emb = torch.cat((self.angles, self.angles), dim=-1)
        cos, sin = emb.cos(), emb.sin()
        turned = torch.cat((-x[..., 8:], x[..., :8]), dim=-1) * sin + cos * x
        q = turned.unflatten(-1, (2, 8)).transpose(1, 2)
        o = F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)
        return self.rms(self.norm(o))


def test_a_plain_model(counts, backend):
    model, x = Plain(), torch.randn(2, 6, 16, requires_grad=True)
    leaves = [x, *model.parameters()]
    want = model(x)
    got = torch.compile(model, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(got, want)
    for g, w in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (got, want)), strict=True):
        torch.testing.assert_close(g, w)
    assert counts == [{"rms_norm": 2, "rope": 1, "attention": 1, "layer_norm": 1}]


def attend(x, mask_of):
    """x (H, S, 8) attends to itself, with the mask that mask_of makes of its places (S,)."""
    places = torch.arange(x.shape[1])
    return F.scaled_dot_product_attention(x[None], x[None], x[None], mask_of(places))


@pytest.mark.parametrize(
    "mask_of",
    [
        lambda i: i[None, :] <= i[:, None],
        lambda i: (i[:, None] >= i[None, :]).expand(1, 2, -1, -1),
        lambda i: ((i + 3)[None, None, None, :] <= (i + 3)[None, None, :, None]).expand(1, -1, 6, 6),
        lambda i: i.unsqueeze(0) <= torch.arange(0, len(i)).unsqueeze(-1),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_causal_mask_is_recognised(counts, backend, mask_of, dynamic):
    """transformers 5.17 makes one whenever it is compiled."""
    x = torch.randn(2, 6, 8)
    got = torch.compile(attend, backend=backend, fullgraph=True, dynamic=dynamic)(x, mask_of)
    torch.testing.assert_close(got, attend(x, mask_of))
    assert counts == [{"attention": 1}]


@pytest.mark.parametrize(
    "mask_of",
    [
        lambda i: i[None, :] < i[:, None] + 2,
        lambda i: i[None, :] <= (i + 1)[:, None],
        lambda i: i[None, :] >= i[:, None],
        lambda i: i[:, None] <= i[None, :],
        lambda i: i[None, :] <= (2 * i)[:, None],
        lambda i: i[None, :] <= torch.arange(1, 7)[:, None],
        lambda i: i[None, :] <= torch.arange(0, 12, 2)[:, None],
        lambda i: i[None, :] <= torch.arange(7)[1:, None],
        lambda i: i[None, :] <= i.flip(0)[:, None],
        lambda i: (i[None, :] <= i[:, None]) | (i[None, :] < 2),
        lambda i: i[None, :] <= 3,
        lambda i: i[None, :] <= torch.ones_like(i)[:, None],
        lambda i: torch.arange(1)[None, :] <= i[:, None],
        lambda i: (torch.arange(1)[None, :] <= i[:, None]).expand(6, 6),
        lambda i: i[None, :] <= torch.arange(1)[:, None],
    ],
)
def test_other_masks_stay_torchs(counts, backend, mask_of):
    x = torch.randn(2, 6, 8)
    got = torch.compile(attend, backend=backend, fullgraph=True)(x, mask_of)
    torch.testing.assert_close(got, attend(x, mask_of))
    assert counts == [{}]


def prefix(i):
    mask = i[None, :] <= i[:, None]
    mask[:, :2] = True
    return mask


def prefix_of_a_view(i):
    mask = i[None, :] <= i[:, None]
    mask[:, :2].fill_(True)
    return mask


def or_in_place(i):
    mask = i[None, :] <= i[:, None]
    mask |= i[None, :] < 3
    return mask


def out(i):
    mask = i[None, :] <= i[:, None]
    torch.logical_or(mask, mask.flip(0), out=mask)
    return mask


def keys(i):
    places = torch.arange(6)
    places[:2] = 0
    return places[None, :] <= i[:, None]


def keys_of_a_view(i):
    places = torch.arange(6)
    places[None].mul_(2)
    return places[None, :] <= i[:, None]


def queries(i):
    places = torch.arange(6.0)
    places *= 0.5
    return i[None, :] <= places[:, None]


def written_by_a_function(i):
    places = torch.arange(6)
    torch.fill_(places, 3)
    return places[None, :] <= i[:, None]


WRITTEN = [prefix, prefix_of_a_view, or_in_place, out, keys, keys_of_a_view, queries, written_by_a_function]


@pytest.mark.parametrize("mask_of", WRITTEN)
def test_a_mask_that_is_written_into_stays_torchs(counts, backend, mask_of):
    x = torch.randn(2, 6, 8)
    got = torch.compile(attend, backend=backend)(x, mask_of)
    torch.testing.assert_close(got, attend(x, mask_of))
    assert sum(map(Counter, counts), Counter()) == {}


def norm_cut(x):
    y = x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    y.clamp_(0)
    return x.new_ones(8) * y


def norm_zeroed(x):
    y = x + 1
    z = y * (y.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    y.zero_()
    return x.new_ones(8) * z


def gate_written(x):
    gate = x + 1
    activated = F.silu(gate)
    gate[..., :4] = 0
    return activated * gate


def gate_written_by_a_view(x):
    gate, up = x + 1, x - 1
    activated = F.silu(gate)
    gate[..., :4].mul_(3)
    return activated * up


def whole_written_of_a_view(x):
    both = torch.cat((x, x + 1), -1)
    gate, up = both.chunk(2, -1)
    activated = F.silu(gate)
    both.mul_(2)
    return activated * up


def norm_of_a_view_written(x):
    y = x + 1
    z = y[:1]
    normed = z * (z.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    y.flatten()[:3].zero_()
    return y[0, 0] * normed


WITHIN = [norm_cut, norm_zeroed, gate_written, gate_written_by_a_view, whole_written_of_a_view, norm_of_a_view_written]


@pytest.mark.parametrize("function", WITHIN)
def test_what_is_written_within_a_pattern_stays_torchs(counts, backend, function):
    x = torch.randn(2, 6, 8)
    torch.testing.assert_close(torch.compile(function, backend=backend)(x), function(x))
    assert sum(map(Counter, counts), Counter()) == {}


def mlp_and_loss(x, head, targets):
    gate, up = x.chunk(2, -1)
    h = F.silu(gate) * up + up * F.gelu(gate, approximate="tanh") + F.relu(gate).square() + F.relu(up) ** 2
    logits = F.linear(h, head).float()
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.flatten(), ignore_index=3, label_smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_mlp_and_its_loss(counts, backend, dtype):
    x = torch.randn(2, 6, 16, dtype=dtype, requires_grad=True)
    head, targets = torch.randn(11, 8, dtype=dtype, requires_grad=True), torch.randint(0, 11, (2, 6))
    want = mlp_and_loss(x, head, targets)
    got = torch.compile(mlp_and_loss, backend=backend, fullgraph=True)(x, head, targets)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    for g, w in zip(*(torch.autograd.grad(y, (x, head)) for y in (got, want)), strict=True):
        torch.testing.assert_close(g, w, rtol=3e-2, atol=3e-3 if dtype == torch.bfloat16 else 1e-5)
    assert counts == [{"swiglu": 1, "geglu": 1, "relu2": 2, "linear_cross_entropy": 1}]


@pytest.mark.parametrize("dynamic", [None, True])
def test_lengths_that_change(counts, backend, dynamic):
    """dynamic=None: sizes are numbers at first, symbols from the second length on."""
    head, every = torch.randn(11, 8), {"swiglu": 1, "geglu": 1, "relu2": 2, "linear_cross_entropy": 1}
    compiled = torch.compile(mlp_and_loss, backend=backend, fullgraph=True, dynamic=dynamic)
    for length in (6, 4, 9):
        x, targets = torch.randn(2, length, 16), torch.randint(4, 11, (2, length))
        torch.testing.assert_close(compiled(x, head, targets), mlp_and_loss(x, head, targets))
    assert counts == [every] * (1 if dynamic else 2)


def test_a_loss_under_autocast(counts, backend):
    """The weight is float32 there, and x and the logits are not."""
    x = torch.randn(6, 8, dtype=torch.bfloat16, requires_grad=True)
    head, targets = torch.randn(11, 8, requires_grad=True), torch.randint(0, 11, (6,))

    def loss_of(x, head, targets):
        return F.cross_entropy(F.linear(x, head).float(), targets)

    with torch.autocast("cpu", torch.bfloat16):
        want = loss_of(x, head, targets)
        got = torch.compile(loss_of, backend=backend, fullgraph=True)(x, head, targets)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-5)
    for g, w in zip(*(torch.autograd.grad(y, (x, head)) for y in (got, want)), strict=True):
        assert g.dtype == w.dtype
        torch.testing.assert_close(g, w, rtol=3e-2, atol=3e-3)
    assert counts == [{"linear_cross_entropy": 1}]


def test_logits_that_are_read_are_kept(counts, backend):
    def loss_and_logits(x, head):
        logits = F.linear(x, head)
        return F.cross_entropy(logits, torch.zeros(6, dtype=torch.long)), logits

    x, head = torch.randn(6, 8), torch.randn(11, 8)
    for got, want in zip(
        torch.compile(loss_and_logits, backend=backend)(x, head), loss_and_logits(x, head), strict=True
    ):
        torch.testing.assert_close(got, want)
    assert counts == [{"cross_entropy": 1}]


def test_a_mean_of_nothing_is_torchs(backend):
    f = torch.compile(lambda z, t: F.cross_entropy(z, t), backend=backend)
    assert f(torch.randn(2, 5), torch.full((2,), -100)).isnan()


W = torch.rand(8)
TABLE = torch.rand(6, 4)


def halves(x):
    return torch.cat((-x[..., 4:], x[..., :4]), dim=-1)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: W * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-5)),  # not the square
        lambda x: W * (x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-5)),  # another dim
        lambda x: W[:1] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)),  # one weight for all
        lambda x: W * (x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-5)),  # the square of another
        lambda x: x * torch.cat((TABLE, TABLE + 1), -1) + halves(x) * torch.cat((TABLE, TABLE), -1),  # unlike halves
        lambda x: x * torch.cat((TABLE, TABLE), -1) + halves(x + 1) * torch.cat((TABLE, TABLE), -1),  # of another
        lambda x: x * torch.cat((TABLE, TABLE), -1) + torch.cat((x[..., :4], -x[..., 4:]), -1) * 2,
        lambda x: F.layer_norm(x, (8,)),  # no weight
        lambda x: F.silu(x) * x[..., :1],  # broadcast
        lambda x: F.silu(x) * W.double(),  # another dtype
        lambda x: (lambda s: s * x + s)(F.silu(x)),  # read twice
        lambda x: F.relu(x) ** 3,
        lambda x: (lambda y: F.silu(y, inplace=True) * x + y)(x + 0),  # in place, and read again
        lambda x: (lambda y: F.relu(y, True).square() + y)(x + 0),
        lambda x: (lambda y: F.relu(y, inplace=True).square() + y)(x + 0),
        lambda x: F.cross_entropy(x, torch.zeros(2, 8, dtype=torch.long)),  # classes in the second dim of three
        lambda x: F.cross_entropy(x[0], x[0].softmax(-1)),  # probabilities
        lambda x: F.cross_entropy(x[0], torch.zeros(6, dtype=torch.long), weight=W),
        lambda x: F.scaled_dot_product_attention(x, x, x),  # three dims
        lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.5),
        lambda x: F.scaled_dot_product_attention(x[None], x[None, :, :3], x[None, :, :3], is_causal=True),
    ],
)
def test_near_misses_are_left_alone(counts, backend, f):
    x = torch.randn(2, 6, 8)
    torch.manual_seed(0)
    want = f(x)
    torch.manual_seed(0)
    torch.testing.assert_close(torch.compile(f, backend=backend, fullgraph=True)(x), want)
    assert counts == [{}]


def test_autocast_decides_the_dtype(counts, backend):
    """Where a norm's result is not in its input's dtype, torch's stays."""
    norm = nn.LayerNorm(8)
    f = torch.compile(lambda x: norm(x).float() if x.dtype == torch.bfloat16 else norm(x), backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(f(torch.ones(3, 8)), norm(torch.ones(3, 8)))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_by_name_through_inductor():
    torch._dynamo.register_backend(compile_backend.cs336, name="cs336_by_hand")
    model, x = Plain(), torch.randn(2, 6, 16)
    with torch.no_grad():
        got = torch.compile(model, backend="cs336_by_hand", options={"max_autotune": False})(x)
        torch.testing.assert_close(got, model(x))
