"""`cs336 ablate`: arms of one size, and whether what they reach differs by more than chance."""

import json
import math
import shutil

import pytest
from experiments.tiny_study import base, pretend

from cs336.cli import main
from cs336.experiments import run_study
from cs336.experiments.ablation import Ablation, rows
from cs336.experiments.arms import kinds, make_arms, size, split_values
from cs336.experiments.significance import holm, incomplete_beta, mean, t_quantile, t_two_sided, welch
from cs336.experiments.study import Here
from cs336.models import Transformer
from cs336.report.ablation import verdict, write_ablation_report
from cs336.training import TrainConfig

MODEL = {"vocab_size": 64, "context_length": 16, "num_layers": 2, "d_model": 32, "num_heads": 2, "d_ff": 160}


def config(tmp_path, **model):
    return TrainConfig.from_table(base(tmp_path, model=MODEL | model) | {"run_dir": "."})


@pytest.mark.parametrize("part", ["mixer", "mlp", "norm"])
@pytest.mark.parametrize("match", ["params", "flops"])
def test_every_kind_can_be_an_arm_of_the_same_size(tmp_path, part, match):
    arms = make_arms(config(tmp_path), part, ["all"], match)
    assert [arm.name for arm in arms] == kinds(part)
    target = size(arms[0].config, match)
    for arm in arms[1:]:
        assert size(arm.config, match) / target - 1 == pytest.approx(arm.residual)
        assert abs(arm.residual) < 0.02
        assert getattr(arm.config.model.blocks[1], part).kind == arm.name
        if match == "params":
            built = sum(p.numel() for p in Transformer(arm.config.model, device="meta").parameters())
            assert built == size(arm.config, "params")
        for other in (arm.d_ff - 1, arm.d_ff + 1):  # no width is nearer
            mlp = arm.config.model.layers[0].mlp
            step = abs(size(_with(arm.config, mlp, other), match) - target)
            assert step >= abs(size(arm.config, match) - target)


def _with(of, mlp, d_ff):
    import dataclasses

    layers = [dataclasses.replace(block, mlp=dataclasses.replace(mlp, d_ff=d_ff)) for block in of.model.layers]
    return dataclasses.replace(of, model=dataclasses.replace(of.model, layers=tuple(layers)))


def test_the_first_arm_is_the_base(tmp_path):
    same, _ = make_arms(config(tmp_path, num_kv_heads=1, qk_norm=True), "mixer", ["attention", "mamba2"], "params")
    whole = config(tmp_path, num_kv_heads=1, qk_norm=True).model
    assert same.config.model.blocks == whole.blocks
    assert (same.residual, same.d_ff) == (0, None)


def test_a_value_may_be_a_table(tmp_path):
    values = split_values('attention, {kind = "attention", window = 4}, {kind="moe", x = "a,}b"}')
    assert values == ["attention", '{kind = "attention", window = 4}', '{kind="moe", x = "a,}b"}']
    full, window = make_arms(config(tmp_path), "mixer", values[:2], "params")
    assert window.config.model.blocks[0].mixer.window == 4
    assert window.config.model.blocks[0].mixer.num_heads == 2  # as the base has them
    assert full.config.model.blocks[0].positions == window.config.model.blocks[0].positions


def test_positions_follow_the_mixer(tmp_path):
    arms = make_arms(config(tmp_path, rope_theta=500.0), "mixer", ["mamba2", "attention", "hyena"], "params")
    assert [arm.config.model.blocks[0].positions.kind for arm in arms] == ["none", "rope", "none"]
    assert arms[1].config.model.blocks[0].positions.theta == 500.0


def test_a_base_without_attention(tmp_path):
    mamba = make_arms(config(tmp_path), "mixer", ["attention", "mamba2"], "params")[1].config
    arms = make_arms(mamba, "mixer", ["mamba2", "attention", "linear_attention"], "params")
    assert arms[0].config == mamba
    assert [arm.config.model.blocks[0].positions.kind for arm in arms] == ["none", "rope", "none"]


def test_other_keys(tmp_path):
    adamw, sgd = make_arms(config(tmp_path), "optimizer.kind", ["adamw", "sgd"], "none")
    assert sgd.config.optimizer.kind == "sgd"
    assert adamw.config == config(tmp_path)
    post = make_arms(config(tmp_path), "placement", ["pre", "post"], "params")[1]
    assert post.config.model.blocks[0].placement == "post"
    one, two = make_arms(config(tmp_path), "model.num_layers", ["1", "2"], "params")
    assert abs(two.residual) < 0.02
    assert one.config.model.num_layers == 1


BAD = [
    ("mixer", ["attention"], "params", "two values or more"),
    ("mixer", ["attention", "attention"], "params", "values must differ"),
    ("mixer", ["attention", "mambo"], "params", "expected attention, "),
    ("mixer", ["attention", "{kind="], "params", "no TOML value"),
    ("mixer", ["attention", '{kind = "attention", windw = 3}'], "params", "windw"),
    ("optimizer.kinds", ["adamw", "sgd"], "none", "unknown key optimizer.kinds"),
    ("model.d_model", ["32", "256"], "params", "256 cannot be matched: with d_ff 1 it has"),
]


@pytest.mark.parametrize(("key", "values", "match", "message"), BAD)
def test_what_cannot_be_an_arm(tmp_path, key, values, match, message):
    with pytest.raises(ValueError, match=message):
        make_arms(config(tmp_path), key, values, match)


# ---- significance ----


def test_students_t():
    """Against closed forms: Cauchy's for one degree of freedom, 1 / sqrt(2 + t^2) for two; and printed tables."""
    for t in (0.0, 0.3, 1.0, 5.0, 60.0):
        assert t_two_sided(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-10)
        assert t_two_sided(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)
        assert t_two_sided(t, 1e7) == pytest.approx(math.erfc(t / math.sqrt(2)), rel=1e-3, abs=1e-12)
    tables = {1: 12.7062047, 2: 4.3026527, 4: 2.7764451, 10: 2.2281389, 30: 2.0422725}
    assert {n: round(t_quantile(0.95, n), 7) for n in tables} == tables
    assert incomplete_beta(2, 3, 0.4) == pytest.approx(0.5248)  # 1 - sum of a binomial
    assert incomplete_beta(2, 3, 0) == 0
    assert incomplete_beta(2, 3, 1) == 1


def test_welch():
    """Of scipy.stats.ttest_ind(a, b, equal_var=False)."""
    scipy = pytest.importorskip("scipy.stats")
    for a, b in (([1.0, 2.0, 3.5], [2.0, 6.0]), ([3.1, 3.2, 3.15, 3.3], [3.5, 3.4, 3.6]), ([0.0, 0.1], [9.0, 9.2])):
        assert welch(a, b) == pytest.approx(scipy.ttest_ind(a, b, equal_var=False).pvalue)
        error = scipy.sem(a)
        assert mean(a).half_width == pytest.approx(scipy.t.ppf(0.975, len(a) - 1) * error)
    assert welch([1.0], [1.0, 2.0]) is None
    assert mean([3.0]).half_width is None
    assert welch([1.0, 1.0], [2.0, 2.0]) == 0
    assert welch([1.0, 1.0], [1.0, 1.0]) == 1


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


# ---- the whole ----


def make(tmp_path, values=("rms_norm", "layer_norm", '{kind = "layer_norm", bias = false}'), **keys):
    arms = make_arms(config(tmp_path), "norm", list(values), "params")
    return Ablation(tmp_path / "a", "norm", arms, where=Here(), **keys)


def test_rows(tmp_path):
    """Arms 1 apart are told apart, one that is 0.01 off is not, and the seeds are the same of each."""
    shift = {"rms_norm": 0.0, "layer_norm": 1.0}

    def loss(config):
        norm = config.model.blocks[0].norm
        bias = getattr(norm, "bias", True)
        return 3 + (shift[norm.kind] if bias else 0.01) + (config.seed - 1) / 10

    ablation = make(tmp_path)
    entries = run_study(ablation, train=pretend(loss))
    assert [e.seed for e in entries] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    plain, worse, same = rows(ablation, entries)
    assert (plain.mean, plain.p, plain.difference) == (pytest.approx(3), None, None)
    assert plain.half_width == pytest.approx(4.3026527 * 0.1 / math.sqrt(3))
    assert worse.difference == pytest.approx(1)
    assert worse.significant
    assert same.difference == pytest.approx(0.01)
    assert not same.significant
    raw = welch(worse.scores, plain.scores), welch(same.scores, plain.scores)
    assert (worse.p, same.p) == pytest.approx(tuple(holm(list(raw))))
    assert worse.state_bytes == ablation.arms[1].config.model.state_bytes(width=2)
    assert not worse.measured
    assert "Better than layer_norm by more than chance" in verdict(
        [vars(r) | {"significant": r.significant} for r in (plain, worse, same)], "val/loss"
    )


def test_one_seed_and_a_failure(tmp_path):
    def loss(config):
        if config.model.blocks[0].norm.kind == "layer_norm":
            raise RuntimeError("out of memory")
        return 1.0

    ablation = make(tmp_path, seeds=1)
    plain, failed, _ = rows(ablation, run_study(ablation, train=pretend(loss)))
    assert (plain.half_width, failed.mean, failed.p) == (None, None, None)
    assert failed.failures == ("RuntimeError: out of memory",)


def test_the_verb(tmp_path, capsys, monkeypatch):
    """For real, in this process."""
    monkeypatch.setattr("cs336.experiments.study.Local", lambda **_: Here())
    config(tmp_path).save(tmp_path / "base.toml")
    arguments = ["ablate", "--config", str(tmp_path / "base.toml"), "--seeds", "2", "--directory", str(tmp_path / "a")]
    assert main([*arguments, "--vary", "mixer=attention,linear_attention"]) == 0
    said = capsys.readouterr().out
    assert "linear_attention: " in said
    assert "% from the first" in said
    summary = json.loads((tmp_path / "a" / "ablation.json").read_text())
    assert [len(row["scores"]) for row in summary["rows"]] == [2, 2]
    assert all(row["tokens_per_second"] > 0 for row in summary["rows"])
    page = (tmp_path / "a" / "report.html").read_text()
    for text in ("p (Welch, Holm)", "state KiB", "residual", "linear_attention"):
        assert text in page
    (folder, _) = summary["folders"]["linear_attention"]
    shutil.rmtree(tmp_path / "a" / "runs" / folder)  # a run that left nothing has no curve
    page = write_ablation_report(tmp_path / "a").read_text()
    assert "As they learned" in page
    assert main([*arguments, "--vary", "mixer"]) == 2
    assert "KEY=VALUE" in capsys.readouterr().err
