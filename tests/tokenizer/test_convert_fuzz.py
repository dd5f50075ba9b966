"""Conversions of random vocabularies: what is accepted encodes as tiktoken and Hugging Face's tokenizers do."""

import json
import random

import pytest

from cs336.tokenizer import PATTERNS, Tokenizer

tiktoken = pytest.importorskip("tiktoken")
pytest.importorskip("tiktoken.load")
tokenizers = pytest.importorskip("tokenizers")

LETTERS = [b"a", b"b", b"c"]


def random_parts(rng):
    """Tokens over abc in mostly the order they are made in, and merges; sometimes a token more, or another order."""
    tokens, merges = list(LETTERS), []
    for _ in range(rng.randrange(1, 9)):
        pair = rng.choice(tokens), rng.choice(tokens)
        if pair not in merges and (pair[0] + pair[1] not in tokens or rng.random() < 0.2):
            merges.append(pair)
            tokens += [pair[0] + pair[1]] * (pair[0] + pair[1] not in tokens)
    change = rng.random()
    if change < 0.2:
        extra = bytes(rng.choice(b"abc") for _ in range(rng.randrange(2, 5)))
        tokens += [extra] * (extra not in tokens)
    elif change < 0.4:
        rng.shuffle(tokens)
    elif change < 0.5:
        rng.shuffle(merges)
    return dict(enumerate(tokens)), merges


def random_texts(rng):
    return ["".join(rng.choice("abc") for _ in range(rng.randrange(1, 14))) for _ in range(60)]


def by_tiktoken(path):
    ranks = tiktoken.load.load_tiktoken_bpe(str(path))
    encoding = tiktoken.Encoding("x", pat_str=PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens={})
    return encoding.encode_ordinary


def by_huggingface(path):
    theirs = tokenizers.Tokenizer.from_file(str(path))
    return lambda text: theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("seed", range(4))
def test_random_vocabularies(seed, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # or it reads the first ranks of this name again
    rng = random.Random(seed)
    accepted = {"ranks": 0, "gpt2": 0, "ignoring": 0}
    ranks, saved = tmp_path / "ranks", tmp_path / "saved.json"
    gpt2 = tmp_path / "vocab.json", tmp_path / "merges.txt"
    for _ in range(60):
        vocab, merges = random_parts(rng)
        texts = random_texts(rng)
        listed, ranked = Tokenizer(vocab, merges), Tokenizer(vocab, None)
        for tokenizer in (listed, ranked):
            ids = [tokenizer.encode(text) for text in texts]

            def same(encode, texts=texts, ids=ids, parts=(vocab, merges)):
                for text, expected in zip(texts, ids, strict=True):
                    assert encode(text) == expected, (text, *parts)

            tokenizer.save(saved)
            same(by_huggingface(saved))
            try:
                tokenizer.to_tiktoken(ranks)
            except ValueError:
                assert tokenizer is listed
            else:
                accepted["ranks"] += tokenizer is listed
                same(by_tiktoken(ranks))
                same(Tokenizer.from_tiktoken(ranks, "gpt2").encode)
            try:
                tokenizer.to_gpt2(*gpt2)
            except ValueError:
                assert tokenizer is ranked
            else:
                accepted["gpt2"] += tokenizer is ranked
                same(Tokenizer.from_gpt2(*gpt2).encode)
        for pairs in (merges, ranked._every_split()):
            Tokenizer(vocab, pairs).save(saved)
            document = json.loads(saved.read_text())
            document["model"]["ignore_merges"] = True
            saved.write_text(json.dumps(document))
            try:
                read = Tokenizer.from_huggingface(saved)
            except ValueError:
                continue
            accepted["ignoring"] += 1
            encode = by_huggingface(saved)
            for text in texts:
                assert read.encode(text) == encode(text), (text, vocab, pairs)
    assert all(accepted.values()), accepted
