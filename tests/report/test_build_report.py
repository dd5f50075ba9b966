"""report.html of a build of data: what it says, and that a stranger's text stays text."""

import json

import pytest

from cs336.report import write_build_report

FOUND = {
    "records": 1000,
    "record_bytes": 5_000_000,
    "unread": {"damaged": 2, "status 404": 70},
    "stages": [
        {"name": "extract", "documents": 1000, "bytes": 5_000_000, "removed": {"no text": [100, 400_000]}},
        {"name": "language", "documents": 900, "bytes": 2_000_000, "removed": {"language fr": [200, 500_000]}},
        {"name": "minhash", "documents": 700, "bytes": 1_500_000, "removed": {"near duplicate": [70, 150_000]}},
    ],
    "documents": 630,
    "bytes": 1_350_000,
    "languages": {"en": 700, "fr": 200},
    "lengths_in": {"512": 300, "2048": 600},
    "lengths_out": {"2048": 630},
    "masked": 0,
    "folders": ["1-extract", "10-minhash"],
}
EVIL = "<script>alert(1)</script>"


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = value if isinstance(value, list) else [value]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def page(tmp_path):
    write(tmp_path / "build.json", FOUND)
    write(tmp_path / "stages.json", {"extract": {"seconds": 61.0, "summary": "900 are left"}, "minhash": {}})
    fr = {"stage": "language", "reason": "language fr", "detail": "score 0.99", "id": EVIL, "text": f"bonjour {EVIL}"}
    write(tmp_path / "1-extract/removed/00000.jsonl", [fr, {**fr, "text": "another of the same rule"}])
    write(
        tmp_path / "1-extract/unread/00000.jsonl",
        [{"id": f"r{i}", "reason": "damaged", "detail": EVIL} for i in range(70)],
    )
    write(tmp_path / "1-extract/documents/00000.jsonl", {"id": "a", "text": "not of the last stage"})
    write(tmp_path / "10-minhash/documents/00000.jsonl", {"id": "kept-1", "text": "a text that stays"})
    write(tmp_path / "11-of-an-earlier-recipe/documents/00000.jsonl", {"id": "b", "text": "not of the last stage"})
    write(tmp_path / "tokens/train/meta.json", {"tokens": 2_000_000})
    write(
        tmp_path / "planted.json",
        {"kinds": {"copies": {"copies": 9, "found": 8, "recall": "0.889", "wrong": 1, "precision": "0.88"}}},
    )
    assert write_build_report(tmp_path) == tmp_path / "report.html"
    return (tmp_path / "report.html").read_text()


def test_what_it_says(page):
    for words in (
        "Of 1,000 records 630 documents are left (63%); 370 were removed by a rule.",
        "−200",
        "22.2%",
        "bonjour",
        "a text that stays",
        "score 0.99",
        "0.889",
        "2M",
        "1 min 01 s",
        "and more, in the folder unread",
    ):
        assert words in page, words


def test_strangers_text_is_text(page):
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_samples_are_of_the_last_stage(page):
    assert "not of the last stage" not in page
    assert "another of the same rule" not in page


def test_parts_that_are_not_there_are_left_out(tmp_path):
    write(tmp_path / "build.json", FOUND)
    write(tmp_path / "stages.json", {})
    page = write_build_report(tmp_path).read_text()
    assert "Removed, by rule" in page
    for title in ("Planted", "A model on raw text", "side by side", "Where the time went"):
        assert title not in page


def test_no_build_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no finished build: run `cs336 data build`"):
        write_build_report(tmp_path)
