"""How much of each source: weights, with a cap on how often a document is repeated, and repeats by quality.

    sources = [MixSource("web", ("web.jsonl",), 0.7), MixSource("books", ("books/",), 0.3, max_epochs=2)]
    for document in mix_documents(sources, total_bytes=10**9): ...

Whether a document is taken, and how often, is decided by its text and the seed alone: not by its place, by other
documents, or by the machine. The order is that of the sources; `shuffle_shards` and `pack_shards` shuffle.
"""

import bisect
import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cs336.utils.documents import TEXT_FIELD, Document, read_documents


@dataclass(frozen=True)
class Buckets:
    """How often documents are taken, by a score that an earlier step put into their metadata."""

    field: str
    edges: tuple[float, ...]
    """Ascending: a score below the first is in bucket 0, one at or above the last in the last bucket."""
    repeats: tuple[float, ...]
    """One more than edges: 0 drops a bucket, 0.5 takes half of it, 2 takes it twice."""

    def __post_init__(self):
        if len(self.repeats) != len(self.edges) + 1 or sorted(self.edges) != list(self.edges):
            raise ValueError(
                f"buckets need ascending edges and one repeat more than edges, got {self.edges}, {self.repeats}"
            )
        if not all(0 <= repeat < math.inf for repeat in self.repeats) or not any(self.repeats):
            raise ValueError(f"repeats are finite, none below 0 and not all 0, got {self.repeats}")

    def repeat(self, document: Document) -> float:
        """Raises ValueError for a document without a number in the field."""
        score = document.metadata.get(self.field)
        if not isinstance(score, int | float) or isinstance(score, bool) or math.isnan(score):
            raise ValueError(
                f'{document.id}: buckets need a number in the field "{self.field}", got {score!r}; let a classifier or '
                "perplexity step put it there"
            )
        return self.repeats[bisect.bisect_right(self.edges, score)]


@dataclass(frozen=True)
class MixSource:
    """A part of a mixture."""

    name: str
    paths: tuple[pathlib.Path | str, ...]
    weight: float
    """Its share of the text, over the sum of all weights."""
    max_epochs: float = 4.0
    """Times that it may be repeated: beyond four, repeated text is worth little (arXiv 2305.16264)."""
    buckets: Buckets | None = None

    def __post_init__(self):
        if not (0 < self.weight < math.inf and 0 < self.max_epochs < math.inf and self.paths):
            raise ValueError(
                f"source {self.name!r}: expected paths, weight > 0 and max_epochs > 0, got {len(self.paths)} paths, "
                f"{self.weight}, {self.max_epochs}"
            )


def mixture_epochs(
    sizes: Mapping[str, float],
    weights: Mapping[str, float],
    max_epochs: Mapping[str, float],
    total: float | None = None,
) -> dict[str, float]:
    """How often to take each source of a size, so that the shares of the total are those of the weights.

    A source that would be repeated more than its cap is taken as often as that, and the others share what it leaves, by
    their weights. total: in the unit of the sizes; None for the most that keeps the weights exact. It is missed where
    all are at their caps. Raises ValueError for an empty source, or no total above 0.
    """
    if empty := [name for name in weights if sizes[name] <= 0]:
        raise ValueError(f"source {empty[0]!r} has no text to take")
    most = {name: sizes[name] * max_epochs[name] for name in weights}
    if total is None:
        total = min(most[name] / weight for name, weight in weights.items()) * sum(weights.values())
    if not total > 0:
        raise ValueError(f"the total of a mixture must be above 0, got {total}")
    taken: dict[str, float] = {}
    free, left = dict(weights), total
    while free:
        share = left / sum(free.values())
        full = [name for name, weight in free.items() if weight * share >= most[name]]
        if not full:
            taken |= {name: weight * share for name, weight in free.items()}
            break
        for name in full:
            taken[name] = most[name]
            left -= most[name]
            del free[name]
    return {name: taken[name] / sizes[name] for name in weights}


def times(text: str, epochs: float, seed: int = 0) -> int:
    """How often to take a text so that all are taken `epochs` times on average: it, rounded up or down by its hash.

    A text that is taken n times is taken at least n times for any larger `epochs`.
    """
    key = b"mix" + seed.to_bytes(8, "little", signed=True)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest()
    return int(epochs) + (int.from_bytes(digest, "little") < (epochs - int(epochs)) * 2**64)


def mix_documents(
    sources: Sequence[MixSource], total_bytes: float | None = None, *, seed: int = 0, text_field: str = TEXT_FIELD
) -> Iterator[Document]:
    """The documents of a mixture of `total_bytes` of UTF-8, about; None for the most that keeps the weights exact.

    The second copy of a document has the id with "@2" behind it, and so on. Sources are read twice: for their sizes,
    then for their documents. Raises as `mixture_epochs`, and ValueError for two sources of one name.
    """
    if len({source.name for source in sources}) < len(sources) or not sources:
        raise ValueError(f"a mixture needs sources with names of their own, got {[s.name for s in sources]}")

    def read(source: MixSource) -> Iterator[tuple[Document, float]]:
        for document in read_documents(source.paths, text_field=text_field):
            yield document, 1.0 if source.buckets is None else source.buckets.repeat(document)

    sizes = {s.name: sum(len(d.text.encode()) * repeat for d, repeat in read(s)) for s in sources}
    weights, caps = {s.name: s.weight for s in sources}, {s.name: s.max_epochs for s in sources}
    epochs = mixture_epochs(sizes, weights, caps, total_bytes)
    for source in sources:
        for document, repeat in read(source):
            for copy in range(1, 1 + times(document.text, repeat * epochs[source.name], seed)):
                yield document if copy == 1 else dataclasses.replace(document, id=f"{document.id}@{copy}")
