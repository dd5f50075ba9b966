"""The opponent of the training benchmark is the same model, and a broken one is noticed."""

import dataclasses
import pathlib

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks import results, run
from benchmarks.end_to_end import bench_ladder, bench_train
from benchmarks.end_to_end.plain import PlainTransformer
from cs336 import ops
from cs336.data import read_shard
from cs336.models import Transformer, TransformerConfig

TINY = bench_train.MODELS["tiny"]


@pytest.mark.parametrize("tied", [True, False])
def test_plain_is_the_same_model(tied):
    config = TransformerConfig(64, 16, 2, 32, 2, tie_embeddings=tied)
    ours, plain = Transformer(config), PlainTransformer(config)
    plain.copy_weights(ours)
    assert sum(p.numel() for p in plain.parameters()) == config.num_parameters()
    ids, targets = torch.randint(64, (2, 16)), torch.randint(64, (2, 16))
    losses = [ops.cross_entropy(ours(ids), targets), plain.loss(ids, targets)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(plain.embedding.weight.grad, ours.embedding.weight.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(plain.layers[0].out.weight.grad, ours.layers[0].attention.o_proj.weight.grad)


def test_plain_refuses_what_it_does_not_have():
    with pytest.raises(ValueError, match="no grouped queries"):
        PlainTransformer(TransformerConfig(64, 16, 2, 32, 2, qk_norm=True))


def test_gpt2_shapes_have_their_parameters():
    for name, millions in (("124M", 124), ("350M", 354), ("774M", 774), ("1.5B", 1558)):
        assert bench_train.MODELS[name].num_parameters() / 1e6 == pytest.approx(millions, rel=0.02)


def test_zipf_tokens(tmp_path):
    tokens = read_shard(bench_train.zipf_tokens(tmp_path / "zipf.bin", 1000, 50_000))
    counts = np.bincount(tokens, minlength=1000)
    assert len(tokens) == 50_000
    assert len(counts) == 1000
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.2)


def test_rows_hold_speed_and_curves():
    rows = bench_train.compare("tiny", batch_size=2, blocks=2, steps=2, compile=False)
    assert [r["variant"] for r in rows] == ["cs336", "plain"]
    for r in rows:
        assert r["shape"] == [2, TINY.context_length]
        assert r["tokens_per_second"] == pytest.approx(2 * TINY.context_length / r["seconds"], rel=0.01)
        assert len(r["curve"]) == 2
        assert r["loss"] == r["curve"][-1]


def test_all_begin_with_the_same_weights(tmp_path):
    """As they multiply and as they are kept: bfloat16 holds them."""
    shard = bench_train.zipf_tokens(tmp_path / "zipf.bin", TINY.vocab_size, 1000)
    make = lambda way: bench_train.Contender("tiny", way, shard, batch_size=2, compile=False).learner  # noqa: E731
    wide, low = (list(make(way).model.parameters()) for way in ("cs336", "cs336 bf16_weights"))
    assert (wide[0].dtype, low[0].dtype) == (torch.float32, torch.bfloat16)
    assert all(torch.equal(a, b.float()) for a, b in zip(wide, low, strict=True))


def test_the_rate_of_a_few_steps_rises_no_faster():
    assert [bench_train.rate(step, 12) for step in range(12)] == [bench_train.rate(step, 40) for step in range(12)]
    assert bench_train.rate(20, 42) == pytest.approx(2e-4)


@pytest.mark.parametrize(
    ("ours", "table"), [([], "train"), (["--ours", "deterministic", "default"], "train_deterministic")]
)
def test_rows_of_our_options_have_a_table(ours, table, tmp_path):
    out = tmp_path / "rows.json"
    arguments = ["train", "tiny", "--batch", "2", "--blocks", "2", "--steps", "2", "--no-compile"]
    assert run.main([*arguments, *ours, "--out", str(out)]) == 0
    (found,) = results.read(out).items()
    assert found[0] == table
    assert [r["variant"] for r in found[1]["rows"]] == [*["cs336 deterministic"] * bool(ours), "cs336", "plain"]


def test_contenders_in_processes_of_their_own_make_the_same_steps():
    settings = {"blocks": 2, "steps": 2, "compile": False}
    (rows,) = (make() for make in bench_train.compare_apart({"tiny": 2}, **settings))
    for row, same in zip(rows, bench_train.compare("tiny", batch_size=2, **settings), strict=True):
        assert (row["variant"], row["curve"]) == (same["variant"], same["curve"])


def test_contenders_are_timed_when_all_are_made_and_go_before_the_next(monkeypatch):
    """One that still compiles would take the host, and the GPU."""
    made, there = [], []

    class Process:
        def __init__(self, name, way, *args, **settings):
            self.name = name, way
            there.append(self.name)

        def wait(self):
            made.append(self.name)

        def end(self):
            if self.name in there:
                there.remove(self.name)

    monkeypatch.setattr(bench_train, "Apart", Process)
    names = ["tiny", "124M"]
    makers = bench_train.compare_apart(dict.fromkeys(names, 2), blocks=2, steps=2, data=pathlib.Path("tokens.bin"))
    for i, _ in enumerate(makers):
        assert made == [(name, way) for name in names for way in ("cs336", "plain")]
        assert there == made[2 * i :]
    assert not there


def test_a_contender_whose_process_ends_is_an_error(tmp_path):
    shard = bench_train.zipf_tokens(tmp_path / "zipf.bin", TINY.vocab_size, 1000)
    contender = bench_train.Apart("tiny", "plain", shard, batch_size=2, compile=False)
    contender.end()
    with pytest.raises(ValueError, match="a contender's process ended with status -9"):
        contender.block(0, 1, 1)


def test_one_that_cannot_be_made_stops_no_other():
    class Process:
        def __init__(self, fails):
            self.fails = fails

        def wait(self):
            if self.fails:
                raise ValueError("a contender's process ended with status 1")

        def end(self):
            pass

    groups = [[Process(True)], [Process(False)]]
    assert list(bench_train.in_turn(groups)) == groups


def test_compilers_are_done_when_a_contender_is_made(tmp_path, monkeypatch):
    torch._dynamo.reset()
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, backend="eager": compile(f, backend=backend))
    deep = dataclasses.replace(TINY, num_layers=5)
    monkeypatch.setitem(bench_train.MODELS, "deep", deep)
    shard = bench_train.zipf_tokens(tmp_path / "zipf.bin", TINY.vocab_size, 1000)
    for way in ("cs336", "plain"):
        contender = bench_train.Contender("deep", way, shard, batch_size=2)
        assert contender.learner.config.model == deep
        graphs = counters["stats"]["unique_graphs"]
        assert contender.block(0, 1, 1)[1]
        assert counters["stats"]["unique_graphs"] == graphs > 0


def test_curves_that_disagree_are_an_error(monkeypatch, capsys):
    ours = torch.full((2, 3), 5.0)
    bench_train.check_curves(ours, ours * 1.005)
    for wrong in (ours * 1.02, ours * float("nan")):
        with pytest.raises(ValueError, match="the loss curves disagree"):
            bench_train.check_curves(wrong, ours)
    monkeypatch.setattr(bench_train.PlainTransformer, "copy_weights", lambda self, ours: None)
    arguments = ["train", "tiny", "--batch", "2", "--blocks", "2", "--steps", "2", "--no-compile"]
    monkeypatch.setattr(bench_train, "DISAGREES", 1e-4)
    assert run.main(arguments) == 1
    assert "FAILED tiny: the loss curves disagree" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [(["7T"], "no model 7T"), (["tiny", "--blocks", "1"], "2 or more")])
def test_bad_arguments(arguments, message):
    with pytest.raises(SystemExit, match=message):
        run.main(["train", *arguments])


def test_each_rung_of_the_ladder_adds_its_piece(monkeypatch):
    found = []

    def backend(graph_module, example_inputs):  # what inductor would get
        names = [getattr(node.target, "__name__", None) for node in graph_module.graph.nodes]
        found.append([names.count(name) for name in ("sdpa", "rms_norm", "swiglu", "of_linear")])
        return graph_module.forward

    monkeypatch.setattr(bench_ladder, "compile_fx", backend)
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, backend="eager": compile(f, backend=backend))
    torch._dynamo.reset()
    bench_ladder._backend.cache_clear()
    rows = bench_ladder.climb("tiny", batch_size=2, blocks=2, steps=2)
    layer, head = [1, 2, 1, 0], [0, 1, 0, 1]  # torch's rms_norm has the name of ours
    assert found == [
        [n if i < pieces or i == 1 else 0 for i, n in enumerate(part)]
        for pieces in (1, 2, 3, 4)
        for part in (layer, head)
    ]
    names = [row["variant"] for row in rows]
    assert names[0] == "plain PyTorch"
    assert names[-4:] == ["+ AdamW", "cs336 train", "+ CUDA graph", "+ bf16 weights"]
    losses = [row["loss"] for row in rows]
    assert losses[:-1] == pytest.approx([losses[0]] * 8, abs=1e-3)
    assert losses[-1] == pytest.approx(losses[0], rel=0.02)


def test_a_piece_that_is_not_found_is_an_error(monkeypatch):
    monkeypatch.setattr(bench_ladder, "PIECES", ("attention", "layer_norm"))
    monkeypatch.setattr(bench_ladder, "compile_fx", lambda graph_module, example_inputs: graph_module.forward)
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, backend="eager": compile(f, backend=backend))
    torch._dynamo.reset()
    with pytest.raises(ValueError, match="has no layer_norm that the compile backend finds"):
        bench_ladder.climb("tiny", batch_size=2, blocks=2, steps=1)
