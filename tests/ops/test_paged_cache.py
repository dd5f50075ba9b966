import pytest
import torch

from cs336 import ops
from cs336.ops import registry

BF16, F32 = torch.bfloat16, torch.float32


def inputs(device, dtype=F32, T=40, P=12, page=16, Hkv=2, D=16, E=16, B=3):
    k_cache, v_cache = (torch.randn(P, page, Hkv, d, device=device).to(dtype) for d in (D, E))
    k, v = (torch.randn(T, Hkv, d, device=device).to(dtype) for d in (D, E))
    table = torch.randperm(P, device=device)[: B * (P // B)].view(B, -1).to(torch.int32)
    places = torch.randperm(B * (P // B) * page, device=device)[:T]
    sequences, positions = (places // (P // B * page)).int(), (places % (P // B * page)).int()
    positions[::5] = -1
    return k_cache, v_cache, k, v, table, sequences, positions


def skip_without(variant, name, *args):
    if reason := registry.why_not(name, variant, *args):
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
@pytest.mark.parametrize("sizes", [{}, {"D": 128, "E": 64}, {"T": 0}, {"page": 24, "D": 7, "E": 3, "Hkv": 1}], ids=str)
def test_append(variant, device, sizes, dtype):
    args = k_cache, v_cache, k, v, table, sequences, positions = inputs(device, dtype, **sizes)
    skip_without(variant, "append_kv_", *args)
    wants, page = [k_cache.clone(), v_cache.clone()], k_cache.shape[1]
    for t, (s, p) in enumerate(zip(sequences.tolist(), positions.tolist(), strict=True)):
        if p >= 0:
            for want, x in zip(wants, (k, v), strict=True):
                want[table[s, p // page], p % page] = x[t]
    version = k_cache._version
    ops.append_kv_(*args)
    assert all(torch.equal(*pair) for pair in zip((k_cache, v_cache), wants, strict=True))
    assert k_cache._version > version


def test_append_to_slices_of_a_pool(variant, device):
    """Keys and values in one pool, k and v in one projection."""
    k_cache, v_cache, k, v, *where = inputs(device, BF16)
    pool, qkv = torch.stack((k_cache, v_cache), 2), torch.cat((k, v), 1)
    views = pool[:, :, 0], pool[:, :, 1], qkv[:, :2], qkv[:, 2:]
    skip_without(variant, "append_kv_", *views, *where)
    with registry.use("ref"):
        ops.append_kv_(k_cache, v_cache, k, v, *where)
    ops.append_kv_(*views, *where)
    assert torch.equal(pool[:, :, 0], k_cache)
    assert torch.equal(pool[:, :, 1], v_cache)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_copy_pages(variant, device, dtype):
    cache = torch.randn(9, 16, 2, 8, device=device).to(dtype)
    sources, targets = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([1, 1, -1, 4], [0, 8, 3, -1]))
    skip_without(variant, "copy_pages_", cache, sources, targets)
    want = cache.clone()
    want[0] = want[8] = cache[1]
    version = cache._version
    ops.copy_pages_(cache, sources, targets)
    assert torch.equal(cache, want)
    assert cache._version > version
    ops.copy_pages_(cache, sources[:0], targets[:0])
    assert torch.equal(cache, want)


def test_refusals(variant, device):
    args = list(inputs(device))
    bad = {
        0: [args[0][0], args[0].bfloat16(), args[0][:3]],
        1: [args[1][..., :4], args[1].bfloat16()],
        2: [args[2][:, :1], args[2].bfloat16(), args[2][:5]],
        3: [args[3][:5], args[3][..., :4]],
        4: [args[4].long(), args[4][0]],
        5: [args[5].long(), args[5][:5]],
        6: [args[6].long(), args[6][:5], args[6][None]],
    }
    for i, values in bad.items():
        for value in values:
            with pytest.raises((ValueError, NotImplementedError)):
                ops.append_kv_(*args[:i], value, *args[i + 1 :])
    one = torch.tensor([1], dtype=torch.int32, device=device)
    for sources, targets in ((one.long(), one), (one, one.long()), (one[None], one), (one, torch.cat((one, one)))):
        with pytest.raises((ValueError, NotImplementedError)):
            ops.copy_pages_(args[0], sources, targets)


def test_places_out_of_range(device):
    """Refused on a CPU; on a GPU, where looking would make the host wait, such tokens and pages are skipped."""
    k_cache, v_cache, k, v, table, sequences, positions = inputs(device, T=1)
    for s, p, entry in ((0, 10**6, 1), (99, 0, 1), (-1, 0, 1), (0, 0, 12), (0, 0, -3)):
        sequences[0], positions[0], table[0, 0] = s, p, entry
        before = k_cache.clone()
        if device == "cpu":
            with pytest.raises(ValueError, match=r"must be|must hold"):
                ops.append_kv_(k_cache, v_cache, k, v, table, sequences, positions)
        else:
            ops.append_kv_(k_cache, v_cache, k, v, table, sequences, positions)
        assert torch.equal(k_cache, before)
    far, one = (torch.tensor([n], dtype=torch.int32, device=device) for n in (12, 1))
    for pair in ((far, one), (one, far)):
        if device == "cpu":
            with pytest.raises(ValueError, match="must be below"):
                ops.copy_pages_(k_cache, *pair)
        else:
            ops.copy_pages_(k_cache, *pair)
        assert torch.equal(k_cache, before)


def test_opcheck(device):
    torch.library.opcheck(torch.ops.cs336_ref.append_kv_, inputs(device))
    pages = torch.tensor([1, 2], dtype=torch.int32, device=device)
    torch.library.opcheck(torch.ops.cs336_ref.copy_pages_, (torch.randn(4, 2, 1, 3, device=device), pages, pages - 1))
