import dataclasses
import pathlib

import pytest
import tiny_run

from cs336.models import TransformerConfig
from cs336.training import DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from cs336.training.config import differences

MODEL = TransformerConfig(vocab_size=32, context_length=8, num_layers=1, d_model=16, num_heads=2)
PLAIN = TrainConfig(run_dir=pathlib.Path("runs/a"), data=DataConfig(pathlib.Path("tokens")), model=MODEL)
FULL = TrainConfig(
    run_dir=pathlib.Path('a "quoted"\\ back\tslash é\x7f'),
    data=DataConfig(pathlib.Path("t"), pathlib.Path("v")),
    model=dataclasses.replace(MODEL, num_kv_heads=1, logit_softcap=30.0, tie_embeddings=True),
    optimizer=OptimizerConfig(lr=1e-5, betas=(0.8, 0.999), max_grad_norm=float("inf")),
    schedule=ScheduleConfig(warmup_steps=7, min_lr_ratio=0.0),
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
        ("[optimizer]\nxyz = 1", "unknown key optimizer.xyz: known are optimizer.lr, optimizer.betas"),
        ("[optimizer]\nweight_deca = 1", "unknown key optimizer.weight_deca; did you mean optimizer.weight_decay?"),
        ("[optimiser]\nlr = 1", "unknown key optimiser; did you mean optimizer?"),
        ("batchsize = 1", "unknown key batchsize; did you mean batch_size?"),
        ("weight_decay = 0.1", "unknown key weight_decay; did you mean optimizer.weight_decay?"),
        ("num_layers = 2", "unknown key num_layers; did you mean model.num_layers?"),
        ("batch_size = 2.5", "batch_size must be int, got 2.5"),
        ("batch_size = true", "batch_size must be int, got True"),
        ("compile = 1", "compile must be bool, got 1"),
        ("precision = 'fp8'", "precision must be 'auto' or 'bf16' or 'fp32', got 'fp8'"),
        ("[optimizer]\nbetas = [0.9]", "optimizer.betas must be tuple"),
        ("[optimizer]\nlr = 'high'", "optimizer.lr must be float, got 'high'"),
        ("optimizer = 3", r"optimizer must be a table \[optimizer\], got 3"),
        ("budget = 'soon'", "budget 'soon' not understood"),
        ("batch_size = 0", "batch_size must be at least 1"),
        ("micro_batch_size = 5", "batch_size 32 is not a multiple of micro_batch_size 5"),
        ("keep_checkpoints = 0", "keep_checkpoints must be at least 1"),
        ("eval_interval = -1", "eval_interval must not be negative"),
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
    changed = dataclasses.replace(PLAIN, seed=1, optimizer=OptimizerConfig(lr=0.5))
    assert differences(PLAIN, changed) == ["optimizer.lr: 0.001 -> 0.5", "seed: 0 -> 1"]


def test_help_shows_every_field(capsys):
    import tyro

    with pytest.raises(SystemExit):
        tyro.cli(TrainConfig, args=["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in ("--run-dir", "--data.train", "--model.num-layers", "--optimizer.betas", "--schedule.warmup-steps"):
        assert option in text
    assert "Highest learning rate" in text
    assert "2e18flops" in text


def test_command_line_overrides_a_file(tmp_path):
    import tyro

    tiny = tiny_run.config(tmp_path)
    assert tyro.cli(
        TrainConfig, default=tiny, args=["--optimizer.lr", "0.5", "--budget", "3steps"]
    ) == tiny_run.changed(tiny, optimizer=OptimizerConfig(lr=0.5), budget="3steps")
