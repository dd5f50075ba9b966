"""Encoding against a naive encoder and tiktoken; special tokens; long pieces; several threads and processes."""

import itertools
import multiprocessing
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cs336.tokenizer import PATTERNS, Tokenizer, convert
from cs336.tokenizer.dialect import translate
from cs336.utils.shards import read_meta


def naive_encode(tokenizer, text):
    """Each piece by its merges, always the first in order, leftmost first."""
    rank = {pair: i for i, pair in enumerate(tokenizer.merges)}
    special_ids = tokenizer.special_tokens.values()
    id_of = {token: i for i, token in tokenizer.vocab.items() if i not in special_ids}
    ids = []
    for piece in regex.findall(translate(PATTERNS[tokenizer.pattern]), text):
        tokens = [bytes([byte]) for byte in piece.encode()]
        while len(tokens) > 1:
            best = min(range(len(tokens) - 1), key=lambda i: rank.get((tokens[i], tokens[i + 1]), len(rank)))
            if (tokens[best], tokens[best + 1]) not in rank:
                break
            tokens[best : best + 2] = [tokens[best] + tokens[best + 1]]
        ids += [id_of[token] for token in tokens]
    return ids


TEXTS = st.one_of(
    st.text("ab", max_size=200),
    st.text("the in\n  self.re'll x19", max_size=60),
    st.text(st.characters(codec="utf-8"), max_size=40),
)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
@example("ab" * 64)
@example("ab" * 64 + "a")
@example("self" * 100)
def test_equal_to_naive(tokenizer, text):
    ids = tokenizer.encode_ordinary(text)
    assert ids == naive_encode(tokenizer, text)
    assert ids == tokenizer.encode_ordinary(text)  # now from the cache
    assert tokenizer.decode(ids) == text


def test_every_length_of_a_piece(tokenizer):
    for size in [*range(1, 20), *range(120, 140), 299]:
        for text in ("x" * size, " " * size, ("ab" * size)[:size], ("reself" * size)[:size]):
            assert tokenizer.encode(text) == naive_encode(tokenizer, text), (size, text[:6])


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=60))
def test_any_bytes_come_back(tokenizer, data):
    assert tokenizer.decode_bytes(tokenizer.encode(data)) == data


@pytest.mark.parametrize("pattern", PATTERNS)
def test_equal_to_tiktoken(pattern, text):
    tiktoken = pytest.importorskip("tiktoken")
    trained = Tokenizer.train([text], 1200, ["<|endoftext|>"], pattern)
    ranks = {token: i for i, token in trained.vocab.items() if i not in trained.special_tokens.values()}
    theirs = tiktoken.Encoding(
        "ours", pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens=trained.special_tokens
    )
    by_rank = Tokenizer(trained.vocab, None, trained.special_tokens, pattern)
    marked = text[:5000] + "<|endoftext|>" + text[-5000:]
    for ours in (trained, by_rank):
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)
        for part in range(0, len(text), 997):  # cuts words and runs anywhere
            piece = text[part : part + 997]
            assert ours.encode(piece) == theirs.encode(piece)
        assert ours.encode(marked, allowed_special="all") == theirs.encode(marked, allowed_special="all")
        assert ours.encode(marked, disallowed_special=()) == theirs.encode(marked, disallowed_special=())
    assert by_rank.merges == trained.merges


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.lists(st.text("ab", min_size=2, max_size=6), unique=True, max_size=20),
    texts=st.lists(st.text("ab", max_size=140), max_size=4),
)
@example(tokens=["aaa", "aa"], texts=["aaaa" * 50])
@example(tokens=["abab", "bab", "ba"], texts=["abab", "ababab" * 40])
def test_any_ranks_equal_tiktoken(tokens, texts):
    """Ranks that no training gives: tokens without parts, or of a lower rank than their parts."""
    tiktoken = pytest.importorskip("tiktoken")
    vocab = dict(enumerate([text.encode() for text in tokens] + [bytes([i]) for i in range(256)]))
    ranks = {token: i for i, token in vocab.items()}
    theirs = tiktoken.Encoding("any", pat_str=PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens={})
    ours = Tokenizer(vocab, None)
    for text in texts:
        assert ours.encode(text) == theirs.encode(text)


def test_ids_in_any_order(tokenizer, text):
    """A vocabulary with its ids shuffled and with holes encodes as the original, id for id."""
    order = np.random.default_rng(0).permutation(5000)
    moved = {i: int(order[i]) for i in tokenizer.vocab}
    other = Tokenizer(
        {moved[i]: token for i, token in tokenizer.vocab.items()}, tokenizer.merges, list(tokenizer.special_tokens)
    )
    assert other.special_tokens == {name: moved[i] for name, i in tokenizer.special_tokens.items()}
    assert other.encode(text) == [moved[i] for i in tokenizer.encode(text)]
    assert other.vocab_size == max(moved.values()) + 1


# ---- special tokens ----


def test_specials_raise_unless_allowed(tokenizer):
    text, eot = "a<|endoftext|>b", tokenizer.special_tokens["<|endoftext|>"]
    with pytest.raises(ValueError, match=r"contains the special token <\|endoftext\|>.*allowed_special"):
        tokenizer.encode(text)
    with pytest.raises(ValueError, match="not allowed here"):
        tokenizer.encode(text, allowed_special={"<|end|>"})
    with pytest.raises(ValueError, match="not allowed here"):
        tokenizer.encode_batch(["", text])
    with pytest.raises(ValueError, match="not allowed here"):
        tokenizer.encode_batch_numpy([text])
    with pytest.raises(ValueError, match="not allowed here"):
        list(tokenizer.encode_iterable(text, allowed_special=()))
    split = [*tokenizer.encode("a"), eot, *tokenizer.encode("b")]
    assert tokenizer.encode(text, allowed_special="all") == split
    assert tokenizer.encode(text, allowed_special={"<|endoftext|>"}) == split
    assert tokenizer.encode(text, disallowed_special={"<|end|>"}) == tokenizer.encode_ordinary(text)
    assert tokenizer.encode_batch([text, "b"], allowed_special="all") == [split, tokenizer.encode("b")]
    assert eot not in tokenizer.encode_ordinary(text)
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text


def test_longest_special_first(tokenizer):
    ids = tokenizer.special_tokens
    encoded = tokenizer.encode("<|end|><|of|><|end|><|end|><|of|", allowed_special="all")
    assert encoded == [ids["<|end|><|of|>"], ids["<|end|>"], ids["<|end|>"], *tokenizer.encode("<|of|")]
    only_short = tokenizer.encode("<|end|><|of|>", allowed_special={"<|end|>"}, disallowed_special=())
    assert only_short == [ids["<|end|>"], *tokenizer.encode("<|of|>")]


@settings(max_examples=300, deadline=None)
@given(
    specials=st.lists(st.text("ab<", min_size=1, max_size=4), unique=True, max_size=6),
    text=st.text("ab<c ", max_size=30),
)
@example(specials=["a", "ab", "b<", "<"], text="ab<aab")
def test_overlapping_specials(specials, text):
    tokenizer = Tokenizer({i: bytes([i]) for i in range(256)}, [], specials)
    longest_first = "|".join(regex.escape(special) for special in sorted(specials, key=len, reverse=True))
    parts = regex.split(f"({longest_first})", text) if specials else [text]
    expected = []
    for i, part in enumerate(parts):
        expected += [tokenizer.special_tokens[part]] if i % 2 else list(part.encode())
    assert tokenizer.encode(text, allowed_special="all") == expected
    assert list(tokenizer.encode_iterable(text, "all")) == expected
    assert tokenizer.decode(expected) == text


def test_unknown_special_names(tokenizer):
    with pytest.raises(ValueError, match="not special tokens of this tokenizer"):
        tokenizer.encode("a", allowed_special={"<|eot|>"})
    with pytest.raises(ValueError, match='expected "all" or a set'):
        tokenizer.encode("a", allowed_special="<|endoftext|>")


def test_ordinary_text_never_becomes_special():
    vocab = {i: bytes([i]) for i in range(256)} | {256: b"ab", 257: b"abc"}
    tokenizer = Tokenizer(vocab, [(b"a", b"b"), (b"ab", b"c")], ["abc", "a"])
    assert tokenizer.special_tokens == {"abc": 258, "a": 259}
    assert tokenizer.encode("abca", disallowed_special=()) == [257, 97]
    assert tokenizer.encode("abca", allowed_special="all") == [258, 259]


def test_ranks_never_merge_to_a_special_token():
    tokenizer = Tokenizer({i: bytes([i]) for i in range(256)}, None, ["ab"])
    assert tokenizer.encode_ordinary("ab") == [97, 98]
    assert tokenizer.encode("ab", allowed_special="all") == [256]


# ---- odd input ----


def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("\U0001f600")
    assert tokenizer.encode_batch(["\udfff"]) == [tokenizer.encode("\ufffd")]
    assert list(tokenizer.encode_iterable(["a\ud83d", "\ude00\ud83d"])) == tokenizer.encode("a\U0001f600\ufffd")


MIXED = st.text(st.sampled_from("ab \n\xe9\xff\u4e2d\uffff\U0001f600\U0010ffff\ud800\udbff\udc00\udfff"), max_size=90)


@settings(max_examples=300, deadline=None)
@given(text=MIXED, ascii_before=st.integers(0, 70), damage=st.lists(st.integers(0, 255), max_size=3))
def test_text_of_every_width_and_back(tokenizer, text, ascii_before, damage):
    text = "x" * ascii_before + text
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    ids = tokenizer.encode_ordinary(text)
    assert tokenizer.decode_bytes(ids) == expected.encode()
    assert tokenizer.decode(ids) == expected
    assert hash(tokenizer.decode(ids)) == hash(expected)
    data = bytearray(expected.encode())
    for byte in damage:
        data.insert(byte % (len(data) + 1), byte)
    assert tokenizer.decode(tokenizer.encode_ordinary(bytes(data))) == data.decode("utf-8", "replace")


@pytest.mark.parametrize("bad", [None, 1, ["a"], bytearray(b"a"), np.zeros(3)])
def test_what_is_not_text(tokenizer, bad):
    with pytest.raises(TypeError, match="expected str or bytes"):
        tokenizer.encode(bad)
    with pytest.raises(TypeError, match="expected str or bytes"):
        tokenizer.encode_batch([bad])


def test_a_vocabulary_without_all_bytes():
    tokenizer = Tokenizer({0: b" ", 1: b"a", 9: b" a"}, [(b" ", b"a")], ["<e>"])
    assert tokenizer.encode("a a") == [1, 9]
    assert tokenizer.encode("<e>a", allowed_special="all") == [10, 1]
    for call, text in ((tokenizer.encode, "ab"), (tokenizer.encode_batch, ["ab"])):
        with pytest.raises(ValueError, match="the byte 0x62 of the text is not in the vocabulary"):
            call(text)
    with pytest.raises(ValueError, match="0x62"):
        tokenizer.encode("a" * 200 + "b" + "a" * 200)
    assert tokenizer.encode("a a") == [1, 9]


def test_a_token_that_merges_do_not_lead_to():
    """Listed merges decide, even for a piece that is a token; where ids are ranks, such a piece is that token."""
    vocab = {i: bytes([i]) for i in range(256)} | {256: b"bc", 257: b"abc"}
    assert Tokenizer(vocab, [(b"b", b"c")]).encode("abc") == [97, 256]
    assert Tokenizer(vocab | {257: b"abcd"}, None).encode("abcd") == [257]


def test_empty(tokenizer):
    assert tokenizer.encode("") == tokenizer.encode(b"") == []
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.encode_batch(["", "a", ""]) == [[], tokenizer.encode("a"), []]
    assert tokenizer.decode([]) == ""
    assert Tokenizer({}, []).encode("") == []


@pytest.mark.parametrize("one", ["abc", b"abc", ""])
def test_one_text_is_no_batch(tokenizer, one):
    for call in (tokenizer.encode_batch, tokenizer.encode_batch_numpy, tokenizer.encode_documents):
        with pytest.raises(ValueError, match="expected a list of texts, got one text"):
            call(one)


def test_batch_to_numpy(tokenizer, text):
    texts = [text[i : i + 1000] for i in range(0, len(text), 1000)] + [""]
    lists = tokenizer.encode_batch(texts)
    assert lists == [tokenizer.encode(part) for part in texts]
    for threads in (1, 3):
        ids, offsets = tokenizer.encode_batch_numpy(texts, num_threads=threads)
        assert (ids.dtype, offsets.dtype, offsets.shape) == (np.uint16, np.int64, (len(texts) + 1,))
        assert [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)] == lists
    for largest, dtype in ((65535, np.uint16), (65536, np.uint32)):
        wide = Tokenizer({**{i: bytes([i]) for i in range(256)}, largest: b"ab"}, [(b"a", b"b")])
        ids, _ = wide.encode_batch_numpy(["ab"])
        assert (ids.dtype, ids.tolist()) == (dtype, [largest])


def test_documents(tokenizer, text):
    texts = [text[:5000], "", "<|end|>", b"\xff", "\u00e9"]
    end = tokenizer.special_tokens["<|endoftext|>"]
    for threads in (1, 3):
        ids, num_bytes = tokenizer.encode_documents(texts, num_threads=threads)
        assert ids.tolist() == [i for part in texts for i in [*tokenizer.encode_ordinary(part), end]]
        assert num_bytes == sum(len(part if isinstance(part, bytes) else part.encode()) for part in texts)
    ids, num_bytes = tokenizer.encode_documents([])
    assert (ids.tolist(), ids.dtype, num_bytes) == ([], np.uint16, 0)
    with pytest.raises(ValueError, match=r"'<\|other\|>' is not a special token"):
        tokenizer.encode_documents(texts, "<|other|>")


def test_one_long_text_on_several_threads(tokenizer, text):
    long = (text + "<|end|>") * 5
    expected = tokenizer.encode(long, allowed_special="all")
    assert tokenizer.encode(long, allowed_special="all", num_threads=3) == expected
    assert tokenizer.encode_batch([long], 3, allowed_special="all") == [expected]
    assert tokenizer.encode_ordinary(long, num_threads=3) == tokenizer.encode_ordinary(long)


def test_texts_keep_their_order_on_several_threads(tokenizer, text):
    """Short and long ones, of every width of character, of several groups."""
    long = text * (1 + (5 << 18) // len(text))
    wide = (text[:200_000], text[:200_000].encode("latin-1", "replace"), "\u00e9" + text[:1000], "\U0001f600" * 9)
    texts = [*wide, "", long, *wide, long.encode(), "x", *wide * 5]
    expected = [tokenizer.encode(part, disallowed_special=()) for part in texts]
    for threads in (1, 2, 5):
        assert tokenizer.encode_batch(texts, threads, disallowed_special=()) == expected
        ids, offsets = tokenizer.encode_batch_numpy(texts, threads, disallowed_special=())
        assert [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)] == expected
        ids, num_bytes = tokenizer.encode_documents(texts, num_threads=threads)
        end = tokenizer.special_tokens["<|endoftext|>"]
        assert ids.tolist() == [i for part in expected for i in [*part, end]]
        assert num_bytes == sum(len(part if isinstance(part, bytes) else part.encode()) for part in texts)
        with pytest.raises(ValueError, match="not allowed here"):
            tokenizer.encode_batch([*texts, "<|endoftext|>"], threads)


def test_bad_number_of_threads(tokenizer):
    one = tokenizer.encode, tokenizer.encode_ordinary
    for call in (*one, tokenizer.encode_batch, tokenizer.encode_batch_numpy):
        for bad in (0, -1):
            with pytest.raises(ValueError, match=f"num_threads must be at least 1.*got {bad}"):
                call("a" if call in one else ["a"], num_threads=bad)


@pytest.mark.parametrize("letters", ["x", " ", "ab", "\u4e2d", "=", "7", "\n", ""])
def test_time_is_linear_in_long_pieces(tokenizer, letters):
    rng = np.random.default_rng(0)

    def seconds(size):
        text = letters * (size // len(letters)) if letters else "".join(map(chr, rng.integers(97, 123, size)))
        start = time.process_time()
        assert tokenizer.decode(tokenizer.encode(text)) == text
        return time.process_time() - start

    seconds(1 << 12)
    small, large = min(seconds(1 << 15) for _ in range(3)), seconds(1 << 20)
    assert large < 32 * 6 * max(small, 1e-3)  # 32 times the text: quadratic is 1024 times the time


CACHE = """
import random
from cs336.tokenizer import Tokenizer

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

rng = random.Random(1)
letters = b"abcdefghijklmnopqrstuvwxyz"
long = {256 + i: bytes(rng.choices(letters, k=20)) for i in range(3000)}
tokenizer = Tokenizer({i: bytes([i]) for i in range(256)} | long, None)
tokenizer.encode("start")
before = resident()
for _ in range(12):
    tokenizer.encode_batch_numpy([b"".join(b" " + bytes(rng.choices(letters, k=254)) for _ in range(4000))], 1)
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads memory in use from /proc")
def test_the_cache_is_bounded():
    grown = subprocess.run([sys.executable, "-c", CACHE], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 30e6  # distinct words and their ids are 50 MB


# ---- decoding ----


def test_decode_bad_ids(tokenizer):
    for bad in (-1, tokenizer.vocab_size, 1 << 40, 1 << 70, -(1 << 70)):
        with pytest.raises(ValueError, match="is not in the vocabulary, whose ids are below 1500"):
            tokenizer.decode([97, bad])
        with pytest.raises(ValueError, match="is not in the vocabulary"):
            tokenizer.token_bytes(bad)
    for bad in ("a", b"a", bytearray(b"a"), [None], [1.0], 5, np.array([1.0]), np.zeros((1, 1), int)):
        with pytest.raises(TypeError):
            tokenizer.decode(bad)
    with pytest.raises(ValueError, match="id 300 is not in the vocabulary"):
        Tokenizer({0: b"a", 400: b"b"}, []).decode([300])


def test_decode_tokens_of_any_size():
    sizes = [1, 2, 14, 15, 16, 17, 18, 300, 5000]
    vocab = {3 * i: bytes([97 + i]) * size for i, size in enumerate(sizes)}
    tokenizer = Tokenizer(vocab, None)
    rng = np.random.default_rng(0)
    ids = 3 * rng.integers(0, len(sizes), 20_000)
    expected = b"".join(vocab[i] for i in ids.tolist())
    assert tokenizer.decode_bytes(ids) == tokenizer.decode_bytes(ids.tolist()) == expected
    with pytest.raises(ValueError, match="id 4 is not in the vocabulary"):
        tokenizer.decode(np.append(ids, 4))


def test_decode_batch(tokenizer):
    texts = ["one", "", "\u00e9 three"]
    assert tokenizer.decode_batch(tokenizer.encode_batch(texts)) == texts
    assert tokenizer.decode_batch(np.array([[97, 98], [99, 100]])) == ["ab", "cd"]


def test_token_to_id(tokenizer):
    for i, token in list(tokenizer.vocab.items())[:300]:
        assert tokenizer.token_to_id(token) == i
    assert tokenizer.token_to_id("<|end|>") == tokenizer.special_tokens["<|end|>"]
    for missing in ("no such token", b"<|end|>", "", "\ud800"):
        with pytest.raises(ValueError, match="is not a token of the vocabulary"):
            tokenizer.token_to_id(missing)


def test_decode_takes_any_iterable(tokenizer):
    assert tokenizer.decode(np.array([])) == tokenizer.decode([]) == ""
    ids = tokenizer.encode("any iterable")
    for dtype in (np.uint16, np.uint32, np.int32, np.int64):
        assert tokenizer.decode(np.array(ids, dtype)) == "any iterable"
        assert tokenizer.decode(np.repeat(np.array(ids, dtype), 2)[::2]) == "any iterable"
    assert tokenizer.decode(tuple(ids)) == tokenizer.decode(iter(ids)) == "any iterable"
    with pytest.raises(ValueError, match="id -1 is not"):
        tokenizer.decode(np.array([-1]))


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 1499), max_size=30))
def test_decode_is_that_of_python(tokenizer, ids):
    data = b"".join(tokenizer.vocab[i] for i in ids)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.decode(ids) == data.decode("utf-8", "replace")
    assert "".join(tokenizer.decode_stream(ids)) == data.decode("utf-8", "replace")


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=30))
def test_offsets_are_those_of_characters(tokenizer, text):
    ids = tokenizer.encode_ordinary(text)
    decoded, offsets = tokenizer.decode_with_offsets(ids)
    assert decoded == text
    begin = 0
    for i, offset in zip(ids, offsets, strict=True):
        first = text.encode()[: begin + 1].decode("utf-8", "replace")  # up to the first byte of the token
        assert offset == len(first) - 1
        begin += len(tokenizer.token_bytes(i))
    with pytest.raises(ValueError, match="utf-8"):
        tokenizer.decode_with_offsets([0xFF])


# ---- threads and processes ----


def test_many_threads_share_one(tokenizer, text):
    texts = [text[i : i + 4000] for i in range(0, len(text), 4000)]
    expected = [tokenizer.encode(part) for part in texts]
    fresh = pickle.loads(pickle.dumps(tokenizer))  # nothing in it is cached yet
    changing = list(range(1000))
    start = threading.Barrier(8)

    def work(worker):
        start.wait(timeout=60)
        assert fresh.fingerprint == tokenizer.fingerprint
        assert fresh.encode("<|end|>", {"<|end|>"}) == [fresh.special_tokens["<|end|>"]]
        for i in range(worker, worker + 2 * len(texts)):
            k = i % len(texts)
            assert fresh.encode(texts[k]) == expected[k]
            assert fresh.decode(expected[k]) == texts[k]
            assert list(fresh.encode_iterable([texts[k]])) == expected[k]
            assert fresh.encode_batch_numpy([texts[k]], 2)[0].tolist() == expected[k]
            changing.append(changing.pop(0))
            assert len(fresh.decode_bytes(changing)) > 900  # without what the others have taken out meanwhile

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def encode_in_child(tokenizer, text):
    return tokenizer.encode(text), tokenizer.encode_batch([text, text], 3), tokenizer.fingerprint


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes(tokenizer, text, method):
    tokenizer.encode_batch([text] * 4, 4)
    ids = tokenizer.encode(text)
    stop = threading.Event()
    busy = threading.Thread(target=lambda: [tokenizer.encode(text) for _ in iter(stop.is_set, True)])
    busy.start()  # a fork may find the tokenizer in use
    try:
        with multiprocessing.get_context(method).Pool(2) as pool:
            for result in pool.starmap_async(encode_in_child, [(tokenizer, text)] * 4).get(timeout=120):
                assert result == (ids, [ids, ids], tokenizer.fingerprint)
    finally:
        stop.set()
        busy.join()


def test_pickle(tokenizer, text):
    for original in (tokenizer, Tokenizer(tokenizer.vocab, None, ["<|end|>"], r"\p{L}+|\P{L}")):
        copy = pickle.loads(pickle.dumps(original))
        assert copy == original
        assert repr(copy) == repr(original)
        assert copy.encode_ordinary(text) == original.encode_ordinary(text)


def test_needs_no_torch():
    code = "import sys; from cs336.tokenizer import Tokenizer; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
@pytest.mark.parametrize("megabytes", [0.3, 2])
def test_running_out_of_memory_leaves_a_tokenizer_that_works(megabytes):
    program = """
import random, resource, sys
from cs336.tokenizer import Tokenizer

random.seed(0)
letters = "abcdefghijklmnopqrstuvwxyz"
tokenizer = Tokenizer({i: bytes([i]) for i in range(256)}, [])
text = " ".join("".join(random.choices(letters, k=random.randint(3, 14))) for _ in range(200_000))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(float(sys.argv[1]) * 1e6), -1))
try:
    tokenizer.encode_ordinary(text)
except MemoryError:
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    assert tokenizer.encode_ordinary(text) == list(text.encode())
else:
    raise SystemExit("there was memory enough")
"""
    subprocess.run([sys.executable, "-c", program, str(megabytes)], check=True)


def test_allowed_special_of_the_constructor(tokenizer, tmp_path):
    text = "a<|end|>b"
    with pytest.raises(ValueError, match="not allowed here"):
        tokenizer.encode(text)
    expected = tokenizer.encode(text, allowed_special="all")
    tokenizer.save(tmp_path / "t.json")
    tokenizer.to_gpt2(tmp_path / "vocab.json", tmp_path / "merges.txt")
    tokenizer.to_tiktoken(tmp_path / "ranks")
    specials, files = tokenizer.special_tokens, (tmp_path / "vocab.json", tmp_path / "merges.txt")
    for allowed in ("all", {"<|end|>"}):
        for made in (
            Tokenizer(tokenizer.vocab, tokenizer.merges, specials, allowed_special=allowed),
            Tokenizer.load(tmp_path / "t.json", allowed_special=allowed),
            convert.load(tmp_path / "t.json", allowed_special=allowed),
            Tokenizer.from_huggingface(tmp_path / "t.json", allowed_special=allowed),
            Tokenizer.from_gpt2(*files, list(specials), allowed_special=allowed),
            Tokenizer.from_tiktoken(tmp_path / "ranks", "gpt2", specials, allowed_special=allowed),
            pickle.loads(pickle.dumps(Tokenizer.load(tmp_path / "t.json", allowed_special=allowed))),
        ):
            assert made.encode(text) == expected
            assert made.encode_batch([text]) == [expected]
            assert made.encode_batch_numpy([text])[0].tolist() == expected
            assert [*made.encode_iterable([text])] == expected
            assert made.encode(text, allowed_special=(), disallowed_special=()) == tokenizer.encode_ordinary(text)
    with pytest.raises(ValueError, match="are not special tokens"):
        Tokenizer(tokenizer.vocab, tokenizer.merges, specials, allowed_special={"<|none|>"})


def test_shards_of_another_tokenizer_are_kept(tokenizer, tmp_path):
    other = Tokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens, "cl100k")
    tokenizer.encode_to_file(["a"], tmp_path / "shards")
    tokenizer.encode_to_file(["ab"], tmp_path / "shards")
    with pytest.raises(ValueError, match=r"holds shards of another tokenizer.*replace=True"):
        other.encode_to_file(["a"], tmp_path / "shards")
    assert read_meta(tmp_path / "shards").tokenizer == tokenizer.fingerprint
    other.encode_to_file(["a"], tmp_path / "shards", replace=True)
    assert read_meta(tmp_path / "shards").tokenizer == other.fingerprint


def test_saving_into_no_directory(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        tokenizer.save(tmp_path / "none" / "t.json")
    assert error.value.filename == str(tmp_path / "none")
