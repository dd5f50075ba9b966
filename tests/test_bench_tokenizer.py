"""The benchmark of tokenizers notices wrong ids and time that grows too fast, and skips by name what is not there."""

import json

import pytest

from benchmarks.end_to_end import bench_tokenizer, peers


def rows(*ids, **more):
    return [{"tool": tool, "ids": i, **more} for tool, i in zip(("cs336", "one", "two"), ids, strict=False)]


def test_ids_are_compared_with_ours():
    ours, one, two = bench_tokenizer.check(rows("a", "a", "b"))
    assert "failed" not in ours
    assert (one["ids"], two["ids"]) == ("same", "other")
    assert "differ" in bench_tokenizer.check(rows("a", "b", "b"))[0]["failed"]
    assert "failed" not in bench_tokenizer.check(rows("a"))[0]


def test_time_that_grows_with_the_square_is_noticed():
    linear, square = ([{"tool": "cs336", "seconds": [0.1 * n**power for n in (1, 2, 4, 8)]}] for power in (1, 2))
    assert "failed" not in bench_tokenizer.check(linear)[0]
    assert "64 times as long" in bench_tokenizer.check(square)[0]["failed"]


def test_results(tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("some text to encode, naïve 中文 <|endoftext|>\r\n" * 5000, newline="")
    options = [
        "--corpus",
        str(text),
        "--train",
        str(text),
        "--rounds",
        "1",
        "--vocab",
        "270",
        "--threads",
        "1",
        "--out",
        str(out),
    ]
    assert bench_tokenizer.main([*options, "--tools", "cs336", "tokenizers", "not_there"]) == 0
    run = json.loads(out.read_text())["tokenizer"]
    assert str(tmp_path) not in run["header"]["command"]
    assert run["rows"][0] == {"op": "tokenizer", "tool": "not_there", "skipped": "No module named 'not_there'"}
    jobs = {(row.get("output", row["job"]), row["tool"]): row for row in run["rows"][1:]}
    assert jobs["list", "tokenizers"]["ids"] == jobs["decode", "tokenizers"]["ids"] == "same"
    assert {("numpy", "cs336"), ("shard", "cs336"), ("train", "tokenizers"), ("double", "cs336")} <= jobs.keys()
    assert not [row for row in run["rows"] if "failed" in row]
    assert jobs["train", "cs336"]["peak_mb"] > 10
    assert jobs["train", "cs336"]["cold_cpu_to_ours"] == 1
    theirs, ours = (jobs["list", tool]["warm_mb_per_cpu_second"] for tool in ("tokenizers", "cs336"))
    assert ours / theirs == pytest.approx(jobs["list", "tokenizers"]["warm_cpu_to_ours"], rel=0.01)


def test_a_worker_that_fails_says_why():
    job = {"tool": "cs336", "job": "encode", "tokenizer": "none.json", "text": "none", "output": "list", "threads": 1}
    assert "none.json" in bench_tokenizer.worker(job)["failed"]


def test_documents_are_the_text(tmp_path):
    path = tmp_path / "text.txt"
    for text in ("", "no line", "a line\r\n" * 40_000 + "the end"):
        path.write_text(text, newline="")
        documents = peers.documents_of(str(path))
        assert "".join(documents) == text
        assert max(map(len, documents)) < 100_100
    assert len(documents) == pytest.approx(3.2, abs=1)
