import dataclasses
import itertools
import pathlib
import re

import pytest

from cs336.cli import program
from cs336.models import BlockConfig, TransformerConfig, training_memory
from cs336.models.memory import head_bytes
from cs336.nn import AttentionConfig, LinearAttentionConfig, MoEConfig
from cs336.parallel import Layout, hardware, plan, planner
from cs336.parallel.planner import Work, layouts, predict, rank_memory, sent_bytes
from cs336.parallel.vocabulary import vocabulary_loss_bytes
from cs336.training import DataConfig, TrainConfig
from cs336.training.division import why_not
from cs336.utils.config import dumps, override, read_table, to_table

GPT = TransformerConfig(256, 64, 4, 64, 4, 2)
MOE = TransformerConfig(256, 64, 2, 64, layers=(BlockConfig(AttentionConfig(4), MoEConfig(8, 2, d_ff=32)),))
H200 = hardware.GPUS["H200"]
DOCS = pathlib.Path(__file__).parents[2] / "docs/parallel.md"


def work(config=GPT, batch_size=16, **more):
    return Work(config, batch_size, config.context_length, **more)


def test_one_gpu_is_the_memory_predictor():
    for how in ("none", "selective", "full"):
        for config, micro_batch in ((GPT, 1), (GPT, 4), (dataclasses.replace(GPT, tie_embeddings=True), 2), (MOE, 2)):
            for fused, (weight, compute) in itertools.product((False, True), ((4, 2), (2, 2), (4, 4))):
                widths = {"weight_bytes": weight, "compute_bytes": compute, "fused_head": fused}
                memory = rank_memory(work(config, **widths), Layout(micro_batch=micro_batch, recompute=how), 0)
                options = {"gradient_checkpointing": how, "compiled": True}
                assert memory == training_memory(config, micro_batch, **widths, **options)


def test_logits_that_tensor_parallel_gathers_become_their_gradient():
    tokens = 64
    one, two = (rank_memory(work(), Layout(tensor=t), 0).logits for t in (1, 2))
    assert one == 2 * (tokens * (256 + 64) + 256 * 64)  # and gradients of features and of the head
    assert two == 2 * tokens * (256 + 128)  # and of the gradient this rank's part
    capped = work(dataclasses.replace(GPT, logit_softcap=3.0))
    whole, gathered = (rank_memory(capped, Layout(tensor=t), 0).logits for t in (1, 2))
    assert whole == gathered - 4 * tokens  # but for the log-sum-exps of both parts


def test_zero_divides_one_thing_after_another():
    whole, *rest = (rank_memory(work(), Layout(8, zero), 0) for zero in range(4))
    N, table = GPT.num_parameters(), 256 * 64
    norms = 9 * 64
    layers = N - 2 * table - norms  # what autocast casts
    assert (whole.weights, whole.gradients, whole.optimizer) == (4 * N, 4 * N, 8 * N)
    assert whole.casts == 2 * (layers + table)
    for zero, memory in enumerate(rest, 1):
        assert memory.optimizer == N
        assert memory.gradients == (4 * N if zero < 2 else N // 8 * 4 + 4 * table)  # the head's come first
        assert memory.activations == whole.activations
        assert memory.casts == 2 * (layers * (zero < 2) + table)
    assert rest[0].weights == 4 * N
    assert rest[1].weights == 4 * (N // 8) + 2 * layers + 4 * (2 * table + norms)  # whole as they are computed
    assert rest[2].weights == 4 * (N // 8) + 2 * 2 * GPT.blocks[0].num_parameters(64) + 4 * 2 * table


def test_tensor_and_pipeline_divide_parameters():
    w = work(dataclasses.replace(GPT, tie_embeddings=True))
    table, blocks = 256 * 64, GPT.num_parameters(embeddings=False) - 64
    parts = [rank_memory(w, Layout(pipeline=2, micro_batch=2), rank).weights // 4 for rank in range(2)]
    assert parts == [blocks // 2 + table + 64, blocks // 2 + table + 64]
    norms = 4 * 2 * 64
    divided = rank_memory(w, Layout(tensor=2), 0).weights // 4
    assert divided == (blocks - norms) // 2 + norms + 64 + table // 2
    one, two = (rank_memory(w, Layout(tensor=t, micro_batch=4), 0).activations for t in (1, 2))
    assert one / 2 < two < 0.75 * one  # what enters attention and MLPs is whole


def test_a_fused_head_has_no_whole_logits():
    capped = dataclasses.replace(GPT, vocab_size=1 << 16, logit_softcap=5.0)
    logits = lambda layout, **more: rank_memory(work(capped, **more), layout, layout.pipeline - 1).logits  # noqa: E731
    tokens, V, M = 4 * 64, 1 << 16, 64
    gathered = Layout(tensor=2, micro_batch=4)
    assert logits(gathered) >= tokens * 3 * 4 * V
    assert logits(gathered, fused_head=True) == vocabulary_loss_bytes(tokens, V // 2, M, 2, capped=True)
    for fused in (False, True):  # a pipeline's last stage always has it
        both = Layout(tensor=2, pipeline=2, micro_batch=4)
        assert logits(both, fused_head=fused) == vocabulary_loss_bytes(tokens, V // 2, M, 2, capped=True)
        last = Layout(pipeline=2, micro_batch=4)
        assert logits(last, fused_head=fused) == head_bytes(capped, tokens, 2, compiled=True, fused=True)
    best = plan(capped, 2, batch_size=16)
    assert {p.memory.logits for p in best if p.layout == gathered} == {logits(gathered, fused_head=True)}


def test_the_stage_of_a_run_that_is_recomputed_has_a_whole_block_for_a_while():
    """Also where no logits make room for it."""
    layout = Layout(pipeline=4, micro_batch=1, recompute="full")
    large = dataclasses.replace(GPT, vocab_size=1 << 16)
    first, other = (rank_memory(work(config), layout, 0).activations for config in (GPT, large))
    assert first == other >= 64 * GPT.blocks[0].activation_bytes(64, 2)


def test_a_schedule_without_a_pipeline_is_none():
    gpipe, other = (rank_memory(work(), Layout(2, schedule=schedule), 0) for schedule in ("gpipe", "1f1b"))
    assert gpipe == other


def test_stages_keep_what_is_in_flight():
    w = work()
    first, last = (rank_memory(w, Layout(pipeline=4, micro_batch=1), rank) for rank in (0, 3))
    assert first.logits == 0 < last.logits
    one = rank_memory(w, Layout(pipeline=4, micro_batch=16), 0)
    assert first.activations == pytest.approx(4 * one.activations / 16)


def test_bytes_sent():
    N, stream = GPT.num_parameters(), 2 * 64 * 64 * 2  # of a micro-batch of two
    assert sent_bytes(work(), Layout(8, micro_batch=2))["data"] == 2 * 4 * N * 7 // 8
    assert sent_bytes(work(), Layout(8, 1, micro_batch=2))["data"] == 2 * 4 * N * 7 // 8 + 4 * N
    layers = 2 * (N - 2 * 256 * 64 - 9 * 64) + 4 * 9 * 64  # matrices as autocast has them, and norms
    root = 4 * 2 * 256 * 64
    assert sent_bytes(work(), Layout(4, 2, micro_batch=2))["data"] == (2 * 4 * N + layers + root) * 3 // 4
    assert sent_bytes(work(), Layout(8, 3, micro_batch=2))["data"] == (4 * N + layers * (2 - 1 / 4) + root) * 7 // 8
    ends = 1.5 + 2.5  # of the head, and of the embedding in float32
    logits = 2 * 64 * 256 * 2 // 2
    assert sent_bytes(work(), Layout(8, tensor=2, micro_batch=2))["tensor"] == stream * (4 * 4 + ends) + logits
    assert sent_bytes(work(fused_head=True), Layout(8, tensor=2))["tensor"] == stream * (4 * 4 + ends) + 2 * 64 * 12
    full = Layout(8, tensor=2, micro_batch=2, recompute="full")
    assert sent_bytes(work(), full)["tensor"] == stream * (4 * 5.5 + ends) + logits
    pipeline = [sent_bytes(work(), Layout(pipeline=4, micro_batch=2), rank)["pipeline"] for rank in range(4)]
    assert pipeline == [8 * stream, 16 * stream, 16 * stream, 8 * stream]
    keys = 4 * 2 * 2 * 16  # layers, keys and values, heads, features
    assert sent_bytes(work(), Layout(8, context=2, micro_batch=2))["context"] == 64 * keys * (2 * 2 + 4 * 2)
    assert sent_bytes(work(MOE), Layout(4, expert=2, micro_batch=2))["expert"] == 4 * stream // 2 * 2 * 2


def test_layouts_divide_and_are_all_there():
    found = list(layouts(work(), 8))
    assert len(set(found)) == len(found)
    axes = {(x.data, x.tensor, x.pipeline, x.context) for x in found}
    assert axes == {
        (d, t, p, c)
        for d in (1, 2, 4, 8)
        for t in (1, 2)  # two key-value heads
        for p in (1, 2, 4)
        for c in (1, 2, 4, 8)
        if d * t * p * c == 8
    }
    assert {x.expert for x in layouts(work(MOE), 8)} == {1, 2, 4, 8}
    assert {x.tensor for x in layouts(work(MOE), 8)} == {1}
    linear = TransformerConfig(256, 64, 2, 64, layers=(BlockConfig(LinearAttentionConfig(2)),))
    assert {(x.tensor, x.context) for x in layouts(work(linear), 4)} == {(1, 1)}


def test_time_of_a_step():
    gpu = dataclasses.replace(H200, flops=1e12, efficiency=0.5, bandwidth=1e18)
    alone = predict(work(), Layout(micro_batch=2), gpu)
    assert alone.step_seconds == pytest.approx(3 * sum(b.flops(64, 64) for b in GPT.blocks) * 1024 / 5e11, rel=0.5)
    assert alone.mfu == pytest.approx(0.5, rel=1e-3)
    full = predict(work(), Layout(micro_batch=2, recompute="full"), gpu)
    assert full.seconds["compute"] == pytest.approx(alone.seconds["compute"] * 4 / 3)
    stages = predict(work(), Layout(pipeline=4, micro_batch=2), gpu)
    assert stages.seconds["pipeline idle"] == pytest.approx(stages.seconds["compute"] * 3 / 8, rel=0.01)
    slow = dataclasses.replace(gpu, tiers=(hardware.Tier(8, 1e3),))
    exposed = predict(work(), Layout(8, micro_batch=2), slow)
    assert exposed.seconds["data"] == pytest.approx(exposed.sent["data"] / 1e3, rel=0.01)


def test_a_ring_over_nodes_uses_the_links_of_all_that_it_has_there():
    tiers = (hardware.Tier(8, 360e9, 0), hardware.Tier(64, 40e9, 0))
    gpu = dataclasses.replace(H200, tiers=tiers)
    assert gpu.seconds(360e9, 8, 1) == pytest.approx(1)
    assert gpu.seconds(320e9, 64, 1) == pytest.approx(1)
    assert gpu.seconds(40e9, 8, 8) == pytest.approx(1)
    assert gpu.seconds(160e9, 32, 2) == pytest.approx(1)
    assert gpu.seconds(1e9, 1, 8) == 0
    with pytest.raises(ValueError, match="reaches 64 ranks, 128 are needed"):
        gpu.seconds(1, 128, 1)
    assert hardware.network("8:360 64:40:0") == (hardware.Tier(8, 360e9), hardware.Tier(64, 40e9, 0))


def test_plans_are_ranked():
    plans = plan(GPT, 8, batch_size=16)
    assert [p.fits for p in plans] == sorted((p.fits for p in plans), reverse=True)
    times = [float(f"{p.step_seconds:.3g}") for p in plans if p.fits]
    assert times == sorted(times)
    assert plans[0].layout.gpus == 8
    small = dataclasses.replace(H200, memory=1)
    assert not any(p.fits for p in plan(GPT, 8, gpu=small, batch_size=16))
    assert "does not fit" in plan(GPT, 8, gpu=small, batch_size=16)[0].explain()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"gpus": 0}, "gpus must be 1 or more"),
        ({"gpus": 8, "batch_size": 0}, "batch_size must be 1"),
        ({"gpus": 8, "gpu": "TPU"}, "gpu must be one of A100, H100, H200, B200, got 'TPU'"),
        ({"gpus": 7, "batch_size": 4}, "no layout has 7 GPUs"),
        ({"gpus": 1 << 20}, "the network reaches 16384 ranks"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        plan(GPT, **{"batch_size": 16} | arguments)


@pytest.mark.parametrize("text", ["", "8", "8:0", "8:1 8:2", "a:b", "8:1:2:3", "8:inf"])
def test_networks_that_are_none(text):
    with pytest.raises(ValueError, match="network"):
        hardware.network(text)


def test_the_verb_prints_what_the_documentation_says(tmp_path, capsys, monkeypatch):
    """The plan for 1,024 GPUs."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```\w*\n(.*?)```", DOCS.read_text(), re.DOTALL)
    model, shown = next((a, b) for a, b in itertools.pairwise(blocks) if "num_layers = 80" in a)
    (tmp_path / "70b.toml").write_text(model)
    command = ["plan", "parallel", "--model", "70b.toml", "--gpus", "1024", "--batch-size", "1024"]
    assert program.main(command) == 0
    assert capsys.readouterr().out == shown
    assert program.main([*command, "--network", "8:360 1024:5", "--top", "1"]) == 0
    assert "data 4, tensor 4, pipeline 32, context 2" in capsys.readouterr().out
    assert program.main([*command, "--network", "8:360"]) == 2
    assert "the network reaches 8 ranks, 1024 are needed" in capsys.readouterr().err


def test_a_batch_that_is_not_given_is_that_of_the_run_or_one_a_gpu(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    model = "model = {vocab_size = 64, context_length = 8, num_layers = 2, d_model = 8, num_heads = 2}\n"
    (run / "config.toml").write_text("batch_size = 12\n" + model)
    (run / "model.toml").write_text(model)

    def planned(path, *options):
        assert program.main(["plan", "parallel", "--model", str(path), "--gpus", "4", *options]) == 0
        first, _, rest = capsys.readouterr().out.partition("\n")
        return first, rest

    for path, size in ((run / "config.toml", 12), (run / "model.toml", 4)):
        said, plans = planned(path)
        assert said.startswith(f"{size} sequences a step, ")
        first, rest = planned(path, "--batch-size", str(size))
        assert plans == f"{first}\n{rest}"
        assert ("--batch-size" in rest) == (size == 4)  # which the run's file does not have


def test_of_equal_times_the_simplest_is_first():
    slow = dataclasses.replace(H200, flops=1e30, bandwidth=1e30, tiers=(hardware.Tier(8, 1e30, 0.1),))
    best = plan(GPT, 2, gpu=slow, batch_size=16, data_only=True)[0].layout  # all wait for the network alone
    assert (best.zero, best.recompute) == (0, "none")
    firsts = [p.layout for p in plan(GPT, 1, gpu=slow, batch_size=16)]
    assert [layout.recompute for layout in firsts[:5]] == ["none"] * 5


def test_small_numbers_have_small_units():
    (first, *_) = plan(GPT, 1, batch_size=16)
    assert re.search(r"fits, \d+\.\d MiB of 126\.0 GiB \(.*KiB.*A step takes [1-9][\d.]* us", first.explain())
    _, row = planner.table([first]).splitlines()
    assert re.search(r"[1-9][\d.]* us .* MiB +0.0 B  data 1", row)


SMALL = TransformerConfig(512, 64, 4, 64, 4)
MIXED = TransformerConfig(512, 64, 2, 64, layers=(BlockConfig(AttentionConfig(4), MoEConfig(4, 2)),))


def test_a_layout_is_a_configuration_of_a_run(tmp_path, capsys):
    """--write keeps what `cs336 train` runs; where it does not run the best it says why."""
    for name, model in (("small", SMALL), ("mixed", MIXED)):
        (tmp_path / f"{name}.toml").write_text(dumps({"model": to_table(model)}))
        path = tmp_path / f"{name} run.toml"
        command = ["plan", "parallel", "--model", str(tmp_path / f"{name}.toml"), "--gpus", "4", "--batch-size", "8"]
        assert program.main([*command, "--write", str(path)]) == 0
        said = capsys.readouterr().out
        best = plan(model, 4, batch_size=8)
        table = override(TrainConfig, read_table(path), ["--run-dir", "runs/a", "--data.train", "tokens"])
        config = TrainConfig.from_table(table)
        assert (config.model, config.batch_size) == (model, 8)
        assert f"torchrun --standalone --nproc_per_node=4 -m cs336 train --config {path} --data.train" in said
        first = next(p.layout for p in best if runs(config, p.layout))
        assert (config.parallel, config.micro_batch_size) == (first.config, first.micro_batch)
        assert config.gradient_checkpointing == first.recompute
        assert ("does not run that" in said) == (first != best[0].layout)
        assert program.main([*command, "--write", str(path)]) == 2
        assert "exists: remove it, or write elsewhere" in capsys.readouterr().err


def test_the_command_is_the_users_file_with_what_it_lacks(tmp_path, capsys):
    own = {"run_dir": "runs/own", "data": {"train": "own/train"}, "parallel": {"tensor": 4, "data": 1}}
    for table in (own, {}, {"model": None}):
        path = tmp_path / "own.toml"
        run = {"model": to_table(SMALL), **table} if "model" not in table else to_table(SMALL)
        path.write_text(dumps(run))
        assert program.main(["plan", "parallel", "--model", str(path), "--gpus", "4", "--batch-size", "8"]) == 0
        said = capsys.readouterr().out
        first = plan(SMALL, 4, batch_size=8)[0].layout
        command = next(line for line in said.splitlines() if line.startswith("torchrun"))
        _, config, *options = command.partition(" train ")[2].split()
        assert ("--data.train" in options, "--run-dir" in options) == (table != own, table != own)
        if "model" in table:  # a model's fields alone are no run
            assert config == "run.toml"
            assert "with the model and\n\nbatch_size = 8\n" in said
            continue
        assert config == str(path)
        wanted = TrainConfig.from_table(override(TrainConfig, run, options))
        assert (wanted.parallel, wanted.micro_batch_size, wanted.batch_size) == (first.config, first.micro_batch, 8)
        assert wanted.run_dir == pathlib.Path(own["run_dir"] if table else "runs/planned")


def runs(config, layout):
    return why_not(dataclasses.replace(config, parallel=layout.config), layout.config.axes(layout.gpus)) is None


def test_what_train_refuses_is_known():
    """Of all layouts; the others it runs."""
    run = TrainConfig(pathlib.Path("runs/a"), DataConfig(pathlib.Path("tokens")), SMALL, batch_size=8)
    refused = set()
    for model in (SMALL, MIXED):
        for layout in {p.layout.config: p.layout for p in plan(model, 8, batch_size=8)}.values():
            changed = dataclasses.replace(run, model=model, parallel=layout.config)
            if reason := why_not(changed, layout.config.axes(8)):
                refused.add(re.sub(r"\d+", "N", reason).split(":")[0])
            assert layout.config.share(8, 8, layout.micro_batch) >= layout.micro_batch
    assert refused == {
        "pipeline = N and context = N do not go together",
        "expert = N goes with zero = N",
        "pipeline = N",  # of a mixture
    }
