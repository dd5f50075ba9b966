"""Decoding with any mixer: what a state keeps stands for the tokens before, however they came and wherever it goes."""

import itertools

import pytest
import torch
from mixers import MIXERS, NAMES, config, ids, make, tensors

from cs336.inference import SamplingParams, generate_ids
from cs336.inference.sampling import Uniforms, sample
from cs336.nn import Context, LinearAttention, Mamba2


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def close(got, want):
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


def poisoned(state):
    """What was never written must not be read, as far as it is no zero that the mixer relies on."""
    for layer in state.layers:
        for entry in getattr(layer, "entries", ()):
            entry.fill_(1e4)
    return state


@pytest.mark.parametrize("rollback", [0, 3])
@pytest.mark.parametrize("cuts", [[0, 24], [0, 7, 8, 9, 20, 24], range(25)], ids=["whole", "parts", "one by one"])
def test_prefill_and_steps_equal_the_parallel_form(name, cuts, rollback):
    model, x = make(name), ids()
    state = poisoned(model.new_state(2, 24, rollback=rollback))
    parts = [model(x[:, a:b], state=state) for a, b in itertools.pairwise(cuts)]
    close(torch.cat(parts, 1), model(x))
    assert state.lengths.tolist() == [24, 24]


def test_no_tokens_and_no_rows(name):
    model, x = make(name), ids(2, 9)
    none = model(x[:, :0], segments=x[:, :0])
    assert none.shape == (2, 0, 97)
    none.sum().backward()
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            state = model.new_state(2, 24)
            for a, b in ((0, 0), (0, 5), (5, 5), (5, 6), (6, 9)):
                close(model(x[:, a:b], state=state), model(x)[:, a:b])
            assert state.lengths.tolist() == [9, 9]
            nobody = model.new_state(0, 24)
            assert [model(x[:0, :n], state=nobody).shape for n in (9, 1)] == [(0, 9, 97), (0, 1, 97)]


@pytest.mark.parametrize("rollback", [0, 2])
def test_rows_of_different_lengths(name, rollback):
    model, x, lengths = make(name), ids(4, 12), torch.tensor([12, 6, 1, 3])
    state = poisoned(model.new_state(4, 20, rollback=rollback))
    padding = torch.arange(12) >= lengths[:, None]
    first = model(x.masked_fill(padding, 96), segments=-padding.long(), state=state)
    more = ids(4, 6)
    gaps = torch.tensor([[0, 0, -1], [0, -1, -1], [0, 0, 0], [-1, -1, -1]])  # padding in a later pass
    second = model(more[:, :3], segments=gaps, state=state)
    third = torch.cat((model(more[:, 3:4], state=state), model(more[:, 4:], state=state)), 1)
    for row, (n, m) in enumerate(zip(lengths, (2, 1, 3, 0), strict=True)):
        whole = model(torch.cat((x[row, :n], more[row, :m], more[row, 3:]))[None])[0]
        close(torch.cat((first[row, :n], second[row, :m], third[row])), whole)


def test_going_back_equals_a_fresh_run(name):
    """As speculation does: some tokens more, all or some of them refused, others in their place."""
    model, x, wrong = make(name), ids(3, 24), ids(3, 24)
    state = model.new_state(3, 24, rollback=4)
    model(x[:, :9], state=state)
    state.truncate([9, 8, 5])
    rows = torch.arange(3)[:, None]

    def going_on(count, source):
        at = state.lengths[:, None] + torch.arange(count)
        return model(source[rows, at], state=state), at

    want = model(x)
    for refused in ([4, 0, 1], [3, 4, 2], [1, 4, 4]):
        going_on(4, wrong)
        state.truncate(state.lengths - 4)
        good, at = going_on(4, x)
        close(good, want[rows, at])
        state.truncate(state.lengths - torch.tensor(refused))
    good, at = going_on(1, x)
    close(good, want[rows, at])
    state.truncate([0, 0, 0])
    close(model(wrong[:, :9], state=state), model(wrong[:, :9]))


@pytest.mark.parametrize("rollback", [0, 2])
def test_steps_without_gradients(name, rollback):
    """Recurrences then step in place: rows of different lengths, going back, beginning anew."""
    model, x, wrong = make(name), ids(3, 16), ids(3, 16)
    with torch.no_grad():
        model.join_weights()
        want, rows = model(x), torch.arange(3)
        state, lengths = poisoned(model.new_state(3, 20, rollback=rollback)), torch.tensor([6, 1, 3])
        model(x[:, :6], segments=-(torch.arange(6) >= lengths[:, None]).long(), state=state)

        def step(source):
            at = state.lengths.clone()
            return model(source[rows, at][:, None], state=state)[:, 0], want[rows, at]

        for _ in range(4):
            close(*step(x))
        for _ in range(rollback):
            step(wrong)
        state.truncate(state.lengths - rollback)
        for _ in range(4):
            close(*step(x))
        state.truncate([0, 20, 0])
        close(*step(x))
        close(*step(x))


def test_a_step_of_a_recurrence_is_two_kernels(name):
    """Between its projections; none of them makes or moves a state."""
    mixer, calls = make(name).layers[0].attention, []
    if not isinstance(mixer, LinearAttention | Mamba2):
        pytest.skip("no recurrence")
    state = mixer.new_state(2, 12)

    def backend(graph, inputs):
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph

    torch._dynamo.reset()
    step = torch.compile(lambda x, context: mixer(x, context, state), backend=backend, fullgraph=True)
    with torch.no_grad():
        step(torch.randn(2, 1, 32), Context(lengths=torch.full((2,), 7)))
    assert sum("recurrent_step_" in call for call in calls) == 1
    assert sum("causal_conv1d_step_" in call for call in calls) == (state.conv is not None)
    moves = ("index", "where", "copy", "masked_fill", "clone", "put", "arange")
    assert not [call for call in calls if any(move in call for move in moves)]


def test_no_further_than_is_kept(name):
    model, x = make(name), ids(2, 12)
    state = model.new_state(2, 24, rollback=2)
    model(x, state=state)
    if state.rollback is None:
        state.truncate([1, 5])
        assert state.lengths.tolist() == [1, 5]
        return
    assert state.rollback == 2
    state.truncate([10, 11])
    with pytest.raises(ValueError, match=r"row 1 goes back from 11 to 9 tokens, and a row can go back 2 tokens"):
        state.truncate([10, 9])
    assert state.lengths.tolist() == [10, 11]
    close(model(x[:, 10:11], state=state.select([0]).select([0, 0]))[0], model(x[:1, :11])[0, 10:])
    for rows, room in ((-1, 4), (1, -4)):
        with pytest.raises(ValueError, match=f"got batch_size {rows}, max_len {room}"):
            model.new_state(rows, room)
    with pytest.raises(ValueError, match="rollback must be 0 or more tokens, got -1"):
        model.new_state(1, rollback=-1)


def test_copies_go_on_apart(name):
    model, x = make(name), ids(3, 12)
    state = model.new_state(3, rollback=3)
    model(x[:, :7], state=state)
    state.truncate([7, 5, 6])
    some, copy = state.select([2, 0, 0]), state.copy()
    assert not {t.data_ptr() for t in tensors(some)} & {t.data_ptr() for t in tensors(state)} - _shared(state)
    got = model(torch.stack((x[2, 6:8], x[0, 7:9], x[0, 7:9])), state=some)
    want = model(x)
    for part, (row, n) in zip(got, ((2, 6), (0, 7), (0, 7)), strict=True):
        close(part, want[row, n : n + 2])
    assert some.lengths.tolist() == [8, 9, 9]
    assert state.lengths.tolist() == copy.lengths.tolist() == [7, 5, 6]  # neither went on
    copy.truncate([4, 5, 6])
    close(model(x[:1, 4:6], state=copy.select([0]))[0], want[0, 4:6])
    close(model(x[1:2, 5:7], state=state.select([1]))[0], want[1, 5:7])


def _shared(state):
    return {layer.filter.data_ptr() for layer in state.layers if hasattr(layer, "filter")}


def test_a_step_is_one_graph_and_touches_no_new_memory(name):
    """As a CUDA graph needs it: nothing is read on the host, no shape and no address changes from step to step."""
    model, x = make(name), ids(2, 12)
    want, state, graphs = model(x), model.new_state(2, 13), []
    model(x[:, :3], state=state)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()  # it counts what it compiled for the other mixers
    before = [t.data_ptr() for t in tensors(state)]
    step = torch.compile(lambda token: model(token, state=state), backend=backend, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for i in range(3, 12):
            close(step(x[:, i : i + 1])[:, 0], want[:, i])
    assert len(graphs) == 1
    assert [t.data_ptr() for t in tensors(state)] == before


def test_a_step_does_not_ask_the_device(name):
    """On meta every question for a value fails."""
    model = make(name, device="meta")
    state = model.new_state(2, rollback=1)
    for S in (3, 1, 2):
        token_ids = torch.zeros(2, S, dtype=torch.long, device="meta")
        assert model(token_ids, segments=token_ids, state=state).shape == (2, S, 97)
    state.truncate(torch.zeros(2, dtype=torch.long, device="meta"))


def test_keeps_no_graph(name):
    model = make(name)
    state = model.new_state(2)
    model(ids(), state=state)
    assert not any(t.requires_grad for t in tensors(state))


def test_under_autocast(name):
    model, x = make(name), ids()
    with torch.autocast("cpu", torch.bfloat16):
        state = model.new_state(2)
        parts = torch.cat(
            (model(x[:, :9], state=state), model(x[:, 9:10], state=state), model(x[:, 10:], state=state)), 1
        )
        want = model(x)
    error = (parts - want).float().square().mean().sqrt() / want.float().square().mean().sqrt()
    assert error < 0.05


@pytest.mark.parametrize("rollback", [0, 3])
@pytest.mark.parametrize("max_len", [3, 30])
def test_bytes(name, rollback, max_len):
    described, model = config(name), make(name, dtype=torch.bfloat16)
    state = model.new_state(3, max_len, rollback=rollback)
    shared = _shared(state)
    held = sum(t.nbytes for t in tensors(state) if t.data_ptr() not in shared)
    assert sum(layer.nbytes for layer in state.layers) == held == 3 * described.state_bytes(max_len, 2, rollback)
    assert state.nbytes == held + 3 * 8 * (1 if state.rollback is None else 2)


@pytest.mark.parametrize("name", ["window", "gated linear", "gated delta", "mamba2", "hyena, short"])
def test_states_of_a_bounded_size(name):
    described = config(name, context_length=4096)
    assert described.state_bytes(4096) == described.state_bytes(16)
    full = config("attention", context_length=4096)
    assert full.state_bytes(4096) == 256 * full.state_bytes(16)


def test_a_latent_is_small():
    """Whatever the number of heads: arXiv:2405.04434's point."""
    mla, mha = MIXERS["latent"], MIXERS["attention"]
    assert mla.state_bytes(32, 100, 2) == 100 * (12 + 4) * 2
    assert mha.state_bytes(32, 100, 2) == 100 * 2 * 2 * 8 * 2


def no_cache(model, prompt, params, count):
    """Generation by the definition: the whole text again for each token."""
    uniforms, tokens = Uniforms(params.seed), list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([tokens]))[:, -1]
        tokens += sample(logits, params, uniforms.draw([0])).tolist()
    return tokens[-count:]


def test_generates(name):
    model = make(name)
    prompts, params = [[5, 6, 7], [80], list(range(20))], SamplingParams(seed=1, max_tokens=8)
    got = generate_ids(model, prompts, params)
    assert got == [no_cache(model, prompt, params, 8) for prompt in prompts]
