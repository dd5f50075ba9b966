"""The split of a corpus into training and validation documents."""

import hashlib
from collections.abc import Iterable, Iterator


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
