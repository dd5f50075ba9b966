"""What head and loss of a divided vocabulary take at their peak is what a plan says."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cs336.parallel import vocabulary

TOKENS, FEATURES = 256, 64


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside took at once."""

    def __init__(self):
        super().__init__()
        self.most, self._made = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {s._cdata for s in storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        self._made |= {s._cdata: (StorageWeakRef(s), s.nbytes()) for s in storages(out) if s._cdata not in given}
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._made.values()))
        return out


def storages(tree):
    return [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("rows", [16, 64, 256])  # of a chunk
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_what_is_said(world, monkeypatch, rows, softcap, dtype):
    C = 1024
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", 4 * C * rows)
    x = torch.randn(TOKENS, FEATURES, dtype=dtype, requires_grad=True)
    weight = torch.randn(C, FEATURES, dtype=dtype, requires_grad=True)
    targets = torch.randint(C, (TOKENS,))
    with Peak() as peak:
        vocabulary.vocabulary_linear_cross_entropy(x, weight, targets, softcap=softcap, reduction="sum").backward()
    said = vocabulary.vocabulary_loss_bytes(TOKENS, C, FEATURES, dtype.itemsize, capped=softcap is not None)
    assert said == pytest.approx(peak.most, rel=0.03)
