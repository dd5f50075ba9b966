"""`cs336 scaling` on files, as it is typed."""

import json

import numpy as np
import pytest

from cs336.cli import main
from cs336.scaling import EPOCH


@pytest.fixture
def points(tmp_path):
    flops = np.repeat(np.geomspace(1e18, 1e21, 5), 7)
    best = np.array([EPOCH.optimum(c).parameters for c in flops])
    N = best * np.tile(np.geomspace(0.3, 3, 7), 5)
    noise = np.exp(0.002 * np.random.default_rng(0).standard_normal(len(N)))
    rows = zip(N, flops, EPOCH.loss(N, flops / (6 * N)) * noise, strict=True)
    path = tmp_path / "points.json"
    path.write_text(json.dumps([{"parameters": n, "compute_budget": c, "final_loss": loss} for n, c, loss in rows]))
    return path


def test_fit_then_predict(points, tmp_path, capsys):
    out = tmp_path / "fit.json"
    assert main(["scaling", "fit", str(points), "--bootstrap", "50", "--out", str(out)]) == 0
    assert "parameter_exponent" in capsys.readouterr().out
    assert json.loads(out.read_text())["alpha"] == pytest.approx(EPOCH.alpha, rel=0.2)
    wider = tmp_path / "wider.json"
    options = ["--bootstrap", "50", "--huber-delta", "0.02", "--out", str(wider)]
    assert main(["scaling", "fit", str(points), *options]) == 0
    capsys.readouterr()
    assert json.loads(wider.read_text())["alpha"] == pytest.approx(EPOCH.alpha, rel=0.2)
    assert json.loads(wider.read_text())["alpha"] != json.loads(out.read_text())["alpha"]
    assert main(["scaling", "predict", str(out), "--flops", "1e22", "--inference-tokens", "1e12"]) == 0
    said = capsys.readouterr().out
    assert "95 % interval of the parameters" in said
    assert "fewer FLOPs in all" in said
    assert main(["scaling", "predict", str(out), "--parameters", "1e9", "--tokens", "2e10"]) == 0
    loss = float(capsys.readouterr().out.split()[1])
    assert loss == pytest.approx(float(EPOCH.loss(1e9, 2e10)), rel=0.02)


def test_runs_on_few_tokens_are_left_out(points, tmp_path, capsys):
    out = tmp_path / "fit.json"
    command = ["scaling", "fit", str(points), "--bootstrap", "0", "--out", str(out), "--least-tokens"]
    assert main([*command, "1e10"]) == 0
    kept = json.loads(out.read_text())["runs"]
    tokens = [row["compute_budget"] / (6 * row["parameters"]) for row in json.loads(points.read_text())]
    assert 0 < kept == sum(count >= 1e10 for count in tokens) < len(tokens)
    assert main([*command, "1e15"]) == 2
    assert "has no run on 1,000,000,000,000,000 tokens or more" in capsys.readouterr().err


@pytest.mark.parametrize("law", ["isoflop", "isoflop-lowest", "envelope"])
def test_the_other_approaches(points, law, capsys):
    assert main(["scaling", "fit", str(points), "--law", law]) == 0
    assert "parameters = " in capsys.readouterr().out
    assert main(["scaling", "fit", str(points), "--law", law, "--huber-delta", "0.01"]) == 2
    assert f"--huber-delta is of --law chinchilla, and --law {law} has none" in capsys.readouterr().err


def test_the_published_law_needs_no_file(capsys):
    assert main(["scaling", "predict", "epoch", "--flops", "1e21", "--unique-tokens", "1e9"]) == 0
    assert "tokens" in capsys.readouterr().out


def test_plot(points, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "law.png"
    assert main(["scaling", "plot", str(points), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_is_a_sentence(points, tmp_path, capsys):
    assert main(["scaling", "predict", "epoch", "--flops", "1e21", "--tokens", "1e9"]) == 2
    assert "say --flops, or --parameters and --tokens" in capsys.readouterr().err
    served = ["--parameters", "1e9", "--tokens", "1e9", "--inference-tokens", "1e12"]
    assert main(["scaling", "predict", "epoch", *served]) == 2
    assert "--inference-tokens go with --flops" in capsys.readouterr().err
    assert main(["scaling", "predict", str(points), "--flops", "1e21"]) == 2
    assert "holds no fitted law" in capsys.readouterr().err
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    for command in (["fit", str(deep)], ["predict", str(deep), "--flops", "1e21"]):
        assert main(["scaling", *command]) == 2
        assert "deep.json" in capsys.readouterr().err
