"""A step over one document: it passes the document on, changed or not, or says why it is removed.

    @dataclass(frozen=True)
    class Longer:
        kind: Literal["longer"] = "longer"
        than: int = 100

        def build(self) -> Callable[[Document], Document | Removed]:
            return lambda d: d if len(d.text) > self.than else Removed("short", f"{len(d.text)} characters")

A config is data, so that it can stand in a recipe and travel to another process; what `build` returns is made where it
runs, and loads what it needs there.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from cs336.utils.documents import Document


class Removed(NamedTuple):
    """Why a document is not passed on."""

    reason: str
    """One of a few words that are counted: "gopher_short"."""
    detail: str = ""
    """Of this document: "12 words"."""


Apply = Callable[[Document], Document | Removed]


class Step(Protocol):
    """A frozen dataclass, told apart from others by `kind`."""

    @property
    def kind(self) -> str: ...

    def build(self) -> Apply: ...


class Semantic(Protocol):
    """Deduplication by what documents mean: a frozen dataclass with what semantic_duplicates takes, and embeddings."""

    @property
    def kind(self) -> str: ...
    @property
    def threshold(self) -> float: ...
    @property
    def num_clusters(self) -> int | None: ...
    @property
    def keep(self) -> Literal["farthest", "nearest"]: ...
    @property
    def centre(self) -> bool: ...
    @property
    def device(self) -> str: ...

    def embed(self, documents: Iterable[Document]) -> Iterator[np.ndarray]:
        """(D,) numbers of each document, in order."""
        ...


@runtime_checkable
class Checked(Protocol):
    """A step that can tell before anything is read that it could not be built."""

    def check(self) -> None:
        """Raises ValueError or OSError for what the user can mend."""
