"""Training with any mixer: no token sees a later one or another document, gradients are right, and the loss falls."""

import pytest
import torch
import torch.nn.functional as F
from mixers import NAMES, config, ids, make

from cs336 import ops
from cs336.models import Transformer
from cs336.optim import AdamW

EXACT = [name for name in NAMES if "hyena" not in name]  # an FFT adds all tokens up before it takes them apart


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def close(got, want):
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("at", [1, 9, 47])
def test_a_token_changes_nothing_before_it(name, at):
    model, x = make(name), ids(2, 48)
    changed = x.clone()
    changed[:, at] = (changed[:, at] + 1) % 97
    before, after = model(x), model(changed)
    if name in EXACT:
        assert torch.equal(after[:, :at], before[:, :at])
    close(after[:, :at], before[:, :at])
    assert (after[:, at] != before[:, at]).any(-1).all()


def test_gradients_of_a_token_reach_none_after_it(name):
    model, x = make(name), ids(1, 20)
    features = model.embedding(x).detach().requires_grad_()
    y = features
    for layer in model.layers:
        y = layer(y)
    (grad,) = torch.autograd.grad(y[:, 11].square().sum(), features)
    assert grad[:, 12:].abs().max() <= (0 if name in EXACT else 1e-5)
    assert grad[:, 11].abs().max() > 1e-2


def test_packed_documents_are_strangers(name):
    model, documents = make(name), [ids(1, n) for n in (5, 1, 11, 20)]
    packed = torch.cat((*documents, torch.zeros(1, 3, dtype=torch.long)), 1).repeat(2, 1)
    segments = torch.tensor([[7] * 5 + [3] + [0] * 11 + [7] * 20 + [-1] * 3] * 2, dtype=torch.int32)
    got = model(packed, segments=segments)
    for document, part in zip(documents, got[0].split([5, 1, 11, 20, 3])[:4], strict=True):
        close(part, model(document)[0])
    close(got[0], got[1])
    changed = packed.clone()
    changed[:, 5] += 1
    changed[:, -3:] += 1
    again = model(changed, segments=segments)
    kept = torch.cat((torch.arange(5), torch.arange(6, 37)))
    if name in EXACT:
        assert torch.equal(again[:, kept], got[:, kept])
    close(again[:, kept], got[:, kept])


def test_gradients_in_float64(name):
    model = make(name, dtype=torch.float64)
    x = torch.randint(97, (1, 7))
    segments = torch.tensor([[0] * 3 + [1] * 4])
    names, values = zip(*model.layers.named_parameters(), strict=True)

    def loss(*values):
        weights = {f"layers.{name}": value for name, value in zip(names, values, strict=True)}
        logits = torch.func.functional_call(model, weights, x, {"segments": segments})
        return ops.cross_entropy(logits, x.flip(1))

    assert loss(*values).dtype == torch.float64
    torch.autograd.gradcheck(loss, values, fast_mode=True)


def test_learns(name):
    """Twenty steps on text that repeats itself."""
    torch.manual_seed(1)
    model = Transformer(config(name, init_std=0.08))
    period = torch.randint(97, (8, 6))
    x = period.repeat(1, 5)[:, :25]
    optimizer, losses = AdamW(model.parameters(), lr=3e-3), []
    for _ in range(20):
        loss = ops.cross_entropy(model(x[:, :-1]), x[:, 1:])
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert abs(losses[0] - torch.tensor(97.0).log()) < 0.4
    assert losses[-1] < 0.8 * losses[0]


def test_gradient_checkpointing_changes_nothing(name):
    model, x = make(name), ids(2, 12)
    want = torch.autograd.grad(ops.cross_entropy(model(x), x), list(model.parameters()))
    model.gradient_checkpointing = True
    got = torch.autograd.grad(ops.cross_entropy(model(x), x), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", ["window", "latent, all options", "gated linear", "gated delta", "mamba2", "hyena"])
def test_compiles_whole(name):
    torch._dynamo.reset()
    model, x = make(name), ids(2, 12)
    compiled = torch.compile(lambda x: ops.cross_entropy(model(x), x), backend="aot_eager", fullgraph=True)
    want, loss = ops.cross_entropy(model(x), x), compiled(x)
    close(loss, want)
    params = list(model.parameters())
    for got, grad in zip(torch.autograd.grad(loss, params), torch.autograd.grad(want, params), strict=True):
        assert (got - grad).norm() <= 1e-5 * grad.norm()


def test_starts_where_its_paper_does():
    model = Transformer(config("mamba2", d_model=64))
    mixer = model.layers[0].attention
    assert (mixer.A_log.exp() >= 1).all()
    assert (mixer.A_log.exp() <= 16).all()
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert dt.min() > 0.99e-3
    assert dt.max() < 0.101
    assert torch.equal(mixer.D, torch.ones_like(mixer.D))
    assert 0.2 < mixer.conv1d.weight.abs().max() <= 0.5  # torch's: uniform in 1 / sqrt(taps)
    assert (Transformer(config("hyena")).layers[0].attention.filter.frequency == 10).all()


def test_keys_normed_in_float32_are_cast_back(monkeypatch):
    """As autocast on a GPU norms them: the op wants q, k and v of one dtype."""
    normalize = F.normalize
    monkeypatch.setattr(F, "normalize", lambda x, dim: normalize(x.float(), dim=dim))
    model, x = make("gated delta"), ids(2, 70)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x[:, :48])
    assert logits.isfinite().all()
    logits.float().square().mean().backward()
    assert model.layers[0].attention.k_proj.weight.grad.abs().max() > 0
