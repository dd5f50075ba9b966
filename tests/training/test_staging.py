import pytest
import torch

from cs336.training.staging import Staging


def tensors(device="cpu"):
    g = torch.Generator().manual_seed(0)
    drawn = {
        "odd": torch.randn(3, 5, generator=g),
        "one": torch.tensor(7.0),
        "none": torch.empty(0, 4),
        "half": torch.randn(7, generator=g).bfloat16(),
        "double": torch.randn(2, generator=g).double(),
        "whole": torch.arange(9),
        "turned": torch.randn(4, 6, generator=g).mT,
    }
    drawn = {name: tensor.to(device) for name, tensor in drawn.items()}
    return {"model": drawn, "optimizer": {"step": torch.tensor(3), "odd": 2 * drawn["odd"]}}


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_copies_are_equal_and_apart(device):
    staging, given = Staging(), tensors(device)
    for factor in (1, 2):
        expected = {kind: {n: (factor * t).cpu() for n, t in found.items()} for kind, found in given.items()}
        scaled = {kind: {n: factor * t for n, t in found.items()} for kind, found in given.items()}
        copies = staging.copies(scaled)
        for found in scaled.values():
            for tensor in found.values():
                tensor.zero_()  # as training would go on
        for kind, found in expected.items():
            assert copies[kind].keys() == found.keys()
            for name, tensor in found.items():
                copy = copies[kind][name]
                assert copy.device.type == "cpu"
                assert copy.dtype == tensor.dtype
                assert copy.is_contiguous()
                torch.testing.assert_close(copy, tensor, rtol=0, atol=0)
    staging.free()


def test_memory_that_cannot_be_pinned_serves_and_leaves_no_error(monkeypatch):
    class Cudart:
        def cudaHostRegister(self, pointer, size, flags):
            return 2

    cleared = []

    def zeros(*size, device):
        cleared.append(device)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    monkeypatch.setattr(torch, "zeros", zeros)
    staging = Staging()
    staging._have(64, torch.device("cuda"))
    assert cleared == [torch.device("cuda")]
    assert staging._memory.numel() == 64
    staging.free()  # and takes no pin back


def test_the_memory_is_kept_until_it_is_freed_and_grows():
    staging = Staging()
    first = staging.copies({"model": {"a": torch.zeros(100)}})["model"]["a"]
    second = staging.copies({"model": {"a": torch.ones(90)}})["model"]["a"]
    assert second.data_ptr() == first.data_ptr()
    assert staging.copies({"model": {"a": torch.ones(10**6)}})["model"]["a"].sum() == 10**6
    staging.free()
    assert staging._memory.numel() == 0
    assert staging.copies({}) == {}
