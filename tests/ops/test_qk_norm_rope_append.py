"""qk_norm_rope_append_ in every variant that runs here, against the ops that it is made of."""

import pytest
import torch
from close import assert_close_to_ref

from cs336 import ops
from cs336.ops import registry

CUDA = torch.cuda.is_available()
T, H, HKV, L = 11, 4, 2, 40
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under Triton's interpreter


@pytest.fixture(params=registry.NAMESPACE)
def variant(request, device):
    x = torch.zeros(1, 1, 2, 8, device=device)
    if reason := registry.why_not("qk_norm_rope_append_", request.param, x, x, x[0], x[0], x[0], *[None] * 9):
        pytest.skip(reason)
    with registry.use(request.param):
        yield request.param


def arguments(D, E, pairs, dtype, device, page=4):
    """Parts of one projection, as a joined one gives them; NaN where nothing is written; pages out of order."""
    qkv = torch.randn(T, H * D + HKV * D + HKV * E, device=device).to(dtype)
    q, k, v = (x.unflatten(1, (-1, d)) for x, d in zip(qkv.split((H * D, HKV * D, HKV * E), 1), (D, D, E), strict=True))
    k_cache, v_cache = (torch.full((9, page, HKV, d), torch.nan, device=device, dtype=dtype) for d in (D, E))
    angles = 6.3 * torch.rand(L, pairs, device=device)
    table = torch.tensor([[7, 2, -1], [0, 5, 8], [3, 99, 4]], dtype=torch.int32, device=device)
    sequence = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 0, 1, 2], dtype=torch.int32, device=device)
    position = torch.tensor([2, 3, 4, 5, 11, 0, 1, -1, 7, 6, 9], dtype=torch.int32, device=device)
    return [k_cache, v_cache, q, k, v, angles.cos(), angles.sin(), table, sequence, position]


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("D", "E", "pairs", "interleaved"), [(8, 8, 4, False), (11, 5, 4, True)] + [(128, 128, 64, False)] * CUDA
)
def test_is_what_it_is_made_of(variant, device, D, E, pairs, interleaved, dtype, normed):
    args = arguments(D, E, pairs, dtype, device)
    weights = [torch.randn(D, device=device).to(dtype) for _ in range(2)] if normed else [None, None]
    options = {"q_weight": weights[0], "k_weight": weights[1], "interleaved": interleaved, "eps": 1e-3}
    found = ops.qk_norm_rope_append_(*args, **options)
    _, _, q, k, v, cos, sin, table, sequence, position = args
    wide = [x.double().transpose(0, 1)[None] for x in (q, k)]
    tables = {"positions": position[None].clamp(min=0), "interleaved": interleaved}
    with registry.use("ref"):
        if normed:
            weights = [w.double().float() for w in weights]
            wide = [
                x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * w for x, w in zip(wide, weights, strict=True)
            ]
        want = [ops.rope(x, cos, sin, **tables)[0].transpose(0, 1) for x in wide]
        caches = [torch.full_like(cache, torch.nan) for cache in args[:2]]
        ops.append_kv_(*caches, found[1], v, table, sequence, position)
    live = position >= 0
    for x, y in zip(found, want, strict=True):
        assert_close_to_ref(x[live], y[live], y[live].to(x.dtype), scale=4.0)
    for cache, kept in zip(args[:2], caches, strict=True):
        assert torch.equal(cache.nan_to_num(-77), kept.nan_to_num(-77))  # what is returned, where it belongs, alone


def test_absurd_entries_are_skipped_or_refused(variant, device):
    args = arguments(8, 8, 4, torch.float32, device)
    args[7], args[9] = args[7].clone(), args[9].clone()
    args[7][1, 0], args[9][3] = 50, 12  # a page that is not there, a place past the table
    if device == "cpu":
        with pytest.raises(ValueError, match="must"):
            ops.qk_norm_rope_append_(*args)
    elif variant != "ref":  # plain torch's indices are checked by the device
        ops.qk_norm_rope_append_(*args)
        assert int(args[0].isnan().all(-1).all(-1).sum()) == 9 * 4 - 8


def test_bad_arguments_are_refused():
    for i, bad, message in (
        (2, torch.zeros(T, H, 6), "q must be"),
        (5, torch.zeros(L, 9), "cos must be"),
        (9, torch.zeros(T), "positions must be"),
        (3, torch.zeros(T, HKV, 6), "k must be"),
    ):
        args = arguments(8, 8, 4, torch.float32, "cpu")
        args[i] = bad
        with pytest.raises(ValueError, match=message):
            ops.qk_norm_rope_append_(*args)
    args = arguments(8, 8, 4, torch.float32, "cpu")
    with pytest.raises(ValueError, match="both given or both None"):
        ops.qk_norm_rope_append_(*args, q_weight=torch.ones(8))
    with pytest.raises(ValueError, match="q_weight must be"):
        ops.qk_norm_rope_append_(*args, q_weight=torch.ones(7), k_weight=torch.ones(8))


def test_opcheck():
    args = arguments(8, 8, 4, torch.float32, "cpu")
    args[0], args[1] = (torch.zeros_like(cache) for cache in args[:2])
    torch.library.opcheck(torch.ops.cs336_ref.qk_norm_rope_append_, (*args, None, None, False, 1e-5))
