"""Conversions keep every id, or refuse; what a format does not hold is asked for, never guessed."""

import json
import re

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


def test_others_read_what_is_written(trained, text, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # or else it keeps what it has read, by path
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


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        ([b"a", b"b", b"c", b"abc"], [], r"no merge makes the token b'abc'"),
        ([b"a", b"b", b"c", b"aa", b"aaa"], ["a a", "a aa"], "not in the order of the ids"),
        ([b"a", b"b", b"ab", b"ba", b"aba"], ["a b", "b a", "ab a", "a ba"], "not in the order of the ids"),
        ([b"a", b"b", b"c", b"bc", b"ab"], ["a b", "b c"], "not in the order of the ids"),
        ([b"a", b"b", b"abb", b"ab"], ["ab b", "a b"], "not in the order of the ids"),
    ],
)
def test_what_ranks_cannot_say_is_refused(vocab, merges, message, tmp_path):
    pairs = [tuple(half.encode() for half in merge.split()) for merge in merges]
    with pytest.raises(ValueError, match=message):
        convert.save(Tokenizer(dict(enumerate(vocab)), pairs), tmp_path / "x", "tiktoken")
    assert not list(tmp_path.iterdir())


def test_a_special_token_spelled_as_another_token(tmp_path):
    tokenizer = Tokenizer({0: b"a", 1: b"b", 2: b" "}, [], {"\u0120": 3})
    with pytest.raises(ValueError, match=r"vocab\.json cannot hold both a special"):
        convert.save(tokenizer, tmp_path / "x", "gpt2")
    assert not list(tmp_path.iterdir())


def test_special_tokens_of_gpt2_files(trained, tmp_path):
    convert.save(trained, tmp_path / "gpt2", "gpt2")
    found = convert.load(tmp_path / "gpt2", trained.pattern)
    assert found == trained
    convert.save(found, tmp_path / "ranks", "tiktoken")
    assert convert.load(tmp_path / "ranks", trained.pattern, END).encode_ordinary("<|endoftext|> the") == (
        trained.encode_ordinary("<|endoftext|> the")
    )
    with pytest.raises(ValueError, match=r"'<\|endoftext\|>' was given as 701, and its id is 700"):
        convert.load(tmp_path / "gpt2", trained.pattern, {"<|endoftext|>": 701})
    assert convert.load(tmp_path / "gpt2", trained.pattern, END | {"<|new|>": 701}).special_tokens["<|new|>"] == 701


def test_no_pattern_is_guessed(trained, tmp_path):
    for to in ("tiktoken", "gpt2", "json"):
        convert.save(trained, tmp_path / to, to)
    for to in ("tiktoken", "gpt2"):
        with pytest.raises(ValueError, match="give its pattern"):
            convert.load(tmp_path / to)
    with pytest.raises(ValueError, match="of its own: give none"):
        convert.load(tmp_path / "json", "gpt2")


@pytest.mark.parametrize("content", ['{"model": null}', '{"model": 3}', '{"a"', "{}", '{"model": {"cs336": 1}}'])
def test_what_is_no_tokenizer(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        convert.load(path)


ABC = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}


@pytest.mark.parametrize(
    ("vocab", "merges", "accepted"),
    [
        (ABC, ["a b", ["ab", "c"]], True),  # a merge for each token, in order
        (ABC, ["ab c", "a b"], False),
        (ABC | {"bc": 5}, ["a b", "ab c"], False),  # as ranks, b and c would merge
        (ABC | {"bc": 5}, ["a b", "a bc", "ab c", "b c"], True),  # every split
        (ABC | {"bc": 5}, ["b c", "a b", "a bc", "ab c"], False),
    ],
)
def test_merges_that_are_ignored_are_ranks(vocab, merges, accepted, tmp_path):
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": True}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}, "model": model}))
    if accepted:
        assert convert.load(path) == Tokenizer({i: token.encode() for token, i in vocab.items()}, None)
    else:
        with pytest.raises(ValueError, match="not those of its ids as ranks"):
            convert.load(path)
