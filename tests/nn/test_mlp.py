import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from cs336.nn import GELU, MLP, GELUConfig, SwiGLU, SwiGLUConfig, default_d_ff


def test_swiglu():
    layer = SwiGLU(12, 20)
    x = torch.randn(2, 3, 12)
    gate, up, down = (getattr(layer, f"{name}_proj").weight for name in ("gate", "up", "down"))
    assert (gate.shape, up.shape, down.shape) == ((20, 12), (20, 12), (12, 20))
    torch.testing.assert_close(layer(x), (F.silu(x @ gate.T) * (x @ up.T)) @ down.T)


def test_gelu():
    layer = GELU(12, 20)
    x = torch.randn(2, 3, 12)
    up, down = layer.up_proj.weight, layer.down_proj.weight
    assert (up.shape, down.shape) == ((20, 12), (12, 20))
    torch.testing.assert_close(layer(x), F.gelu(x @ up.T) @ down.T)


@pytest.mark.parametrize("config", [SwiGLUConfig(), SwiGLUConfig(20), GELUConfig(), GELUConfig(20)])
def test_config_builds_and_counts(config):
    layer = config.build(12, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    assert layer.down_proj.in_features == config.width(12)
    assert config.num_parameters(12) == sum(p.numel() for p in layer.parameters())
    x = torch.zeros(7, 12, device="meta", dtype=torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 7 * config.flops(12)


def test_bad_width():
    for kind in (SwiGLUConfig, GELUConfig):
        with pytest.raises(ValueError, match="d_ff must be a positive integer, got 0"):
            kind(0)


def test_default_width():
    for d_model, d_ff in ((24, 64), (512, 1408), (768, 2048), (4096, 10944), (1, 64)):
        assert default_d_ff(d_model) == d_ff
        assert d_ff % 64 == 0
        assert 0 <= d_ff - 8 / 3 * d_model < 64
    assert SwiGLU(24, device="meta").gate_proj.weight.shape == (64, 24)


@pytest.mark.parametrize(("activation", "products"), [("silu", 2), ("gelu_tanh", 2), ("relu", 3)])
def test_a_compiled_training_step_has_one_product_for_gate_and_up(activation, products):
    layer, x = MLP(8, 12, activation=activation, gated=True), torch.randn(3, 8, requires_grad=True)

    def compiled(layer):
        """What it gives, and how many products it has."""
        torch.compiler.reset()
        counts = []

        def backend(graph, inputs):
            parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
            counts.append(sum(str(part.code).count("linear(") for part in parts))
            return graph

        return torch.compile(layer, backend=backend, fullgraph=True)(x), sum(counts)

    got, count = compiled(layer)
    assert count == products
    torch.testing.assert_close(got, layer(x))
    leaves = [x, *layer.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), leaves) for y in (got, layer(x))))
    with torch.no_grad():
        assert compiled(layer)[1] == 3
    layer.gate_proj.requires_grad_(False)
    assert compiled(layer)[1] == 3
