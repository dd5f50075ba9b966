"""Equal paragraphs: what counts as one, what stays, over files and as a stage of a build."""

import collections
import json
import random

import pytest

from cs336 import _text
from cs336.data import Recipe, dedup_paragraphs
from cs336.data.build.job import Build
from cs336.data.build.store import Store
from cs336.data.dedup.paragraphs import keys_of, paragraphs_of
from cs336.report import write_build_report
from cs336.utils.config import parse


def write(folder, texts):
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:02}").write_bytes(text if isinstance(text, bytes) else text.encode())
    return [folder / f"{i:02}" for i in range(len(texts))]


def left(folder):
    return [path.read_bytes().decode() for path in sorted(folder.iterdir())]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("one", ["one"]),
        ("one\ntwo", ["one\ntwo"]),
        ("one\n\ntwo\n \t\n\nthree\n", ["one\n\n", "two\n \t\n\n", "three\n"]),
        ("\n\none\n\n", ["\n\n", "one\n\n"]),
    ],
)
def test_blank_lines_part_paragraphs(text, expected):
    assert paragraphs_of(text) == expected


def test_keys_are_a_line_a_paragraph():
    text = "Crème  BRÛLÉE!\n\n***\n\nof 2025\n07"
    assert keys_of(text, ignore_digits=False) == b"creme brulee\n\nof 2025 07\n"
    assert keys_of(text, ignore_digits=True) == b"creme brulee\n\nof 0000 00\n"


@pytest.mark.parametrize("keep", ["none", "first"])
@pytest.mark.parametrize("max_memory", [1 << 30, 2000])
def test_equals_counting(tmp_path, keep, max_memory):
    rng = random.Random(0)
    pool = [f"{kind} paragraph number {i}" for i in range(60) for kind in ("a", "A", "á", "a,")]
    split = [rng.choices(pool, k=rng.randint(0, 30)) for _ in range(8)]
    report = dedup_paragraphs(
        write(tmp_path / "in", ["\n\n".join(parts) for parts in split]), tmp_path / "out", keep, max_memory=max_memory
    )
    counts = collections.Counter(_text.normalize(part) for parts in split for part in parts)
    seen, expected = set(), []
    for parts in split:
        kept = []
        for part in parts:
            key = _text.normalize(part)
            kept += [part] * (counts[key] == 1 if keep == "none" else key not in seen)
            seen.add(key)
        expected.append("\n\n".join(kept))
    assert [text.rstrip("\n") for text in left(tmp_path / "out")] == expected
    assert (report.total, report.kept) == (sum(counts.values()), sum(len(t.split("\n\n")) for t in expected if t))


def test_short_ones_and_those_without_a_word_stay(tmp_path):
    texts = ["Chapter one\n\n* * * * * * * * * * * *\n\nA paragraph of some length"] * 2
    dedup_paragraphs(write(tmp_path / "in", texts), tmp_path / "out")
    assert left(tmp_path / "out") == [texts[0], "Chapter one\n\n* * * * * * * * * * * *"]
    dedup_paragraphs(write(tmp_path / "in2", texts), tmp_path / "out2", min_chars=5)
    assert left(tmp_path / "out2")[1] == "* * * * * * * * * * * *"


def test_digits_count_unless_they_are_ignored(tmp_path):
    texts = ["Printed on page 12 of the book", "printed on page 34 of the book.", "Printed on page 345 of the book"]
    files = write(tmp_path / "in", texts)
    assert dedup_paragraphs(files, tmp_path / "a").dropped == 0
    assert dedup_paragraphs(files, tmp_path / "b", ignore_digits=True).dropped == 1
    assert left(tmp_path / "b") == [texts[0], "", texts[2]]


def test_other_bytes_are_kept(tmp_path):
    texts = [
        b"caf\xe9 is not UTF-8 in this file\n\nsecond paragraph of the file",
        b"Second paragraph, of the file\n\n\xff",
    ]
    dedup_paragraphs(write(tmp_path / "in", texts), tmp_path / "out")
    assert [path.read_bytes() for path in sorted((tmp_path / "out").iterdir())] == [texts[0], b"\xff"]


def test_refuses_what_makes_no_sense(tmp_path):
    files = write(tmp_path / "in", ["a"])
    with pytest.raises(ValueError, match='keep is "none"'):
        dedup_paragraphs(files, tmp_path / "out", keep="last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_memory is bytes"):
        dedup_paragraphs(files, tmp_path / "out", max_memory=0)
    assert not (tmp_path / "out").exists()


def test_as_a_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notice = "All rights reserved, (C) 2024"
    texts = [f"The first document.\n\n{notice}", f"{notice.upper()}!\n\nThe second one.", notice.replace("4", "5")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    table = {
        "output": "out",
        "sources": [{"kind": "jsonl", "paths": ["a.jsonl"]}],
        "dedup": [{"kind": "paragraphs", "ignore_digits": True}, {"kind": "documents"}],
    }
    Build(parse(Recipe, table)).run()
    assert [document.text for document in Store(tmp_path / "out/3-documents")] == [texts[0], "The second one."]
    (removed,) = map(json.loads, (tmp_path / "out/2-paragraphs/removed/00000.jsonl").open())
    assert (removed["reason"], removed["detail"]) == ("no paragraph left", "1 paragraphs that others have")
    counted = json.loads((tmp_path / "out/build.json").read_text())
    assert (counted["paragraphs"], counted["paragraphs_dropped"]) == (5, 2)
    assert "Paragraphs dropped" in write_build_report(tmp_path / "out").read_text()
