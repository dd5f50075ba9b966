import pytest
import torch
import torch.nn.functional as F
from norms import EPS, NormTests

from cs336 import ops


class TestRmsNorm(NormTests):
    name = "rms_norm"
    num_params = 1
    op = staticmethod(ops.rms_norm)

    @staticmethod
    def torch_norm(x, params):
        return F.rms_norm(x, x.shape[-1:], *params, EPS)

    def test_zero_rows_stay_zero(self, variant, device):
        x, w = torch.zeros(3, 40, device=device, requires_grad=True), torch.ones(40, device=device)
        y = self.op(x, w)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert torch.equal(y, torch.zeros_like(y))
        torch.testing.assert_close(dx, torch.full_like(dx, 1e-5**-0.5))

    def test_squares_beyond_float16(self, variant, device):
        """60000^2 overflows float16: only the accumulation in float32 saves it."""
        x = torch.full((2, 64), 60000.0, dtype=torch.float16, device=device)
        assert torch.equal(self.op(x, torch.ones_like(x[0])), torch.ones_like(x))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_bad_row_spoils_only_itself(self, variant, device, bad):
        x, w = torch.randn(5, 40, device=device), torch.ones(40, device=device)
        want = self.op(x, w)
        x[2, 7] = bad
        y = self.op(x, w)
        assert y[2, 7].isnan()
        assert torch.equal(y[[0, 1, 3, 4]], want[[0, 1, 3, 4]])
