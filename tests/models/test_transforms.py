"""torch.func over a whole model: what works on torch's modules works on ours."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from mixers import MIXERS
from torch.func import functional_call, grad, jvp, vmap

import cs336
from cs336.inference.quantization import quantize_
from cs336.models import BlockConfig, Transformer, TransformerConfig
from cs336.nn import AttentionConfig, MoEConfig, SwiGLUConfig
from cs336.nn.quantized import TOKEN, rounded

CONFIG = TransformerConfig(97, 24, num_layers=2, d_model=32, num_heads=4, init_std=0.15)


def test_vmap_over_the_forward(device):
    model, ids = Transformer(CONFIG).to(device), torch.randint(97, (3, 2, 9), device=device)
    torch.testing.assert_close(vmap(model)(ids), torch.stack([model(batch) for batch in ids]))


BLOCKS = {name: BlockConfig(mixer, SwiGLUConfig(16)) for name, mixer in MIXERS.items()} | {
    "experts": BlockConfig(AttentionConfig(4, sinks=True), MoEConfig(4, 2, d_ff=16, num_shared=1, bias=True))
}


@pytest.mark.filterwarnings("ignore:.*batching rule")
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_of_each_sample(name, device):
    model = Transformer(TransformerConfig(97, 48, 1, 32, layers=(BLOCKS[name],), init_std=0.15)).to(device)
    ids = torch.randint(97, (3, 10), device=device)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params, ids_S):
        logits_SV = functional_call(model, params, (ids_S[None, :-1],))[0]
        return F.cross_entropy(logits_SV, ids_S[1:])

    per_sample = vmap(grad(loss), in_dims=(None, 0))(params, ids)
    _, slope = jvp(lambda params: loss(params, ids[0]), (params,), (params,))
    for i, ids_S in enumerate(ids):
        model.zero_grad()
        loss(dict(model.named_parameters()), ids_S).backward()
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
        for name, expected in grads.items():
            torch.testing.assert_close(per_sample[name][i], expected, msg=name, atol=1e-5, rtol=1e-4)
        if i == 0:
            expected = sum((params[name] * g).sum() for name, g in grads.items())
            torch.testing.assert_close(slope, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["invariant", "int8", "fp8 of activations too"])
def test_gradients_of_what_serves(how):
    """Of a model whose sums have one order, and of quantised ones: forward and reverse mode are one slope."""
    model, ids = Transformer(CONFIG), torch.randint(97, (9,))
    if how != "invariant":
        quantize_(model, how[:4].strip(), None, activations=how.endswith("too"))
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params):
        return F.cross_entropy(functional_call(model, params, (ids[None, :-1],))[0], ids[1:])

    with cs336.invariant() if how == "invariant" else contextlib.nullcontext():
        found = grad(loss)(params)
        _, slope = jvp(loss, (params,), (params,))
        loss(dict(model.named_parameters())).backward()
    want = sum((params[name] * g).sum() for name, g in found.items())
    torch.testing.assert_close(slope, want, atol=1e-4, rtol=1e-3)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, msg=name, atol=1e-4, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:.*batching rule")
@pytest.mark.parametrize("method", ["int8", "int4", "fp8"])
def test_quantised_layers_pass_on_what_goes_through_them(method, device):
    model = quantize_(Transformer(CONFIG).to(device), method, 8)
    ids = torch.randint(97, (3, 10), device=device)
    table = model.embedding.weight.detach()

    def loss(table, ids_S):
        logits_SV = functional_call(model, {"embedding.weight": table}, (ids_S[None, :-1],))[0]
        return F.cross_entropy(logits_SV, ids_S[1:])

    expected = [torch.autograd.grad(loss(x := table.clone().requires_grad_(), ids_S), x)[0] for ids_S in ids]
    per_sample = vmap(grad(loss), in_dims=(None, 0))(table, ids)
    torch.testing.assert_close(per_sample, torch.stack(expected), atol=1e-5, rtol=1e-4)
    _, slope = jvp(lambda table: loss(table, ids[0]), (table,), (table,))
    torch.testing.assert_close(slope, (table * expected[0]).sum(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("group", [TOKEN, 5])
def test_what_is_rounded_passes_gradients_on_as_if_it_were_not(group, device):
    x, dx, dy = torch.randn(3, 4, 4, 12, device=device).unbind()
    assert torch.equal(vmap(lambda x: rounded(x, group))(x), rounded(x, group))
    assert torch.equal(vmap(grad(lambda x, dy: (rounded(x, group) * dy).sum()))(x, dy), dy)
    y, slope = jvp(lambda x: rounded(x, group), (x,), (dx,))
    assert torch.equal(y, rounded(x, group))
    assert torch.equal(slope, dx)
    assert not torch.equal(y, x)
