import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cs336.data import ShardWriter, TokenDataset, TokenLoader
from cs336.data.loader import permute


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokens")
    with ShardWriter(directory, vocab_size=1000, tokenizer="t", eot_id=0, shard_tokens=37) as writer:
        writer.write(np.arange(97 * 3 + 2))
    return TokenDataset(directory, 3)  # 97 windows


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 99))
def test_permute_is_a_permutation(size, seed, epoch):
    assert sorted(permute(np.arange(size), size, seed, epoch).tolist()) == list(range(size))


def test_permute_at_great_size():
    size = 10**12 + 39
    out = permute(np.arange(1000), size, 0, 0)
    assert len(set(out.tolist())) == 1000
    assert 0 <= out.min() <= out.max() < size
    assert abs(out.mean() / size - 0.5) < 0.05


def test_permute_spreads_windows_evenly():
    """Chi-squared over (position, window) of a small permutation under many keys."""
    size, keys = 13, 4000
    counts = np.zeros((size, size))
    for epoch in range(keys):
        counts[np.arange(size), permute(np.arange(size), size, 7, epoch)] += 1
    chi2 = ((counts - keys / size) ** 2 / (keys / size)).sum()
    freedom = (size - 1) ** 2
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("batch_size", [1, 8, 97, 200])
def test_each_window_once_an_epoch(dataset, batch_size):
    loader = TokenLoader(dataset, batch_size, seed=3)
    sequence = np.concatenate([loader.indices(s) for s in range(97 * 3 // batch_size + 1)])[: 97 * 3]
    epochs = sequence.reshape(3, 97)
    assert all(sorted(e) == list(range(97)) for e in epochs)
    assert (epochs[0] != epochs[1]).any()


def test_ranks_share_the_global_batch(dataset):
    whole = TokenLoader(dataset, 12)
    parts = [TokenLoader(dataset, 4, rank=r, world=3) for r in range(3)]
    for step in (0, 5, 40):
        x, y = zip(*(p.batch(step) for p in parts), strict=True)
        assert torch.equal(torch.cat(x), whole.batch(step)[0])
        assert torch.equal(torch.cat(y), whole.batch(step)[1])


def test_resume_continues_the_sequence(dataset):
    loader = TokenLoader(dataset, 8, seed=1)
    for _ in range(17):
        next(loader)
    state = loader.state_dict()
    ahead = [next(loader)[0] for _ in range(20)]
    resumed = TokenLoader(dataset, 8, seed=1)
    resumed.load_state_dict(state)
    assert all(torch.equal(a, next(resumed)[0]) for a in ahead)
    assert resumed.step == 37


@pytest.mark.parametrize(
    ("changed", "named"), [({"seed": 2}, "seed"), ({"batch_size": 4}, "global_batch"), ({"world": 2}, "global_batch")]
)
def test_resume_refuses_another_sequence(dataset, changed, named):
    state = TokenLoader(dataset, 8, seed=1).state_dict()
    other = TokenLoader(dataset, **{"batch_size": 8, "seed": 1} | changed)
    with pytest.raises(ValueError, match=named):
        other.load_state_dict(state)


def test_resume_refuses_other_data(dataset, tmp_path):
    with ShardWriter(tmp_path, vocab_size=1000, tokenizer="t", eot_id=0) as writer:
        writer.write(np.arange(50))
    with pytest.raises(ValueError, match="windows = 97, this run has 16"):
        TokenLoader(TokenDataset(tmp_path, 3), 8).load_state_dict(TokenLoader(dataset, 8).state_dict())


def test_resume_refuses_what_no_loader_said(dataset):
    loader = TokenLoader(dataset, 8)
    for name in loader.state_dict():
        rest = {key: value for key, value in loader.state_dict().items() if key != name}
        with pytest.raises(ValueError, match=rf"the saved data position lacks {name}: give a loader's state_dict"):
            loader.load_state_dict(rest)


def test_seed_changes_the_order(dataset):
    a, b = (TokenLoader(dataset, 97, seed=s).indices(0) for s in (0, 1))
    assert (a != b).any()


def test_bad_arguments(dataset):
    for batch_size in (0, 1.5):
        with pytest.raises(ValueError, match=f"batch_size must be an integer of at least 1, got {batch_size}"):
            TokenLoader(dataset, batch_size)
    with pytest.raises(ValueError, match="rank"):
        TokenLoader(dataset, 1, rank=2, world=2)
