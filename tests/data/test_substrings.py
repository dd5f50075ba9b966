"""Repeated passages: exact against their definition, for any memory, threads and text; cut from files and builds."""

import json
import random

import numpy as np
import pytest

from cs336 import _text
from cs336.data import Recipe, dedup_substrings, repeated_spans
from cs336.data.build.job import Build
from cs336.data.build.store import Store
from cs336.data.dedup import substrings
from cs336.report import write_build_report
from cs336.tokenizer import Tokenizer
from cs336.utils.config import parse

BYTES = Tokenizer({i: bytes([i]) for i in range(256)}, [])
LOTS = 1 << 30


def defined(documents, length):
    """The definition, symbol by symbol: what windows cover that do not overlap the first one like them."""
    corpus = [symbol for document in documents for symbol in document]
    first, spans, begin = {}, [], 0
    for document in documents:
        end, covered = begin + len(document), set()
        for i in range(begin, end - length + 1):
            if first.setdefault(tuple(corpus[i : i + length]), i) + length <= i:
                covered |= set(range(i, i + length))
        edges = [i for i in range(begin, end + 1) if (i in covered) != (i - 1 in covered)]
        spans.append([(a - begin, b - begin) for a, b in zip(edges[::2], edges[1::2], strict=True)])
        begin = end
    return spans


def found(documents, length, max_memory=LOTS, num_threads=1, kind=np.uint8):
    ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
    corpus = np.array([symbol for document in documents for symbol in document], kind)
    spans = [tuple(span) for span in _text.repeats(corpus, ends, length, max_memory, num_threads).tolist()]
    begins = [0, *ends]
    return [
        [(a - begin, b - begin) for a, b in spans if begin <= a < end]
        for begin, end in zip(begins, ends.tolist(), strict=False)
    ]


@pytest.mark.parametrize("kind", [np.uint8, np.uint32])
def test_is_what_the_definition_says(kind):
    rng = random.Random(0)
    for trial in range(300):
        alphabet = b"ab" if trial % 2 else b"abcd"
        documents = [bytes(rng.choices(alphabet, k=rng.randint(0, 40))) for _ in range(rng.randint(0, 5))]
        length = rng.randint(1, 9)
        for max_memory in (1, 700, LOTS):
            assert found(documents, length, max_memory, rng.choice([1, 3]), kind) == defined(documents, length)


@pytest.mark.parametrize(
    ("documents", "length", "expected"),
    [
        ([], 3, []),
        ([b""], 3, [[]]),
        ([b"", b"", b""], 1, [[], [], []]),
        ([b"abcabc"], 3, [[(3, 6)]]),
        ([b"abcdefgh", b"abcdefgh"], 4, [[], [(0, 8)]]),  # a whole document
        ([b"xabcd", b"abcdy", b"zabcd"], 4, [[], [(0, 4)], [(1, 5)]]),  # at an end
        ([b"abcd", b"ab", b"cd"], 4, [[], [], []]),  # no passage crosses a border
        ([b"abab", b"ab"], 9, [[], []]),  # longer than any document
        ([b"a" * 10], 4, [[(4, 10)]]),  # the first four stay
        ([b"abcdef", b"abcd", b"cdef", b"abcdef"], 4, [[], [(0, 4)], [(0, 4)], [(0, 6)]]),  # windows that overlap
        ([b"\0\0\0", b"\0\0\0\xff\xff\xff\xff"], 2, [[], [(0, 3), (5, 7)]]),
    ],
)
def test_cases_that_are_easily_wrong(documents, length, expected):
    assert found(documents, length) == defined(documents, length) == expected


@pytest.mark.parametrize("period", [1, 2, 7, 1000])
def test_periodic_text_leaves_one_period_and_a_window(period):
    """200,000 symbols: a suffix sort by comparisons would be at it for minutes."""
    rng = np.random.default_rng(period)
    corpus = np.resize(rng.integers(0, 256, period), 200_000).astype(np.uint8)
    ends = np.array([len(corpus)])
    first = -(-100 // period) * period  # the smallest distance at which windows are equal and do not overlap
    for max_memory in (LOTS, 100_000):
        assert _text.repeats(corpus, ends, 100, max_memory, 2).tolist() == [[first, 200_000]]


def test_fibonacci_words_with_parts_and_threads():
    """Every window is there early, no period ever holds."""
    a, b = b"a", b"ab"
    while len(b) < 3000:
        a, b = b, b + a
    documents = [b[:1500], b[1500:3000]]
    expected = defined(documents, 20)
    assert expected[1] == [(0, 1500)]
    for max_memory, num_threads in ((LOTS, 1), (LOTS, 3), (1000, 1), (1000, 3)):
        assert found(documents, 20, max_memory, num_threads) == expected


@pytest.mark.parametrize("max_memory", [LOTS, 1000])
def test_windows_of_one_hash_are_told_apart(max_memory):
    """A Thue-Morse word of 2^12 letters and the one with its letters exchanged: whatever numbers the letters stand for,
    and whatever the base, their polynomials differ by a product of (1 - base^(2^k)), k < 12, which is 0 mod 2^64."""
    word = bytes(b"ab"[i.bit_count() % 2] for i in range(1 << 12))
    other = word.translate(bytes.maketrans(b"ab", b"ba"))
    documents = [word, other, b"x" + other, word]
    assert found(documents, len(word), max_memory) == [[], [], [(1, 4097)], [(0, 4096)]]


def test_a_length_above_every_document_costs_nothing():
    """The power of the base that a window of this length has would never be done."""
    for length in (2**40, 2**63 - 1):
        assert repeated_spans(["short", "short"], length) == [[], []]


def test_parts_that_chance_makes_large_have_room():
    """Of 1,250 parts of about 16 windows some have twice as many: their tables grow, or would be full."""
    corpus = np.random.default_rng(0).integers(0, 256, 20_000).astype(np.uint8)
    corpus[15_000:15_100] = corpus[100:200]
    assert _text.repeats(corpus, np.array([20_000]), 30, 1, 1).tolist() == [[15_000, 15_100]]


def test_large_corpora_are_parted_and_threaded_alike():
    """More windows than one thread is given alone, with passages planted at known places."""
    rng = np.random.default_rng(0)
    corpus = rng.integers(0, 256, 300_000).astype(np.uint8)
    corpus[200_000:200_500] = corpus[1000:1500]
    corpus[299_900:] = corpus[500:600]
    ends = np.array([100_000, 250_000, 300_000])
    for max_memory in (LOTS, 1_000_000):
        for num_threads in (1, 4):
            spans = _text.repeats(corpus, ends, 50, max_memory, num_threads).tolist()
            assert spans == [[200_000, 200_500], [299_900, 300_000]]


class TestSpans:
    def test_are_what_a_str_and_bytes_are_sliced_by(self):
        texts = ["Straße 中文字 ok", "x Straße 中文字 ok", "🙂 Straße 中"]
        spans = repeated_spans(texts, 10)
        assert [[text[a:b] for a, b in cut] for text, cut in zip(texts, spans, strict=True)] == [
            [],
            ["Straße 中文字 ok"],
            [" Straße 中"],
        ]
        raw = repeated_spans([text.encode() for text in texts], 10)
        assert texts[1].encode()[slice(*raw[1][0])].decode() == "Straße 中文字 ok"

    def test_characters_are_never_cut(self):
        """中 and 丯 share their first two bytes, 丯 and 漯 their last one."""
        texts = ["ab中", "ab丯", "漯cdef", "丯cdef"]
        assert repeated_spans(texts, 4) == [[], [(0, 2)], [], [(1, 5)]]
        raw = [text.encode() for text in texts]
        for text, spans in zip(raw, repeated_spans(raw, 3), strict=True):
            assert all(text[a:b].decode() for a, b in spans)

    def test_words_and_lines_stay_whole(self):
        texts = ["one two three\nfour five six\nseven", "none two three\nfour five six\nsevenths"]
        cut = {at: [texts[1][a:b] for a, b in repeated_spans(texts, 8, at)[1]] for at in ("char", "word", "line")}
        assert cut == {
            "char": ["one two three\nfour five six\nseven"],
            "word": ["two three\nfour five six\n"],
            "line": ["four five six\n"],
        }
        assert repeated_spans(["one two three", "none two three, four"], 4, "word")[1] == [(5, 9)]
        assert repeated_spans(["one two three", "one two three four"], 4, "word")[1] == [(0, 13)]
        assert repeated_spans(["a whole text", "a whole text"], 8, "line") == [[], [(0, 12)]]
        assert repeated_spans(["a whole text", "xa whole textx"], 8, "line") == [[], []]

    @pytest.mark.parametrize(("at", "parts"), [("word", b" \n\t"), ("line", b"\n")])
    def test_ends_move_to_the_nearest_place_inward(self, at, parts):
        rng = random.Random(0)
        for _ in range(500):
            text = bytes(rng.choices(b"ab \n\t", k=rng.randint(1, 12)))
            begin, end = sorted(rng.sample(range(len(text) + 1), 2))
            begins = [p for p in range(begin, end) if p == 0 or text[p - 1] in parts]
            ends = [p for p in range(end, begin, -1) if p == len(text) or text[p - 1] in parts or text[p] in parts]
            first, last = substrings._inward(text, begin, end, at)
            if begins and ends and begins[0] < ends[0]:
                assert (first, last) == (begins[0], ends[0])
            else:
                assert first >= last

    def test_tokens_count_in_place_of_bytes(self):
        merged = Tokenizer.train(["the cat sat on the mat. " * 50], 268, [])
        texts = ["the cat sat on the mat, é", "a dog: the cat sat on the mat"]
        ids = [merged.encode_ordinary(text) for text in texts]
        sizes = {token: len(spelled) for token, spelled in merged.vocab.items()}
        for length in (1, 2, 3, 4):
            for text, tokens, spans, expected in zip(
                texts, ids, repeated_spans(texts, length, tokenizer=merged), defined(ids, length), strict=True
            ):
                at = np.cumsum([0, *(sizes[token] for token in tokens)]).tolist()
                raw = [text.encode()[at[a] : at[b]].decode() for a, b in expected]
                assert [text[a:b] for a, b in spans] == raw
        assert any(repeated_spans(texts, 3, tokenizer=merged))
        assert repeated_spans(texts, 8, tokenizer=BYTES) == repeated_spans(texts, 8)

    def test_refuses_what_makes_no_sense(self):
        for options, message in (
            ({"length": 0}, "length must be 1"),
            ({"length": 1.5}, "length must be 1"),
            ({"length": 2**63}, "length must be 1"),
            ({"max_memory": 10**30}, "max_memory is bytes"),
            ({"at": "sentence"}, 'at is "char", "word" or "line"'),
            ({"max_memory": 0}, "max_memory is bytes"),
        ):
            with pytest.raises(ValueError, match=message):
                repeated_spans(["a"], **options)
        with pytest.raises(TypeError, match=r"give \[text\]"):
            repeated_spans("a")


def write(folder, **texts):
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_bytes(text)
    return [folder / name for name in texts]


def test_files_lose_their_repeats(tmp_path):
    notice = b"All rights are reserved by everyone. "
    whole = b"a text of its own, which has no end. " + notice
    files = write(tmp_path / "in", a=whole, b=notice + b"Another.", c=notice, d=b"\xff\x80" * 20 + notice, e=b"")
    report = dedup_substrings(files, tmp_path / "out", 30)
    left = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert left == {"a": whole, "b": b"Another.", "d": b"\xff\x80" * 20, "e": b""}
    size = len(notice)
    assert (report.documents, report.documents_cut, report.documents_dropped) == (5, 2, 1)
    assert (report.passages, report.cut_bytes) == (3, 3 * size)
    assert report.text_bytes == sum(path.stat().st_size for path in files)
    assert report.examples[0] == {"id": str(files[1]), "text": notice.decode()}


@pytest.mark.parametrize(("max_cut", "kept"), [(1.0, "abc"), (0.5, "ac"), (0.1, "a"), (0.0, "a")])
def test_documents_of_which_too_much_goes_are_dropped(tmp_path, max_cut, kept):
    notice = b"the same forty bytes in every document, "
    files = write(tmp_path / "in", a=notice, b=notice + b"x" * 13, c=notice + bytes(range(128, 192)) * 2)
    dedup_substrings(files, tmp_path / "out", 40, max_cut=max_cut)
    assert "".join(sorted(path.name for path in (tmp_path / "out").iterdir())) == kept


def test_examples_are_few_and_short(tmp_path, monkeypatch):
    monkeypatch.setattr(substrings, "EXAMPLES", 2)
    monkeypatch.setattr(substrings, "EXAMPLE_CHARS", 5)
    files = write(tmp_path / "in", a=b"one text here", b=b"one text here!", c=b"one text here?", d=b"one text here.")
    report = dedup_substrings(files, tmp_path / "out", 10)
    assert [example["text"] for example in report.examples] == ["one t", "one t"]
    assert report.passages == 3


NOTICE = "This notice about cookies stands at the end of every page, of one as of another."
TEXTS = [f"Café one has a text. {NOTICE}", f"Two has another. {NOTICE} It goes on.", NOTICE, "Nothing, as another has"]


def built(tmp_path, monkeypatch, texts=TEXTS, more=(), **config):
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"id": f"d{i}", "text": text}) for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    table = {
        "output": "out",
        "sources": [{"kind": "jsonl", "paths": ["a.jsonl"]}],
        "dedup": [{"kind": "substrings"} | config, *more],
    }
    Build(parse(Recipe, table)).run()
    return tmp_path / "out"


class TestStep:
    def test_cuts_and_reports(self, tmp_path, monkeypatch):
        out = built(tmp_path, monkeypatch, length=60, at="word")
        kept = {document.id: document.text for document in Store(out / "2-substrings")}
        assert kept == {"d0": TEXTS[0], "d1": "Two has another.  It goes on.", "d3": TEXTS[3]}
        (removed,) = map(json.loads, (out / "2-substrings/removed/00000.jsonl").open())
        assert removed["reason"] == "repeated passages"
        assert removed["detail"] == "80 of 80 bytes were there before"
        repeats = json.loads((out / "build.json").read_text())["repeats"]
        assert repeats["passages"] == 2
        assert repeats["cut_bytes"] == 2 * len(NOTICE)
        assert [example["id"] for example in repeats["examples"]] == ["d1", "d2"]
        page = write_build_report(out).read_text()
        assert "Cut out, for it was there before" in page
        assert NOTICE in page
        assert json.loads((out / "2-substrings/index.json").read_text())["documents"] == 3

    def test_takes_a_tokenizer_and_asks_for_it_first(self, tmp_path, monkeypatch):
        with pytest.raises(FileNotFoundError, match=r"no\.json does not exist: the substrings' tokenizer"):
            built(tmp_path, monkeypatch, length=60, tokenizer="no.json")
        (tmp_path / "t.json").write_text("{")
        with pytest.raises(ValueError, match=r"t\.json"):
            built(tmp_path, monkeypatch, length=60, tokenizer="t.json")
        assert not (tmp_path / "out").exists()
        Tokenizer.train([NOTICE * 9], 300, []).save(tmp_path / "t.json")
        out = built(tmp_path, monkeypatch, length=5, tokenizer="t.json")
        assert len(Store(out / "2-substrings")) == 3
        before = (out / "2-substrings/index.json").read_bytes()
        Tokenizer({i: bytes([i]) for i in range(256)}, []).save(tmp_path / "t.json")  # another one is another stage
        out = built(tmp_path, monkeypatch, length=5, tokenizer="t.json")
        assert (out / "2-substrings/index.json").read_bytes() != before

    def test_several_stages_add_up(self, tmp_path, monkeypatch):
        more = [{"kind": "substrings", "length": 11}, {"kind": "lines", "min_chars": 1}, {"kind": "lines"}]
        out = built(tmp_path, monkeypatch, more=more, length=60)
        counted = json.loads((out / "build.json").read_text())
        stages = [json.loads((out / f"{n}-substrings/index.json").read_text())["repeats"] for n in (2, 3)]
        assert [stage["passages"] for stage in stages] == [2, 1]  # " as another" is left for the second
        assert counted["repeats"]["passages"] == 3
        assert counted["repeats"]["cut_bytes"] == sum(stage["cut_bytes"] for stage in stages)
        assert len(counted["repeats"]["examples"]) == 3
        assert counted["lines"] == 2 * 3

    def test_nothing_left_is_an_empty_stage(self, tmp_path, monkeypatch):
        out = built(tmp_path, monkeypatch, texts=["short"], length=10**6)
        assert [document.text for document in Store(out / "2-substrings")] == ["short"]
