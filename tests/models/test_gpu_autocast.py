"""Every kind of block under a GPU's autocast, which makes float32 of more functions' arguments than a CPU's."""

import pytest
import torch
import torch.nn.functional as F
from inference.block_kinds import MIXERS
from torch.overrides import TorchFunctionMode

from benchmarks.end_to_end.variants import SHAPE, VARIANTS
from cs336.models import Transformer, TransformerConfig

NAMES = ("cumprod", "cumsum", "dist", "exp", "expm1", "log", "log10", "log1p", "log2", "norm", "pow", "prod")
NAMES += ("reciprocal", "rsqrt", "sum", "__pow__", "__rpow__")
WIDENED = {getattr(home, name) for home in (torch, torch.Tensor) for name in NAMES if hasattr(home, name)}
WIDENED |= {F.cross_entropy, F.layer_norm, F.log_softmax, F.mse_loss, F.nll_loss, F.softmax, F.softplus}
MODELS = VARIANTS | {name: TransformerConfig(**SHAPE, layers=(layer,)) for name, layer in MIXERS.items()}


class GPUAutocast(TorchFunctionMode):
    """On a CPU: float32 for what autocast widens on a GPU, where no dtype is asked for."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in WIDENED and torch.is_autocast_enabled("cpu") and kwargs.get("dtype") is None:
            args = [x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x for x in args]
        return function(*args, **kwargs)


@pytest.mark.parametrize("name", MODELS)
def test_trains_under_a_gpus_autocast(name):
    torch.manual_seed(0)
    model = Transformer(MODELS[name])
    token_ids = torch.randint(0, 64, (2, 33))

    def loss():
        torch.manual_seed(1)
        return model(token_ids[:, :-1], targets=token_ids[:, 1:])

    with torch.autocast("cpu", torch.bfloat16):
        want = loss()
        with GPUAutocast():
            got = loss()
    got.backward()
    assert abs(got.item() / want.item() - 1) < 0.05
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
