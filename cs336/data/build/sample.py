"""The first records of a build's sources, through extraction and steps: what to expect of all, before all are read."""

import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cs336.data.build.counts import Counts, total
from cs336.data.build.store import read_file
from cs336.data.build.supervisor import Supervisor
from cs336.data.build.unit import Work
from cs336.data.corpus import in_validation
from cs336.data.recipe import Lines, Paragraphs, Recipe, Substrings
from cs336.utils.documents import Document

SAMPLE_UNITS, SAMPLE_RECORDS = 8, 200  # of each source
LEAST_HELD_OUT = 5.0  # documents; of fewer expected ones the chance that there is none is above e^-5


@dataclass(frozen=True)
class Sample:
    """What became of the records that were read."""

    counts: list[tuple[int, Counts]]
    """(source, counts) of each unit."""
    seconds: float
    """That one core took."""
    documents: float
    """That the steps will leave of all sources."""
    bytes: float
    """Of their text."""
    whole: bool
    """Everything was read."""
    held_out: int
    """Documents of the sample that the recipe's split holds out."""


def take_sample(recipe: Recipe, works: Sequence[Work], enough: float | None = None) -> Sample:
    """Read some units of each source, or as many as leave `enough` documents. Nothing is written to the output.

    Raises what steps raise, and ValueError for a document that the recipe's quality buckets cannot take.
    """
    with tempfile.TemporaryDirectory() as scratch:
        done: list[tuple[Work, Counts]] = []
        supervisor = Supervisor(recipe, f"{scratch}/lock")
        try:
            chosen = [dataclasses.replace(work, directory=scratch, key="") for work in _chosen(recipe, works)]
            supervisor.run(dataclasses.replace(chosen[0], most=0))  # starts the process
            start = time.perf_counter()
            for work in chosen:
                supervisor.run(work)
                done.append((work, work.counts()))
                if enough is not None and sum(counts.documents for _, counts in done) >= enough:
                    break
            seconds = time.perf_counter() - start
        finally:
            supervisor.close()
        held_out = sum(_held_out(recipe, work.path("documents")) for work, _ in done)
    counts = [(work.source, found) for work, found in done]
    documents, size = _scaled(recipe, works, counts)
    read = [found.records + sum(found.unread.values()) for _, found in done]
    whole = len(done) == len(works) and all(records < SAMPLE_RECORDS for records in read)
    return Sample(counts, seconds, documents, size, whole, held_out)


def warning(recipe: Recipe, sample: Sample) -> str | None:
    """What will go wrong with the split, or None. Raises ValueError where it is certain that the build will fail."""
    if recipe.tokenize is None or not (fraction := recipe.tokenize.val_fraction):
        return None
    advice = "give more documents, another tokenize.val_fraction, or 0 to hold none out"
    documents, held_out = round(sample.documents), sample.held_out
    changes_texts = any(isinstance(config, Lines | Paragraphs | Substrings) for config in recipe.dedup)
    certain = sample.whole and not changes_texts
    if certain and documents and held_out in (0, documents):
        side = "training" if held_out else "validation"
        raise ValueError(
            f"no {side} document: the steps leave {documents:,} documents, of which val_fraction = {fraction:g} holds "
            f"out {held_out:,}; {advice}"
        )
    expected = held_out if sample.whole else documents * fraction
    if expected >= LEAST_HELD_OUT:
        return None
    return (
        f"too few documents to hold some out: the steps leave about {documents:,}, of which "
        f"val_fraction = {fraction:g} holds out about {expected:.2g}, and deduplication leaves fewer; {advice}"
    )


def _chosen(recipe: Recipe, works: Sequence[Work]) -> Iterator[Work]:
    for i in range(len(recipe.sources)):
        mine = [work for work in works if work.source == i]
        every = max(1, len(mine) // SAMPLE_UNITS)
        yield from (dataclasses.replace(work, most=SAMPLE_RECORDS) for work in mine[::every][:SAMPLE_UNITS])


def _held_out(recipe: Recipe, path: pathlib.Path) -> int:
    if recipe.tokenize is None:
        return 0
    fraction, seed = recipe.tokenize.val_fraction, recipe.seed
    return sum(
        _taken(recipe, document) and in_validation(document.text, fraction, seed) for document in read_file(path)
    )


def _taken(recipe: Recipe, document: Document) -> bool:
    """Whether quality buckets take a document at all."""
    return recipe.mix is None or recipe.mix.buckets is None or recipe.mix.buckets.repeat(document) > 0


def _scaled(recipe: Recipe, works: Sequence[Work], counts: Sequence[tuple[int, Counts]]) -> tuple[float, float]:
    """(documents, bytes of text) of all: each source is like its sample, one without a sample adds nothing."""
    documents = size = 0.0
    for i in range(len(recipe.sources)):
        whole = sum(work.unit.size for work in works if work.source == i)
        found = total(one for source, one in counts if source == i)
        times = whole / max(1, found.source_bytes)
        documents += times * found.documents
        size += times * found.bytes
    return documents, size
