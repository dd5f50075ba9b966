"""What shares an n-gram with an evaluation set is found, whatever its dress; nothing else is."""

import gzip
import json
import random

import pytest

from cs336.data.decontaminate import Decontaminate, Decontaminator
from cs336.data.step import Removed
from cs336.utils import config
from cs336.utils.documents import Document

QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."


def write(path, *rows):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def test_equals_a_search_through_all_ngrams(tmp_path):
    rng = random.Random(0)
    words = ["red", "green", "blue", "one", "two", "three", "four"]
    items = [rng.choices(words, k=rng.randint(0, 9)) for _ in range(40)]
    path = write(tmp_path / "set.jsonl", *({"q": " ".join(item)} for item in items))
    for n in (1, 3, 5):
        index = Decontaminator(path, n)
        grams = {}
        for number, item in enumerate(items, 1):
            for i in range(len(item) - n + 1):
                grams.setdefault(tuple(item[i : i + n]), number)
        assert len(index) == len(grams)
        assert (index.items, index.short_items) == (40, sum(len(item) < n for item in items))
        for _ in range(200):
            text = rng.choices([*words, "other"], k=rng.randint(0, 12))
            hits = [g for i in range(len(text) - n + 1) if (g := tuple(text[i : i + n])) in grams]
            match = index.find(" ".join(text))
            assert (match.count if match else 0) == len(hits)
            if match:
                assert (match.ngram, match.item) == (" ".join(hits[0]), f"{path}:{grams[hits[0]]}")


def test_case_accents_and_punctuation_are_no_disguise(tmp_path):
    index = Decontaminator(write(tmp_path / "set.jsonl", {"question": QUESTION}))
    hidden = "noise " * 50 + QUESTION.upper().replace(" ", "\n - ").replace("A", "Á") + " more noise"
    assert index.find(hidden).ngram == "natalia sold clips to 48 of her friends in april and then she"
    assert index.find(hidden.encode()).count == len(QUESTION.split()) - 12
    assert index.find(" ".join(QUESTION.split()[:12])) is None
    assert index.find("") is None


def test_all_strings_of_an_item_count_or_those_of_fields(tmp_path):
    item = {"id": 7, "question": "one two three", "choices": ["four five", {"text": "six"}], "gold": "seven"}
    path = write(tmp_path / "set.jsonl", item)
    assert Decontaminator(path, 3).find("three four five six") is not None
    assert len(Decontaminator(path, 3)) == 5
    only = Decontaminator(path, 3, fields=["question", "absent"])
    assert (len(only), only.find("three four five")) == (1, None)


def test_directories_and_compressed_files_are_read(tmp_path):
    write(tmp_path / "a.jsonl.gz", {"q": "one two three"})
    write(tmp_path / "b.jsonl", {"q": "four five six"})
    (tmp_path / "notes.txt").write_text("no json")
    index = Decontaminator(tmp_path, 3)
    assert index.items == 2
    assert index.find("four five six").item == f"{tmp_path / 'b.jsonl'}:1"


@pytest.mark.parametrize(
    ("line", "options", "message"),
    [
        ("{broken", {}, r"set\.jsonl:2: an evaluation item is a JSON object"),
        ('["a"]', {}, r"set\.jsonl:2: an evaluation item is a JSON object, got list"),
        ("[" * 100_000, {}, r"set\.jsonl:2: "),
        ('{"b": "x"}', {"fields": ["a"]}, r"set\.jsonl:2: has none of the fields a, only 'b'"),
        ("", {"ngram": 0}, "ngram must be"),
    ],
)
def test_errors_name_the_line(tmp_path, line, options, message):
    path = tmp_path / "set.jsonl"
    path.write_text('{"a": "x"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        Decontaminator(path, **options)


def test_a_set_without_items_is_refused(tmp_path):
    (tmp_path / "set.jsonl").write_text("\ufeff\n\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no evaluation item"):
        Decontaminator(tmp_path / "set.jsonl")


def test_the_step_says_what_matched(tmp_path):
    path = write(tmp_path / "set.jsonl", {"question": QUESTION})
    table = {"kind": "decontaminate", "paths": [str(path)]}
    apply = config.parse(Decontaminate, table).build()
    clean = Document("Something else altogether.", "1", "f")
    assert apply(clean) is clean
    removed = apply(Document(QUESTION, "2", "f"))
    assert isinstance(removed, Removed)
    assert removed.reason == "contaminated"
    assert removed.detail.startswith(f"{path}:1: natalia sold clips")
    assert isinstance(Decontaminate((path,), min_matches=8).build()(Document(QUESTION, "2", "f")), Removed)
    tolerant = config.parse(Decontaminate, table | {"min_matches": 9}).build()
    assert isinstance(tolerant(Document(QUESTION, "2", "f")), Document)
    with pytest.raises(ValueError, match="min_matches >= 1"):
        Decontaminate((path,), min_matches=0)
