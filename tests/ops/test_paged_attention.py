"""paged_attention and paged_prefill in every variant that runs here, against the formula in fp64."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from attentions import BF16, CUDA, F16, F32, F64
from close import assert_close_to_ref
from paged import formula, pool

from cs336 import ops
from cs336.ops import registry

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under Triton's interpreter
OPTIONS = [{}, {"window": 5}, {"window": 0}, {"softcap": 2.0}, {"scale": 0.4}, {"window": 20, "softcap": 3.0}]
if CUDA:
    LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1000, 4097, 9000]
    PAGES, DTYPES, DIMS = [16, 32, 64, 128, 256], [BF16, F16], [64, 128]
    GROUPS = [1, 2, 3, 4, 7, 8, 16]
else:
    LENGTHS = [0, 1, 16, 37]
    PAGES, DTYPES, DIMS = [16, 32, 256], [F32, BF16], [16]
    GROUPS = [1, 3, 4, 8]


def scaled(options):
    """What a raw op takes after the cache, for why_not."""
    window = options.get("window")
    return (
        options.get("scale", 1.0),
        -1 if window is None else window,
        options.get("softcap", 0.0),
        options.get("sinks"),
    )


def decode(variant, lengths, page, Hkv, group, D, Q, dtype, device, E=None, **options):
    *cache, dense = pool(lengths, page, Hkv, D, E, dtype, device)
    q = torch.randn(len(lengths), Q, Hkv * group, D, device=device).to(dtype)
    if reason := registry.why_not("paged_attention", variant, q, *cache, *scaled(options)):
        pytest.skip(reason)
    o, lse = ops.paged_attention(q, *cache, **options, return_lse=True)
    compare(o, lse, list(q), dense, **options)


def expected(qs, dense, **options):
    """Of each sequence its keys, and what the formula gives in fp64, in its dtype and in fp32."""
    dtype = qs[0].dtype
    plain = (formula(qs, dense, d, **options) for d in (F64, dtype, torch.promote_types(dtype, F32)))
    return list(zip([k for k, _ in dense], *plain, strict=True))


def compare(o, lse, qs, dense, **options):
    """o: (Q, H, E) and lse: (H, Q) of each sequence."""
    hold(o, lse, expected(qs, dense, **options))


def hold(o, lse, all_expected):
    for got, got_lse, (k, want, torchs, again) in zip(o, lse, all_expected, strict=True):
        assert_close_to_ref(got, want[0], torchs[0], scale=4.0 * max(1, k.shape[0]) ** -0.5)  # as in attentions.check
        seen = want[1].isfinite()
        assert torch.equal(got_lse.isfinite(), seen)
        assert_close_to_ref(got_lse[seen], want[1][seen], again[1][seen], scale=4.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", DIMS)
@pytest.mark.parametrize("Q", [1, 2, 5, 8])
@pytest.mark.parametrize("page", PAGES)
def test_pages_and_queries(variant, device, page, Q, D, dtype):
    decode(variant, LENGTHS, page, 2, 4, D, Q, dtype, device)


@pytest.mark.parametrize("Q", [1, 3])
@pytest.mark.parametrize("group", GROUPS)
def test_groups(variant, device, group, Q):
    decode(variant, LENGTHS, 16, 2, group, DIMS[0], Q, DTYPES[-1], device)


@pytest.mark.parametrize("Q", [1, 4])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(variant, device, options, Q):
    decode(variant, LENGTHS, 16, 2, 2, DIMS[-1], Q, DTYPES[0], device, **options)


@pytest.mark.parametrize("window", [None, 6])
def test_sinks(variant, device, window):
    sinks = torch.tensor([-1.0, 0.0, 2.0, 30.0, -torch.inf, 5.0], device=device)
    decode(variant, LENGTHS, 32, 2, 3, DIMS[0], 2, DTYPES[0], device, window=window, sinks=sinks)


@pytest.mark.parametrize(("D", "E"), [(24, 16), (33, 7), (576, 512)])
def test_other_widths(variant, device, D, E):
    decode(variant, LENGTHS[:4], 16, 1, 2, D, 2, F32, device, E=E)


def test_odd_pages_and_strides(variant, device):
    """Pages of any size, caches that are slices of a larger pool, a table that is a slice of a larger one."""
    *(k, v, table, lens), dense = pool(LENGTHS[:4], 24, 2, DIMS[0], None, DTYPES[0], device)
    both = torch.stack((k, v), 2)  # (P, page, 2, Hkv, D)
    k, v = both.unbind(2)
    table = torch.cat((table, table), 1)[:, : table.shape[1]]
    q = torch.randn(4, 2, 3, 4, DIMS[0], device=device, dtype=DTYPES[0])[:, :, 1]
    if reason := registry.why_not("paged_attention", variant, q, k, v, table, lens, *scaled({})):
        pytest.skip(reason)
    o, lse = ops.paged_attention(q, k, v, table, lens, return_lse=True)
    compare(o, lse, list(q), dense)


def test_no_sequences_and_no_pages(variant, device):
    k, v, table, lens, _ = pool([0, 0], 16, 1, DIMS[0], None, DTYPES[0], device, spare=0)
    q = torch.randn(2, 1, 2, DIMS[0], device=device, dtype=DTYPES[0])
    if reason := registry.why_not("paged_attention", variant, q, k, v, table, lens, *scaled({})):
        pytest.skip(reason)
    assert torch.equal(ops.paged_attention(q, k, v, table, lens), torch.zeros_like(q))
    assert ops.paged_attention(q[:0], k, v, table[:0], lens[:0]).shape == (0, 1, 2, DIMS[0])


@pytest.mark.parametrize(("group", "Q"), [(1, 1), (4, 3), (4, 1)] if CUDA else [(2, 3)])
def test_a_sequence_gets_the_same_bits_in_any_batch(variant, device, group, Q):
    if variant == "ref":
        pytest.skip("plain torch does not promise it")
    *(k, v, table, lens), _ = pool(LENGTHS, 16, 2, DIMS[0], None, DTYPES[-1], device)
    q = torch.randn(len(LENGTHS), Q, 2 * group, DIMS[0], device=device).to(DTYPES[-1])
    if reason := registry.why_not("paged_attention", variant, q, k, v, table, lens, *scaled({})):
        pytest.skip(reason)
    together = ops.paged_attention(q, k, v, table, lens)
    for b, length in enumerate(LENGTHS):
        alone = slice(b, b + 1)
        width = max(1, -(-length // 16))
        o = ops.paged_attention(q[alone], k, v, table[alone, :width], lens[alone])
        assert torch.equal(o, together[alone])
    many = [b for b in range(len(LENGTHS)) for _ in range(37 if CUDA else 2)]
    repeated = ops.paged_attention(q[many], k, v, table[many], lens[many])
    assert torch.equal(repeated, together[many])


@pytest.mark.parametrize("options", [{}, {"window": 300, "softcap": 3.0}], ids=str)
@pytest.mark.parametrize("Q", [1, 3])
@pytest.mark.parametrize("D", DIMS)
def test_sequences_cut_anywhere(variant, device, D, Q, options):
    """Not invariant: one after the other alone, all at once, many times all, behind a longer one. Nothing else runs, so
    that what is settled changes no bit."""
    *(k, v, table, lens), dense = pool(LENGTHS, 16, 2, D, None, DTYPES[-1], device)
    sinks = torch.randn(8, device=device)
    q = torch.randn(len(LENGTHS), Q, 8, D, device=device).to(DTYPES[-1])
    if reason := registry.why_not("paged_attention", variant, q, k, v, table, lens, *scaled(options)):
        pytest.skip(reason)
    everyone, wanted = range(len(LENGTHS)), expected(list(q), dense, **options, sinks=sinks)
    for rows in ([[b] for b in everyone], [everyone], [[b for b in everyone for _ in range(31 if CUDA else 2)]]):
        for chosen in map(list, rows):
            args, say = (q[chosen], k, v, table[chosen], lens[chosen]), options | {"sinks": sinks, "return_lse": True}
            o, lse = ops.paged_attention(*args, **say, invariant=False)
            hold(o, lse, [wanted[b] for b in chosen])
            again = ops.paged_attention(*args, **say, invariant=False, settled=True)
            assert torch.equal(o, again[0])
            assert torch.equal(lse, again[1])
            whole = ops.paged_attention(*args, **say)
            for spare in (1, 30, 1000):  # as many blocks as multiprocessors are left, or one
                hold(*ops.paged_attention(*args, **say, invariant=False, spare=spare), [wanted[b] for b in chosen])
                some = ops.paged_attention(*args, **say, spare=spare)
                assert torch.equal(some[0], whole[0])
                assert torch.equal(some[1], whole[1])


# ---- prefill ----


def prefill(variant, lengths, queries, page, Hkv, group, D, dtype, device, **options):
    *cache, dense = pool(lengths, page, Hkv, D, None, dtype, device)
    qs = [torch.randn(n, Hkv * group, D, device=device).to(dtype) for n in queries]
    cu = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32, device=device)
    q = torch.cat(qs)
    if reason := registry.why_not("paged_prefill", variant, q, *cache, cu, max(queries), *scaled(options)):
        pytest.skip(reason)
    o, lse = ops.paged_prefill(q, *cache, cu, max_seqlen_q=max(queries), **options, return_lse=True)
    compare(o.split(queries), lse.split(queries, 1), qs, dense, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("page", PAGES)
def test_prefill(variant, device, page, group, dtype):
    lengths, queries = [37, 20, 0, 1, 33], [20, 20, 0, 1, 1]
    if CUDA:
        lengths, queries = [*lengths, 3000, 700], [*queries, 129, 700]
    prefill(variant, lengths, queries, page, 2, group, DIMS[0], dtype, device)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_prefill_options(variant, device, options):
    sinks = torch.tensor([0.5, -torch.inf, 3.0, -2.0], device=device)
    prefill(variant, [40, 18], [30, 18], 16, 2, 2, DIMS[0], DTYPES[0], device, **options, sinks=sinks)


@pytest.mark.parametrize("options", [{}, {"window": 20, "softcap": 3.0}], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_prompt_in_chunks_gets_the_bits_of_the_whole(variant, device, fixed_order, dtype, options):
    """Log-sum-exps too, whose float32 shows what rounding to 16 bits hides, and in pages of one token."""
    if variant == "ref":
        pytest.skip("plain torch does not promise it")
    length, page = (300, 64) if CUDA else (50, 16)  # pages that Triton's blocks of keys lie in
    *(k, v, table, _), _ = pool([length], page, 1, DIMS[0], None, dtype, device)
    q = torch.randn(length, 4, DIMS[0], device=device).to(dtype)
    places = table[0].repeat_interleave(page) * page + torch.arange(page, device=device).repeat(table.shape[1])
    single = k.view(-1, 1, *k.shape[2:]), v.view(-1, 1, *v.shape[2:]), places.int()[None]

    def run(first, last, cache=(k, v, table)):
        ints = {"dtype": torch.int32, "device": device}
        args = q[first:last], *cache, torch.tensor([last], **ints), torch.tensor([0, last - first], **ints)
        if reason := registry.why_not("paged_prefill", variant, *args, last - first, *scaled(options)):
            pytest.skip(reason)
        return ops.paged_prefill(*args, max_seqlen_q=last - first, **options, return_lse=True)

    whole = run(0, length)
    for cuts in ([0, 1, 17, 33, length], [0, length - 1, length], range(0, length + 1, 1 if CUDA else 10)):
        parts = [run(a, b) for a, b in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat([o for o, _ in parts]), whole[0])
        assert torch.equal(torch.cat([lse for _, lse in parts], 1), whole[1])
    assert all(map(torch.equal, run(0, length, single), whole))


@pytest.mark.parametrize(
    ("room", "page", "stages"), [(232448, 64, 5), (232448, 16, 3), (166912, 64, 3), (101376, 64, 2)]
)
def test_blocks_of_keys_are_asked_for_as_far_ahead_as_there_is_room(room, page, stages, monkeypatch):
    pytest.importorskip("triton")
    from cs336.ops.triton import paged_attention

    monkeypatch.setattr(paged_attention, "shared_memory", lambda device: room)
    monkeypatch.setattr(paged_attention, "INTERPRET", SimpleNamespace(value=False))
    plan = paged_attention._blocks(128, 128, 2, page, True, BF16, torch.device("cuda"))
    assert (plan["num_stages"], plan["IN_PAGE"]) == (stages, page == 64)


# ---- arguments ----


def test_refusals(variant, device):
    k, v, table, lens, _ = pool([20, 5], 16, 2, DIMS[0], None, DTYPES[0], device)
    q = torch.randn(2, 1, 4, DIMS[0], device=device, dtype=DTYPES[0])
    good = {"q": q, "k_cache": k, "v_cache": v, "page_table": table, "seq_lens": lens}
    bad = {
        "q": [q[0], q[:1], q[..., :8], q.double(), q[:, :, :3], q.expand(2, 9, 4, -1)],
        "k_cache": [k[0], k[:, :8], k.half() if k.dtype != F16 else k.float()],
        "v_cache": [v[0], v[:1], v[:, :, :1]],
        "page_table": [table[0], table.long(), table[:1], table.repeat(1, 2)[:, ::2]],
        "seq_lens": [lens[:1], lens.long(), lens[None]],
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises((ValueError, NotImplementedError)):
                ops.paged_attention(**good | {name: value})
    with pytest.raises(ValueError, match="window"):
        ops.paged_attention(**good, window=-2)
    for bad in (-1.0, float("inf")):
        with pytest.raises(ValueError, match="softcap"):
            ops.paged_attention(**good, softcap=bad)
    with pytest.raises(ValueError, match="spare must be a number of multiprocessors"):
        ops.paged_attention(**good, spare=-1)
    with pytest.raises(ValueError, match="scale must be finite"):
        ops.paged_attention(**good, scale=float("nan"))
    for sinks in (torch.zeros(3, device=device), torch.zeros(4, device=device, dtype=torch.float64)):
        with pytest.raises((ValueError, NotImplementedError)):
            ops.paged_attention(**good, sinks=sinks)


@pytest.mark.skipif(CUDA, reason="what tensors hold is checked on a CPU")
@pytest.mark.parametrize(("length", "entry"), [(-1, 0), (1000, 0), (20, -1), (20, 99)])
def test_lengths_and_pages_out_of_range_are_refused(length, entry):
    k, v, table, lens, _ = pool([20], 16, 1, 8)
    lens[0], table[0, 1] = length, entry
    with pytest.raises(ValueError, match=r"seq_lens must be from 0|page_table must hold pages"):
        ops.paged_attention(torch.randn(1, 1, 2, 8), k, v, table, lens)


@pytest.mark.skipif(CUDA, reason="what tensors hold is checked on a CPU")
@pytest.mark.parametrize("cu", [[0], [0, 2], [0, 4], [1, 3]])
def test_native_prefill_refuses_rows_of_no_sequence(cu):
    if reason := registry.missing("paged_prefill", "native", torch.device("cpu")):
        pytest.skip(reason)
    k, v, table, lens, _ = pool([20], 16, 1, 8)
    cu, B = torch.tensor(cu, dtype=torch.int32), len(cu) - 1
    with pytest.raises((ValueError, RuntimeError), match="cu_seqlens_q must rise from 0 to q's 3 rows"):
        torch.ops.cs336.paged_prefill(torch.randn(3, 2, 8), k, v, table[:B], lens[:B], cu, 3, 1.0, -1, 0.0, None)


def test_opcheck_and_compile(device):
    k, v, table, lens, _ = pool([20, 5], 16, 2, DIMS[0], None, DTYPES[0], device)
    q = torch.randn(2, 1, 4, DIMS[0], device=device, dtype=DTYPES[0])
    args = q, k, v, table, lens
    for more in ((), (False, True)):  # invariant, settled
        torch.library.opcheck(torch.ops.cs336_ref.paged_attention, (*args, 1.0, -1, 0.0, None, *more))
    cu = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
    torch.library.opcheck(torch.ops.cs336_ref.paged_prefill, (q[:, 0], *args[1:], cu, 1, 1.0, -1, 0.0, None))
    compiled = torch.compile(ops.paged_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), ops.paged_attention(*args))


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize(("name", "invariant"), [("native", True), ("native", False), ("triton", True)])
def test_one_captured_graph_serves_changing_lengths(name, invariant):
    lengths = [5000, 1, 0, 700, 64, 2048]
    *(k, v, table, lens), dense = pool(lengths, 16, 2, 128, None, BF16, "cuda")
    q = torch.randn(len(lengths), 1, 8, 128, device="cuda", dtype=BF16)
    with registry.use(name):
        ops.paged_attention(q, k, v, table, lens)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o, lse = ops.paged_attention(q, k, v, table, lens, invariant=invariant, return_lse=True)
        for cut in (lengths, [17, 1, 0, 699, 63, 1], [4999, 0, 0, 1, 1, 2000], [0] * 6, lengths):
            lens.copy_(torch.tensor(cut, dtype=torch.int32))
            o.fill_(torch.nan)
            graph.replay()
            now = [(k[:n], v[:n]) for (k, v), n in zip(dense, cut, strict=True)]
            compare(o, lse, list(q), now)
            assert torch.equal(o, ops.paged_attention(q, k, v, table, lens, invariant=invariant))
