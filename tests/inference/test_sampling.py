import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cs336.inference import SamplingParams, sample
from cs336.inference.sampling import Uniforms, draw, filter_logits, min_p, top_k, top_p
from cs336.ops.ref import sample as ref

PROBS = torch.tensor([[0.1, 0.4, 0.05, 0.25, 0.2], [0.2, 0.2, 0.2, 0.2, 0.2]])


def kept(logits_BV):
    return [set(torch.nonzero(row > -torch.inf).flatten().tolist()) for row in logits_BV]


def test_top_k():
    assert kept(top_k(PROBS.log(), 2))[0] == {1, 3}
    assert [len(ids) for ids in kept(top_k(PROBS.log(), 2))] == [2, 2]  # ties too
    assert torch.equal(top_k(PROBS.log(), 9), PROBS.log())


def test_top_p():
    for p, ids in ((0.01, {1}), (0.39, {1}), (0.41, {1, 3}), (0.64, {1, 3}), (0.86, {0, 1, 3, 4}), (1.0, {*range(5)})):
        assert kept(top_p(PROBS.log(), p))[0] == ids
    assert len(kept(top_p(PROBS.log(), 0.5))[1]) == 3


def test_min_p():
    for p, ids in ((0.0, {*range(5)}), (0.2, {0, 1, 3, 4}), (0.49, {1, 3, 4}), (0.6, {1, 3}), (1.0, {1})):
        assert kept(min_p(PROBS.log(), p))[0] == ids
    assert kept(min_p(PROBS.log(), 1.0))[1] == {*range(5)}


def test_filters_keep_the_logits_of_what_stays():
    logits = torch.randn(3, 50)
    params = SamplingParams(temperature=0.5, top_k=20, top_p=0.9, min_p=0.05)
    out = filter_logits(logits, params)
    stays = out > -torch.inf
    assert torch.equal(out[stays], ((logits - logits.amax(-1, keepdim=True)) / 0.5)[stays])
    assert (stays.sum(-1) >= 1).all()
    assert (stays.sum(-1) <= 20).all()
    assert stays.gather(1, logits.argmax(-1, keepdim=True)).all()
    # Each filter sees what the one before left: top-p of a top-k of one token is that token.
    assert kept(filter_logits(PROBS.log(), SamplingParams(top_k=1, top_p=0.99, min_p=0.01)))[0] == {1}


def test_filters_leave_what_the_engine_draws_from():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 50, generator=generator) * 2
    for temperature, k, p, m in ((1.0, 8, 0.9, 0.05), (0.7, 50, 0.5, 0.2), (1.5, 30, 0.95, 0.3)):
        params = SamplingParams(temperature=temperature, top_k=k, top_p=p, min_p=m)
        limits = torch.full((64,), k, dtype=torch.int32), torch.full((64,), p), torch.full((64,), m)
        theirs = ref.kept((logits - logits.amax(-1, keepdim=True)) / temperature, *limits)
        assert kept(filter_logits(logits, params)) == kept(theirs)
        assert kept(filter_logits(logits, params)) != kept(top_p(filter_logits(logits, SamplingParams(top_k=k)), p))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-50, 50), min_size=1, max_size=12),
    st.integers(1, 12),
    st.floats(0.01, 1),
    st.floats(0, 1),
    st.floats(0, 1, exclude_max=True, width=32),
)
def test_never_draws_what_is_excluded(logits, k, p, m, u):
    out = filter_logits(torch.tensor([logits]), SamplingParams(top_k=k, top_p=p, min_p=m))
    (token,) = draw(out.softmax(-1), torch.tensor([u])).tolist()
    assert token in kept(out)[0]


def test_draw_inverts_the_running_sum():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    for u, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (1 - 2**-24, 3)):
        assert draw(probs, torch.tensor([u])).item() == token


@pytest.mark.parametrize("temperature", [1e-6, 1e-37, 1e-40, 1e-320])
def test_tiny_temperatures_are_greedy(temperature):
    logits = torch.tensor([[1.0, -torch.inf, 300.0, 299.0], [3e38, -3e38, 0.0, 0.0]])
    assert sample(logits, SamplingParams(temperature=temperature, top_p=0.9, min_p=0.1)).tolist() == [2, 0]


def test_a_large_temperature_is_uniform():
    logits = torch.tensor([[1.0, 2.0, 300.0, -torch.inf]]).expand(3000, -1)
    counts = sample(logits, SamplingParams(temperature=1e39)).bincount(minlength=4)
    assert counts[:3].min() > 850
    assert counts[3] == 0


def test_frequencies():
    torch.manual_seed(0)
    ids = sample(PROBS[:1].log().expand(40_000, -1), SamplingParams())
    torch.testing.assert_close(ids.bincount() / 40_000, PROBS[0], atol=0.01, rtol=0)
    hot = sample(PROBS[:1].log().expand(40_000, -1), SamplingParams(temperature=2.0))
    want = PROBS[0].sqrt() / PROBS[0].sqrt().sum()
    torch.testing.assert_close(hot.bincount() / 40_000, want, atol=0.01, rtol=0)


def test_greedy_takes_the_largest_and_no_random_number():
    logits = torch.randn(4, 9)
    state = torch.get_rng_state()
    assert torch.equal(sample(logits, SamplingParams(temperature=0)), logits.argmax(-1))
    assert torch.equal(torch.get_rng_state(), state)


def test_seed():
    logits = torch.randn(3, 100)
    with_seed = [sample(logits, SamplingParams(seed=seed)) for seed in range(20)]
    assert all(torch.equal(ids, sample(logits, SamplingParams(seed=seed))) for seed, ids in enumerate(with_seed))
    assert len({tuple(ids.tolist()) for ids in with_seed}) > 15
    for row in range(3):  # a row's token does not depend on the batch
        assert all(sample(logits[row : row + 1], SamplingParams(seed=i)) == ids[row] for i, ids in enumerate(with_seed))
    uniforms = Uniforms(3)
    first, second = (sample(logits, SamplingParams(), uniforms.draw([0] * 3)) for _ in range(2))
    assert torch.equal(first, with_seed[3])
    assert not torch.equal(second, with_seed[3])


def test_uniforms_of_samples():
    several, alone = Uniforms(7, 3), [Uniforms(seed) for seed in (7, 8, 9)]
    for rows in ([0, 1, 2, 0, 1, 2], [2, 0], [1, 1, 1]):
        want = torch.cat([u.draw([0]) for u in alone])
        assert torch.equal(several.draw(rows), want[rows])
    assert len(set(Uniforms(None, 3).draw([0] * 9).tolist())) == 9


@pytest.mark.parametrize("bad", [[torch.nan, 0.0], [torch.inf, 0.0], [-torch.inf, -torch.inf]])
def test_logits_that_are_not_finite(bad):
    for temperature in (0, 1.0):
        with pytest.raises(ValueError, match="not finite"):
            sample(torch.tensor([[1.0, 2.0], bad]), SamplingParams(temperature=temperature))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"top_k": 0}, "top_k must be an integer, 1 or more"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\]"),
        ({"top_k": 2.5}, "top_k must be an integer, 1 or more"),
        ({"max_tokens": 0}, "max_tokens must be an integer, 1 or more"),
        ({"max_tokens": None}, "max_tokens must be an integer, 1 or more"),
        ({"stop": ["a", ""]}, "empty string"),
        ({"stop": ""}, "empty string"),
        ({"seed": -1}, r"seed must be an integer in 0\.\.2\*\*63 - 1, got -1"),
        ({"seed": 10**30}, "seed must be an integer in"),
        ({"seed": 1.5}, "seed must be an integer in .* got 1.5"),
        ({"seed": "1"}, "seed must be an integer in .* got '1'"),
        ({"stop": (1,)}, "stop must be strings, .* stop_token_ids"),
        ({"stop_token_ids": (1.5,)}, "stop_token_ids must be integers"),
        ({"max_tokens": True}, "max_tokens must be an integer"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**values)


def test_one_stop_string():
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=None).stop == ()


def test_logits_of_another_shape():
    for shape in ((5,), (2, 3, 5), (2, 0)):
        with pytest.raises(ValueError, match=r"logits must be \(batch, vocabulary\), got shape"):
            sample(torch.zeros(shape), SamplingParams())


@pytest.mark.parametrize(
    "bad",
    [
        *({name: value} for name in ("temperature", "repetition_penalty", "presence_penalty") for value in (None, "1")),
        {"top_p": "0.9"},
        {"min_p": True},
        {"stop": 5},
        {"stop_token_ids": 5},
        *({"logit_bias": value} for value in (5, [1, 2], {"a": 1}, {1: None}, {1.7: 2}, {1: 10**400})),
    ],
    ids=str,
)
def test_what_is_no_number_is_refused_by_name(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"^{name} must be"):
        SamplingParams(**bad)
