"""Tokenizers of SentencePiece's kind: the ids and texts of Hugging Face's tokenizers, and of SentencePiece's rule."""

import copy
import json
import pickle
import re

import numpy as np
import pytest

from cs336.cli import main
from cs336.tokenizer import Tokenizer, convert
from cs336.tokenizer import tokenizer as tokenizer_module
from cs336.tokenizer.sentencepiece import SentencePiece
from tests.tokenizer.sentencepieces import (
    LAYOUTS,
    MARK,
    SAID,
    added,
    by_scores,
    document,
    hard_texts,
    metaspace,
    model_file,
    pieces,
    vocabulary,
)

LARGEST = {"fallback": True, "fuse": True}, {"fallback": False, "fuse": True}, {"fallback": False, "fuse": False}


@pytest.fixture
def read(tmp_path):
    """Reads a document, as we do."""

    def read(content, **options):
        (tmp_path / "theirs.json").write_text(json.dumps(content))
        return Tokenizer.from_huggingface(tmp_path / "theirs.json", **options)

    return read


@pytest.mark.parametrize("options", LARGEST, ids=["bytes", "unknown_run", "unknown"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_and_text_are_those_of_tokenizers(layout, options, read, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    content = document(layout, **options)
    ours = read(content, allowed_special="all")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "theirs.json"))
    ours.save(tmp_path / "saved.json")
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "saved.json"))
    specials = [token["content"] for token in content["added_tokens"]]
    for text in hard_texts(150, specials):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids, repr(text)
        assert saved.encode(text, add_special_tokens=False).ids == ids, repr(text)
        said = theirs.decode(ids, skip_special_tokens=False)
        if "\ufffd" not in said:
            assert ours.decode(ids) == said == "".join(ours.decode_stream(ids)), repr(text)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_it_is_the_same(layout, read, tmp_path):
    ours = read(document(layout))
    ours.save(tmp_path / "saved.json")
    for again in (Tokenizer.load(tmp_path / "saved.json"), convert.load(tmp_path / "saved.json"), copy.copy(ours)):
        assert again == ours
        assert again.special_tokens == ours.special_tokens
        assert again.encode(SAID) == ours.encode(SAID)
    assert pickle.loads(pickle.dumps(ours)) == ours
    assert ours != read(document(layout, fallback=False))
    content = json.loads((tmp_path / "saved.json").read_text())
    content["model"]["merges"].pop()
    (tmp_path / "saved.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="was changed after it was saved"):
        Tokenizer.load(tmp_path / "saved.json")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_text_in_chunks(layout, read, monkeypatch):
    ours = read(document(layout), allowed_special="all")
    monkeypatch.setattr(tokenizer_module, "STREAM_STEP", 1)
    for text in hard_texts(60, ours.special_tokens, seed=1):
        expected, data = ours.encode(text), text.encode()
        assert [*ours.encode_iterable(text)] == expected, repr(text)
        assert [*ours.encode_iterable(data[i : i + 1] for i in range(len(data)))] == expected, repr(text)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_text_on_several_threads(layout, read):
    ours = read(document(layout), allowed_special="all")
    text = (SAID + "\n".join(hard_texts(40, ours.special_tokens))) * 600
    assert len(text) > 1 << 20  # which several threads share
    assert ours.encode(text, num_threads=3) == ours.encode(text)
    ids, offsets = ours.encode_batch_numpy([text, SAID, ""], num_threads=3)
    assert ids.tolist() == ours.encode(text) + ours.encode(SAID)
    assert offsets[-1] == offsets[-2]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_bytes_come_back(layout, read):
    ours = read(document(layout))
    for data in (b"\xff", b"\xe2\x96", b"the \x80other\xf0\x9f\x98", bytes(range(256)), b"\xc3\xa9\xc3"):
        assert ours.decode_bytes(ours.encode_ordinary(data)) == data
    with_unknown = read(document(layout, fallback=False))
    assert with_unknown.encode(b"a\xff\xfeb").count(0) == 1


def test_tokens_and_offsets(read):
    ours = read(document())
    ids = ours.encode("the other \u4e2d\n")
    assert [ours.token_bytes(i) for i in ids] == [b" the", b" ", b"other", b" ", "\u4e2d".encode(), b"\n"]
    assert ours.decode_with_offsets(ids) == ("the other \u4e2d\n", [0, 3, 4, 9, 10, 11])
    assert ours.decode_bytes(ids) == ours.decode(ids).encode()
    assert ours.decode_bytes(ids, at_start=False) == b" " + ours.decode(ids).encode()
    assert ours.decode_batch([ids, ids[1:]]) == ["the other \u4e2d\n", "other \u4e2d\n"]
    assert ours.token_to_id(" the") == ids[0]
    assert ours.token_to_id(b"\n") == ids[-1] == 3 + 10
    assert ours.pattern == "sentencepiece"
    assert ours.strips_space
    assert not read(document("gemma")).strips_space


def test_a_text_that_goes_on(read):
    ours = read(document(), allowed_special="all")
    first, second = ours.encode("the other"), ours.encode(" one</s>that", behind=[5])
    assert first + second == ours.encode("the other one</s>that")
    assert ours.encode("that", behind=first) == ours.encode("xthat")[2:]
    assert ours.encode("that", behind=[2]) == ours.encode("</s>that")[1:] == ours.encode("that")
    once = read(document("first"), allowed_special="all")
    assert once.encode("that", behind=[2]) == once.encode("</s>that")[1:] != once.encode("that")


def test_tokens_that_are_not_special_are_in_any_text(read):
    ours = read(document())
    tool = ours.special_tokens["<tool>"]
    assert tool in ours.encode("a <tool> b")
    assert tool in ours.encode_ordinary("a<tool>b")
    with pytest.raises(ValueError, match="special token </s>, which is not allowed here"):
        ours.encode("a</s>")
    assert 2 not in ours.encode_ordinary("a</s>")


def test_what_comes_before_a_text(read, tmp_path):
    content = document()
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    ours = read(content)
    ours.save(tmp_path / "saved.json")
    for found in (ours, Tokenizer.load(tmp_path / "saved.json")):
        assert found.begin_ids == (1,)
        assert found.encode_prompt("the") == found.encode_prompt("<s>the") == [1, *found.encode("the")]
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_file(str(tmp_path / "saved.json"))
    assert theirs.encode("the").ids == ours.encode_prompt("the")


def changed(**parts):
    return document() | parts


def with_token(layout="llama", **flags):
    content = document(layout)
    content["added_tokens"].append(added("[X]", len(vocabulary()) + 4, **flags))
    return content


FIRST, NFKC = document("first"), {"type": "Sequence", "normalizers": [{"type": "NFKC"}, LAYOUTS["llama"][0]]}
MORE = vocabulary() | {"qqq": len(vocabulary())}
FEW = {"<unk>": 0, "<s>": 1, "</s>": 2, MARK: 3, "a": 4}
REFUSED = {
    "other normalizer": (changed(normalizer=NFKC), 'the normalizer {"type": "NFKC"}'),
    "two prefixes": (changed(pre_tokenizer=metaspace("first", False)), "pre_tokenizer has .* behind a normalizer"),
    "another mark": (
        FIRST | {"pre_tokenizer": metaspace("first", False) | {"replacement": "_"}},
        'has "_" for a space',
    ),
    "scheme": (FIRST | {"pre_tokenizer": metaspace("last", False)}, 'prepend_scheme "last"'),
    "no decoder": (changed(decoder=None), "its decoder is null, expected Replace"),
    "decoder": (changed(decoder={"type": "ByteLevel"}), "its decoder is .*ByteLevel"),
    "dropout": (document(dropout=0.1), "its model has dropout = 0.1"),
    "suffix": (document(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    "no bytes": (document(vocab=FEW, extra=False), "lacks <0x00> and 255 more"),
    "nothing unknown": (document(fallback=False, unk_token=None), "no byte_fallback, and the unk_token null"),
    "a merge of none": (document(merges=[["q", "zz"]]), "merge 0, of 'q' and 'zz', has 'zz', which is no token"),
    "a merge to none": (document(merges=[["q", "z"]]), "needs the token b'qz'"),
    "half a merge": (document(merges=["the"]), 'merge 0 is "the", expected two tokens'),
    "an id twice": (document(vocab=vocabulary() | {"qq": 300}, extra=False), "gives an id to two tokens"),
    "an id": (document(vocab=vocabulary() | {"qq": "x"}), "ids must be integers: that of 'qq'"),
    "whole pieces": (document(ignore_merges=True, vocab=MORE, extra=False), "merges do not come to its token b'qqq'"),
    "normalized": (with_token(normalized=True, special=False), "'[X]' is looked for after spaces became"),
    "word": (with_token(single_word=True), "takes white space or word ends into account"),
    "its id": (changed(added_tokens=[added("<x>", 9)]), "has the id 9, and Hugging Face's tokenizers would make it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_give_other_ids_is_refused(name, read):
    content, message = REFUSED[name]
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        read(content)


def test_what_comes_to_the_same_is_read(read):
    expected = read(document()).encode(SAID)
    assert read(REFUSED["other normalizer"][0], without_normalizer=True).encode(SAID) == expected
    assert read(document(ignore_merges=True)).encode(SAID) == expected
    joined = [" ".join(pair) for pair in document()["model"]["merges"]]
    assert read(document(merges=joined)).encode(SAID) == expected
    old = document("first") | {"pre_tokenizer": {"type": "Metaspace", "replacement": MARK, "add_prefix_space": True}}
    assert read(old).encode(" the") == read(document("words")).encode(" the")
    assert (
        read(with_token("gemma", normalized=True), allowed_special="all").encode("a [X]")[-1] == len(vocabulary()) + 4
    )


def test_special_tokens_of_old_files_are_found_anywhere(read):
    content = document(extra=False)
    for token in content["added_tokens"]:
        token["normalized"] = True
    assert read(content) == read(document(extra=False))
    assert read(content, allowed_special="all").encode("the</s>other").count(2) == 1


def test_other_formats_cannot_hold_it(read, tmp_path):
    ours = read(document())
    with pytest.raises(ValueError, match=r"a file of ranks cannot tell .*: save it as json"):
        convert.save(ours, tmp_path / "ranks", "tiktoken")
    with pytest.raises(ValueError, match=r"vocab\.json and merges\.txt cannot tell"):
        convert.save(ours, tmp_path, "gpt2")
    with pytest.raises(ValueError, match="nothing stands for a character that is no token"):
        SentencePiece()
    with pytest.raises(ValueError, match="needs its merges listed"):
        Tokenizer({0: b" ", 1: b"u"}, None, sentencepiece=SentencePiece(unknown=1))
    with pytest.raises(ValueError, match="the vocabulary lacks '\u2581', the space"):
        Tokenizer({0: b"x", 1: b"u"}, [], sentencepiece=SentencePiece(unknown=1))


# ---- tokenizer.model ----


def test_ids_are_those_of_the_scores(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model_file())
    ours = convert.load(path)
    assert ours.begin_ids == (1,)
    assert ours.strips_space
    assert list(ours.special_tokens) == ["<unk>", "<s>", "</s>"]
    ours.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json") == ours
    given = pieces()
    for text in [*hard_texts(60), "x" + " " * 7 + "y", " " * 50 + "the"]:
        assert ours.encode_ordinary(text) == by_scores(given, text), repr(text)


def test_a_token_of_a_million_characters_is_read(tmp_path):
    """In no time: its halves were looked up one by one, a million texts of half a million characters."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model_file([*pieces(), ("ab" * 500_000, -5.0, 1)]))
    assert convert.load(path).vocab_size == len(pieces()) + 1


def test_equal_scores_go_by_place(tmp_path):
    given = [("<unk>", 0.0, 2), (MARK, -9.0, 1), ("a", -9.0, 1), ("b", -9.0, 1), ("c", -9.0, 1)]
    given += [("bc", -1.0, 1), ("ab", -1.0, 1), ("abc", -1.0, 1), ("ca", -2.0, 1)]
    (tmp_path / "m").write_bytes(model_file(given, normalizer=((3, 0), (4, 0))))
    ours = Tokenizer.from_sentencepiece(tmp_path / "m")
    assert [ours.token_bytes(i) for i in ours.encode("abcbca")] == [b"abc", b"bc", b"a"]
    assert [ours.token_bytes(i) for i in ours.encode("abc" * 40)] == [b"abc"] * 40
    assert ours.encode("qrb\u00e9") == [0, 3, 0]  # one unknown token for several characters


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (model_file(trainer=((3, 1),)), "a model of unigram: only BPE is read"),
        (model_file(trainer=((3, 2), (24, 1))), "its spaces end words"),
        (model_file(normalizer=((3, 1),)), "changes text before it encodes it"),
        (model_file(normalizer=((2, b"map"), (4, 0))), "changes text before it encodes it"),
        (model_file([*pieces(), ("the", -1.0, 1)]), "has the token 'the' twice"),
        (model_file([*pieces(), ("q1", -1.0, 5)]), "its token 'q1' is unused"),
        (model_file(pieces()[:200]), "it has tokens of bytes, and lacks <0xC5>"),
        (model_file()[:-1], "is damaged"),
        (model_file()[:1000], "is damaged"),
    ],
)  # fmt: skip
def test_other_models_are_refused(content, message, tmp_path):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        convert.load(tmp_path / "m")


def test_tokens_of_a_user_are_in_any_text(tmp_path):
    given = [*pieces(), ("\n\n", 0.0, 4), (MARK * 3, 0.0, 4)]
    given = [piece for i, piece in enumerate(given) if piece[0] != MARK * 3 or piece[2] == 4 or i > len(pieces())]
    (tmp_path / "m").write_bytes(model_file(given, normalizer=((3, 0), (4, 0))))
    ours = convert.load(tmp_path / "m")
    ours.save(tmp_path / "t.json")
    assert Tokenizer.load(tmp_path / "t.json") == ours
    ids = ours.encode("the\n\nx   y")
    assert [ours.token_bytes(i) for i in ids] == [
        *(ours.token_bytes(i) for i in ours.encode("the")),
        b"\n\n",
        b"x",
        b"   ",
        b"y",
    ]
    assert np.array_equal(ours.encode_batch_numpy(["the\n\nx   y"])[0], ids)


def test_the_command_line(tmp_path, capfdbinary):
    model, saved, text = tmp_path / "tokenizer.model", tmp_path / "tokenizer.json", tmp_path / "text"
    model.write_bytes(model_file())
    data = (SAID + " \u4e2d\n").encode() * 3
    text.write_bytes(data)
    assert main(["tokenizer", "convert", str(model), str(saved)]) == 0
    printed = []
    for path in (model, saved):
        capfdbinary.readouterr()
        assert main(["tokenizer", "encode", str(path), str(text)]) == 0
        printed.append(capfdbinary.readouterr().out)
    assert printed[0] == printed[1]
    assert [int(i) for i in printed[0].split()] == convert.load(model).encode(data)
    (tmp_path / "ids").write_bytes(printed[0])
    assert main(["tokenizer", "decode", str(saved), str(tmp_path / "ids")]) == 0
    assert capfdbinary.readouterr().out == data
    assert main(["tokenizer", "inspect", str(model)]) == 0
    assert b"sentencepiece" in capfdbinary.readouterr().out
    assert main(["tokenizer", "inspect", str(saved), "--text", "the\u4e2d"]) == 0
    assert "' the'" in capfdbinary.readouterr().out.decode()
    assert main(["tokenizer", "compare", str(model), str(saved), "--text", str(text)]) == 0
    rows = capfdbinary.readouterr().out.decode().splitlines()[1:]
    assert len(rows) == 2
    assert rows[0].split()[:3] == rows[1].split()[:3]
    assert main(["tokenizer", "convert", str(model), str(tmp_path / "ranks.tiktoken")]) == 2
    shards = ["tokenizer", "encode", str(saved), str(text), "--shards", str(tmp_path / "shards"), "--val-fraction", "0"]
    assert main(shards) == 2
    assert b"the token that ends a document: --eot-token" in capfdbinary.readouterr().err
    assert main([*shards, "--eot-token", "</s>"]) == 0
    assert main(["tokenizer", "decode", str(saved), str(tmp_path / "shards" / "00000.bin")]) == 0
    assert capfdbinary.readouterr().out.endswith(data + b"</s>")


def test_messages_name_the_file(tmp_path):
    (tmp_path / "m").write_bytes(model_file()[:1000])
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "m"))):
        convert.load(tmp_path / "m")
