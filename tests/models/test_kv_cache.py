import pytest
import torch

from cs336.models import KVCache


def test_appends_in_place():
    cache = KVCache(2, 1, 3, 8, 4)
    keys, values = torch.randn(2, 1, 3, 6, 4)
    storage = cache.layers[1].keys.data_ptr()
    for a, b in ((0, 2), (2, 3), (3, 6)):
        k, v = cache.layers[1].append(keys[:, :, a:b], values[:, :, a:b])
        assert torch.equal(k, keys[:, :, :b])
        assert torch.equal(v, values[:, :, :b])
        assert k.data_ptr() == storage
    assert [layer.length for layer in cache.layers] == [0, 6]


def test_keeps_no_graph():
    k = torch.randn(1, 3, 2, 4, requires_grad=True)
    assert not any(t.requires_grad for t in KVCache(1, 1, 3, 8, 4).layers[0].append(k, 2 * k))


def test_padding():
    cache = KVCache(1, 3, 1, 8, 2, padding=[0, 3, 1])
    assert cache.positions(4).tolist() == [[0, 1, 2, 3], [0, 0, 0, 0], [0, 0, 1, 2]]
    assert cache.mask(4)[:, 0, 0].int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 1], [0, 1, 1, 1]]
    cache.layers[0].append(*torch.zeros(2, 3, 1, 4, 2))
    assert (cache.length, cache.longest) == (4, 4)
    assert cache.positions(1).tolist() == [[4], [1], [3]]
    cache.select([2, 1])
    assert (cache.length, cache.longest) == (4, 3)
    assert cache.positions(1).tolist() == [[3], [1]]
    assert cache.mask(1)[:, 0, 0].int().tolist() == [[0, 1, 1, 1, 1], [0, 0, 0, 1, 1]]


def test_no_padding_needs_no_mask():
    for padding in (None, [0, 0]):
        cache = KVCache(1, 2, 1, 8, 2, padding=padding)
        assert cache.mask(3) is None
        assert cache.positions(3).tolist() == [0, 1, 2]
        assert cache.longest == 0


def test_select_takes_rows():
    cache = KVCache(1, 3, 1, 4, 2)
    k, v = torch.randn(2, 3, 1, 4, 2)
    cache.layers[0].append(k[:, :, :3], v[:, :, :3])
    cache.select([2, 0])
    got = cache.layers[0].append(k[[2, 0], :, 3:], v[[2, 0], :, 3:])
    assert torch.equal(got[0], k[[2, 0]])
    assert torch.equal(got[1], v[[2, 0]])


def test_bad_arguments():
    layer = KVCache(1, 1, 3, 4, 2).layers[0]
    with pytest.raises(ValueError, match="the cache holds 4 tokens, 5 were to be kept"):
        layer.append(*torch.zeros(2, 1, 3, 5, 2))
    with pytest.raises(ValueError, match=r"k and v must be \(1, 3, S, 2\)"):
        layer.append(*torch.zeros(2, 2, 3, 1, 2))
    with pytest.raises(ValueError, match=r"k is torch\.bfloat16, the cache torch\.float32"):
        layer.append(*torch.zeros(2, 1, 3, 1, 2, dtype=torch.bfloat16))
    for bad in ([1], [0, -1]):
        with pytest.raises(ValueError, match="padding must be 2 counts of tokens"):
            KVCache(1, 2, 1, 4, 2, padding=bad)
