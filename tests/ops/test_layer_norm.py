import pytest
import torch
import torch.nn.functional as F
from norms import EPS, NormTests

from cs336 import ops
from cs336.ops import registry


class TestLayerNorm(NormTests):
    name = "layer_norm"
    num_params = 2
    op = staticmethod(ops.layer_norm)

    @staticmethod
    def torch_norm(x, params):
        return F.layer_norm(x, x.shape[-1:], *params, eps=EPS)

    @pytest.mark.parametrize("with_residual", [False, True])
    def test_without_bias(self, variant, device, with_residual):
        x, residual = torch.randn(2, 5, 48, device=device)
        self.check(x, self.params(48, torch.float32, device)[:1], residual if with_residual else None)

    @pytest.mark.parametrize("N", [48, 1000])
    def test_large_mean(self, variant, device, N):
        """A mean of 1e3 rounds to 1e-4, ten times that is allowed; the mean of squares, 1e6, rounds to 0.1."""
        self.check(1e3 + torch.randn(5, N, device=device), self.params(N, torch.float32, device), scale=1e4)

    def test_constant_rows_give_the_bias(self, variant, device):
        x, (w, b) = torch.full((3, 37), 7.0, device=device), self.params(37, torch.float32, device)
        torch.testing.assert_close(self.op(x, w, b), b.expand(3, 37))

    def test_bad_bias(self, device):
        x, (w, b) = torch.randn(3, 8, device=device), self.params(8, torch.float32, device)
        for bad in (b[:7], b.bfloat16(), b.to("meta")):
            with pytest.raises(ValueError, match="bias must be like weight"):
                self.op(x, w, bad)

    @pytest.mark.parametrize(("N", "first"), [(1023, "native"), (1024, "triton"), (65536, "triton"), (65537, "native")])
    def test_the_faster_forward_is_chosen_by_the_width_alone(self, N, first):
        for M in (1, 1 << 20):
            x, w = torch.empty(M, N, device="meta"), torch.empty(N, device="meta")
            assert registry.OPS["layer_norm_fwd"].prefer(x, w, None, EPS) == first
