import torch
import torch.nn.functional as F

from cs336.nn import SwiGLU, default_d_ff


def test_swiglu():
    layer = SwiGLU(12, 20)
    x = torch.randn(2, 3, 12)
    gate, up, down = (getattr(layer, f"{name}_proj").weight for name in ("gate", "up", "down"))
    assert (gate.shape, up.shape, down.shape) == ((20, 12), (20, 12), (12, 20))
    torch.testing.assert_close(layer(x), (F.silu(x @ gate.T) * (x @ up.T)) @ down.T)


def test_default_width():
    for d_model, d_ff in ((24, 64), (512, 1408), (768, 2048), (4096, 10944), (1, 64)):
        assert default_d_ff(d_model) == d_ff
        assert d_ff % 64 == 0
        assert 0 <= d_ff - 8 / 3 * d_model < 64
    assert SwiGLU(24, device="meta").gate_proj.weight.shape == (64, 24)
