"""What repeated tokens are worth, found again from runs that a known law made."""

import json

import numpy as np
import pytest

from cs336.cli import main
from cs336.scaling import EPOCH, DataConstrainedLaw, Points, fit_repeats

TRUTH = {"repeat_decay": 9.0, "excess_decay": 4.0}


def repeating(noise=0.0, rng=None, largest=3e10):
    """Sizes to far beyond what 1e8 to 1e10 unique tokens deserve, 1 to 60 times over: (points, unique tokens)."""
    grid = np.meshgrid(np.geomspace(1e7, largest, 6), [1, 2, 4, 10, 25, 60], [1e8, 1e9, 1e10], indexing="ij")
    N, epochs, unique = (axis.ravel() for axis in grid)
    loss = np.array(
        [DataConstrainedLaw(EPOCH, u, **TRUTH).loss(n, e * u) for n, e, u in zip(N, epochs, unique, strict=True)]
    )
    factor = 1 if rng is None else np.exp(noise * rng.standard_normal(len(N)))
    return Points.of(N, epochs * unique, loss * factor), unique


def test_the_decays_are_found_again():
    found = fit_repeats(*repeating(), EPOCH, bootstrap=0)
    assert found.repeat_decay == pytest.approx(9, rel=1e-3)
    assert found.excess_decay == pytest.approx(4, rel=1e-3)


def test_their_intervals_hold_the_truth():
    inside, rng = dict.fromkeys(TRUTH, 0), np.random.default_rng(1)
    for _ in range(12):
        found = fit_repeats(*repeating(0.004, rng), EPOCH, bootstrap=30)
        for name, value in TRUTH.items():
            low, high = found.interval(name)
            inside[name] += low <= value <= high
    assert min(inside.values()) >= 9, inside


def test_parameters_that_are_never_too_many_tell_nothing_of_their_decay():
    points, unique = repeating(largest=1e7)
    enough = unique >= 1e9
    found = fit_repeats(points.take(enough), unique[enough], EPOCH, bootstrap=2)
    assert found.repeat_decay == pytest.approx(9, rel=1e-2)
    assert found.excess_decay == pytest.approx(DataConstrainedLaw.excess_decay)


def test_what_does_not_repeat_is_refused():
    points, unique = repeating()
    once = points.tokens <= unique
    with pytest.raises(ValueError, match="some have more tokens than unique_tokens; got 18"):
        fit_repeats(points.take(once), unique[once], EPOCH)
    with pytest.raises(ValueError, match="unique_tokens must be positive"):
        fit_repeats(points, -1.0, EPOCH)


def test_from_a_file_to_a_prediction(tmp_path, capsys):
    points, unique = repeating()
    rows = zip(points.parameters, points.tokens, points.loss, unique, strict=True)
    names = ("parameters", "tokens", "loss", "unique_tokens")
    (tmp_path / "runs.json").write_text(json.dumps([dict(zip(names, row, strict=True)) for row in rows]))
    base, out = tmp_path / "base.json", tmp_path / "law.json"
    law = {name: getattr(EPOCH, name) for name in ("E", "A", "B", "alpha", "beta")}
    base.write_text(json.dumps(law | {"resampled": [], "residuals": [0.0]}))
    command = ["scaling", "fit", str(tmp_path / "runs.json"), "--law", "repeats"]
    assert main([*command, "--base", str(base), "--bootstrap", "3", "--out", str(out)]) == 0
    assert "repeat_decay       9" in capsys.readouterr().out
    asked = ["--parameters", "1e9", "--tokens", "4e10", "--unique-tokens", "1e9"]
    for path, decays in ((base, {}), (out, TRUTH)):
        assert main(["scaling", "predict", str(path), *asked]) == 0
        loss = float(DataConstrainedLaw(EPOCH, 1e9, **decays).loss(1e9, 4e10))
        assert float(capsys.readouterr().out.split()[1]) == pytest.approx(loss, abs=1e-3)
    assert main(command) == 2
    assert "--law repeats takes --base" in capsys.readouterr().err
    for option in ("--huber-delta", "--least-tokens"):  # which it does not read
        assert main([*command, "--base", str(base), option, "1"]) == 2
        assert option in capsys.readouterr().err


def test_a_decay_that_no_run_tells_is_said_to_be_the_published_one(tmp_path, capsys):
    points, unique = repeating(largest=1e7)
    enough = unique >= 1e9
    rows = zip(points.parameters[enough], points.tokens[enough], points.loss[enough], unique[enough], strict=True)
    names = ("parameters", "tokens", "loss", "unique_tokens")
    (tmp_path / "runs.json").write_text(json.dumps([dict(zip(names, row, strict=True)) for row in rows]))
    law = {name: getattr(EPOCH, name) for name in ("E", "A", "B", "alpha", "beta")}
    base, out = tmp_path / "base.json", tmp_path / "law.json"
    base.write_text(json.dumps(law | {"resampled": [], "residuals": [0.0]}))
    command = ["scaling", "fit", str(tmp_path / "runs.json"), "--law", "repeats", "--base", str(base)]
    assert main([*command, "--bootstrap", "2", "--out", str(out)]) == 0
    assert "the published one: no run has more parameters than its unique tokens deserve" in capsys.readouterr().out
    assert json.loads(out.read_text())["excess_decay_interval"] is None
