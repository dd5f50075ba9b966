import pytest
import torch
import torch.nn.functional as F

from cs336.nn import LayerNorm, RMSNorm


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm(bias):
    layer, theirs = LayerNorm(24, eps=1e-3, bias=bias), torch.nn.LayerNorm(24, eps=1e-3, bias=bias)
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    theirs.load_state_dict(layer.state_dict())
    x, residual = torch.randn(2, 2, 5, 24)
    torch.testing.assert_close(layer(x), theirs(x))
    y, total = layer(x, residual)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(y, theirs(total))


def test_rms_norm():
    layer, theirs = RMSNorm(24, eps=1e-3), torch.nn.RMSNorm(24, eps=1e-3)
    torch.nn.init.normal_(layer.weight)
    theirs.load_state_dict(layer.state_dict())
    x, residual = torch.randn(2, 2, 5, 24)
    torch.testing.assert_close(layer(x), theirs(x))
    y, total = layer(x, residual)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(y, theirs(total))


def test_fp32_weights_with_16_bit_activations():
    layer, x = RMSNorm(24), torch.randn(5, 24, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), F.rms_norm(x.float(), (24,), eps=1e-5), atol=1e-2, rtol=1e-2)


def test_start_as_the_identity():
    layer = LayerNorm(3, device="cpu", dtype=torch.float16)
    assert layer.weight.tolist() == [1, 1, 1]
    assert layer.bias.tolist() == [0, 0, 0]
    assert layer.weight.dtype == torch.float16
