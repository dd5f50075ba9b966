"""The split of a corpus into training and validation documents."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from cs336.utils.documents import Document, text_of

Text = TypeVar("Text", str, Document)

HELD_OUT, HELD_OUT_OF_FEW = 0.02, 0.1  # of the documents
FEW = 200  # documents; fewer are cut into pieces, or the held-out part might be empty


def in_validation(document: str, fraction: float, seed: int = 0) -> bool:
    """Whether a document is held out: decided by its text alone, so that copies of it fall on one side.

    About `fraction` (0..1) of all documents are, and those held out at a fraction stay so at any larger one.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"the validation fraction must be in 0..1, got {fraction}")
    key = seed.to_bytes(8, "little", signed=True)
    digest = hashlib.blake2b(document.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def select(documents: Iterable[str], fraction: float, *, validation: bool, seed: int = 0) -> Iterator[str]:
    """One side of the split, in order."""
    return (d for d in documents if in_validation(d, fraction, seed) == validation)


def for_split(documents: Iterable[Text], fraction: float | None = None) -> tuple[float, Iterator[Text]]:
    """The fraction to hold out, and the documents, cut into pieces where they are too few for that.

    fraction: None is 0.02, and 0.1 of the pieces of few documents.
    """
    documents = iter(documents)
    head = list(itertools.islice(documents, FEW))
    if len(head) < FEW:
        return HELD_OUT_OF_FEW if fraction is None else fraction, _pieces(head)
    return HELD_OUT if fraction is None else fraction, itertools.chain(head, documents)


def _pieces(documents: Sequence[Text]) -> Iterator[Text]:
    """Few documents as at least FEW pieces, cut at line ends where lines are not too long for that."""
    size = max(1, sum(len(text_of(document)) for document in documents) // (2 * FEW))
    for document in documents:
        for number, piece in enumerate(_cut(text_of(document), size), 1):
            if isinstance(document, Document):
                yield dataclasses.replace(document, text=piece, id=f"{document.id}#{number}")
            else:
                yield piece


def _cut(text: str, size: int) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start + size, start + 2 * size) + 1 or start + 2 * size
        if text[start:end].strip():
            yield text[start:end]
        start = end
