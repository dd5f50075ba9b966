import pytest
import torch
import torch.nn.functional as F

from cs336.nn import Linear


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
