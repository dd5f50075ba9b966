"""The law of compute: known laws come back, intervals hold; and a law is fitted to what the runs are counted as."""

import json
import math

import numpy as np
import pytest

from cs336.cli import main
from cs336.scaling import ComputeLaw, Counting, Points, PowerLaw, fit_compute, read_points
from cs336.scaling.forecast import read
from cs336.scaling.saved import load_compute_fit, load_counting

TRUTH = ComputeLaw(E=2.1, A=2.1 * 1e13**0.12, gamma=0.12)
BUDGETS = np.geomspace(5e12, 3e14, 5)


def ladder(noise=0.0, seeds=3, law=TRUTH, rng=None):
    """Runs of 20 tokens a parameter."""
    flops = np.repeat(BUDGETS, seeds)
    parameters = np.sqrt(flops / 120)
    factor = 1 if rng is None else np.exp(noise * rng.standard_normal(len(flops)))
    return Points.of(parameters, 20 * parameters, law.loss(flops) * factor)


@pytest.mark.parametrize("truth", [TRUTH, ComputeLaw(E=0.0, A=30.0, gamma=0.05), ComputeLaw(E=3.0, A=4e3, gamma=0.3)])
def test_points_without_noise_give_the_law_back(truth):
    law = fit_compute(ladder(law=truth), bootstrap=0).law
    assert law.gamma == pytest.approx(truth.gamma, rel=2e-5)
    assert pytest.approx(truth.E, abs=1e-4) == law.E
    assert law.loss(3e15) == pytest.approx(truth.loss(3e15), rel=1e-6)


def test_forecasts_of_ten_times_the_compute_are_within_their_intervals():
    rng = np.random.default_rng(0)
    errors, held = [], 0
    for draw in range(100):
        loss, (low, high) = fit_compute(ladder(0.002, rng=rng), bootstrap=60, seed=draw).predict(10 * BUDGETS[-1])
        measured = TRUTH.loss(10 * BUDGETS[-1]) * np.exp(0.002 * rng.standard_normal())
        errors.append(abs(measured / loss - 1))
        held += low <= measured <= high
    assert np.mean(errors) < 0.01
    assert held >= 88


def test_a_budget_of_one_run_still_counts_in_every_resample():
    points = ladder(0.002, seeds=1, rng=np.random.default_rng(1))
    fit = fit_compute(points, bootstrap=50)
    low, high = fit.predict(BUDGETS[0])[1]
    assert high / low < 1.05  # resampled runs would leave a budget out of every third law


def test_what_cannot_be_fitted_is_refused():
    points = ladder()
    with pytest.raises(ValueError, match="at least 4 budgets of FLOPs; got 3"):
        fit_compute(points.take(points.flops < 1e14))
    with pytest.raises(ValueError, match="does not fall"):
        fit_compute(Points.of(points.parameters, points.tokens, points.loss[::-1]))
    with pytest.raises(ValueError, match="wants bootstrap > 0"):
        fit_compute(points, bootstrap=0).interval("E")
    with pytest.raises(ValueError, match="confidence must be between 0 and 1"):
        fit_compute(points, bootstrap=5).predict(1e15, confidence=95)
    with pytest.raises(ValueError, match="there are no runs"):
        Points.of([], [], [])
    with pytest.raises(ValueError, match="y must be positive"):
        PowerLaw.through([1, 2], [3, -1])


def test_from_a_file_to_a_graded_forecast(tmp_path, capsys):
    points, law, log = tmp_path / "points.json", tmp_path / "law.json", tmp_path / "forecasts.jsonl"
    runs = ladder(0.001, rng=np.random.default_rng(2))
    rows = [{"N": n, "D": d, "loss": x} for n, d, x in zip(runs.parameters, runs.tokens, runs.loss, strict=True)]
    points.write_text(json.dumps(rows))
    assert main(["scaling", "fit", str(points), "--law", "compute", "--out", str(law)]) == 0
    assert "gamma " in capsys.readouterr().out
    loss, (low, high) = load_compute_fit(law).predict(3e15)
    assert main(["scaling", "predict", str(law), "--flops", "3e15"]) == 0
    assert f"loss {loss:.4f}\n95 % of such runs between {low:.4f} and {high:.4f}" in capsys.readouterr().out
    run = ["--parameters", "5e6", "--tokens", "1e8", "--log", str(log)]
    assert main(["scaling", "forecast", str(law), "--name", "a", *run]) == 0
    assert main(["scaling", "forecast", str(law), "--name", "b", "--flops", "6e15", *run]) == 0
    a, b = read(log)
    assert (a.flops, b.flops) == (3e15, 6e15)
    assert (a.loss, a.low, a.high) == pytest.approx((loss, low, high))
    assert b.loss < a.loss
    for refused, message in (
        (["scaling", "predict", str(law), "--flops=-1"], "flops must be positive and finite, got -1.0"),
        (["scaling", "predict", "epoch", "--parameters=-1", "--tokens", "2e7"], "parameters must be positive"),
        (["scaling", "predict", str(law), "--parameters", "1e6", "--tokens", "2e7"], "takes --flops"),
        (["scaling", "forecast", str(law), "--name", "c", "--unique-tokens", "1e6", *run], "leave unique_tokens out"),
        (["scaling", "forecast", "epoch", "--name", "c", "--flops", "6e15", *run], "and a law of compute"),
        (["scaling", "design", "best", "--vocab-size", "512", "--budgets", "1e13", "--law", str(law)], "no fitted law"),
    ):
        assert main(refused) == 2
        assert message in capsys.readouterr().err


def test_parameters_and_flops_are_counted_both_ways(tmp_path, capsys):
    points = tmp_path / "points.csv"
    points.write_text("N,non_embedding_parameters,D,C,loss\n100,60,2000,1500000,4.5\n200,150,4000,5600000,4.2\n")
    for counting, parameters, flops in (
        (Counting(), [100, 200], [1.5e6, 5.6e6]),
        (Counting(flops="6nd"), [100, 200], [1.2e6, 4.8e6]),
        (Counting(embeddings=False), [60, 150], [1.5e6, 5.6e6]),
        (Counting(embeddings=False, flops="6nd"), [60, 150], [0.72e6, 3.6e6]),
    ):
        found = read_points(points, counting)
        assert found.parameters.tolist() == parameters
        assert found.flops.tolist() == pytest.approx(flops)
    points.write_text("N,D,loss\n100,2000,4.5\n")
    with pytest.raises(ValueError, match="two of non_embedding_parameters, tokens and flops"):
        read_points(points, Counting(embeddings=False))
    assert main(["scaling", "fit", str(points), "--law", "step", "--flops", "6nd"]) == 2
    assert "--law step takes no --least-tokens, --flops" in capsys.readouterr().err


def test_a_file_that_is_no_fit_makes_no_forecast(tmp_path, capsys):
    law, log = tmp_path / "law.json", tmp_path / "forecasts.jsonl"
    good = {"law": "compute", "E": 2.0, "A": 90.0, "gamma": 0.2, "resampled": [[2.0, 90.0, 0.2]], "residuals": [0.01]}
    law.write_text(json.dumps(good | {"gamma": math.nan}))
    run = ["--name", "a", "--parameters", "5e6", "--tokens", "1e8", "--log", str(log)]
    assert main(["scaling", "forecast", str(law), *run]) == 2
    assert "law.json holds no fitted law (ValueError: gamma must be 0 or more" in capsys.readouterr().err
    assert not log.exists()


@pytest.mark.parametrize("counting", [{"flops": "most"}, {"embeddings": "no"}, {"layers": True}, 3])
def test_how_runs_were_counted_is_said_or_refused(tmp_path, counting):
    law = tmp_path / "law.json"
    law.write_text(json.dumps({"counting": {"embeddings": False, "flops": "6nd"}}))
    assert load_counting(law) == Counting(embeddings=False, flops="6nd")
    law.write_text(json.dumps({"counting": counting}))
    with pytest.raises(ValueError, match=r"law\.json does not say how its runs were counted"):
        load_counting(law)
