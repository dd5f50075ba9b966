"""sample in every variant that runs here: against ref where it is exact, and against probabilities where it draws."""

import math

import pytest
import torch
from attentions import CUDA

from cs336 import ops
from cs336.ops import registry

VOCABULARIES = [1, 5, 1000, 32001]
if CUDA:  # float32 and bfloat16 of which a block has just under 48 KB, and some static memory; then what is larger
    VOCABULARIES += [92544, 163840, 131072]


def arguments(B, V, device, dtype=torch.float32, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0):
    """Everything before the keywords."""
    logits = (2 * torch.randn(B, V, device=device)).to(dtype)
    floats = [torch.full((B,), x, device=device) for x in (temperature, top_p, min_p)]
    k = torch.full((B,), top_k, dtype=torch.int32, device=device)
    seeds = torch.arange(B, device=device) * 2**33 + seed
    return [logits, floats[0], k, floats[1], floats[2], seeds, torch.arange(B, device=device) + 5]


def run(variant, args, **options):
    names = "counts", "repetition_penalty", "presence_penalty", "frequency_penalty", "bias"
    raw = [options.get(name) for name in names]
    if reason := registry.why_not("sample", variant, *args, *raw, options.get("num_logprobs", 0)):
        pytest.skip(reason)
    return ops.sample(*args, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", VOCABULARIES)
def test_greedy_takes_the_first_of_the_largest(variant, device, V, dtype):
    args = arguments(7, V, device, dtype, temperature=0.0)
    args[0][0] = 1.5
    args[0][1, -1] = args[0][1, V // 2] = 50.0
    out = run(variant, args)
    assert torch.equal(out.token_ids, args[0].argmax(-1))
    assert out.token_ids[0] == 0
    assert out.token_ids[1] == V // 2
    want = torch.log_softmax(args[0].double(), -1).gather(1, out.token_ids[:, None])[:, 0]
    torch.testing.assert_close(out.logprobs.double(), want, atol=2e-5, rtol=1e-5)
    assert out.top_token_ids.shape == out.top_logprobs.shape == (7, 0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 3},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"top_k": 20, "top_p": 0.5},
        {"top_k": 700},
        {"top_k": 3000, "top_p": 0.9},
        {"top_p": 0.0},
        {"temperature": 0.01},
    ],
    ids=str,
)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_draws_are_those_of_the_reference(variant, device, V, options):
    args = arguments(40, V, device, **options)
    with registry.use("ref"):
        want = ops.sample(*args, num_logprobs=min(V, 4))
    got = run(variant, args, num_logprobs=min(V, 4))
    assert (got.token_ids != want.token_ids).sum() <= (1 if V > 1000 else 0)  # scores of two tokens within an ulp
    assert torch.equal(got.top_token_ids, want.top_token_ids)
    torch.testing.assert_close(got.top_logprobs, want.top_logprobs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_k": 2500}, {"top_p": 0.3}, {"min_p": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_tokens_alike(variant, device, dtype, options):
    """As many as there are: of equal ones none is dropped, and none is nearer."""
    args = arguments(6, VOCABULARIES[-1], device, dtype, **options)
    args[0] = args[0].round()
    args[0][0], args[0][1, 7:] = 2.0, -torch.inf
    with registry.use("ref"):
        want = ops.sample(*args).token_ids
    assert torch.equal(run(variant, args).token_ids, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_of_changed_logits_are_those_of_the_reference(variant, device, dtype):
    V = VOCABULARIES[-1]
    args = arguments(8, V, device, dtype)
    args[1][:2], args[2][2:4], args[3][4:6] = 0.0, 20, 0.7
    options = {name: torch.full((8,), 1.3, device=device) for name in ("repetition_penalty", "presence_penalty")}
    options |= {"counts": torch.randint(0, 3, (8, V), dtype=torch.int32, device=device)}
    options |= {"bias": torch.randn(8, V, device=device)}
    with registry.use("ref"):
        want = ops.sample(*args, **options)
    got = run(variant, args, **options)
    assert (got.token_ids != want.token_ids).sum() <= 1  # scores of two tokens within an ulp
    same = got.token_ids == want.token_ids
    torch.testing.assert_close(got.logprobs[same], want.logprobs[same], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("options", "sees"), [
    ({}, [0.5, 0.25, 0.125, 0.0625, 0.0625]),
    ({"temperature": 0.5}, [0.7356, 0.1839, 0.0460, 0.0115, 0.0115, ]),
    ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0, 0]),
    ({"top_k": 4}, [0.5, 0.25, 0.125, 0.0625, 0.0625]),  # equal tokens stay together
    ({"top_p": 0.74}, [2 / 3, 1 / 3, 0, 0, 0]),
    ({"top_p": 0.76}, [4 / 7, 2 / 7, 1 / 7, 0, 0]),
    ({"min_p": 0.2}, [4 / 7, 2 / 7, 1 / 7, 0, 0]),
    ({"top_k": 3, "top_p": 0.8}, [2 / 3, 1 / 3, 0, 0, 0]),  # top_p of what top_k leaves: 4/7 + 2/7 reach 0.8
    ({"top_k": 1}, [1, 0, 0, 0, 0]),
])  # fmt: skip
def test_frequencies_are_the_probabilities(variant, device, options, sees):
    B = 4000
    args = arguments(B, 5, device, **options)
    args[0] = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625], device=device).log().expand(B, 5).contiguous()
    tokens = run(variant, args).token_ids
    share = torch.bincount(tokens, minlength=5).double().cpu() / B
    want = torch.tensor(sees, dtype=torch.float64)
    assert ((share - want).abs() <= 4.5 * (want * (1 - want) / B).sqrt() + 1e-4).all(), share
    args[6] += 1
    assert not torch.equal(run(variant, args).token_ids, tokens) or options.get("top_k") == 1


def test_a_request_draws_the_same_in_any_batch(variant, device):
    args = arguments(60, VOCABULARIES[-1], device, top_p=0.9)
    together = run(variant, args).token_ids
    assert torch.equal(run(variant, [x[17:18] for x in args]).token_ids, together[17:18])
    order = torch.randperm(60, device=device)
    assert torch.equal(run(variant, [x[order] for x in args]).token_ids, together[order])


def test_rows_with_settings_of_their_own(variant, device):
    args = arguments(6, VOCABULARIES[-1], device)
    args[1] = torch.tensor([0.0, 1.0, 0.7, 2.0, 1.0, 0.0], device=device)
    args[2] = torch.tensor([5, 1, 0, 10, 10**9, -1], dtype=torch.int32, device=device)
    args[3] = torch.tensor([0.1, 1.0, 0.9, 0.5, 1e-9, 1.0], device=device)
    args[4] = torch.tensor([0.5, 0.0, 0.1, 0.0, 0.0, 1.0], device=device)
    with registry.use("ref"):
        want = ops.sample(*args).token_ids
    got = run(variant, args).token_ids
    assert torch.equal(got, want)
    assert torch.equal(got[[0, 1, 4, 5]], args[0].argmax(-1)[[0, 1, 4, 5]])


def test_penalties_and_bias(variant, device):
    args = arguments(3, 6, device, temperature=0.0)
    args[0] = torch.tensor([[3.0, 2.9, -1.0, 0, 0, 0]] * 3, device=device)
    counts = torch.zeros(3, 6, dtype=torch.int32, device=device)
    counts[0, 0] = ops.IN_PROMPT
    counts[1, 0] = 2
    counts[2, 0] = ops.IN_PROMPT + 1
    one, zero = torch.ones(3, device=device), torch.zeros(3, device=device)

    def chosen(repetition=one, presence=zero, frequency=zero, bias=None, counts=counts):
        penalties = {"repetition_penalty": repetition, "presence_penalty": presence, "frequency_penalty": frequency}
        return run(variant, args, counts=counts, bias=bias, **penalties).token_ids.tolist()

    assert chosen() == [0, 0, 0]
    assert chosen(repetition=1.2 * one) == [1, 1, 1]
    assert chosen(presence=0.2 * one) == [0, 1, 1]
    assert chosen(frequency=0.06 * one) == [0, 1, 0]
    bias = torch.zeros(3, 6, device=device)
    bias[:, 5], bias[1, 5] = 9.0, -torch.inf
    assert chosen(bias=bias) == [5, 0, 5]
    args[0] = -args[0].abs()  # a negative logit is multiplied
    args[0][:, 0] = -0.1
    args[0][:, 1:] = -0.15
    assert chosen(repetition=2 * one) == [1, 1, 1]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("temperature", [0.0, 1.0, torch.inf])
def test_penalties_that_overflow(variant, device, temperature, top_p):
    """What is not finite is still drawn from: a distance of inf - inf would be NaN, and no token the nearest."""
    args = arguments(3, 6, device, temperature=temperature, top_p=top_p)
    args[0] = torch.tensor([[-torch.inf, 3.0, 2.0, 0.0, -1.0, 0.0]] * 3, device=device)
    counts = torch.zeros(3, 6, dtype=torch.int32, device=device)
    counts[:, :3] = 1
    repetition = torch.tensor([1e-40, 0.0, torch.inf], device=device)  # +inf; also 0 * -inf; 0 and -inf
    penalties = {"repetition_penalty": repetition, "frequency_penalty": torch.full_like(repetition, -1e38)}
    tokens = run(variant, args, counts=counts, **penalties).token_ids.tolist()
    assert all(token in ((1, 2) if temperature < torch.inf else range(1, 6)) for token in tokens)


def test_logprobs_are_those_of_the_logits(variant, device):
    args = arguments(4, VOCABULARIES[-1], device, temperature=0.3, top_k=2)
    bias = torch.randn_like(args[0])
    out = run(variant, args, bias=bias, num_logprobs=5)
    want = torch.log_softmax(args[0].double(), -1)
    torch.testing.assert_close(
        out.logprobs.double(), want.gather(1, out.token_ids[:, None])[:, 0], atol=2e-5, rtol=1e-5
    )
    top = want.topk(5)
    assert torch.equal(out.top_token_ids, top.indices)
    torch.testing.assert_close(out.top_logprobs.double(), top.values, atol=2e-5, rtol=1e-5)


def test_logprobs_beside_large_logits(variant, device):
    """Where the logarithm of their sum, added to the largest, would be lost."""
    args = arguments(2, 5, device)
    args[0][0], args[0][1] = 1e9, torch.inf
    out = run(variant, args, num_logprobs=2)
    assert out.logprobs.tolist() == pytest.approx([-math.log(5)] * 2)
    assert out.top_logprobs.flatten().tolist() == pytest.approx([-math.log(5)] * 4)


def test_rows_that_hold_nothing_to_draw(variant, device):
    args = arguments(5, 8, device, top_p=0.5)
    args[0][0] = -torch.inf
    args[0][1] = torch.nan
    args[0][2] = torch.nan
    args[0][2, 3] = -5.0
    args[0][3, 4] = torch.inf
    args[0][4] = torch.finfo(torch.float32).min
    args[0][4, 6] = torch.finfo(torch.float32).max
    tokens = run(variant, args).token_ids.tolist()
    assert all(0 <= t < 8 for t in tokens)
    assert tokens[2:] == [3, 4, 6]


def test_refusals(variant, device):
    args = arguments(3, 10, device)
    for i, x in enumerate(args):
        for bad in (x[:2], x.to(torch.float64 if i else torch.int64), x[None]):
            with pytest.raises((ValueError, NotImplementedError)):
                ops.sample(*args[:i], bad, *args[i + 1 :])
    one = torch.ones(3, device=device)
    for options in (
        {"repetition_penalty": one},
        {"num_logprobs": 11},
        {"num_logprobs": -1},
        {"bias": torch.zeros(3, 9, device=device)},
        {"counts": torch.zeros(3, 10, device=device)},
    ):
        with pytest.raises((ValueError, NotImplementedError)):
            ops.sample(*args, **options)


def test_opcheck_and_compile(device):
    args = arguments(3, 10, device)
    torch.library.opcheck(torch.ops.cs336_ref.sample, (*args, None, None, None, None, None, 2))
    compiled = torch.compile(ops.sample, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args).token_ids, ops.sample(*args).token_ids)
