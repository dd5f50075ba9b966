import dataclasses
import pathlib

import pytest
import tiny_run

from cs336.models import TransformerConfig
from cs336.training import AdamWConfig, CosineConfig, DataConfig, TrainConfig, WSDConfig
from cs336.training.config import differences
from cs336.training.objectives import NextToken
from cs336.utils.config import keys, override, to_table

MODEL = TransformerConfig(vocab_size=32, context_length=8, num_layers=1, d_model=16, num_heads=2)
PLAIN = TrainConfig(run_dir=pathlib.Path("runs/a"), data=DataConfig(pathlib.Path("tokens")), model=MODEL)
FULL = TrainConfig(
    run_dir=pathlib.Path('a "quoted"\\ back\tslash é\x7f'),
    data=DataConfig(pathlib.Path("t"), pathlib.Path("v")),
    model=dataclasses.replace(MODEL, num_kv_heads=1, logit_softcap=30.0, tie_embeddings=True),
    optimizer=AdamWConfig(lr=1e-5, betas=(0.8, 0.999), max_grad_norm=float("inf")),
    schedule=CosineConfig(warmup_steps=7, min_lr_ratio=0.0),
    budget="90m",
    micro_batch_size=8,
    precision="bf16",
    compile=True,
    eval_interval=0,
)


@pytest.mark.parametrize("config", [PLAIN, FULL])
def test_toml_round_trip(tmp_path, config):
    config.save(tmp_path / "c.toml")
    assert TrainConfig.from_toml(tmp_path / "c.toml") == config


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[optimizer]\nxyz = 1", "unknown key optimizer.xyz: known are optimizer.kind, optimizer.lr, optimizer.betas"),
        ("[optimizer]\nweight_deca = 1", "unknown key optimizer.weight_deca; did you mean optimizer.weight_decay?"),
        ("[optimiser]\nlr = 1", "unknown key optimiser; did you mean optimizer?"),
        ("batchsize = 1", "unknown key batchsize; did you mean batch_size?"),
        ("weight_decay = 0.1", "unknown key weight_decay; did you mean optimizer.weight_decay?"),
        ("num_layers = 2", "unknown key num_layers; did you mean model.num_layers?"),
        ("batch_size = 2.5", "batch_size must be int, got 2.5"),
        ("batch_size = true", "batch_size must be int, got True"),
        ("compile = 1", "compile must be bool, got 1"),
        ("precision = 'fp8'", "precision must be 'auto' or 'bf16' or .*'fp32', got 'fp8'"),
        ("[optimizer]\nbetas = [0.9]", "missing: optimizer.betas.1"),
        ("[optimizer]\nlr = 'high'", "optimizer.lr must be float, got 'high'"),
        ("optimizer = 3", r"optimizer must be a table \[optimizer\], got 3"),
        ("budget = 'soon'", "budget 'soon' not understood"),
        ("batch_size = 0", "batch_size must be at least 1"),
        ("micro_batch_size = 5", "batch_size 32 is not a multiple of micro_batch_size 5"),
        ("keep_checkpoints = 0", "keep_checkpoints must be at least 1"),
        ("eval_interval = -1", "eval_interval must not be negative"),
        ("memory_limit = 0.0", "memory_limit must be more than 0 GiB, got 0.0"),
        ("memory_limit = nan", "memory_limit must be more than 0 GiB, got nan"),
        ("[schedule]\nmin_lr_ratio = 2", r"\[schedule\] min_lr_ratio must be in 0..1"),
        ("[schedule]\nwarmup_steps = -2", r"\[schedule\] warmup_steps must not be negative"),
        ("batch_size 3", "c.toml"),
    ],
)
def test_errors_name_the_key(tmp_path, line, message):
    tables = "[data]\ntrain = 't'\n[model]\n" + PLAIN.to_toml().partition("[model]\n")[2].partition("[")[0]
    lines = [tables, line] if line.startswith("[") else [line, tables]
    (tmp_path / "c.toml").write_text("\n".join(["run_dir = 'r'", *lines]))
    with pytest.raises(ValueError, match=message) as error:
        TrainConfig.from_toml(tmp_path / "c.toml")
    assert str(error.value).startswith(str(tmp_path / "c.toml"))


def test_missing_keys_and_bad_models_are_named(tmp_path):
    (tmp_path / "c.toml").write_text("run_dir = 'r'\n[data]\ntrain = 't'\n")
    with pytest.raises(ValueError, match="missing: model"):
        TrainConfig.from_toml(tmp_path / "c.toml")
    (tmp_path / "c.toml").write_text(PLAIN.to_toml().replace("num_heads = 2", ""))
    with pytest.raises(ValueError, match=r"num_heads must be a positive integer, got None"):
        TrainConfig.from_toml(tmp_path / "c.toml")
    (tmp_path / "c.toml").write_text(PLAIN.to_toml().replace("num_heads = 2", "num_heads = 3"))
    with pytest.raises(ValueError, match=r"\[model\] d_model 16 is not a multiple of num_heads 3"):
        TrainConfig.from_toml(tmp_path / "c.toml")


def test_what_may_differ_in_a_continued_run():
    assert differences(PLAIN, dataclasses.replace(PLAIN, budget="5m", log_interval=1, keep_checkpoints=9)) == []
    fused = NextToken(fused_head=True)
    assert differences(PLAIN, dataclasses.replace(PLAIN, objective=fused)) == []
    smooth = dataclasses.replace(PLAIN, objective=NextToken(label_smoothing=0.1))
    assert differences(PLAIN, smooth) == ["objective.label_smoothing: 0.0 -> 0.1"]
    changed = dataclasses.replace(PLAIN, seed=1, optimizer=AdamWConfig(lr=0.5))
    assert differences(PLAIN, changed) == ["optimizer.lr: 0.001 -> 0.5", "seed: 0 -> 1"]


def test_every_key_has_its_place_in_a_list_of_options():
    names = [key.name for key in keys(TrainConfig)]
    for name in (
        "run_dir",
        "data.train",
        "model.num_layers",
        "optimizer.betas",
        "schedule.kind",
        "schedule.decay_part",
    ):
        assert name in names
    found = {key.name: key for key in keys(TrainConfig)}
    assert found["optimizer.lr"].doc == "Highest learning rate."
    assert "2e18flops" in found["budget"].doc


def test_options_change_a_file(tmp_path):
    tiny = tiny_run.config(tmp_path)
    options = ["--optimizer.lr", "0.5", "--budget", "3steps", "--schedule.kind", "wsd"]
    changed = TrainConfig.from_table(override(TrainConfig, to_table(tiny), options))
    assert changed == tiny_run.changed(tiny, optimizer=AdamWConfig(lr=0.5), budget="3steps", schedule=WSDConfig())


def test_a_file_of_a_run_before_kinds_still_loads():
    config = TrainConfig.from_toml(pathlib.Path(__file__).parent / "fixtures/run_before/config.toml")
    assert (config.optimizer.kind, config.schedule.kind, config.objective.kind) == ("adamw", "cosine", "next_token")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[optimizer]\nlr = inf", r"\[optimizer\] lr must be finite"),
        ("[optimizer]\nmax_grad_norm = -1", r"\[optimizer\] max_grad_norm must be more than 0"),
        ("[optimizer]\nmax_grad_norm = nan", r"\[optimizer\] max_grad_norm must be more than 0"),
        ("[optimizer]\nbetas = [0.9, 1.0]", r"\[optimizer\] betas must be two numbers in \[0, 1\)"),
        ("seed = 99999999999999999999999", r"seed must be below 2\*\*63"),
        ("[schedule]\nkind = 'cosin'", "schedule.kind must be 'cosine' or .*, got 'cosin'; did you mean 'cosine'"),
        (
            "[schedule]\ndecay_part = 0.1",
            "unknown key schedule.decay_part of this kind: it goes with schedule.kind = 'wsd'",
        ),
        ("[schedule]\nkind = 'wsd'\ndecay_part = 2", r"\[schedule\] decay_part must be in 0..1"),
    ],
)
def test_what_cannot_run_is_refused(tmp_path, line, message):
    test_errors_name_the_key(tmp_path, line, message)
