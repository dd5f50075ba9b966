import json
import multiprocessing
import os
import pathlib
import signal

import numpy as np
import pytest

from cs336.data import for_split, in_validation, read_meta, select, tokenize, tokenize_corpus, tokenize_documents
from cs336.data.corpus import FEW, _pieces
from cs336.tokenizer import Tokenizer
from cs336.utils.documents import Document
from cs336.utils.locks import locked
from cs336.utils.shards import open_tokens


class Bytes:
    """A tokenizer whose ids are bytes; 256 ends a text."""

    vocab_size = 257
    fingerprint = "bytes"
    special_tokens = {"<|endoftext|>": 256}  # noqa: RUF012

    def encode_documents(self, texts, eot_token):
        ids = [i for text in texts for i in [*text.encode(), self.special_tokens[eot_token]]]
        return np.array(ids, np.uint16), len(ids) - len(texts)

    def save(self, path):
        pathlib.Path(path).write_text("{}")


def text_of(directory):
    shards, _ = open_tokens(directory)
    ids = np.concatenate(shards).tolist()
    return "".join("|" if i == 256 else chr(i) for i in ids)


@pytest.mark.parametrize("batch_chars", [1, 7, 1 << 20])
def test_documents_end_with_the_end_of_text(tmp_path, monkeypatch, batch_chars):
    monkeypatch.setattr(tokenize, "BATCH_CHARS", batch_chars)
    meta = tokenize_documents(iter(["one", "", "three"]), Bytes(), tmp_path, shard_tokens=4, progress=True)
    assert text_of(tmp_path) == "one||three|"
    assert (meta.documents, meta.tokens, meta.text_bytes, meta.eot_id) == (3, 11, 8, 256)
    assert meta == read_meta(tmp_path)


def test_text_bytes_are_utf8(tmp_path):
    assert tokenize_documents(["é€😀"], Bytes(), tmp_path).text_bytes == 9


def test_corpus_is_split_by_document(tmp_path):
    documents = [f"document {i}" for i in range(500)]
    train, val = tokenize_corpus(documents, Bytes(), tmp_path, val_fraction=0.1)
    assert train.documents + val.documents == 500
    assert 20 < val.documents < 80
    for name, validation in (("train", False), ("val", True)):
        assert text_of(tmp_path / name).split("|")[:-1] == list(select(documents, 0.1, validation=validation))


def test_split_is_a_function_of_the_text():
    documents = [str(i) for i in range(1000)]
    held = {f: {d for d in documents if in_validation(d, f)} for f in (0, 0.1, 0.5, 1)}
    assert held[0] < held[0.1] < held[0.5] < held[1] == set(documents)
    assert held[0.1] != {d for d in documents if in_validation(d, 0.1, seed=1)}
    assert in_validation("a fixed document", 0.5) == in_validation("a fixed document", 0.5)
    with pytest.raises(ValueError, match="fraction"):
        in_validation("a", 1.5)


def test_empty_corpora_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no documents"):
        tokenize_documents([], Bytes(), tmp_path / "a")
    with pytest.raises(ValueError, match="no validation document: 3 documents"):
        tokenize_corpus(["a", "b", "c"], Bytes(), tmp_path / "b", val_fraction=0)
    with pytest.raises(ValueError, match="no training document"):
        tokenize_corpus(["a"], Bytes(), tmp_path / "b", val_fraction=1)
    with pytest.raises(ValueError, match="expected a list of documents, got one text or path: str"):
        tokenize_documents("a text", Bytes(), tmp_path / "c")
    with pytest.raises(TypeError, match="a document must be a str or a Document, got int"):
        tokenize_corpus(["a", 5], Bytes(), tmp_path / "d")  # type: ignore[list-item]
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"]


def test_tokenizer_without_end_of_text(tmp_path):
    with pytest.raises(ValueError, match=r"no special token '<\|end\|>' \(it has: <\|endoftext\|>\)"):
        tokenize_documents(["a"], Bytes(), tmp_path, eot_token="<|end|>")


def test_with_our_tokenizer(tmp_path):
    documents = ["the cat and the hat " * 20, "a document that says <|endoftext|> in it", "naïve 😀"]
    tokenizer = Tokenizer.train(documents, 290, special_tokens=["<|endoftext|>"])
    meta = tokenize_documents(documents, tokenizer, tmp_path)
    ids = np.concatenate(open_tokens(tmp_path)[0])
    assert (meta.tokenizer, meta.vocab_size) == (tokenizer.fingerprint, tokenizer.vocab_size)
    ends = np.flatnonzero(ids == meta.eot_id)
    assert len(ends) == len(documents)
    assert [tokenizer.decode(part[part != meta.eot_id]) for part in np.split(ids, ends)[:-1]] == documents
    assert Tokenizer.load(tokenize.tokenizer_of(tmp_path)).fingerprint == meta.tokenizer


# ---- one that was stopped ----

DOCUMENTS = [f"document {i} " * (i % 7) + "é" for i in range(200)]
SPLIT = {"val_fraction": 0.2, "shard_tokens": 500}


class Dying(Bytes):
    """Ends its process by SIGKILL in the middle."""

    def __init__(self, texts):
        self.left = texts

    def encode_documents(self, texts, eot_token):
        self.left -= len(texts)
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_documents(texts, eot_token)


def encode_and_be_killed(directory, texts):
    tokenize.BATCH_CHARS, tokenize.SAVE_SECONDS = 200, 0.0
    tokenize_corpus(iter(DOCUMENTS), Dying(texts), directory, **SPLIT)


def files(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture
def killed(tmp_path):
    """A directory in which two processes have been killed."""
    for texts in (70, 50):
        process = multiprocessing.get_context("spawn").Process(
            target=encode_and_be_killed, args=(tmp_path / "killed", texts)
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    return tmp_path / "killed"


def test_a_killed_encoding_goes_on_and_leaves_the_same_bytes(tmp_path, killed):
    done = json.loads((killed / ".encoding.json").read_text())["documents"]
    assert 90 < done < 121
    encoded = []

    class Watched(Bytes):
        def encode_documents(self, texts, eot_token):
            encoded.extend(texts)
            return super().encode_documents(texts, eot_token)

    tokenize_corpus(iter(DOCUMENTS), Watched(), killed, **SPLIT)
    assert sorted(encoded) == sorted(DOCUMENTS[done:])
    tokenize_corpus(iter(DOCUMENTS), Bytes(), tmp_path / "whole", **SPLIT)
    assert files(killed) == files(tmp_path / "whole")


def test_other_documents_are_not_mixed_in(killed):
    others = ["another", *DOCUMENTS[1:]]
    with pytest.raises(ValueError, match="it was of other documents: run the same command again"):
        tokenize_corpus(others, Bytes(), killed, **SPLIT)
    train, val = tokenize_corpus(others, Bytes(), killed, **SPLIT)
    assert train.documents + val.documents == 200


def test_other_settings_begin_anew(tmp_path, killed):
    tokenize_corpus(DOCUMENTS, Bytes(), killed, val_fraction=0.1)
    tokenize_corpus(DOCUMENTS, Bytes(), tmp_path / "whole", val_fraction=0.1)
    assert files(killed) == files(tmp_path / "whole")


def test_two_encoders_at_one_directory(tmp_path):
    with locked(tmp_path), pytest.raises(RuntimeError, match=r"another process is at work in .*another directory"):
        tokenize_documents(["a"], Bytes(), tmp_path)
    tokenize_documents(["a"], Bytes(), tmp_path)


def test_the_tokenizer_lies_beside_its_shards(tmp_path):
    tokenize_corpus(DOCUMENTS, Bytes(), tmp_path)
    for side in ("train", "val"):
        assert read_meta(tmp_path / side).tokenizer_file == "tokenizer.json"
        assert tokenize.tokenizer_of(tmp_path / side) == tmp_path / side / "tokenizer.json"
    assert tokenize.tokenizer_of([tmp_path / "train/00000.bin"]) is None


def test_few_documents_are_cut():
    text = "".join(f"line {i}\n" for i in range(20_000))
    pieces = list(_pieces([text, "short", " \n"]))
    assert "".join(pieces) == text + "short"
    assert FEW < len(pieces) <= 2 * FEW + 2
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    line = text.replace("\n", " ")
    assert "".join(_pieces([line])) == line
    assert FEW <= len(list(_pieces([line]))) <= 2 * FEW
    assert list(_pieces([])) == []


def test_six_books_are_cut_and_many_documents_are_not(tmp_path):
    books = ["".join(f"book {b} line {i}\n" for i in range(1000)) for b in range(6)]
    fraction, documents = for_split(books)
    pieces = list(documents)
    assert fraction == 0.1
    assert "".join(pieces) == "".join(books)
    _, val = tokenize_corpus(pieces, Bytes(), tmp_path, val_fraction=fraction)
    assert val.documents >= 5
    many = [f"document {i}" for i in range(FEW)]
    assert (for_split(many)[0], list(for_split(many)[1])) == (0.02, many)
    documents = [Document(book, f"book {b}", "books") for b, book in enumerate(books)]
    cut = list(for_split(documents)[1])
    assert [d.text for d in cut] == pieces
    assert (cut[0].id, cut[1].id, cut[-1].source) == ("book 0#1", "book 0#2", "books")
    assert tokenize_corpus(cut, Bytes(), tmp_path / "again", val_fraction=0.1)[1] == val
    assert for_split(books, 0.5)[0] == for_split(many, 0.5)[0] == 0.5
