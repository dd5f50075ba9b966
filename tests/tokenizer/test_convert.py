"""Conversions keep every id, or refuse; what a format does not hold is asked for, never guessed."""

import json

import pytest
import tiktoken
import tiktoken.load

from cs336.tokenizer import PATTERNS, Tokenizer, convert

END = {"<|endoftext|>": 700}
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module", params=PATTERNS)
def trained(request, text):
    vocab = (made := Tokenizer.train([text], 700, pattern=request.param)).vocab
    return Tokenizer(vocab, made.merges, END, request.param)


@pytest.mark.parametrize("to", ["json", "tiktoken", "gpt2"])
def test_there_and_back(trained, to, text, tmp_path):
    untold = convert.save(trained, tmp_path / "converted", to)
    if to == "json":
        assert untold == []
        assert convert.load(tmp_path / "converted") == trained
        return
    assert untold == [f"the pattern {trained.pattern}", "the special token <|endoftext|> = 700"]
    back = convert.load(tmp_path / "converted", trained.pattern, END)
    assert back.special_tokens == END
    assert back.encode_ordinary(text) == trained.encode_ordinary(text)
    convert.save(back, tmp_path / "again.json", "json")
    assert convert.load(tmp_path / "again.json") == back


def test_others_read_what_is_written(trained, text, tmp_path):
    ids = trained.encode_ordinary(text)
    convert.save(trained, tmp_path / "ranks", "tiktoken")
    ranks = tiktoken.load.load_tiktoken_bpe(str(tmp_path / "ranks"))
    pattern = PATTERNS[trained.pattern]
    assert (
        tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens=END).encode_ordinary(text)
        == ids
    )
    convert.save(trained, tmp_path / "gpt2", "gpt2")
    paths = str(tmp_path / "gpt2/vocab.json"), str(tmp_path / "gpt2/merges.txt")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*paths))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    bytes_of_chars = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, bytes_of_chars])
    theirs.add_special_tokens(list(END))
    assert theirs.encode(text, add_special_tokens=False).ids == ids
    theirs.save(str(tmp_path / "theirs.json"))
    assert convert.load(tmp_path / "theirs.json") == trained


@pytest.mark.parametrize("to", ["tiktoken", "gpt2"])
@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        ([b"a", b"b", b"c", b"abc"], [], r"no merge makes the token b'abc', and 0 others"),
        ([b"a", b"b", b"ab", b"ba", b"aba"], ["a b", "b a", "ab a", "a ba"], "made by several merges"),
        ([b"a", b"b", b"c", b"bc", b"ab"], ["a b", "b c"], "ids do not follow the order"),
        ([b"a", b"b", b"abb", b"ab"], ["ab b", "a b"], "ids do not follow the order"),
    ],
)
def test_what_ranks_cannot_say_is_refused(vocab, merges, message, to, tmp_path):
    pairs = [tuple(half.encode() for half in merge.split()) for merge in merges]
    with pytest.raises(ValueError, match=message):
        convert.save(Tokenizer(dict(enumerate(vocab)), pairs), tmp_path / "x", to)
    assert not list(tmp_path.iterdir())


def test_a_special_token_spelled_as_another_token(tmp_path):
    tokenizer = Tokenizer({0: b"a", 1: b"b", 2: b" "}, [], {"\u0120": 3})
    with pytest.raises(ValueError, match=r"vocab\.json cannot hold both the special token"):
        convert.save(tokenizer, tmp_path / "x", "gpt2")


def test_no_pattern_is_guessed(trained, tmp_path):
    for to in ("tiktoken", "gpt2", "json"):
        convert.save(trained, tmp_path / to, to)
    for to in ("tiktoken", "gpt2"):
        with pytest.raises(ValueError, match="give its pattern"):
            convert.load(tmp_path / to)
    with pytest.raises(ValueError, match="of its own: give none"):
        convert.load(tmp_path / "json", "gpt2")


def huggingface(**changes):
    document = {
        "normalizer": None,
        "added_tokens": [],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}, "merges": ["a b", ["ab", "c"]]},
    }
    for path, value in changes.items():
        *parents, key = path.split("__")
        place = document
        for parent in parents:
            place = place[parent]
        place[key] = value
    return document


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "NFC"}}, "normalizer is"),
        ({"model__type": "WordPiece"}, 'the model is "WordPiece"'),
        ({"model__byte_fallback": True}, "byte_fallback is true"),
        ({"model__continuing_subword_prefix": "##"}, "continuing_subword_prefix"),
        ({"model__vocab": {"a": 0, "b": 0, "c": 2, "ab": 3, "abc": 4}}, "two tokens"),
        ({"model__merges": ["a b c"]}, "too many values"),
        ({"model__ignore_merges": True, "model__vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "bc": 5}}, "b'a'"),
        ({"pre_tokenizer": None}, "pre-tokenizer is null"),
        ({"pre_tokenizer__add_prefix_space": True}, "add_prefix_space is true"),
        ({"pre_tokenizer__use_regex": False}, "use_regex is false"),
        ({"added_tokens": [{"content": "<s>", "id": 9, "lstrip": True}]}, "lstrip of the added token"),
        ({"added_tokens": [{"id": 9}]}, "lacks 'content'"),
    ],
)
def test_what_a_tokenizer_does_not_do_is_refused(changes, message, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(huggingface(**changes)))
    with pytest.raises(ValueError, match=message):
        convert.load(path)


def test_merges_that_are_ignored_are_ranks(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(huggingface()))
    assert convert.load(path).encode("abc") == [4]
    path.write_text(json.dumps(huggingface(model__ignore_merges=True)))
    assert convert.load(path) == Tokenizer({0: b"a", 1: b"b", 2: b"c", 3: b"ab", 4: b"abc"}, None)
