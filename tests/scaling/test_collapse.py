"""Training curves of one shape: those of runs that are set alike, whatever their size."""

import json

import numpy as np
import pytest
from experiments.tiny_study import study

from cs336.cli import main
from cs336.experiments import run_study
from cs336.scaling import collapse
from cs336.scaling.collapse import curve


def shaped(scale, E=1.5, power=0.3):
    """A run whose reducible loss falls as a power of the part that is done."""
    return E + scale * np.linspace(0.05, 1, 20) ** -power


def test_curves_of_one_shape_fall_together():
    found = collapse([shaped(0.5), shaped(1.0), shaped(3.0)], 1.5)
    assert found.curves_RP[:, -1].tolist() == [1, 1, 1]
    assert found.deviation_P == pytest.approx(np.zeros(20), abs=1e-12)
    assert found.off_R == pytest.approx(np.zeros(3), abs=1e-12)


def test_a_run_of_another_shape_is_named():
    found = collapse([shaped(0.5), shaped(1.0), shaped(2.0, power=0.6), shaped(3.0)], 1.5)
    assert int(found.off_R.argmax()) == 2
    assert found.off_R[2] > 0.05
    assert np.delete(found.off_R, 2) == pytest.approx(np.zeros(3), abs=0.02)
    wrong = collapse([shaped(0.5), shaped(1.0), shaped(3.0)], 0.5)  # another E bends them apart
    assert wrong.deviation_P[10] > 0.01


def test_a_curve_is_of_equal_parts_of_the_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "train/loss": float(step)} for step in range(1, 41)] + [{"step": 40, "val/loss": 9.0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert curve(path, 4).tolist() == [5.5, 15.5, 25.5, 35.5]
    with pytest.raises(ValueError, match="40 rows of train/loss, which leave one of 50 parts empty"):
        curve(path, 50)
    with pytest.raises(ValueError, match="has no val/bpb"):
        curve(path, name="val/bpb")
    with pytest.raises(ValueError, match="parts must be 2 or more, got 0"):
        curve(path, 0)
    path.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "tr')
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds no metrics of a run: JSONDecodeError"):
        curve(path, 4)


def test_curves_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"2 of each at least; got shape \(1, 20\)"):
        collapse([shaped(1.0)], 1.0)
    with pytest.raises(ValueError, match=r"run 1 ends at 1\.6, which is not above E = 2"):
        collapse([shaped(1.0), shaped(0.1)], 2.0)


def test_the_runs_of_a_study_from_a_shell(tmp_path, capsys):
    run_study(study(tmp_path, vary={"model.d_model": [8, 16]}, changes={"budget": "6steps"}))
    law = tmp_path / "law.json"
    numbers = {"E": 0.5, "A": 1.0, "B": 1.0, "alpha": 0.3, "beta": 0.3}
    law.write_text(json.dumps(numbers | {"resampled": [], "residuals": [0.0]}))
    capsys.readouterr()
    assert main(["scaling", "collapse", str(tmp_path / "study"), "--law", str(law), "--parts", "3"]) == 0
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.endswith("seed 0, d_model 8")
    assert second.endswith("seed 0, d_model 16")
    assert last.startswith("deviation over the later half: ")
    assert main(["scaling", "collapse", str(tmp_path), "--law", str(law)]) == 2
    assert "holds no study" in capsys.readouterr().err
