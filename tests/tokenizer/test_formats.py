"""Files that come back as they went, that others read alike, and that fail plainly where they are broken."""

import base64
import contextlib
import copy
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cs336.tokenizer import PATTERNS, Tokenizer
from cs336.tokenizer.formats import spell, unspell

BYTES = {i: bytes([i]) for i in range(256)}


def test_alphabet():
    assert spell([b" the\n\xff\x00", b"", b"a"]) == ["\u0120the\u010a\u00ff\u0100", "", "a"]
    assert spell([]) == unspell([]) == []
    every_byte = [bytes(range(256)), *BYTES.values()]
    assert unspell(spell(every_byte)) == every_byte
    assert len(set(spell(every_byte)[0])) == 256
    for char in " \n\x80\u0144\U0001f600\ud800":
        with pytest.raises(ValueError, match=r"token .* has .*, which GPT-2's alphabet does not have"):
            unspell(["good", f"a{char}b"])


@pytest.mark.parametrize("pattern", [*PATTERNS, r"[\p{L}_]+|[^\p{L}_]+"])
@pytest.mark.parametrize("merges", ["listed", "ranks"])
def test_save_and_load(pattern, merges, text, tmp_path):
    specials = ["<|z|>", "<|a|>", "\u4e2d\u0120 \n", "def"]
    tokenizer = Tokenizer.train([text], 700, specials, pattern)
    if merges == "ranks":
        tokenizer = Tokenizer(tokenizer.vocab, None, tokenizer.special_tokens, pattern)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert loaded == tokenizer
    assert (loaded.vocab, loaded.merges) == (tokenizer.vocab, tokenizer.merges)
    assert list(loaded.special_tokens.items()) == list(tokenizer.special_tokens.items())
    assert loaded.pattern == tokenizer.pattern
    marked = text[:3000] + "<|z|>\u4e2d\u0120 \ndefine<|a|>" + text[-9000:]
    assert loaded.encode(marked, allowed_special="all") == tokenizer.encode(marked, allowed_special="all")
    first = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == first


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_tokenizer_comes_back(data, tmp_path):
    """Ids in any order with holes, bytes missing, special tokens spelled like others."""
    tokens = data.draw(st.lists(st.binary(min_size=1, max_size=3), unique=True, max_size=12))
    ids = data.draw(st.lists(st.integers(0, 100_000), min_size=len(tokens), max_size=len(tokens), unique=True))
    ordinary = set(tokens)
    pairs = [(a, b) for a in tokens for b in tokens if a + b in ordinary]
    specials = data.draw(st.lists(st.text("ab\u0120\u4e2d", min_size=1, max_size=3), unique=True, max_size=3))
    merges = data.draw(st.sampled_from([pairs, None]))
    tokenizer = Tokenizer(dict(zip(ids, tokens, strict=True)), merges, specials)
    tokenizer.save(tmp_path / "any.json")
    loaded = Tokenizer.load(tmp_path / "any.json")
    assert loaded == tokenizer
    assert (loaded.vocab, loaded.special_tokens) == (tokenizer.vocab, tokenizer.special_tokens)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_hugging_face_reads_what_we_save(pattern, text, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = Tokenizer.train([text], 1200, ["<|end|>", "<|end|><|of|>"], pattern)
    ranked = Tokenizer(tokenizer.vocab, None, tokenizer.special_tokens, pattern)
    holes = {i if i < 1000 else i + 50: token for i, token in tokenizer.vocab.items()}
    for ours in (tokenizer, ranked, Tokenizer(holes, tokenizer.merges, [*tokenizer.special_tokens], pattern)):
        path = tmp_path / "tokenizer.json"
        ours.save(path)
        theirs = tokenizers.Tokenizer.from_file(str(path))
        marked = text + "<|end|><|of|>a<|end|> b" + text[:2000]
        ids = ours.encode(marked, allowed_special="all")
        assert theirs.encode(marked).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == marked
        assert theirs.get_vocab_size() == len(ours.vocab)


def write_gpt2(tokenizer, folder):
    ordinary = {i: token for i, token in tokenizer.vocab.items() if i not in tokenizer.special_tokens.values()}
    names = dict(zip(spell(ordinary.values()), ordinary, strict=True))
    (folder / "vocab.json").write_text(json.dumps(names | tokenizer.special_tokens))
    lines = [" ".join(spell(pair)) for pair in tokenizer.merges]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return folder / "vocab.json", folder / "merges.txt"


def test_gpt2_files(tokenizer, text, tmp_path):
    read = Tokenizer.from_gpt2(*write_gpt2(tokenizer, tmp_path), special_tokens=[*tokenizer.special_tokens])
    assert read == tokenizer
    read = Tokenizer.from_gpt2(tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert read.special_tokens == {"<|endoftext|>": tokenizer.special_tokens["<|endoftext|>"]}
    assert read.encode_ordinary(text) == tokenizer.encode_ordinary(text)


def test_tiktoken_files(tokenizer, text, tmp_path):
    path = tmp_path / "ours.tiktoken"
    ranks = {i: token for i, token in tokenizer.vocab.items() if i not in tokenizer.special_tokens.values()}
    path.write_text("".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in ranks.items()))
    specials = {"<|endoftext|>": 3000, "<|end|>": 2000}
    read = Tokenizer.from_tiktoken(path, "gpt2", specials)
    assert read.special_tokens == specials
    assert read.vocab_size == 3001
    assert read.merges == tokenizer.merges
    assert read.encode_ordinary(text) == tokenizer.encode_ordinary(text)
    assert read.encode("<|end|>", allowed_special="all") == [2000]


# ---- from one format to another ----


ODD = [
    b"\xff\xfe \xe4\xb8",
    b"\xf0\x9f\x98",
    "\U0001f600\u200d\ufe0f e\u0301 \u3000\u3000x \r\n\r\n  y",
    "=" * 70 + " " * 99,
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_conversions_keep_every_id(pattern, text, tmp_path):
    trained = Tokenizer.train([text], 900, ["<|end|>"], pattern)
    ranked = Tokenizer(trained.vocab, None, trained.special_tokens, pattern)
    specials = trained.special_tokens
    for original in (trained, ranked):
        original.save(tmp_path / "tokenizer.json")
        original.to_tiktoken(tmp_path / "ranks")
        original.to_gpt2(tmp_path / "vocab.json", tmp_path / "merges.txt")
        for copy_ in (
            Tokenizer.from_huggingface(tmp_path / "tokenizer.json"),
            Tokenizer.from_tiktoken(tmp_path / "ranks", pattern, specials),
            Tokenizer.from_gpt2(tmp_path / "vocab.json", tmp_path / "merges.txt", specials, pattern),
        ):
            assert (copy_.vocab, copy_.merges, copy_.special_tokens) == (original.vocab, original.merges, specials)
            assert copy_.pattern == pattern
            for sample in (text, *ODD):
                assert copy_.encode_ordinary(sample) == original.encode_ordinary(sample)


def test_what_a_format_cannot_tell(tmp_path):
    vocab = BYTES | {256: b"cd", 257: b"ab"}
    with pytest.raises(ValueError, match="not in the order of the ids"):
        Tokenizer(vocab, [(b"a", b"b"), (b"c", b"d")]).to_tiktoken(tmp_path / "ranks")
    with pytest.raises(ValueError, match="no merge of two others makes the token b'abc'"):
        Tokenizer(BYTES | {256: b"abc"}, None).to_gpt2(tmp_path / "vocab.json", tmp_path / "merges.txt")
    with pytest.raises(ValueError, match="both a special and an ordinary token 'ab'"):
        Tokenizer(vocab, [(b"a", b"b")], {"ab": 300}).to_gpt2(tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert not [*tmp_path.iterdir()]


def test_what_hugging_face_trained(text, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator(
        [text], tokenizers.trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet, special_tokens=["<|e|>"])
    )
    theirs.save(str(tmp_path / "theirs.json"))
    ours = Tokenizer.from_huggingface(tmp_path / "theirs.json")
    assert ours.special_tokens == {"<|e|>": 0}
    for sample in (text, "a<|e|>b", *(odd for odd in ODD if isinstance(odd, str))):
        assert ours.encode(sample, allowed_special="all") == theirs.encode(sample).ids


SPLIT = {"type": "Split", "pattern": {"Regex": r"\s+|\S+"}, "behavior": "Isolated", "invert": False}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": [*steps]}


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (["model", "type"], "Unigram", "expected 'BPE'"),
        (["model", "byte_fallback"], True, "byte_fallback"),
        (["model", "unk_token"], "<unk>", "unk_token"),
        (["normalizer"], {"type": "NFC"}, "without_normalizer=True"),
        (["added_tokens", 0, "lstrip"], True, "white space or word ends"),
        (["pre_tokenizer"], {"type": "Whitespace"}, r'ends with {"type": "Whitespace"}, expected ByteLevel'),
        (["pre_tokenizer", "add_prefix_space"], True, "puts a space before each text"),
        (["pre_tokenizer"], sequence(SPLIT, SPLIT, LEVEL), "one expression after the other"),
        (["pre_tokenizer"], sequence({"type": "Punctuation"}, LEVEL), "before ByteLevel, expected Split or Digits"),
        (["pre_tokenizer"], sequence(), "its tokens are of characters"),
        (["pre_tokenizer"], SPLIT, "expected ByteLevel"),
        (["pre_tokenizer"], sequence(LEVEL, SPLIT), "expected ByteLevel"),
        (["pre_tokenizer"], sequence(SPLIT | {"pattern": {"String": ""}}, LEVEL), "can match nothing at all"),
        (["pre_tokenizer"], sequence(SPLIT | {"behavior": "Removed", "invert": True}, LEVEL), "another way"),
        (["pre_tokenizer"], sequence(SPLIT | {"behavior": "MergedWithNext"}, LEVEL), "another way"),
        (["pre_tokenizer"], sequence(SPLIT | {"invert": True}, LEVEL), "another way"),
        (
            ["pre_tokenizer"],
            sequence(SPLIT | {"pattern": {"Regex": r"\s+$|\S+"}}, LEVEL),
            r"the end of a line or of the text, '\$' at 3, which engines read in different ways",
        ),
        (["model", "ignore_merges"], True, "ignore_merges"),
        (["model", "vocab"], {"a": 1, "b": 1, "<|e|>": 258}, "two tokens"),
        (["pre_tokenizer"], None, "its pre_tokenizer is null: without ByteLevel its tokens are of characters"),
        (["pre_tokenizer"], 3, "pre_tokenizer is 3, expected an object"),
        (["pre_tokenizer"], sequence(None, 3), "pre_tokenizer is 3, expected an object"),
        (["normalizer"], {"type": "Sequence", "normalizers": [{"type": "NFC"}]}, "without_normalizer=True"),
        (["normalizer"], {"type": "Sequence"}, "normalizer lacks 'normalizers'"),
    ],
)
def test_tokenizers_that_would_encode_otherwise(saved, where, value, message, tmp_path):
    saved["model"]["merges"].reverse()
    put(saved, where, value)
    (tmp_path / "theirs.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_huggingface(tmp_path / "theirs.json")
    assert "theirs.json" in str(error.value)
    if where == ["normalizer"] and value == {"type": "NFC"}:
        assert Tokenizer.from_huggingface(tmp_path / "theirs.json", without_normalizer=True).encode("abc") == [257]


# ---- parts that do not fit together ----


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (({-1: b"a"}, []), "ids must be integers from 0"),
        (({1 << 24: b"a"}, []), "ids must be integers from 0"),
        (({"a": b"a"}, []), "ids must be integers from 0"),
        (({True: b"a"}, []), "ids must be integers from 0"),
        (({0: "a"}, []), "tokens must be bytes"),
        (({0: b""}, []), "tokens must be bytes"),
        (({0: b"a", 1: b"a"}, []), "ids 0 and 1 are the same token b'a'"),
        ((BYTES, [(b"a", b"b")]), r"merge 0, of b'a' and b'b', needs the token b'ab'"),
        (({0: b"a", 1: b"ab"}, [(b"a", b"b")]), "needs the token b'b'"),
        (({**BYTES, 256: b"ab"}, [(b"a", b"b"), (b"a", b"b")]), "is listed twice"),
        (({**BYTES, 256: b"ab"}, [("a", "b")]), "a merge must be a pair of bytes"),
        (({**BYTES, 256: b"ab"}, [(b"a", b"b", b"c")]), "a merge must be a pair of bytes"),
        ((BYTES, [], ["<e>", "<e>"]), "a special token is listed twice"),
        ((BYTES, [], [""]), "must be a str, not empty"),
        ((BYTES, [], "<e>"), "special_tokens must be a list"),
        ((BYTES, [], {"<e>": 97}), "cannot have id 97, which is b'a'"),
        ((BYTES, [], {"<e>": -5}), "ids must be integers from 0"),
        ((BYTES, [], ["<e>"], "gpt5("), "neither one of"),
        ((BYTES, [], ["<e>"], "gpt5"), "there is no pattern 'gpt5'"),
    ],
)
def test_parts_that_do_not_fit(parts, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(*parts)


def test_the_largest_id_is_cheap():
    tokenizer = Tokenizer({**BYTES, (1 << 24) - 1: b"ab"}, [(b"a", b"b")])
    assert tokenizer.encode("ab") == [(1 << 24) - 1]
    assert tokenizer.vocab_size == 1 << 24


# ---- broken files ----


@pytest.fixture
def saved(tmp_path):
    tokenizer = Tokenizer({**BYTES, 256: b"ab", 257: b"abc"}, [(b"a", b"b"), (b"ab", b"c")], ["<|e|>"])
    tokenizer.save(tmp_path / "good.json")
    return json.loads((tmp_path / "good.json").read_text())


def put(document, where, value):
    *parents, last = where
    for key in parents:
        document = document[key]
    document[last] = value


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (["model", "cs336"], None, "damaged"),
        (["model", "cs336", "format"], 3, "its format is 3"),
        (["model", "cs336", "pattern"], 7, "expected a text"),
        (["model", "cs336", "pattern"], "(", "neither one of"),
        (["model", "cs336", "pattern"], "cl100k", "its fingerprint does not match"),
        (["model", "cs336", "merges"], "guess", 'expected "listed" or "ranks"'),
        (["model", "cs336", "special_tokens"], ["<|other|>"], "lacks"),
        (["model", "cs336", "special_tokens"], [["x"]], "damaged"),
        (["model", "vocab"], [], "damaged"),
        (["model", "vocab", "ab"], 97, "is given to two tokens"),
        (["model", "vocab", "ab"], 10**30, "ids must be integers from 0"),
        (["model", "vocab", "ab"], -1, "ids must be integers from 0"),
        (["model", "vocab", "ab"], [1], r"ids must be integers: that of 'ab' is \[1\]"),
        (["model", "vocab", "ab"], 300, "its fingerprint does not match"),
        (["model", "vocab", " "], 5000, "alphabet"),
        (["model", "vocab", ""], 5000, "tokens must be bytes"),
        (["model", "merges"], None, "damaged"),
        (["model", "vocab", "ab"], None, "ids must be integers"),
        (["model", "merges"], [["a"]], r'merge 0 is \["a"\], expected two tokens'),
        (["model", "merges"], [["a", 1]], "damaged"),
        (["model", "merges"], [["x", "y"]], "needs the token b'xy'"),
        (["model", "merges"], [["a", "b"]], "its fingerprint does not match"),
        (["added_tokens"], 3, "damaged"),
        (["added_tokens", 0, "id"], "1", "expected a whole number"),
        (["added_tokens", 0, "content"], "<|f|>", "lacks"),
    ],
)
def test_altered_files(saved, where, value, message, tmp_path):
    document = copy.deepcopy(saved)
    put(document, where, value)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"model": {}}']
)
def test_what_is_no_tokenizer(content, tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Tokenizer.load(path)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Tokenizer.from_gpt2(path, path)
    if content:
        with pytest.raises(ValueError, match=re.escape(str(path))):
            Tokenizer.from_tiktoken(path, "gpt2")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_files_cut_or_changed_anywhere(saved, data, tmp_path):
    text = json.dumps(saved)
    place = data.draw(st.integers(0, len(text) - 1))
    broken = text[:place] + data.draw(st.sampled_from(["", "\x00", "9", '"', "]", "}", "null", "-", "\ud800"]))
    broken += data.draw(st.sampled_from(["", text[place + 1 :]]))
    path = tmp_path / "bad.json"
    path.write_bytes(broken.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(ValueError):  # or else the change is in a part that only others read
        assert Tokenizer.load(path) == Tokenizer.load(tmp_path / "good.json")


@pytest.mark.parametrize(
    ("merges", "message"),
    [
        ("a b c\n", "line 1 is 'a b c'"),
        ("#version\na\n", "line 2"),
        ("x y\n", "needs the token b'xy'"),
        ("a \u4e2d", "alphabet"),
    ],
)
def test_broken_merges_txt(merges, message, tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate([*spell(BYTES.values()), "ab"])}))
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"(vocab\.json|merges\.txt).*{message}"):
        Tokenizer.from_gpt2(tmp_path / "vocab.json", tmp_path / "merges.txt")
    (tmp_path / "merges.txt").write_bytes(b"#version: 0.2\r\na b\r\n")
    assert Tokenizer.from_gpt2(tmp_path / "vocab.json", tmp_path / "merges.txt").encode("ab") == [256]


@pytest.mark.parametrize(
    "line", ["YQ==", "YQ== x", "!!!! 1", "YQ== 1 2", "YQ== -1", "YQ== 99999999999", "YQ== 0\nYg== 0", "YQ== 0\nYQ== 1"]
)
def test_broken_ranks(line, tmp_path):
    (tmp_path / "ranks").write_text(line)
    with pytest.raises(ValueError, match=r"ranks.*(line \d is|rank 0 a second time|ids must be|the same token)"):
        Tokenizer.from_tiktoken(tmp_path / "ranks", "gpt2")


def test_a_failed_save_leaves_the_old_file(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    path.write_text("old")
    monkeypatch.setattr(json, "dump", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tokenizer.save(path)
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]
