"""The critical batch over runs: a known law comes back, with intervals that hold it, and needs no parameters."""

import json

import numpy as np
import pytest

from cs336.cli import main
from cs336.scaling import fit_critical_batch
from cs336.scaling.rates import read_critical_batches
from cs336.scaling.saved import load_critical_batch

B_0, BETA = 22.0, 0.47


def measured(noise=0.0, rng=None):
    """Of 4 sizes on 6 lengths: tokens, critical batch, parameters."""
    N, D = (axis.ravel() for axis in np.meshgrid(np.geomspace(8.5e7, 1.2e9, 4), np.geomspace(1e9, 1e11, 6)))
    return D, B_0 * D**BETA * (1 if rng is None else np.exp(noise * rng.standard_normal(len(D)))), N


def test_points_without_noise_give_the_law_back():
    law, sized = fit_critical_batch(*measured(), bootstrap=20)
    assert law.coefficient == pytest.approx(B_0)
    assert law.exponents == pytest.approx({"tokens": BETA})
    assert sized.exponents == pytest.approx({"tokens": BETA, "parameters": 0.0}, abs=1e-9)
    value, interval = law.predict(tokens=1e12)
    assert interval == pytest.approx((value, value))
    assert value == pytest.approx(B_0 * 1e12**BETA)
    D, B, _ = measured()
    assert fit_critical_batch(D, B)[1] is None
    assert fit_critical_batch(D, B, D / 20)[1] is None  # size and length grow together


def test_its_intervals_hold_the_truth():
    rng = np.random.default_rng(0)
    inside = dict.fromkeys(("coefficient", "tokens", "parameters", "predicted"), 0)
    for _ in range(200):
        law, sized = fit_critical_batch(*measured(0.1, rng), bootstrap=200)
        once = B_0 * 1e12**BETA * np.exp(0.1 * rng.standard_normal())
        for name, value, (low, high) in (
            ("coefficient", B_0, law.interval("coefficient")),
            ("tokens", BETA, law.interval("tokens")),
            ("parameters", 0.0, sized.interval("parameters")),
            ("predicted", once, law.predict(tokens=1e12)[1]),
        ):
            inside[name] += low <= value <= high
    assert all(0.9 <= count / 200 <= 0.975 for count in inside.values()), inside


def test_from_a_file_to_a_prediction(tmp_path, capsys):
    points, out = tmp_path / "points.csv", tmp_path / "law.json"
    D, B, N = measured(0.1, np.random.default_rng(1))
    points.write_text("D,critical_batch,N\n" + "".join(f"{d},{b},{n}\n" for d, b, n in zip(D, B, N, strict=True)))
    fit = ["scaling", "fit", str(points), "--law", "critical-batch"]
    assert main([*fit, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "critical_batch tokens " in said
    assert "with_parameters parameters " in said
    found = json.loads(out.read_text())["critical_batch"]
    assert found["tokens_interval"][0] < BETA < found["tokens_interval"][1]
    value, (low, high) = load_critical_batch(out).predict(tokens=1e12)
    assert main(["scaling", "predict", str(out), "--tokens", "1e12"]) == 0
    expected = f"critical batch {value:.4g} tokens\n95 % of such runs between {low:.4g} and {high:.4g}\n"
    assert capsys.readouterr().out == expected
    assert main([*fit, "--bootstrap", "0", "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["scaling", "predict", str(out), "--tokens", "1e12"]) == 0
    assert capsys.readouterr().out == f"critical batch {value:.4g} tokens\n"


def test_from_directories_of_runs(tmp_path):
    for i, length in enumerate((1, 2, 4)):
        places = [{"tokens": 1000 * length, "critical": 2 * length, "at_least": False}]
        places += [{"tokens": 500 * length, "critical": 1, "at_least": False}]  # no larger one was harmless
        places += [{"tokens": 2000 * length, "critical": 16, "at_least": True}]  # no one was harmful
        (tmp_path / f"run{i}").mkdir()
        found = {"batch_size": 1, "context_length": 8, "parameters": 300, "points": places}
        (tmp_path / f"run{i}" / "batch_size.json").write_text(json.dumps(found))
    columns = {name: values.tolist() for name, values in read_critical_batches(tmp_path).items()}
    assert columns == {"tokens": [1e3, 2e3, 4e3], "critical_batch": [16, 32, 64], "parameters": [300] * 3}
    assert read_critical_batches(tmp_path / "run1")["critical_batch"].tolist() == [32]
    assert main(["scaling", "fit", str(tmp_path), "--law", "critical-batch"]) == 0
    (tmp_path / "run1" / "batch_size.json").write_text("{}")
    with pytest.raises(ValueError, match=r"run1/batch_size\.json is not what `cs336 batch-size` writes"):
        read_critical_batches(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no critical batch between the smallest and the largest"):
        read_critical_batches(tmp_path / "none")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("tokens,critical_batch\n1e9,1e5\n1e10,3e5\n", "want at least 3 runs, whose tokens differ; got 2"),
        ("tokens,critical_batch\n" + "1e9,1e5\n" * 4, "whose tokens differ; got 4"),
        ("tokens,critical_batch\n1e9,1e5\n1e10,-3e5\n2e10,1e6\n", "points.csv: critical_batch must be positive"),
        ("tokens,critical_batch,parameters\n1e9,1e5,0\n", "points.csv: parameters must be positive"),
        ("tokens,critical_batch\n1e9,many\n", "run 1: critical_batch must be a number, got 'many'"),
        ("tokens,batch\n1e9,1e5\n", "as columns; critical_batch is not among tokens, batch"),
    ],
)
def test_what_cannot_be_fitted_is_refused_by_name(tmp_path, capsys, rows, message):
    points = tmp_path / "points.csv"
    points.write_text(rows)
    assert main(["scaling", "fit", str(points), "--law", "critical-batch"]) == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_predicted_is_refused(tmp_path, capsys):
    law = tmp_path / "law.json"
    good = {"law": "critical-batch", "critical_batch": {"coefficient": 22.0, "tokens": 0.47}}
    law.write_text(json.dumps(good | {"resampled": [], "residuals": []}))
    for command, message in (
        (["predict", str(law), "--flops", "1e20"], "takes --tokens alone"),
        (["predict", str(law), "--tokens", "1e9", "--parameters", "1e8"], "takes --tokens alone"),
        (["predict", str(law), "--tokens=-1"], "tokens must be positive and finite"),
        (["forecast", str(law), "--name", "a", "--tokens", "1e9", "--parameters", "1e8"], "holds no fitted law"),
    ):
        assert main(["scaling", *command]) == 2
        assert message in capsys.readouterr().err
    law.write_text(json.dumps(good | {"resampled": [[float("nan"), 0.47]], "residuals": [0.1]}))
    assert main(["scaling", "predict", str(law), "--tokens", "1e9"]) == 2
    assert "law.json holds no fitted law (ValueError: coefficient must be positive" in capsys.readouterr().err
