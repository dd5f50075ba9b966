"""A compiled run compiles a layer of each kind once, and is the run that it is without."""

import functools

import pytest
import torch
from torch._dynamo.utils import counters

from cs336.data import TokenDataset, TokenLoader
from cs336.models import TransformerConfig, recompute
from cs336.training.division import compile_layer
from cs336.training.learner import Learner
from tests.training import tiny_run


@pytest.fixture(autouse=True)
def without_a_code_generator(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # the graphs are the same


def learner(path, num_layers=2, d_model=16, **changes):
    model = TransformerConfig(tiny_run.VOCAB, 8, num_layers, d_model, 2)
    return Learner(tiny_run.config(path, model=model, batch_size=4, **changes))


def batch(made):
    dataset = TokenDataset(made.config.data.train, 8, vocab_size=tiny_run.VOCAB)
    return TokenLoader(dataset, 4, device=made.device).batch(0)


def test_a_deep_model_has_the_graphs_of_a_shallow_one(tmp_path):
    for num_layers in (2, 7):
        made = learner(tmp_path, num_layers, compile=True)
        before = counters["stats"]["unique_graphs"]
        for _ in range(2):
            made.update(batch(made), 1e-3)
        graphs = counters["stats"]["unique_graphs"] - before
        assert graphs == (2 if num_layers == 2 else 0)  # the first layer adds nothing before its norm


def test_a_process_that_trains_many_models_compiles_all(tmp_path):
    with torch._dynamo.config.patch(recompile_limit=1):
        for d_model in (8, 12, 16):
            made = learner(tmp_path, d_model=d_model, compile=True)
            before = counters["stats"]["unique_graphs"]
            made.update(batch(made), 1e-3)
            assert counters["stats"]["unique_graphs"] == before + 2


def test_layers_whose_weights_come_and_go_are_compiled_in_all_models(tmp_path):
    with torch._dynamo.config.patch(recompile_limit=1):
        for d_model in (8, 12, 16):
            made = learner(tmp_path, d_model=d_model)
            for layer in made.model.layers:
                compile_layer(layer)
            before = counters["stats"]["unique_graphs"]
            made.update(batch(made), 1e-3)
            assert counters["stats"]["unique_graphs"] == before + 2


@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_a_step_is_that_without(tmp_path, how):
    values, weights = [], []
    for compile in (False, True):
        made = learner(tmp_path, compile=compile, gradient_checkpointing=how)
        before = counters["stats"]["unique_graphs"]
        values.append([made.update(batch(made), 1e-2)["grad_norm"].item() for _ in range(3)])
        weights.append(torch.cat([p.detach().flatten() for p in made.model.parameters()]))
        assert (counters["stats"]["unique_graphs"] > before) == compile
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    torch.testing.assert_close(*weights)


def test_the_list_of_what_is_kept_is_not_traced(tmp_path, monkeypatch):
    """It would be made anew for each graph, with a warning."""
    traced = []

    def products():
        traced.append(torch.compiler.is_dynamo_compiling())
        return [torch.ops.aten.mm.default]

    monkeypatch.setattr(recompute, "_products", products)
    made = learner(tmp_path, compile=True, gradient_checkpointing="selective")
    made.update(batch(made), 1e-3)
    assert traced
    assert not any(traced)


def test_what_looks_at_single_modules_sees_them(tmp_path):
    made = learner(tmp_path, compile=True)
    given = batch(made)
    made.update(given, 1e-3)
    with torch.no_grad():
        made.model.layers[1].attention.v_proj.weight[0, 0] = torch.nan
    assert "layers.1.attention.v_proj" in made.first_non_finite(given)
