"""A step's memory is planned before it is allocated."""

import dataclasses
import gc

import pytest
import tiny_run
import torch
from torch.profiler import ProfilerActivity, profile

from cs336.models import Transformer, TransformerConfig
from cs336.models.memory import training_memory
from cs336.parallel import ParallelConfig
from cs336.training import MuonConfig, NextToken, Trainer
from cs336.training.fit import Numerics, choose_recompute, predicted_memory
from cs336.training.learner import Learner

MODEL = TransformerConfig(64, 128, 4, 128, 4)
FP32 = Numerics(4, 4, compiled=False)


def kept_bytes(how):
    """What the forward pass leaves behind for the backward, as torch counts it."""
    model = Transformer(MODEL)
    model.gradient_checkpointing = how
    ids = torch.randint(64, (4, 128))
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        features = model.features(ids)
    kept = sum(event.self_cpu_memory_usage for event in found.key_averages())
    del features
    return kept


@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_activations_are_predicted(how):
    found = kept_bytes(how)
    predicted = training_memory(MODEL, 4, gradient_checkpointing=how).activations
    if how != "none":  # less what one layer takes while it is computed again
        again = max(0, 512 * MODEL.blocks[0].activation_bytes(128, 4) - training_memory(MODEL, 4).logits)
        if how == "selective":
            from cs336.models.memory import products_bytes

            again -= 512 * products_bytes(MODEL.blocks[0], 128, 4)
        predicted -= again
    assert found == pytest.approx(predicted, rel=0.05)


def test_recomputation_changes_no_gradient():
    ids = torch.randint(64, (2, 128))
    gradients = []
    for how in (False, "none", "selective", "full", True):
        torch.manual_seed(0)
        model = Transformer(MODEL)
        model.gradient_checkpointing = how
        model(ids).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert all(torch.equal(g, gradients[0]) for g in gradients[1:])


def test_an_unknown_way_is_named():
    model = Transformer(MODEL)
    model.gradient_checkpointing = "some"
    with pytest.raises(ValueError, match="none, selective or full, got 'some'"):
        model(torch.zeros(1, 4, dtype=torch.int64))


def test_products_are_computed_once(monkeypatch):
    """Selective recomputation repeats norms and activations, and no product; full repeats both."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counts[how][function] = counts[how].get(function, 0) + 1
            return function(*args, **(kwargs or {}))

    counts = {"none": {}, "selective": {}, "full": {}}
    for how in counts:
        model = Transformer(MODEL)
        model.gradient_checkpointing = how
        with Count():
            model(torch.zeros(1, 16, dtype=torch.int64)).sum().backward()
    mm, silu = torch.ops.aten.mm.default, torch.ops.aten.silu.default
    assert counts["selective"][mm] == counts["none"][mm] < counts["full"][mm]
    assert counts["none"][silu] < counts["selective"][silu] == counts["full"][silu]


def needs(tiny):
    micro = tiny.micro_batch_size or tiny.batch_size
    return {way: predicted_memory(tiny, FP32, way, micro).total for way in ("none", "selective", "full")}


@pytest.fixture
def large(tmp_path):
    """A run whose activations are most of its memory."""
    return tiny_run.config(tmp_path, model=MODEL, batch_size=64)


def test_auto_takes_the_first_that_fits(large):
    auto = dataclasses.replace(large, gradient_checkpointing="auto")
    sizes = needs(large)
    assert sizes["none"] > sizes["selective"] > sizes["full"]
    for way, size in sizes.items():
        assert choose_recompute(auto, FP32, size) == way
    with pytest.raises(ValueError, match="would fit"):
        choose_recompute(auto, FP32, sizes["full"] - 1)


def test_what_is_refused_says_what_would_fit_and_it_does(large):
    sizes = needs(large)
    for room in (sizes["none"] - 1, sizes["none"] / 2, sizes["full"] / 8):
        with pytest.raises(ValueError, match=r"a step takes about .* GiB, and .* can be used: .* would fit") as error:
            choose_recompute(large, FP32, room)
        advice = str(error.value).partition("can be used: ")[2]
        size = int(advice.partition("micro_batch_size = ")[2].split()[0]) if "micro_batch" in advice else None
        way = advice.split('"')[1] if "gradient_checkpointing" in advice else False
        changed = dataclasses.replace(large, micro_batch_size=size or 64, gradient_checkpointing=way)
        assert choose_recompute(changed, FP32, room) == way
    with pytest.raises(ValueError, match=r"even one sequence at a time takes .*; use a smaller model"):
        choose_recompute(large, FP32, 1000)


def test_a_run_that_cannot_fit_is_refused_before_anything_is_written(tmp_path):
    tiny = tiny_run.config(tmp_path, memory_limit=1e-5)
    with pytest.raises(ValueError, match="even one sequence at a time takes"):
        Trainer(tiny, display=tiny_run.quiet())
    assert not tiny.run_dir.exists()


def test_the_optimizers_state_counts(tmp_path):
    for optimizer in ({}, {"optimizer": MuonConfig()}):
        learner = Learner(tiny_run.config(tmp_path, **optimizer))
        ids = torch.zeros(4, 8, dtype=torch.int64)
        learner.update((ids, ids), 0.01)
        states = learner.optimizer.state.values()
        held = sum(t.nbytes for s in states for name, t in s.items() if name != "step")
        assert learner.predicted_memory().optimizer == held


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}, {"zero": 3}, {"tensor": 2, "context": 2}])
def test_a_head_that_is_fused_has_no_whole_logits_in_any_layout(tmp_path, layout):
    """It is where the model caps its logits, where it is asked for, and with the last stage of a pipeline."""
    wide = dataclasses.replace(MODEL, vocab_size=1 << 16, context_length=8192)
    capped = dataclasses.replace(wide, logit_softcap=30.0)
    parallel = ParallelConfig(**layout)

    def logits(model, fused=None):
        tiny = tiny_run.config(tmp_path, model=model, parallel=parallel, objective=NextToken(fused_head=fused))
        return predicted_memory(tiny, Numerics(4, 2, True), "none", 4, 4 if "context" in layout else 2).logits

    whole = 4 * 8192 // parallel.context * (1 << 16) * 2
    assert logits(wide, True) <= logits(capped) < whole
    assert (logits(wide, False) >= whole) == (parallel.pipeline == 1)


def test_a_run_recomputes_as_it_says(tmp_path):
    results = {}
    for way in (False, "selective", "full", "auto"):
        tiny_run.train(tiny_run.config(tmp_path, str(way), gradient_checkpointing=way, budget="4steps"))
        results[way] = tiny_run.rows(tmp_path / str(way))
    assert all(rows == results[False] for rows in results.values())
    assert Learner(tiny_run.config(tmp_path, gradient_checkpointing=True)).model.gradient_checkpointing is True
