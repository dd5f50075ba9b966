import pytest
import torch
import torch.nn.functional as F

from cs336.nn import LayerNorm, LayerNormConfig, RMSNorm, RMSNormConfig


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


@pytest.mark.parametrize("layer", [RMSNorm(6), LayerNorm(6), LayerNorm(6, bias=False)])
def test_float64(layer):
    layer = layer.double()
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    x, residual = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(layer, (x,))
    torch.autograd.gradcheck(layer, (x, residual))


def test_float64_is_not_rounded():
    x = torch.randn(5, 24, dtype=torch.float64)
    for ours, theirs in ((RMSNorm, torch.nn.RMSNorm), (LayerNorm, torch.nn.LayerNorm)):
        want = theirs(24, eps=1e-5, dtype=torch.float64)(x)
        torch.testing.assert_close(ours(24, dtype=torch.float64)(x), want, atol=1e-14, rtol=0)


@pytest.mark.parametrize("config", [RMSNormConfig(1e-3), LayerNormConfig(1e-3), LayerNormConfig(bias=False)])
def test_config_builds_and_counts(config):
    layer = config.build(12, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    assert layer.eps == config.eps
    assert config.num_parameters(12) == sum(p.numel() for p in layer.parameters())
    with pytest.raises(ValueError, match="eps must be a positive, finite number, got 0"):
        type(config)(0)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_a_device_is_no_option(kind):
    with pytest.raises(TypeError, match="positional"):
        kind(3, 1e-5, "cpu")
