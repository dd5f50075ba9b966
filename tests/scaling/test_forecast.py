"""A forecast is written before, graded after, and neither is changed."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest

from cs336.cli import main
from cs336.scaling import EPOCH, EPOCH_FIT
from cs336.scaling.forecast import forecast, grade, read, score


def test_forecast_then_grade(tmp_path, capsys):
    log = tmp_path / "forecasts.jsonl"
    make = ["scaling", "forecast", "epoch", "--log", str(log), "--parameters", "1e9", "--tokens", "2e10"]
    assert main([*make, "--name", "a"]) == 0
    assert main([*make, "--name", "b"]) == 0
    before = log.read_text().splitlines()
    loss = float(EPOCH.loss(1e9, 2e10))
    assert json.loads(before[0])["loss"] == pytest.approx(loss)
    assert score(read(log)) is None
    assert main(["scaling", "grade", "a", str(loss * 1.01), "--log", str(log)]) == 0
    assert "error +1.00 %, within" in capsys.readouterr().out
    after = log.read_text().splitlines()
    assert after[1] == before[1]
    assert json.loads(after[0]) == json.loads(before[0]) | {k: json.loads(after[0])[k] for k in ("measured", "graded")}
    assert main(["scaling", "grade", "b", str(loss * 0.9), "--log", str(log)]) == 0
    said = capsys.readouterr().out
    assert "error -10.00 %, outside" in said
    assert "2 graded: mean error 5.50 %, 50 % within" in said
    assert score(read(log)) == pytest.approx((0.055, 0.5))


def test_what_is_refused_leaves_the_log(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    make = ["scaling", "forecast", "epoch", "--log", str(log), "--tokens", "2e10", "--name", "a", "--parameters"]
    assert main([*make, "1e9"]) == 0
    assert main(["scaling", "grade", "a", "2.5", "--log", str(log)]) == 0
    kept = log.read_text()
    for arguments, message in (
        ([*make, "2e9"], "a forecast is not changed"),
        ([*make, "-1"], "parameters must be positive"),
        (["scaling", "grade", "a", "2.4", "--log", str(log)], "was graded at"),
        (["scaling", "grade", "c", "2.4", "--log", str(log)], "no forecast of 'c': there are a"),
        (["scaling", "grade", "a", "nan", "--log", str(log)], "must be positive and finite"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
        assert log.read_text() == kept
    log.write_text(kept + "{}\n")
    with pytest.raises(ValueError, match=r"log.jsonl:2 is no forecast"):
        read(log)
    log.write_bytes(kept.encode().replace(b'"a"', b'"\xe9"'))  # Latin-1: not read as another name, which would be kept
    with pytest.raises(ValueError, match=r"log.jsonl:1 is no forecast"):
        read(log)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"loss": "2"}, "loss must be"), ({"loss": 0}, "loss must be"), ({"low": math.nan}, "low must be"),
     ({"high": None}, "high must be"), ({"tokens": True}, "tokens must be"), ({"name": 5}, "name must be text"),
     ({"name": " "}, "by which the run is graded later"),
     ({"measured": "x"}, "measured must be"), ({"more": 1}, "more"), ({"confidence": 7}, "confidence must be below 1"),
     ({"low": 2.7}, "low must be at most high")],
)  # fmt: skip
def test_a_log_of_other_things_is_none(change, message, tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    row = {"name": "a", "parameters": 1e9, "tokens": 1e10, "loss": 2.5, "low": 2.4, "high": 2.6, "confidence": 0.95}
    log.write_text(json.dumps(row | {"made": "2026-11-30"} | change))
    kept = log.read_bytes()
    assert main(["scaling", "grade", "a", "2.5", "--log", str(log)]) == 2
    said = capsys.readouterr().err
    assert "log.jsonl:1 is no forecast" in said
    assert message in said
    assert log.read_bytes() == kept


def test_nothing_is_lost_where_many_write_one_log(tmp_path):
    log, names = tmp_path / "logs" / "log.jsonl", [f"run {i}" for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: forecast(log, EPOCH_FIT, name, 1e9, 2e10), names))
        list(pool.map(lambda name: grade(log, name, 2.5), names))
    found = read(log)
    assert sorted(f.name for f in found) == sorted(names)
    assert {f.measured for f in found} == {2.5}


@pytest.mark.parametrize("name", ["runs.csv", "runs.json"])
def test_a_file_of_seeds_is_graded_by_their_mean(name, tmp_path, capsys):
    log, runs = ["--log", str(tmp_path / "log.jsonl")], tmp_path / name
    rows = [{"parameters": 1e9, "tokens": 2e10, "loss": loss} for loss in (2.4, 2.6)]

    def write(rows):
        lines = ["parameters,tokens,loss", *(",".join(map(str, row.values())) for row in rows)]
        runs.write_text(json.dumps(rows) if runs.suffix == ".json" else "\n".join(lines))

    assert main(["scaling", "forecast", "epoch", "--name", "a", "--parameters", "1e9", "--tokens", "2e10", *log]) == 0
    write([*rows, {"parameters": 1e9, "tokens": 3e10, "loss": 2.3}])
    assert main(["scaling", "grade", "a", "--study", str(runs), *log]) == 2
    assert f"{name} has 2 runs: a forecast is of one, or of several seeds of it" in capsys.readouterr().err
    write(rows)
    assert main(["scaling", "grade", "a", "--study", str(runs), *log]) == 0
    assert read(tmp_path / "log.jsonl")[0].measured == 2.5
