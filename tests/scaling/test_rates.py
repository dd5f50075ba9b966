"""Power laws of rates and batches: the Step Law is found again from runs on a grid like its paper's."""

import json

import numpy as np
import pytest

from cs336.cli import main
from cs336.scaling import fit_power, fit_step_law, step_law


def step_grid(noise=0.0, rng=None):
    """The best settings of 6 sizes of 60M to 1.1B on 5 lengths of 2 to 100 billion tokens, as in arXiv:2503.04715."""
    N, D = (axis.ravel() for axis in np.meshgrid(np.geomspace(6e7, 1.1e9, 6), np.geomspace(2e9, 1e11, 5)))
    best = np.array([step_law(n, d) for n, d in zip(N, D, strict=True)])
    if rng is not None:
        best = best * np.exp(noise * rng.standard_normal(best.shape))
    return {"parameters": N, "tokens": D, "lr": best[:, 0], "batch_tokens": best[:, 1]}


def test_the_step_law_is_found_again():
    rate, batch = fit_step_law(**step_grid(), bootstrap=0)
    assert rate.coefficient == pytest.approx(1.79)
    assert rate.exponents == pytest.approx({"parameters": -0.713, "tokens": 0.307})
    assert batch.coefficient == pytest.approx(0.58)
    assert batch.exponents == pytest.approx({"tokens": 0.571})
    lr, size = step_law(1e10, 1e12)
    assert rate(parameters=1e10, tokens=1e12) == pytest.approx(lr)
    assert batch(tokens=np.array([1e12])) == pytest.approx([size])


def test_its_intervals_hold_the_truth():
    truth = {"coefficient": 1.79, "parameters": -0.713, "tokens": 0.307}
    inside, rng = dict.fromkeys(truth, 0), np.random.default_rng(0)
    for _ in range(200):
        rate, _ = fit_step_law(**step_grid(0.1, rng), bootstrap=200)
        for name, value in truth.items():
            low, high = rate.interval(name)
            inside[name] += low <= value <= high
    assert all(0.9 <= count / 200 <= 0.975 for count in inside.values()), inside


def test_what_cannot_be_told_apart_is_refused():
    N = np.geomspace(1e6, 1e8, 5)
    with pytest.raises(ValueError, match="want at least 4 runs, whose parameters and tokens differ and do not grow"):
        fit_power(N, {"parameters": N, "tokens": 20 * N})
    with pytest.raises(ValueError, match="want at least 4 runs, whose parameters and tokens differ and do not grow"):
        fit_power(N, {"parameters": N, "tokens": 20 * N * (1 + 1e-9 * np.array([1, -1, 2, 0, -2]))})
    with pytest.raises(ValueError, match="want at least 3 runs, whose tokens differ; got 2"):
        fit_power(N[:2], {"tokens": N[:2]})
    with pytest.raises(ValueError, match="y must be positive and finite; run 2 of 3 has -1"):
        fit_power([1.0, -1.0, 2.0], {"tokens": N[:3]})
    with pytest.raises(ValueError, match="bootstrap > 0"):
        fit_power(N, {"tokens": N}, bootstrap=0).interval("tokens")


def test_from_a_file(tmp_path, capsys):
    columns = step_grid()
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    points, out = tmp_path / "best.json", tmp_path / "law.json"
    points.write_text(json.dumps(rows))
    assert main(["scaling", "fit", str(points), "--law", "step", "--bootstrap", "20", "--out", str(out)]) == 0
    assert "lr parameters" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["lr"]["parameters"] == pytest.approx(-0.713)
    assert found["batch_tokens"]["tokens_interval"] == pytest.approx([0.571, 0.571])
    points.write_text(json.dumps([{"N": 1e6, "D": 1e9, "lr": 1e-3}]))
    assert main(["scaling", "fit", str(points), "--law", "step"]) == 2
    assert "batch_tokens is not among N, D, lr" in capsys.readouterr().err
    points.write_text(json.dumps([{"N": 1e6, "D": 1e9, "lr": 1e-3, "batch size": 512}]))  # tokens, or sequences?
    assert main(["scaling", "fit", str(points), "--law", "step"]) == 2
    assert "batch_tokens is not among" in capsys.readouterr().err
