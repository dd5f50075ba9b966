"""Text in chunks encodes as the whole; ids decode to text without half a character."""

import itertools
import pathlib
import threading

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cs336 import _text
from cs336.tokenizer import PATTERNS, Tokenizer
from cs336.utils.shards import open_tokens

PARTS = [
    "<|end|>",
    "<|end|><|of|>",
    "<|endoftext|>",
    "<|",
    "|>",
    "I'm",
    "'ll",
    "  ",
    "\n",
    " x",
    "don",
    "1234",
    "\u4e2d\u6587",
]
TEXTS = st.one_of(
    st.lists(st.sampled_from([*PARTS, "\U0001f600", "\u3000", "!\n/"]), max_size=20).map("".join),
    st.text(st.characters(codec="utf-8"), max_size=30),
)


@pytest.fixture(scope="module", params=[*PATTERNS, r"[\p{L}_]+|[^\p{L}_]+"])
def stream_tokenizer(request, text):
    specials = ["<|endoftext|>", "<|end|>", "<|end|><|of|>", "n <|"]
    return Tokenizer.train([text], 600, specials, pattern=request.param)


def ids_of_chunks(tokenizer, chunks, least):
    stream = _text.StreamEncoder(tokenizer._core, tokenizer._get_policy("all", "all"), least)
    return [i for chunk in chunks for i in stream.feed(chunk, False)] + stream.feed("", True)


def test_a_stream_refuses_a_second_thread():
    refusals = []

    def feed():
        with pytest.raises(ValueError, match="one thread's at a time") as refusal:
            stream.feed("b", True)
        refusals.append(refusal)

    def split(data):  # in the middle of the feed below
        other = threading.Thread(target=feed)
        other.start()
        other.join()
        return [len(data)]

    encoder = _text.Encoder(
        [(i, bytes([i])) for i in range(256)], ordinary=range(256), merges=None, specials=[], pattern=split
    )
    stream = _text.StreamEncoder(encoder, _text.Policy([], []), 1)
    assert stream.feed("a", True) == [97]
    assert len(refusals) == 1


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 200), max_size=8))
@example(text="a  <|end|><|of|> I'm  \n x", cuts=[])
def test_any_chunking_gives_the_same(stream_tokenizer, text, cuts):
    expected = stream_tokenizer.encode(text, allowed_special="all")
    assert list(stream_tokenizer.encode_iterable(text, "all")) == expected  # one character at a time
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    chunks = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert list(stream_tokenizer.encode_iterable(chunks, "all")) == expected
    assert ids_of_chunks(stream_tokenizer, text, 1) == expected  # encodes what it can after every character
    data = text.encode()
    one_byte_each = (data[i : i + 1] for i in range(len(data)))
    assert ids_of_chunks(stream_tokenizer, one_byte_each, 1) == expected


def test_long_texts_in_small_chunks(tokenizer, text):
    long = (text + "<|end|>") * 3
    expected = tokenizer.encode(long, allowed_special="all")
    for size in (10, 1000, 65_537):
        chunks = (long[i : i + size] for i in range(0, len(long), size))
        assert list(tokenizer.encode_iterable(chunks, "all")) == expected


def test_to_file(tokenizer, text, tmp_path, monkeypatch):
    documents = [text[i : i + 3000] for i in range(0, 60_000, 3000)] + ["", b"\xff<|end|>", "\u00e9"]
    eot = tokenizer.special_tokens["<|endoftext|>"]
    expected = [i for part in documents for i in [*tokenizer.encode_ordinary(part), eot]]
    for step, threads in ((1, 1), (20_000, 3), (1 << 20, 2)):
        monkeypatch.setattr("cs336.tokenizer.tokenizer.FILE_STEP", step)
        meta = tokenizer.encode_to_file(iter(documents), tmp_path, num_threads=threads, shard_tokens=5000)
        shards, read = open_tokens(tmp_path)
        assert [i for shard in shards for i in shard.tolist()] == expected
        assert read == meta
        assert (meta.documents, meta.tokens, meta.tokenizer) == (23, len(expected), tokenizer.fingerprint)
        assert meta.text_bytes == sum(len(part.encode() if isinstance(part, str) else part) for part in documents)
    with pytest.raises(ValueError, match=r"'<\|other\|>' is not a special token"):
        tokenizer.encode_to_file(documents, tmp_path, "<|other|>")


@pytest.mark.parametrize(
    ("documents", "error", "message"),
    [
        ("one text", ValueError, "expected a list of texts, got one text or path"),
        (b"one text", ValueError, "expected a list of texts, got one text or path"),
        (pathlib.Path("text.txt"), ValueError, "expected a list of texts, got one text or path"),
        (["a", 3], TypeError, "a document must be str or bytes, got int"),
        ([], ValueError, "there are no documents"),
    ],
)
def test_to_file_of_what_are_no_documents(tokenizer, documents, error, message, tmp_path):
    with pytest.raises(error, match=message):
        tokenizer.encode_to_file(documents, tmp_path / "tokens")
    assert not list(tmp_path.rglob("*.*"))


def test_lazy(tokenizer):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield "some words " * 100

    first = list(itertools.islice(tokenizer.encode_iterable(endless()), 1000))
    assert first == tokenizer.encode("some words " * 1000)[:1000]
    assert taken < 200


def test_a_special_token_cut_in_two_still_raises(tokenizer):
    with pytest.raises(ValueError, match="not allowed here"):
        list(tokenizer.encode_iterable(["<|endof", "text|>"]))
    stream = _text.StreamEncoder(tokenizer._core, tokenizer._get_policy((), "all"), 1)
    for char in "some text, and some more text <|end|":
        stream.feed(char, False)
    with pytest.raises(ValueError, match="not allowed here"):
        stream.feed(">", True)
    assert list(tokenizer.encode_iterable("<|endoftext|>", (), ())) == tokenizer.encode_ordinary("<|endoftext|>")


def test_a_disallowed_token_that_begins_in_an_allowed_one_raises_wherever_the_text_is_cut():
    tokenizer = Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<|a|>", "|>x"])
    text = "y " * 40_000 + "<|a|>x"
    for chunks in ([text], [text[:-1], "x"], [text[:-2], ">", "x"], list(text)):
        with pytest.raises(ValueError, match=r"special token \|>x"):
            list(tokenizer.encode_iterable(chunks, {"<|a|>"}, "all"))


def test_half_a_surrogate_pair_before_bytes(tokenizer):
    assert list(tokenizer.encode_iterable(["\ud83d", b"x", "\ude00"])) == tokenizer.encode("\ufffdx\ufffd")


def test_a_long_piece_in_small_chunks_is_not_quadratic(tokenizer):
    chunks = itertools.repeat("x", 300_000)
    assert tokenizer.decode(list(tokenizer.encode_iterable(chunks))) == "x" * 300_000


def test_decode_stream_gives_whole_characters(tokenizer):
    text = "a\u00e9\u4e2d\U0001f600!"
    parts = list(tokenizer.decode_stream(text.encode()))
    assert parts == list(text)
    assert list(tokenizer.decode_stream(b"\xe4\xb8")) == ["\ufffd"]
    assert list(tokenizer.decode_stream(b"\xe4a")) == ["\ufffda"]
    stream = tokenizer.decode_stream(iter([97, 5000]))
    assert next(stream) == "a"
    with pytest.raises(ValueError, match="id 5000"):
        next(stream)
