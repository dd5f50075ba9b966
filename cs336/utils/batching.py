"""Many small documents as fewer large pieces of work."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

Text = TypeVar("Text", str, bytes, str | bytes)
MOST = 1 << 16  # documents of one batch


def batches(documents: Iterable[Text], size: int) -> Iterator[list[Text]]:
    """Lists of documents, in order, of at least `size` characters or bytes in all; the last may have fewer.

    Raises TypeError for a document that is neither str nor bytes.
    """
    batch: list[Text] = []
    waiting = 0
    for document in documents:
        if not isinstance(document, str | bytes):
            raise TypeError(f"a document must be str or bytes, got {type(document).__name__}")
        batch.append(document)
        waiting += len(document)
        if waiting >= size or len(batch) == MOST:
            yield batch
            batch, waiting = [], 0
    if batch:
        yield batch
