"""Arguments that nobody means and somebody gives: no dims, no features, other dtypes, scales that are not positive."""

import contextlib

import pytest
import torch

import cs336
from cs336 import ops
from cs336.ops import registry

SCALAR = torch.tensor(1.0)
CU = torch.tensor([0, 4, 10], dtype=torch.int32)
PACKED = torch.randn(10, 2, 16), torch.randn(10, 2, 16), torch.randn(10, 2, 16)
BHTK = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
BETA = torch.rand(1, 2, 5)


@pytest.mark.parametrize(
    ("op", "args", "place"),
    [
        *((ops.attention_varlen, (*PACKED, CU), i) for i in range(3)),
        *((ops.attention_invariant, (*PACKED, CU, 6), i) for i in range(4)),
        *((ops.linear_attention, BHTK, i) for i in range(3)),
        *((ops.gated_delta_rule, (*BHTK, BETA), i) for i in range(4)),
        *((ops.linear_few_rows, (torch.randn(2, 8), torch.randn(4, 8)), i) for i in range(2)),
        *((ops.linear_invariant, (torch.randn(2, 8), torch.randn(4, 8)), i) for i in range(2)),
    ],
)
def test_tensors_without_dims_or_features_are_refused(op, args, place):
    op(*args)
    good = args[place]
    none = () if place == 2 else (good[..., :0],)  # values may have no features
    for bad in (SCALAR.to(good.dtype), good.to(torch.complex64), *none):
        with pytest.raises(ValueError, match=r"must|fit"):
            op(*args[:place], bad, *args[place + 1 :])


@pytest.mark.parametrize("variant", ["triton", "ref", None])
@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)])
def test_a_sum_over_no_rows_has_gradients(variant, lead, device):
    """Its gradient is one number, spread out by strides of 0, which contiguous() leaves as they are."""

    def leaf(*shape):
        return torch.ones(shape, device=device, requires_grad=True)

    def table():
        return torch.ones(lead[-1], 4, device=device)

    x, weight, bias = leaf(*lead, 8), leaf(8), leaf(8)
    with registry.use(variant) if variant else contextlib.nullcontext():
        for y in (
            ops.rms_norm(x, weight),
            sum(ops.rms_norm(x, weight, residual=x)),
            ops.layer_norm(x, weight, bias),
            sum(ops.layer_norm(x, weight, bias, residual=x)),
            *(op(x, x) for op in (ops.swiglu, ops.geglu)),
            ops.relu2(x),
            ops.rope(x, table(), table()),
            ops.attention(*[leaf(1, 2, 0, 8) for _ in range(3)], causal=True),
        ):
            y.sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any()
    assert not bias.grad.any()
    turned = leaf(8, 0)
    ops.rms_norm(turned.t(), weight).sum().backward()
    assert turned.grad.shape == (8, 0)


@pytest.mark.parametrize("op", [ops.rms_norm, ops.layer_norm])
def test_norms_name_what_is_no_tensor(op):
    x, weight = torch.randn(2, 8), torch.ones(8)
    for args, message in (((x, None), "weight must be a tensor, got None"), (([1.0], weight), "x must be a tensor")):
        with pytest.raises(TypeError, match=message):
            op(*args)
    with pytest.raises(TypeError, match=r"residual must be a tensor like x, \(2, 8\) .* got \[1\]"):
        op(x, weight, residual=[1])
    with pytest.raises(TypeError, match=r"bias must be a tensor like weight, .* got 3"):
        ops.layer_norm(x, weight, 3)


def test_slopes_in_a_list_are_refused():
    q = torch.randn(1, 4, 2, 8)
    for call in (
        lambda slopes: ops.attention(q, q, q, alibi_slopes=slopes),
        lambda slopes: ops.attention_varlen(*PACKED, CU, alibi_slopes=slopes),
        lambda slopes: cs336.flash_attn_func(q, q, q, alibi_slopes=slopes),
        lambda slopes: cs336.flash_attn_varlen_func(*PACKED, CU, CU, 6, 6, alibi_slopes=slopes),
        lambda slopes: cs336.flash_attn_with_kvcache(q, q, q, alibi_slopes=slopes),
    ):
        with pytest.raises(ValueError, match=r"alibi_slopes must be a float32 tensor, .* got \[0.5, 0.25\]"):
            call([0.5, 0.25])


def test_lengths_of_packed_sequences_are_checked():
    for longest in (-1, 5):
        with pytest.raises(ValueError, match="must"):
            ops.attention_invariant(*PACKED, CU, longest)


def test_wider_gates_than_the_rest_are_refused():
    with pytest.raises(ValueError, match=r"beta must be torch.float32, or narrower, to fit q, got .* torch.float64"):
        ops.gated_delta_rule(*BHTK, BETA.double())
    assert ops.gated_delta_rule(*BHTK, BETA.bfloat16()).shape == (1, 2, 5, 8)


@pytest.mark.parametrize("op", [ops.linear_few_rows, ops.linear_invariant])
@pytest.mark.parametrize("lead", [(), (3,), (2, 0), (2, 3)])
def test_products_over_no_features_are_the_bias(op, lead):
    bias = torch.randn(4)
    y = op(torch.empty(*lead, 0), torch.empty(4, 0), bias)
    assert torch.equal(y, bias.expand(*lead, 4))
    with pytest.raises(ValueError, match="must be"):
        op(torch.empty(*lead, 0), torch.empty(4, 8))


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scales_that_are_not_positive(scale):
    """torch's kernel on a CPU gives NaN for them under a causal mask."""
    q, k, v = (torch.randn(1, 2, 7, 16) for _ in range(3))
    with registry.use("ref"):
        want = ops.attention(q, k, v, causal=True, scale=scale)
    torch.testing.assert_close(ops.attention(q, k, v, causal=True, scale=scale), want)
