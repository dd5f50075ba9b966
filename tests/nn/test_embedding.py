import pytest
import torch

from cs336.nn import Embedding


def test_is_torchs_function():
    table, theirs = Embedding(11, 4), torch.nn.Embedding(11, 4)
    theirs.load_state_dict(table.state_dict())
    assert isinstance(table, torch.nn.Embedding)
    ids = torch.randint(0, 11, (2, 3))
    assert torch.equal(table(ids), theirs(ids))
    assert torch.equal(table(ids.int()), theirs(ids))


def test_starts_as_a_unit_normal():
    weight = Embedding(500, 200, dtype=torch.float32).weight
    assert abs(weight.std() - 1) < 0.03
    assert 2.9 < weight.abs().max() <= 3


def test_a_device_is_no_position():
    with pytest.raises(TypeError, match="positional"):
        Embedding(3, 2, "cpu")


def test_ids_must_be_integers():
    with pytest.raises(ValueError, match="ids must be int64 or int32"):
        Embedding(3, 2)(torch.zeros(1))


@pytest.mark.parametrize("bad", [-1, 3])
def test_ids_outside_the_table(bad):
    with pytest.raises(IndexError, match=f"ids must be 0 to 2, got some from {min(bad, 1)} to {max(bad, 1)}"):
        Embedding(3, 2)(torch.tensor([1, bad]))
    with pytest.raises(IndexError, match="ids must be 0 to 2, got others"):
        torch.vmap(Embedding(3, 2))(torch.tensor([[1], [bad]]))
