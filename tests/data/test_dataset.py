import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cs336.data import ShardWriter, TokenDataset, get_batch, write_shard


def tokens(directory, ids, vocab_size=60_000, tokenizer="t", **kwargs):
    with ShardWriter(directory, vocab_size=vocab_size, tokenizer=tokenizer, eot_id=0, **kwargs) as writer:
        writer.write(np.asarray(ids))
    return directory


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 60), st.integers(1, 59), st.integers(1, 61))
def test_every_token_but_the_first_is_a_target_once(tmp_path_factory, count, context_length, shard_tokens):
    context_length = min(context_length, count - 1)
    path = tokens(tmp_path_factory.mktemp("t"), range(count), shard_tokens=shard_tokens)
    dataset = TokenDataset(path, context_length)
    inputs, targets = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    used = (count - 1) // context_length * context_length
    assert torch.cat(inputs).tolist() == list(range(used))
    assert torch.cat(targets).tolist() == list(range(1, used + 1))


def test_windows_are_random_access(tmp_path):
    dataset = TokenDataset(tokens(tmp_path, range(101), shard_tokens=7), 10)
    window_BT1 = dataset.windows(np.array([9, 0, 3, 3]))
    assert window_BT1.dtype == torch.int64
    assert window_BT1.tolist() == [list(range(i * 10, i * 10 + 11)) for i in (9, 0, 3, 3)]
    assert dataset[-1][1][-1] == 100
    with pytest.raises(IndexError, match="window 10 of 10"):
        dataset[10]


def test_guards(tmp_path):
    path = tokens(tmp_path / "t", range(20), vocab_size=50)
    with pytest.raises(ValueError, match="20 tokens; one window of context_length 20 needs 21"):
        TokenDataset(path, 20)
    with pytest.raises(ValueError, match="0 tokens"):
        TokenDataset(tokens(tmp_path / "empty", []), 1)
    with pytest.raises(ValueError, match="context_length must be at least 1"):
        TokenDataset(path, 0)
    with pytest.raises(ValueError, match="made by tokenizer t, the one in use is other"):
        TokenDataset(path, 4, tokenizer="other")
    with pytest.raises(ValueError, match="needs a vocabulary of 50, the model's embedding has 49 rows"):
        TokenDataset(path, 4, vocab_size=49)
    TokenDataset(path, 4, vocab_size=50, tokenizer="t")


def test_bare_shards_are_scanned_for_their_largest_token(tmp_path):
    write_shard(tmp_path / "a.bin", np.array([1, 30, 2], np.uint16))
    TokenDataset(tmp_path / "a.bin", 1, vocab_size=31, tokenizer="any")
    with pytest.raises(ValueError, match="vocabulary of 31"):
        TokenDataset(tmp_path / "a.bin", 1, vocab_size=30)


@pytest.mark.parametrize("kind", ["int64", "uint16", "uint32", "memmap", "tensor", "uint16 tensor"])
def test_get_batch_shifts_by_one(tmp_path, kind):
    data = np.arange(50, dtype=kind if kind.startswith("uint") and "tensor" not in kind else np.int64)
    if kind == "memmap":
        data.astype(np.uint16).tofile(tmp_path / "m")
        data = np.memmap(tmp_path / "m", np.uint16, "r")
    elif "tensor" in kind:
        data = torch.from_numpy(data.astype(np.uint16 if kind == "uint16 tensor" else np.int64))
    x, y = get_batch(data, 8, 7, "cpu")
    assert x.shape == y.shape == (8, 7)
    assert x.dtype == y.dtype == torch.int64
    assert (y == x + 1).all()
    assert (x[:, 1:] == x[:, :-1] + 1).all()


def test_get_batch_reaches_every_start_equally():
    x, _ = get_batch(np.arange(11), 40_000, 4, generator=torch.Generator().manual_seed(0))
    count = torch.bincount(x[:, 0])
    assert len(count) == 7  # starts 0..6: the last target is token 10
    expected = 40_000 / 7
    assert (count - expected).abs().max() < 5 * expected**0.5


def test_get_batch_follows_its_generator():
    draws = [get_batch(np.arange(99), 4, 5, generator=torch.Generator().manual_seed(s))[0].tolist() for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_get_batch_refuses_what_is_no_batch_of_tokens():
    with pytest.raises(TypeError, match=r"tokens must be an array or a tensor, got list"):
        get_batch(list(range(99)), 2, 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tokens must be integers, got float32"):
        get_batch(np.zeros(99, np.float32), 2, 5)
    with pytest.raises(ValueError, match=r"batch_size >= 0 .* got \(99,\), -1 and 5"):
        get_batch(np.zeros(99, int), -1, 5)
    for kind in (np.uint16, np.uint32, np.int64, np.int8):
        assert get_batch(np.zeros(99, kind), 2, 5)[0].shape == (2, 5)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_get_batch_refuses_short_data(count):
    with pytest.raises(ValueError, match=f"needs 6 tokens, got {count}"):
        get_batch(np.arange(count), 1, 5)
    with pytest.raises(ValueError, match="expected tokens"):
        get_batch(np.zeros((4, 9), int), 1, 1)


def test_a_token_beyond_the_vocabulary_names_its_shard(tmp_path):
    """A sidecar that promises less than its shards hold: no IndexError out of an embedding."""
    with ShardWriter(tmp_path, vocab_size=100, tokenizer="t", eot_id=0, shard_tokens=20) as writer:
        writer.write(np.full(50, 9))
    tokens = np.full(20, 9, np.uint16)
    tokens[7] = 99
    write_shard(tmp_path / "00001.bin", tokens)
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"vocab_size": 99}))
    damaged = TokenDataset(tmp_path, 4, vocab_size=99)
    assert damaged.windows(np.array([0, 1])).max() == 9
    with pytest.raises(ValueError, match=r"00001\.bin holds the token 99 \(its 8th\), and the vocabulary has 99"):
        damaged.windows(np.array([0, 6]))


@pytest.mark.parametrize("count", [5, 5000, 400_000])
def test_a_fingerprint_is_of_the_content(tmp_path, count):
    tokens = np.random.default_rng(0).integers(0, 90, count)
    found = {}

    def fingerprint(name, tokens, shard_tokens=1 << 20, tokenizer="t"):
        settings = {"vocab_size": 100, "tokenizer": tokenizer, "eot_id": 0, "shard_tokens": shard_tokens}
        with ShardWriter(tmp_path / name, **settings) as writer:
            writer.write(tokens)
        found[name] = TokenDataset(tmp_path / name, 4).fingerprint

    fingerprint("a", tokens)
    fingerprint("the same, elsewhere and in other files", tokens, count // 3)
    fingerprint("reversed", tokens[::-1])
    fingerprint("shorter", tokens[:-1] if count > 5 else np.append(tokens, 1))
    fingerprint("of another tokenizer", tokens, tokenizer="u")
    changed = tokens.copy()
    changed[-1] += 1
    fingerprint("another end", changed)
    names = list(found)
    assert found[names[0]] == found[names[1]]
    assert len(set(found.values())) == len(found) - 1
