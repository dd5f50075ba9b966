"""The benchmarks of several processes run, on two over gloo, and write what a table is made of."""

import json

import pytest

from benchmarks import run
from benchmarks.end_to_end import bench_collectives, bench_parallel, parallel_trace


def results_of(path, *argv):
    assert run.main([*argv, "--processes", "2", "--out", str(path)]) == 0
    return {name: found["rows"] for name, found in json.loads(path.read_text()).items()}


def test_every_section_in_two_processes(tmp_path):
    rows = results_of(tmp_path / "parallel.json", "parallel", "--size", "tiny")
    assert rows.keys() == {f"parallel_{name}" for name in bench_parallel.SECTIONS}
    assert {row["variant"] for row in rows["parallel_zero"]} >= {"compute alone", "cs336 ShardedAdamW", "FSDP2"}
    for row in rows["parallel_equal"]:
        assert row["loss_difference"] < 1e-5, row
        assert row.get("gradient_difference", 0) < 1e-4, row
        assert row.get("weight_difference", 0) < 1e-6, row
    assert {row["variant"] for row in rows["parallel_equal"]} >= {"context ring", "expert", "ShardedAdamW"}
    assert rows["parallel_gpt"][2]["of_linear"] > 0
    for row in rows["parallel_plan"]:
        assert row["loss_difference"] < 1e-5, row
        assert row["predicted_seconds"] > 0
        assert row["predicted_bytes"] > 0
    assert [row["equal_tokens"] for row in rows["parallel_engine"]] == [1, 1]
    assert all(row["processes"] == 2 for found in rows.values() for row in found)


def test_every_collective_in_two_processes(tmp_path):
    rows = results_of(tmp_path / "c.json", "collectives", "--from-mb", "0.01", "--to-mb", "0.02")["collectives"]
    assert [row["variant"] for row in rows] == [name for name in bench_collectives.COLLECTIVES for _ in range(2)]
    for row in rows:
        factor = bench_collectives.COLLECTIVES[row["variant"]][0](2)
        assert row["bus_gbps"] == pytest.approx(row["bytes"] * factor / row["seconds"] / 1e9, abs=0.006)


def test_what_nothing_hides():
    found = parallel_trace.overlap([(0, 4), (2, 6), (10, 12)], [(5, 7), (6, 8), (11, 20)])
    assert found == {"communication_ms": 8, "exposed_ms": 6, "span_ms": 20}
    assert parallel_trace.overlap([], [(1, 2)]) == {"communication_ms": 0, "exposed_ms": 0, "span_ms": 1}


def test_sizes_and_picture(tmp_path):
    mb = bench_collectives.MB
    assert bench_collectives.sizes(1, 1024) == [mb, 4 * mb, 16 * mb, 64 * mb, 256 * mb, 1024 * mb]
    assert bench_collectives.sizes(2, 2) == [2 * mb]
    pytest.importorskip("matplotlib")
    row = {"variant": "p2p", "processes": 2, "backend": "gloo", "bytes": mb, "bus_gbps": 1.0}
    bench_collectives.draw([row, row | {"bytes": 2 * mb}], tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["collectives", "all_reduces"], "no collective all_reduces"),
        (["collectives", "--from-mb", "2", "--to-mb", "1"], "sizes must rise"),
        (["collectives", "--plot", "bus.txt"], "a plot is a .png, .svg or .pdf file"),
        (["collectives", "--plot", "no/bus.png"], "there is no directory no"),
        (["parallel", "zeros"], "no section zeros"),
        (["parallel", "--out", "no/rows.json"], "there is no directory no"),
    ],
)
def test_mistakes_are_told_before_processes_start(argv, message, monkeypatch, capsys):
    monkeypatch.setattr("subprocess.run", lambda *args, **options: pytest.fail("processes were started"))
    with pytest.raises(SystemExit):
        run.main([*argv, "--processes", "2"])
    assert message in capsys.readouterr().err
