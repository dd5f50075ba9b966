"""SentencePiece's own vocabularies, with a score for each token: tokenizer.model, and the metadata of GGUF files.

Any two tokens that together are one merge, the highest score first and of equal ones the leftmost. A tokenizer.model is
a message of Protocol Buffers: fields, each a number and a value.
    1: a token, many times: 1: text, 2: score, 3: kind
    2: how it was trained: 3: 2 for BPE, 24: spaces end words, 41: the id that begins a text
    3: what is done to text first: 2: a map of characters, 3: a space before it, 4: fewer spaces, 5: marks for spaces
"""

import itertools
import os
import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cs336.tokenizer.formats import Parts, reading
from cs336.tokenizer.sentencepiece import MARK, SentencePiece, byte_token

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_BPE = 2
_KINDS = {1: "unigram", 3: "words", 4: "characters"}


class Piece(NamedTuple):
    text: str
    score: float
    kind: int


def is_model(path: str | os.PathLike) -> bool:
    """Whether a file begins as a tokenizer.model does: with a token, which begins with its text."""
    if os.path.isdir(path):
        return False
    with open(path, "rb") as file:
        head = file.read(3)
    return len(head) == 3 and head[0] == head[2] == 0x0A


def read_model(path: str | os.PathLike) -> Parts:
    """The parts of a tokenizer.model. Raises ValueError for one that is no BPE, changes text, or is damaged.

    Behind a special token, or one of a user's, a text begins anew, as to those who encode what is between them apart:
    SentencePiece, which knows no special tokens in text, puts a space before the whole alone, so that text which holds
    a user's token has other ids there, if the model has such a space. A user's token of spaces is looked for before
    marks become spaces, and SentencePiece's after.
    """
    with reading(path):
        fields = _fields(Path(path).read_bytes())
        trained, normalizer = (_fields(_last(fields, i, b"")) for i in (2, 3))
        if (kind := _last(trained, 3, 1)) != _BPE:
            raise ValueError(f"it is a model of {_KINDS.get(kind, kind)}: only BPE is read")
        if _last(trained, 24, 0):
            raise ValueError("its spaces end words, where those of a tokenizer that is read begin them")
        if _last(normalizer, 2, b"") or _last(normalizer, 4, 1) or not _last(normalizer, 5, 1):
            raise ValueError(
                "it changes text before it encodes it, by a map of characters or by leaving out spaces, and this "
                "tokenizer never does"
            )
        pieces = [_piece(data) for data in fields[1]]
        has_prefix = bool(_last(normalizer, 3, 1))
        if unused := next((piece.text for piece in pieces if piece.kind == UNUSED), None):
            raise ValueError(f"its token {unused!r} is unused, and merges may go through it: such a model is not read")
        begin = _last(trained, 41, 1)
        return parts_of_pieces(pieces, has_prefix, begin)


def parts_of_pieces(pieces: Sequence[Piece], has_prefix: bool, begin: int | None) -> Parts:
    """A tokenizer whose ids are the places of its tokens.

    has_prefix: a space comes before a text, and a text begins after each special token and each of a user's.
    begin: what comes before each text, if a model expects it.
    Raises ValueError for tokens that are none, and for what SentencePiece does and a Tokenizer does not.
    """
    place = {piece.text: i for i, piece in enumerate(pieces)}
    if len(place) < len(pieces):
        text = next(piece.text for i, piece in enumerate(pieces) if place[piece.text] != i)
        raise ValueError(f"it has the token {text!r} twice")
    of_kind = defaultdict(list)
    for i, piece in enumerate(pieces):
        of_kind[piece.kind].append(i)
    if of_kind[BYTE] and (lacking := [b for b in map(byte_token, range(256)) if b not in place]):
        raise ValueError(f"it has tokens of bytes, and lacks {lacking[0]}")
    byte_ids = tuple(place[byte_token(byte)] for byte in range(256)) if of_kind[BYTE] else ()
    vocab = {i: piece.text.replace(MARK, " ").encode() for i, piece in enumerate(pieces)}
    vocab |= {i: bytes([byte]) for byte, i in enumerate(byte_ids)}
    specials = {pieces[i].text: i for kind in (UNKNOWN, CONTROL) for i in of_kind[kind]}
    found = {pieces[i].text.replace(MARK, " "): i for i in of_kind[USER_DEFINED]}
    merges, tied = _merges([pieces[i] for i in of_kind[NORMAL]])
    kind = SentencePiece(
        byte_ids=byte_ids,
        unknown=next(iter(of_kind[UNKNOWN]), None) if not byte_ids else None,
        fuses_unknown=not byte_ids,
        prefix="always" if has_prefix else "never",
        doubled=True,
        strips=has_prefix,
        tied=tied,
        found=frozenset(found),
        begin=(begin,) if begin is not None and begin in of_kind[CONTROL] else (),
    )
    return Parts(vocab, merges, specials | found, "", kind)


def _merges(pieces: Sequence[Piece]) -> tuple[list[tuple[bytes, bytes]], tuple[int, ...]]:
    """All splits of a token into two, those of the highest score first, and how many in a row have one score."""
    known = {piece.text: piece.text.replace(MARK, " ").encode() for piece in pieces}
    merges: list[tuple[bytes, bytes]] = []
    sizes: list[int] = []
    lengths = dict.fromkeys(sorted(map(len, known)))  # of a long token few halves can be tokens
    ordered = sorted(pieces, key=lambda piece: -piece.score)
    for _, group in itertools.groupby(ordered, key=lambda piece: piece.score):
        before = len(merges)
        for text, *_ in group:
            halves = ((text[:i], text[i:]) for i in lengths if len(text) - i in lengths)
            merges += ((known[left], known[right]) for left, right in halves if left in known and right in known)
        if len(merges) > before:
            sizes.append(len(merges) - before)
    return merges, tuple(sizes)


def _piece(data: Any) -> Piece:
    fields = _fields(data)
    text = _last(fields, 1, b"").decode()
    if not text:
        raise ValueError("it has a token without text")
    return Piece(text, struct.unpack("<f", _last(fields, 2, bytes(4)))[0], _last(fields, 3, NORMAL))


def _last(fields: dict[int, list[Any]], number: int, default: Any) -> Any:
    """The value of a field. Raises ValueError for one of another type than the default."""
    value = fields[number][-1] if fields.get(number) else default
    if type(value) is not type(default):
        raise ValueError(f"its field {number} is {value!r:.60}, expected {type(default).__name__}")
    return value


def _fields(data: Any) -> dict[int, list[Any]]:
    """The values of a message by their numbers: whole numbers, or bytes."""
    if not isinstance(data, bytes):
        raise ValueError(f"it has {data!r:.60} for a message")
    fields: dict[int, list[Any]] = defaultdict(list)
    for number, value in _each_field(data):
        fields[number].append(value)
    return fields


def _each_field(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(data) or shift > 63:
                raise ValueError("a number of it has no end")
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = varint()
        wire = tag & 7
        if wire == 0:
            yield tag >> 3, varint()
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"a field of it has the type {wire}, which is none")
        size = varint() if wire == 2 else 8 if wire == 1 else 4
        if size > len(data) - at:
            raise ValueError(f"a field of it has {size} bytes, and {len(data) - at} are left")
        yield tag >> 3, data[at : at + size]
        at += size
