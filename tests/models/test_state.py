"""A model's state while it decodes: right padding, going back, copies, and steps that can be recorded."""

import dataclasses
import itertools

import pytest
import torch
from test_transformer import SMALL, VARIANTS, ids, make

from cs336 import ops
from cs336.nn import Context, KeyValues


@pytest.fixture(params=VARIANTS)
def config(request):
    return dataclasses.replace(SMALL, **VARIANTS[request.param])


def poisoned(state):
    """What is past the lengths must not be read: a large number there would show in every logit."""
    for layer in state.layers:
        layer.keys.fill_(1e4)
        layer.values.fill_(1e4)
    return state


@pytest.mark.parametrize("cuts", [[0, 24], [0, 7, 8, 9, 20, 24], range(25)])
def test_decode_equals_the_full_forward(config, cuts):
    model, x = make(config), ids(config, S=24)
    state = poisoned(model.new_state(2))
    parts = [model(x[:, a:b], state=state) for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(torch.cat(parts, 1), model(x), atol=1e-5, rtol=1e-5)
    assert state.lengths.tolist() == [24, 24]


@pytest.mark.parametrize("how", ["segments", "truncate"])
def test_rows_of_different_lengths(config, how):
    model, x, lengths = make(config), ids(config, 3, 10), torch.tensor([10, 6, 1])
    state = poisoned(model.new_state(3, 14))
    padding = torch.arange(10) >= lengths[:, None]
    prompts = x.masked_fill(padding, 96)
    if how == "segments":
        first = model(prompts, segments=-padding.long(), state=state)
    else:
        first = model(prompts, state=state)
        state.truncate(lengths)
    assert torch.equal(state.lengths, lengths)
    more = ids(config, 3, 4)
    rest = torch.cat((model(more[:, :1], state=state), model(more[:, 1:], state=state)), 1)
    for row, n in enumerate(lengths):
        alone = model(torch.cat((x[row, :n], more[row]))[None])[0]
        torch.testing.assert_close(torch.cat((first[row, :n], rest[row])), alone, atol=1e-5, rtol=1e-5)


def test_going_back(config):
    model, x = make(config), ids(config, 2, 12)
    state = model.new_state(2)
    model(x[:, :9], state=state)
    state.truncate([4, 7])
    got = model(torch.stack((x[0, 4:7], x[1, 7:10])), state=state)
    torch.testing.assert_close(got[0], model(x)[0, 4:7], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[1], model(x)[1, 7:10], atol=1e-5, rtol=1e-5)
    state.truncate(torch.tensor([100, 3]))  # never more than there is
    assert state.lengths.tolist() == [7, 3]
    with pytest.raises(ValueError, match=r"lengths must be 2 numbers of tokens, got shape \(3,\)"):
        state.truncate([1, 2, 3])


def test_rows_and_copies(config):
    model, x = make(config), ids(config, 3, 9)
    state = model.new_state(3)
    model(x[:, :5], state=state)
    state.truncate([5, 3, 4])
    some, copy = state.select([2, 0, 0]), state.copy()
    got = model(torch.stack((x[2, 4:6], x[0, 5:7], x[0, 5:7])), state=some)
    for part, (row, n) in zip(got, ((2, 4), (0, 5), (0, 5)), strict=True):
        torch.testing.assert_close(part, model(x)[row, n : n + 2], atol=1e-5, rtol=1e-5)
    assert some.lengths.tolist() == [6, 7, 7]
    assert state.lengths.tolist() == copy.lengths.tolist() == [5, 3, 4]  # neither went on
    torch.testing.assert_close(model(x[1:2, 3:5], state=copy.select([1]))[0], model(x)[1, 3:5], atol=1e-5, rtol=1e-5)


def test_a_copy_of_an_empty_state_is_empty():
    model, x = make(SMALL), ids(SMALL)
    assert torch.equal(model(x, state=model.new_state(2).copy()), model(x, state=model.new_state(2)))


def test_a_prompt_needs_no_mask(monkeypatch):
    """Nothing is before it: attention runs over its own tokens, as in training."""
    model, x, masked = make(SMALL), ids(SMALL), []
    attention = ops.attention

    def watched(q, k, v, mask=None, **options):
        masked.append(mask is not None)
        return attention(q, k, v, mask, **options)

    monkeypatch.setattr(ops, "attention", watched)
    state = model.new_state(2)
    assert torch.equal(model(x[:, :9], state=state), model(x[:, :9]))
    model(x[:, 9:10], state=state)
    assert masked == [False] * 6 + [True] * 3


def test_slots_past_the_longest_row_cost_nothing(monkeypatch):
    read, attention = [], ops.attention
    monkeypatch.setattr(
        ops, "attention", lambda q, k, *rest, **how: read.append(k.shape[-2]) or attention(q, k, *rest, **how)
    )
    model, x = make(SMALL), ids(SMALL)
    state = model.new_state(2)
    model(x[:, :9], state=state)
    state.truncate([3, 5])
    model(x[:, 9:11], state=state)
    assert set(read) == {9, 7}


def test_bytes(config):
    model = make(config, dtype=torch.bfloat16)
    state = model.new_state(3, 11)
    tensors = [t for layer in state.layers for t in (layer.keys, layer.values)]
    assert {t.dtype for t in tensors} == {torch.bfloat16}
    assert state.nbytes == sum(t.numel() * 2 for t in tensors) + 3 * 8
    assert config.state_bytes(11, width=2) * 3 == state.nbytes - 3 * 8
    assert config.state_bytes(width=2) == config.state_bytes(24, width=2)


def test_a_step_is_one_graph_and_touches_no_new_memory(config):
    """As a CUDA graph needs it: nothing is read on the host, no shape and no address changes from step to step."""
    model, x = make(config), ids(config, 2, 20)
    want, state, graphs = model(x), model.new_state(2, 21), []
    model(x[:, :3], state=state)

    def addresses():
        return [t.data_ptr() for layer in state.layers for t in (layer.keys, layer.values, state.lengths)]

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    before = addresses()
    step = torch.compile(lambda token: model(token, state=state), backend=backend, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for i in range(3, 20):
            torch.testing.assert_close(step(x[:, i : i + 1])[:, 0], want[:, i], atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1
    assert addresses() == before


def test_a_step_does_not_ask_the_device():
    """On meta every question for a value fails."""
    model = make(SMALL, device="meta")
    state = model.new_state(2)
    for S in (3, 1, 1):
        token_ids = torch.zeros(2, S, dtype=torch.long, device="meta")
        assert model(token_ids, segments=token_ids, state=state).shape == (2, S, 97)
    state.truncate(torch.zeros(2, dtype=torch.long, device="meta"))


def test_under_autocast(config):
    model, x = make(config), ids(config)
    with torch.autocast("cpu", torch.bfloat16):
        state = model.new_state(2)
        parts = torch.cat((model(x[:, :9], state=state), model(x[:, 9:], state=state)), 1)
        torch.testing.assert_close(parts, model(x), atol=0.2, rtol=0.1)
    with pytest.raises(ValueError, match=r"k is torch\.float32, the state torch\.bfloat16"):
        model(x[:, :1], state=state)


def test_keeps_no_graph():
    model, x = make(SMALL), ids(SMALL)
    state = model.new_state(2)
    model(x, state=state)
    assert not any(t.requires_grad for layer in state.layers for t in (layer.keys, layer.values))


def test_too_many_tokens():
    model = make(SMALL)
    with pytest.raises(ValueError, match="25 tokens do not fit the model's context_length of 24"):
        model.new_state(1, 25)
    state = model.new_state(2, 10)
    model(torch.zeros(2, 8, dtype=torch.long), state=state)
    state.truncate([8, 2])
    with pytest.raises(ValueError, match="the state has room for 10 tokens a row, 11 were to be kept"):
        model(torch.zeros(2, 3, dtype=torch.long), state=state)
    assert state.lengths.tolist() == [8, 2]
    with pytest.raises(ValueError, match="the state is of 2 rows, token_ids of 1"):
        model(torch.zeros(1, 1, dtype=torch.long), state=state)


def test_key_values():
    state = KeyValues.allocate(2, 4, 3, 5, device="cpu", dtype=torch.float32)
    k, v = torch.randn(2, 2, 2, 3, 5)
    state.append(k, v, Context(lengths=torch.tensor([1, 2])))
    assert torch.equal(state.keys[0, 1:3], k[0])
    assert torch.equal(state.values[1, 2:4], v[1])
    assert not state.keys[1, :2].any()
    keys, values, visible = state.read(2, Context(lengths=torch.tensor([1, 2])))
    assert torch.equal(keys, state.keys.transpose(1, 2))
    assert torch.equal(values, state.values.transpose(1, 2))
    assert visible.int().tolist() == [[[[1, 1, 0, 0], [1, 1, 1, 0]]], [[[1, 1, 1, 0], [1, 1, 1, 1]]]]
    keys, values, visible = state.read(1, Context(lengths=torch.tensor([1, 2]), reach=3))
    assert keys.shape == values.shape == (2, 3, 3, 5)
    assert visible.int().tolist() == [[[[1, 1, 0]]], [[[1, 1, 1]]]]
    with pytest.raises(ValueError, match="room for 4 tokens a row, 5 were to be kept: make a longer one"):
        state.append(k, v, Context(lengths=torch.tensor([1, 3])))
    with pytest.raises(ValueError, match=r"k and v must be \(2, S, 3, 5\) to fit the state"):
        state.append(k[..., :4], v[..., :4], Context(lengths=torch.tensor([1, 2])))
