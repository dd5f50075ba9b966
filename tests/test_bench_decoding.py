"""The benchmark of decoding measures each kind of weights and of text."""

import json

from benchmarks.end_to_end import bench_decoding


def test_rows(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.json"
    monkeypatch.setattr("sys.argv", ["bench_decoding", "tiny", "--device", "cpu", "--tokens", "12", "--out", str(out)])
    bench_decoding.main()
    run = json.loads(out.read_text())["decoding"]
    assert "tiny --tokens 12" in run["header"]["command"]
    rows = run["rows"]
    assert [row["weights"] for row in rows[:2]] == ["fp32", "int8"]
    assert rows[1]["gb"] < rows[0]["gb"]
    texts = {row["text"]: row for row in rows[4:]}
    assert texts["repeats itself"]["accepted"] == texts["repeats itself"]["drafted"] > 0
    assert texts["wanders"]["accepted"] < texts["wanders"]["drafted"]
    assert texts["is new"]["drafted"] == 0
    assert all(row["tokens_per_second"] > 0 for row in rows)
