"""The benchmark of the engine on a tiny model: rows of each kind, which the table in the README takes."""

import json

import pytest

pytest.importorskip("torch")
from benchmarks import report
from benchmarks.end_to_end import bench_engine


def test_rows_of_each_kind_make_a_table(tmp_path):
    out = tmp_path / "results.json"
    assert bench_engine.main(["tiny", "tiny-scoring", "--out", str(out), "--commit", "abc"]) == 0
    run = json.loads(out.read_text())["engine"]
    assert run["header"]["command"] == "python -m benchmarks.end_to_end.bench_engine tiny tiny-scoring"
    served, uncached, cached = run["rows"]
    assert served["output_tokens"] == 30
    assert served["dtype"] == ("bfloat16" if bench_engine.torch.cuda.is_available() else "float32")
    assert served["tokens_per_second"] == pytest.approx(30 / served["seconds"], rel=0.1)
    assert uncached["output_tokens"] == cached["output_tokens"] == 20
    assert [line.split("|")[1].strip() for line in report.engine(run["rows"])][2:] == [
        row["work"] for row in run["rows"]
    ]
    with pytest.raises(SystemExit):
        bench_engine.main(["huge"])


def test_a_share_counts_weights_once_and_all_tokens(monkeypatch):
    monkeypatch.setattr(bench_engine.torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(bench_engine.harness, "default_device", lambda: bench_engine.torch.device("cuda"))
    work = bench_engine.WORKS["batch"]  # 8.2e9 weights but for embeddings, and 64 x 640 tokens of 147,456 bytes
    assert bench_engine.share_of_roof(work, 6.9e-3) == pytest.approx(0.70, abs=0.02)
    assert bench_engine.share_of_roof(bench_engine.WORKS["many"], 6.9e-3) is None
