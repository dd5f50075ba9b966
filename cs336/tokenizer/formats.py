"""Files of tokenizers: tokenizer.json, GPT-2's vocab.json and merges.txt, tiktoken's ranks.

A tokenizer.json is what Hugging Face's tokenizers reads, with one section more, model.cs336:
    format          1; 2 for SentencePiece's kind (cs336/tokenizer/sentencepiece_json.py)
    pattern         a name or an expression
    merges          "listed", or "ranks" if ids are ranks; the merges are then there for other readers alone
    special_tokens  those of added_tokens, in our order
    fingerprint     checked on loading
Token bytes are spelled in GPT-2's alphabet, one printable character a byte, so that they are readable and lossless.
"""

import base64
import binascii
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cs336.tokenizer.patterns import PATTERNS, is_portable
from cs336.tokenizer.sentencepiece import SentencePiece
from cs336.utils.files import replacing

FORMAT, OF_CHARACTERS = 1, 2


class Parts(NamedTuple):
    """What the constructor of Tokenizer takes."""

    vocab: dict[int, bytes]
    merges: list[tuple[bytes, bytes]] | None
    special_tokens: dict[str, int]
    pattern: str
    sentencepiece: SentencePiece | None = None


def fingerprint_of(parts: Parts) -> str:
    """sha256 of everything that decides how text encodes, in hex."""
    digest = hashlib.sha256()

    def add(*fields: bytes) -> None:
        for field in fields:
            digest.update(len(field).to_bytes(8, "little") + field)

    add(b"cs336.tokenizer", parts.pattern.encode(), b"ranks" if parts.merges is None else b"listed")
    for i, token in sorted(parts.vocab.items()):
        add(str(i).encode(), token)
    add(b"merges")
    for left, right in parts.merges or []:
        add(left, right)
    add(b"special")
    for text, i in sorted(parts.special_tokens.items()):
        add(text.encode(), str(i).encode())
    for name, value in sorted(dataclasses.asdict(parts.sentencepiece).items()) if parts.sentencepiece else ():
        add(name.encode(), repr(sorted(value) if isinstance(value, frozenset) else value).encode())
    return digest.hexdigest()


def _alphabet() -> list[str]:
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


_CODES = np.array([ord(char) for char in _alphabet()], np.uint16)  # of the character of each byte
_BYTES = np.full(1 << 16, -1, np.int16)  # of each code
_BYTES[_CODES] = np.arange(256)


def spell(tokens: Collection[bytes]) -> list[str]:
    """Bytes in GPT-2's alphabet, a character for each: b" the" is "Ġthe"."""
    codes = _CODES[np.frombuffer(b"".join(tokens), np.uint8)]
    text = codes.astype("<u2").tobytes().decode("utf-16-le")
    return [text[begin:end] for begin, end in _spans(tokens)]


def unspell(tokens: Collection[str]) -> list[bytes]:
    """The inverse of `spell`. Raises ValueError for a character outside the alphabet."""
    codes = np.frombuffer("".join(tokens).encode("utf-16-le", "surrogatepass"), "<u2")
    values = _BYTES[codes]
    if (values < 0).any():
        alphabet = set(_alphabet())
        token, char = next((token, char) for token in tokens for char in token if char not in alphabet)
        raise ValueError(f"token {token!r} has {char!r}, which GPT-2's alphabet does not have")
    data = values.astype(np.uint8).tobytes()
    return [data[begin:end] for begin, end in _spans(tokens)]


def _spans(tokens: Collection[str] | Collection[bytes]) -> Iterator[tuple[int, int]]:
    return itertools.pairwise(itertools.accumulate(map(len, tokens), initial=0))


def _pairs(merges: Iterable[Sequence[Any]], translate: Callable[[list], list]) -> list[tuple[Any, Any]]:
    """Both sides of merges spelled or unspelled."""
    lefts, rights = [], []
    for number, merge in enumerate(merges):
        if len(merge) != 2:
            raise ValueError(f"merge {number} is {merge!r}, expected two tokens")
        lefts.append(merge[0])
        rights.append(merge[1])
    return list(zip(translate(lefts), translate(rights), strict=True))


def write_json(path: str | os.PathLike, parts: Parts, merges: list[tuple[bytes, bytes]], fingerprint: str) -> None:
    """Write a tokenizer.json, whole or not at all. merges: parts.merges, or what others need where that is None."""
    special_ids = set(parts.special_tokens.values())
    ordinary = {i: token for i, token in parts.vocab.items() if i not in special_ids}
    vocab = dict(zip(spell(ordinary.values()), ordinary, strict=True))
    for text, i in parts.special_tokens.items():
        vocab.setdefault(text, i)
    bytes_of_chars = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    cut = {"type": "Split", "pattern": {"Regex": PATTERNS.get(parts.pattern, parts.pattern)}, "behavior": "Isolated"}
    if parts.pattern == "gpt2":  # ByteLevel has this one built in
        pre_tokenizer = bytes_of_chars | {"use_regex": True}
    elif not is_portable(parts.pattern):  # another engine would read it in another way: no one else knows this type
        pre_tokenizer = {"type": "regex", "pattern": parts.pattern}
    else:
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [cut | {"invert": False}, bytes_of_chars]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, **flags}
            for text, i in sorted(parts.special_tokens.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": bytes_of_chars,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": parts.merges is None,
            "cs336": {
                "format": FORMAT,
                "pattern": parts.pattern,
                "merges": "ranks" if parts.merges is None else "listed",
                "special_tokens": list(parts.special_tokens),
                "fingerprint": fingerprint,
            },
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": _pairs(merges, spell),
        },
    }
    with replacing(path) as file:
        json.dump(document, file, ensure_ascii=False, indent=1)


class NotOurs(ValueError):
    """A JSON file that another program wrote."""


def read_own(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tokenizer.json that Tokenizer.save wrote, and its section. Raises ValueError for any other."""
    document = load_json(path)
    model = document.get("model") if isinstance(document, dict) else None
    if not isinstance(model, dict) or "cs336" not in model:
        raise NotOurs(
            f"{path} was not written by Tokenizer.save: it has no section model.cs336. Tokenizer.from_huggingface "
            "reads a tokenizer.json of others, Tokenizer.from_gpt2 a vocab.json"
        )
    with reading(path):
        section = field(model, "cs336", dict, "model")
        if section.get("format") not in (FORMAT, OF_CHARACTERS):
            raise ValueError(
                f"its format is {shortened(section.get('format'))}, and this version of cs336 reads formats {FORMAT} "
                f"and {OF_CHARACTERS}"
            )
        return document, section


def parts_of(document: dict[str, Any]) -> Parts:
    """What a tokenizer.json of format 1 says. Raises ValueError if it is damaged."""
    model = document["model"]
    section = model["cs336"]
    field(section, "fingerprint", str, "model.cs336")
    added = {
        field(token, "content", str, "added_tokens[]"): field(token, "id", int, "added_tokens[]")
        for token in field(document, "added_tokens", list)
    }
    names = field(section, "special_tokens", list, "model.cs336")
    specials = {text: field(added, text, int, "added_tokens") for text in names if _is_text(text)}
    vocab = vocab_of(field(model, "vocab", dict, "model"), specials)
    kind = section.get("merges")
    if kind not in ("listed", "ranks"):
        raise ValueError(f'model.cs336.merges is {shortened(kind)}, expected "listed" or "ranks"')
    merges = listed_merges(model) if kind == "listed" else None
    return Parts(vocab, merges, specials, field(section, "pattern", str, "model.cs336"))


_KINDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}


def field(document: Any, name: str, kind: type, where: str = "the document") -> Any:
    """A value of an object in JSON. Raises ValueError, naming both, if it is missing or of another kind."""
    if not isinstance(document, dict):
        raise ValueError(f"{where} is {shortened(document)}, expected an object with {name!r}")
    if name not in document:
        raise ValueError(f"{where} lacks {name!r}, {_KINDS[kind]}")
    value = document[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where} has {shortened(value)} for {name!r}, expected {_KINDS[kind]}")
    return value


def shortened(value: Any) -> str:
    """A value of a document, for a message."""
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _is_text(text: Any) -> bool:
    if not isinstance(text, str):
        raise ValueError(f"a special token is {shortened(text)}, expected a text")
    return True


def listed_merges(model: dict[str, Any]) -> list[tuple[bytes, bytes]]:
    """model.merges, of which each is two tokens or both with a space between them."""
    pairs = []
    for number, merge in enumerate(field(model, "merges", list, "model")):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(token, str) for token in pair):
            raise ValueError(f"merge {number} is {shortened(merge)}, expected two tokens")
        pairs.append(pair)
    return _pairs(pairs, unspell)


def vocab_of(ids: dict[str, int], specials: dict[str, int]) -> dict[int, bytes]:
    """id -> bytes of a vocabulary in GPT-2's alphabet, which may list the special tokens too, as they are.

    Raises ValueError for an id of two tokens, and for what is no id.
    """
    for token, i in ids.items():
        if type(i) is not int:
            raise ValueError(f"ids must be integers: that of {token!r} is {shortened(i)}")
    vocab: dict[int, bytes] = {}
    for text, i in specials.items():
        if vocab.setdefault(i, text.encode("utf-8", "surrogatepass")) != text.encode("utf-8", "surrogatepass"):
            raise ValueError(f"id {i} is given to two tokens")
    ordinary = {token: i for token, i in ids.items() if specials.get(token) != i}
    for data, i in zip(unspell(ordinary), ordinary.values(), strict=True):
        if i in vocab:
            raise ValueError(f"id {i} is given to two tokens")
        vocab[i] = data
    return vocab


def write_gpt2(vocab_json: str | os.PathLike, merges_txt: str | os.PathLike, parts: Parts) -> None:
    """Write GPT-2's two files, and make their directories. Raises ValueError for a special token spelled as another."""
    special_ids = set(parts.special_tokens.values())
    ordinary = {i: token for i, token in parts.vocab.items() if i not in special_ids}
    ids = dict(zip(spell(ordinary.values()), ordinary, strict=True))
    if clash := ids.keys() & parts.special_tokens.keys():
        raise ValueError(f"vocab.json cannot hold both a special and an ordinary token {clash.pop()!r}")
    assert parts.merges is not None
    for path in (vocab_json, merges_txt):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(vocab_json) as file:
        json.dump(ids | parts.special_tokens, file, ensure_ascii=False)
    with replacing(merges_txt) as file:
        file.write("#version: 0.2\n")
        file.writelines(f"{left} {right}\n" for left, right in _pairs(parts.merges, spell))


def write_tiktoken(path: str | os.PathLike, ranks: dict[int, bytes]) -> None:
    """Write tiktoken's ranks, in order."""
    with replacing(path) as file:
        file.writelines(f"{base64.b64encode(token).decode()} {i}\n" for i, token in sorted(ranks.items()))


def read_gpt2(vocab_json: str | os.PathLike, merges_txt: str | os.PathLike, special_tokens: list[str] | None) -> Parts:
    """GPT-2's files. None for the special tokens: <|endoftext|> if the vocabulary has it."""
    ids = load_json(vocab_json)
    with reading(vocab_json):
        if not isinstance(ids, dict):
            raise ValueError(f"it is {shortened(ids)}, expected an object of tokens and ids")
        if special_tokens is None:
            special_tokens = ["<|endoftext|>"] if "<|endoftext|>" in ids else []
        given = {text: ids[text] for text in special_tokens if text in ids}
        vocab = vocab_of(ids, given)
    merges = []
    with reading(merges_txt):
        for number, line in enumerate(Path(merges_txt).read_text(encoding="utf-8").split("\n"), 1):
            if not line or (number == 1 and line.startswith("#version")):
                continue
            halves = line.removesuffix("\r").split(" ")
            if len(halves) != 2:
                raise ValueError(f"line {number} is {line[:80]!r}, expected two tokens with one space between them")
            merges.append(halves)
        return Parts(vocab, _pairs(merges, unspell), given, "gpt2")


def read_tiktoken(path: str | os.PathLike) -> dict[int, bytes]:
    """tiktoken's ranks: a line is the base64 of a token, a space, and its rank."""
    vocab: dict[int, bytes] = {}
    with reading(path):
        for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
            if not line:
                continue
            try:
                token, rank = line.split()
                i = int(rank)
                vocab_size = len(vocab)
                vocab[i] = base64.b64decode(token, validate=True)
            except (ValueError, binascii.Error):
                raise ValueError(f"line {number} is {line[:80]!r}, expected a token in base64, and its rank") from None
            if len(vocab) == vocab_size:
                raise ValueError(f"line {number} gives rank {i} a second time")
        if not vocab:
            raise ValueError("it is empty")
    return vocab


def load_json(path: str | os.PathLike) -> Any:
    """The document of a JSON file. Raises ValueError, naming the file, if it is damaged."""
    with reading(path):
        return json.loads(Path(path).read_text(encoding="utf-8"))


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Puts the name of a file before what is wrong with its contents, or does not fit them."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@contextlib.contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Names the file in what is wrong with it."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a file of this kind, or it is damaged: {error}") from None
