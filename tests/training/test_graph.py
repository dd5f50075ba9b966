"""All of a captured step but the capture itself, which a stand-in does; on a GPU the capture too."""

import pytest
import tiny_run
import torch

from cs336.optim import CosineConfig, MuonConfig, SGDConfig, SOAPConfig
from cs336.training.graph import WARM_UP, StepGraph
from cs336.training.learner import Learner


def recorded(step, batch, stream):
    """A stand-in for a CUDA graph: its replay makes the step on the captured memory, and leaves results in place."""
    values = {}

    def replay():
        for name, value in step(batch).items():
            values.setdefault(name, torch.empty_like(value)).copy_(value)

    return replay, values


def learners(root, **changes):
    """One that makes each step as it is, and one that captures it."""
    tiny = tiny_run.config(root, **{"cuda_graph": False} | changes)
    plain, graphed = Learner(tiny), Learner(tiny)
    graphed.graph = StepGraph(graphed._step, graphed.device, capture=recorded)
    return plain, graphed


def batch(step, rows=4):
    ids = torch.randint(tiny_run.VOCAB, (rows, 9), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("optimizer", [None, MuonConfig(), SGDConfig()])
@pytest.mark.parametrize("micro", [4, 2])
def test_a_replayed_step_is_the_step(tmp_path, optimizer, micro):
    """Under a learning rate that changes, with accumulation: bit for bit, results and state."""
    options = {} if optimizer is None else {"optimizer": optimizer}
    plain, graphed = learners(tmp_path, micro_batch_size=micro, **options)
    kept = []
    for step in range(8):
        lr = CosineConfig().lr(step + 1, 8, 0.01)
        a, b = plain.update(batch(step), lr), graphed.update(batch(step), lr)
        kept.append((a, b))
        assert [g["lr"] for g in graphed.optimizer.param_groups] == [g["lr"] for g in plain.optimizer.param_groups]
        assert graphed.graph.captured == (step >= WARM_UP)
    for a, b in kept:  # a result is not overwritten by later replays
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    for p, q in zip(plain.model.parameters(), graphed.model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert q.grad is None
        for name, value in plain.optimizer.state[p].items():
            assert torch.equal(value, graphed.optimizer.state[q][name])


def test_another_batch_size_is_made_as_it_is(tmp_path):
    plain, graphed = learners(tmp_path)
    for step, rows in enumerate((4, 4, 4, 2, 4)):
        a, b = plain.update(batch(step, rows), 0.01), graphed.update(batch(step, rows), 0.01)
        assert torch.equal(a["loss"], b["loss"])


def failing(step, batch, stream):
    raise RuntimeError("operation not permitted when stream is capturing\nmore of it")


def failing_late(step, batch, stream):
    """When there are gradients already, that have not been computed."""

    def refuse(**options):
        failing(step, batch, stream)

    optimizer = step.__self__.optimizer
    optimizer.step = refuse
    try:
        step(batch)
    finally:
        del optimizer.step


def test_a_capture_that_fails_leaves_no_gradients(tmp_path):
    plain, graphed = learners(tmp_path)
    graphed.graph = StepGraph(graphed._step, graphed.device, required=False, capture=failing_late)
    for step in range(5):
        a, b = plain.update(batch(step), 0.01), graphed.update(batch(step), 0.01)
        assert torch.equal(a["grad_norm"], b["grad_norm"])
    assert graphed.graph.refused


def test_weights_that_move_are_captured_anew(tmp_path):
    """As those do of which an engine makes samples."""
    captures = []

    def capture(*given):
        captures.append(given)
        return recorded(*given)

    plain, graphed = learners(tmp_path)
    weights = list(graphed.model.parameters())
    graphed.graph = StepGraph(graphed._step, graphed.device, weights=weights, capture=capture)
    for step in range(7):
        if step == 5:
            graphed.model.join_weights()
        a, b = plain.update(batch(step), 0.01), graphed.update(batch(step), 0.01)
        assert torch.equal(a["loss"], b["loss"])
        assert len(captures) == (0 if step < WARM_UP else 1 if step < 5 else 2)


def test_a_step_that_cannot_be_captured_goes_on_or_says_so(tmp_path):
    plain, graphed = learners(tmp_path)
    graphed.graph = StepGraph(graphed._step, graphed.device, required=False, capture=failing)
    for step in range(5):
        a, b = plain.update(batch(step), 0.01), graphed.update(batch(step), 0.01)
        assert torch.equal(a["loss"], b["loss"])
    assert graphed.graph.refused == "operation not permitted when stream is capturing"
    graphed.graph = StepGraph(graphed._step, graphed.device, capture=failing)
    for step in range(WARM_UP):
        graphed.update(batch(step), 0.01)
    with pytest.raises(RuntimeError, match=r"cannot be captured .*: set cuda_graph = false"):
        graphed.update(batch(WARM_UP), 0.01)


def test_on_a_cpu_there_is_none(tmp_path):
    assert Learner(tiny_run.config(tmp_path)).graph is None
    with pytest.raises(ValueError, match="cuda_graph = true is not possible: it is a GPU's, and the device is cpu"):
        Learner(tiny_run.config(tmp_path, cuda_graph=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
@pytest.mark.parametrize("optimizer", [None, MuonConfig()])
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu_a_captured_step_is_the_step(tmp_path, optimizer, compile):
    options = {} if optimizer is None else {"optimizer": optimizer}
    options |= {"device": "cuda", "compile": compile, "deterministic": True, "micro_batch_size": 2}
    plain = Learner(tiny_run.config(tmp_path, cuda_graph=False, **options))
    graphed = Learner(tiny_run.config(tmp_path, cuda_graph=True, **options))
    for step in range(10):
        given = tuple(t.cuda() for t in batch(step))
        a, b = plain.update(given, 0.01 / (step + 1)), graphed.update(given, 0.01 / (step + 1))
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert graphed.graph.captured
    assert all(torch.equal(p, q) for p, q in zip(plain.model.parameters(), graphed.model.parameters(), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks for a CUDA graph")
def test_on_a_gpu_what_cannot_be_captured_is_named(tmp_path):
    options = {"device": "cuda", "compile": False, "cuda_graph": True}
    with pytest.raises(ValueError, match="a step of soap waits for the GPU"):
        Learner(tiny_run.config(tmp_path, optimizer=SOAPConfig(), **options))
    with pytest.raises(ValueError, match="weight_decay_end changes it"):
        Learner(tiny_run.config(tmp_path, optimizer=MuonConfig(weight_decay_end=0.0), **options))
