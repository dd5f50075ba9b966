"""Training against an independent, naive trainer: a full recount before every merge."""

import collections
import contextlib
import gzip
import itertools
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
import warnings

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cs336 import _text
from cs336.tokenizer import PATTERNS, Tokenizer, training
from cs336.tokenizer.dialect import translate


def split_at_specials(text, specials):
    if not specials:
        return [text]
    longest_first = sorted(specials, key=len, reverse=True)
    return regex.split("|".join(regex.escape(special) for special in longest_first), text)


def naive_merges(documents, num_merges, specials=(), pattern="gpt2"):
    words, expression = collections.Counter(), translate(PATTERNS[pattern])
    for document, times in collections.Counter(documents).items():
        for part in split_at_specials(document, specials):
            for piece in regex.findall(expression, part):
                words[tuple(bytes([byte]) for byte in piece.encode())] += times
    merges = []
    while len(merges) < num_merges:
        pairs = collections.Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        merged = collections.Counter()
        for word, count in words.items():
            tokens, i = [], 0
            while i < len(word):
                size = 2 if word[i : i + 2] == best else 1
                tokens.append(b"".join(word[i : i + size]))
                i += size
            merged[tuple(tokens)] += count
        words = merged
    return merges


def train(documents, vocab_size, specials=(), **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return Tokenizer.train(documents, vocab_size, specials, **options)


DOCUMENTS = st.lists(
    st.one_of(
        st.text("ab", max_size=30),
        st.text("aab  \n", max_size=30),
        st.text("abcAB1'st .\u00e9\u4e2d\U0001f600|<>", max_size=30),
        st.text(
            st.characters(codec="utf-8", categories=["Ll", "Lu", "Nd", "Zs", "Po"], max_codepoint=0x250), max_size=20
        ),
    ),
    max_size=8,
)


@settings(max_examples=400, deadline=None)
@given(documents=DOCUMENTS, num_merges=st.integers(0, 30), threads=st.sampled_from([1, 2, 7]))
@example(documents=["aaaaaaaaaaaaa"], num_merges=6, threads=1)
@example(documents=["abababab ababa baba", "aab abb aab"], num_merges=20, threads=2)
def test_equal_to_naive(documents, num_merges, threads):
    tokenizer = train(iter(documents), 256 + num_merges, num_threads=threads)  # a list of "." alone is one of paths
    assert tokenizer.merges == naive_merges(documents, num_merges)


@settings(max_examples=100, deadline=None)
@given(documents=DOCUMENTS, times=st.lists(st.sampled_from([1, 3, 50, 1000]), min_size=8, max_size=8))
@example(documents=["ab abab", "abcdefgh", "bcd"], times=[1000, 3, 1, 1, 1, 1, 1, 1])
def test_rare_pairs_are_found_when_the_frequent_ones_are_used_up(documents, times):
    repeated = [document for document, n in zip(documents, times, strict=False) for _ in range(n)]
    assert train(iter(repeated), 266, num_threads=2).merges == naive_merges(repeated, 10)


@settings(max_examples=100, deadline=None)
@given(documents=DOCUMENTS, specials=st.lists(st.sampled_from(["<|", "<||>", "ab", "a", "|>b", " "]), unique=True))
@example(documents=["<||>ab<|ab<||>"], specials=["<|", "<||>"])
def test_specials_split_first_and_are_not_counted(documents, specials):
    tokenizer = train(iter(documents), 270 + len(specials), specials)
    merges = naive_merges(documents, 14, specials)
    assert tokenizer.merges == merges
    first = 256 + len(merges)
    assert tokenizer.special_tokens == {special: first + i for i, special in enumerate(specials)}
    assert [tokenizer.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(pattern, text):
    sample = text[:3000] + text[-9000:-7000]
    assert Tokenizer.train([sample], 300, pattern=pattern).merges == naive_merges([sample], 44, pattern=pattern)
    as_expression = Tokenizer.train([sample], 300, pattern=f"(?:{PATTERNS[pattern]})")
    assert as_expression.merges == Tokenizer.train([sample], 300, pattern=pattern).merges


def test_any_number_of_threads_gives_the_same(text):
    documents = [text[i : i + 5000] for i in range(0, len(text), 5000)] * 3 + [text * 12]  # the last is cut into parts
    first, *others = (Tokenizer.train(documents, 1000, ["def", "\n\n"], num_threads=n).fingerprint for n in (1, 2, 7))
    assert others == [first, first]


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("gap", [" ", "."])
def test_merges_with_many_places(gap, threads):
    """Thousands of distinct words with the same few pairs: each merge is shared among the threads. Runs of one letter
    chain, counts tie, and the pairs that are left at the end are rare."""
    letters = random.Random(0)
    words = ["".join(letters.choices("aabc", k=letters.randint(2, 12))) for _ in range(3000)]
    documents = [gap.join(words), gap.join(words[::7] * 3), "ab" * 2000]
    assert train(documents, 256 + 60, num_threads=threads).merges == naive_merges(documents, 60)


@pytest.mark.parametrize("threads", [2, 7])
def test_merges_of_one_long_piece_among_many(threads):
    """One word is nearly all of the text, so that parts of it are small or empty."""
    documents = ["abcab" * 3000, "ab abc cab", "bc"]
    assert train(documents, 256 + 20, num_threads=threads).merges == naive_merges(documents, 20)


@pytest.mark.parametrize("block", [1, 7, 64, 5000])
def test_files_are_streams(block, text, tmp_path, monkeypatch):
    """However a file is read, it trains as the text it holds; the second file does not continue the first."""
    sample = ("<|end|>" + text[-12_000:] + text[:4000] + "<|end|><|of|>" + "\u4e2d" * 100 + "a b " * 50)[
        : 400 * block + 8000
    ]
    specials = ["<|end|>", "<|end|><|of|>"]
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in paths:
        path.write_bytes(sample.encode())
    monkeypatch.setattr(training, "BLOCK", block)
    assert train(paths, 600, specials) == train([sample, sample], 600, specials)
    assert train(str(paths[0]), 600, specials) == train([sample], 600, specials)


def test_paths_are_str_or_path(tmp_path):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in paths:
        path.write_text("text in a file")
    expected = train(["text in a file"] * 2, 270)
    for source in (paths, tuple(paths), iter(paths), [str(path) for path in paths]):
        assert train(source, 270) == expected
    assert train(str(paths[0]), 270) == train(paths[0], 270) == train(["text in a file"], 270)


def test_merges_never_cross_documents():
    assert train(["ab", "ab", "b", "a"], 300).merges == [(b"a", b"b")]
    assert train(["ab", b"ab"], 300).merges == [(b"a", b"b")]


def test_stops_when_no_pair_is_left():
    with pytest.warns(UserWarning, match="after 2 merges: the vocabulary has 259 tokens, not 500"):
        tokenizer = Tokenizer.train(["abc"], 500, ["<|x|>"])
    assert tokenizer.vocab_size == 259
    assert tokenizer.special_tokens == {"<|x|>": 258}
    with pytest.warns(UserWarning, match="after 0 merges"):
        assert Tokenizer.train([], 257).vocab_size == 256


def test_a_vocabulary_far_larger_than_the_text():
    assert train(["abc"], 1 << 40).vocab_size == 258


def test_one_long_piece():
    """A megabyte without a place to split takes no longer than any other: each merge goes to its places alone."""
    assert train(["a" * (1 << 20)], 276).merges == [(b"a" * 2**i, b"a" * 2**i) for i in range(20)]


def test_invalid_utf8_is_kept(tmp_path):
    path = tmp_path / "broken.bin"
    path.write_bytes(b"\xff\xfe\xff\xfe \xff\xfe")
    assert train(path, 257).merges == [(b"\xff", b"\xfe")]


@pytest.mark.parametrize("size", [-1, 0, 256, 257])
def test_vocab_size_too_small(size):
    with pytest.raises(ValueError, match=f"vocab_size {size} is too small: 256 bytes and 2 special tokens need 258"):
        Tokenizer.train(["text"], size, ["<|a|>", "<|b|>"])


def test_files_of_documents(tmp_path):
    documents = ["some text", "here is more text", "naïve 中文 text"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.txt.xz").write_bytes(lzma.compress(documents[0].encode()))
    expected = Tokenizer.train(documents, 280).merges
    for source in (tmp_path / "a.jsonl", str(folder), [folder / "b.jsonl.gz"]):
        assert Tokenizer.train(source, 280).merges == expected
    assert Tokenizer.train(tmp_path / "c.txt.xz", 260).merges == Tokenizer.train(documents[:1], 260).merges
    large = "".join(f"{'x' * (i % 90)} {i}\n\n" for i in range(25_000))  # more than is looked at for a separator
    for name, data in (("one.txt", b"\xff\xfe \xff\xfe"), ("two.md", large.encode()), ("three.bin", b"\0 binary")):
        (folder / name).write_bytes(data)
    named = [folder / name for name in ("b.jsonl.gz", "one.txt", "two.md")]
    assert Tokenizer.train(folder, 300).merges == Tokenizer.train(named, 300).merges
    assert Tokenizer.train([str(folder)], 300).merges == Tokenizer.train(named, 300).merges
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(lines)[:-9])
    with pytest.raises(ValueError, match=r"d\.txt\.gz is damaged"):
        Tokenizer.train(tmp_path / "d.txt.gz", 280)


def test_bad_sources(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text")
    for source in ([str(path), "a document"], iter([str(path)])):
        with pytest.raises(ValueError, match=r"is the name of a file, .* give pathlib\.Path"):
            Tokenizer.train(source, 300)
    for source in ("no such file", ["a missing.txt", "CORPUS.JSONL.GZ"], [str(path), "missing.txt"]):
        with pytest.raises(FileNotFoundError):
            Tokenizer.train(source, 300)
    assert Tokenizer.train(["documents.", "are words", "a.txt is one"], 257).merges
    with pytest.raises(TypeError, match="float"):
        Tokenizer.train(["text"], 300.0)
    with pytest.raises(ValueError, match="source is bytes"):
        Tokenizer.train(b"text", 300)
    with pytest.raises(TypeError, match="a document must be str or bytes, got int"):
        Tokenizer.train([1], 300)
    with pytest.raises(ZeroDivisionError):
        Tokenizer.train((str(1 // i) for i in (1, 0)), 300)


@pytest.mark.parametrize("i", [None, "3", -1, 1 << 24, 1.0])
def test_bad_ids_of_specials(i):
    with pytest.raises(ValueError, match=r"ids must be integers from 0 to 16777215, got"):
        Tokenizer({0: b"a"}, [], {"<|a|>": i})


@pytest.mark.parametrize("specials", [["<|a|>", "<|a|>"], [""], [b"x"], "abc", ["\ud800"]])
def test_bad_specials(specials):
    with pytest.raises(ValueError, match="special"):
        Tokenizer.train(["text"], 300, specials)


@pytest.mark.parametrize("source", ["itertools.repeat('some text ' * 1000)", "endless"])
def test_ctrl_c_stops_reading(source, tmp_path):
    """Endless documents, and an endless pipe."""
    if source == "endless":
        os.mkfifo(tmp_path / "pipe")
        source = repr(str(tmp_path / "pipe"))
    code = (
        f"import itertools; from cs336.tokenizer import Tokenizer; print(1, flush=True); Tokenizer.train({source}, 300)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.readline()
        with open(tmp_path / "pipe", "wb", buffering=0) if "pipe" in source else contextlib.nullcontext() as pipe:
            if pipe:
                pipe.write(b"some text ")
            time.sleep(0.2)
            child.send_signal(signal.SIGINT)
            assert b"KeyboardInterrupt" in child.communicate(timeout=60)[1]


def test_progress_and_interrupt(capsys):
    Tokenizer.train(["some text here"], 260, progress=True)
    assert "4 merges" in capsys.readouterr().out
    counter = _text.WordCounter("gpt2", [], 1)
    counter.add_documents(["some text"])

    def interrupt(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        counter.train(5, interrupt)


@pytest.mark.parametrize("names", [["a.md", "b.md"], ["data/corpus.text"], ["./corpus", "/data/x"]])
def test_names_of_files_that_are_missing(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        Tokenizer.train(names, 300)
