"""The plan of a build, and what it will take, from a sample of each source."""

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence

from cs336.data.build.counts import Counts, total
from cs336.data.build.job import Build
from cs336.data.build.supervisor import Supervisor
from cs336.data.build.unit import Work
from cs336.data.dedup.lines import TABLE_BYTES
from cs336.data.recipe import Documents, Lines, MinHash, Recipe
from cs336.utils.config import to_table
from cs336.utils.duration import duration

SAMPLE_UNITS, SAMPLE_RECORDS = 8, 200  # of each source
DOCUMENT_BYTES = 70  # of memory: digests or keys, their order, where each document is
BYTES_PER_TOKEN = 4.2  # of English text, by a tokenizer of 32,000
LINE_BYTES = 60  # of web text, the mean
DOCUMENTS_PER_SECOND = 8000.0  # that MinHash signs, one core, 1.5 kB each; measured by benchmarks/end_to_end
TEXT_BYTES_PER_SECOND = 60e6  # of another pass over documents


def estimate(build: Build) -> Iterator[str]:
    """Lines for a person: the plan, then documents, time, memory and disk of each stage, from a sample.

    Nothing is written to the output directory. Raises what the sources and steps raise.
    """
    recipe = build.recipe
    with tempfile.TemporaryDirectory() as scratch:
        works = [Work(number, source, unit, scratch, "") for number, (source, unit) in enumerate(build.units())]
        yield from _plan(recipe, works)
        yield ""
        sampled, seconds = _sample(recipe, works, scratch)
    yield from _expected(recipe, works, sampled, seconds, build)


def _plan(recipe: Recipe, works: Sequence[Work]) -> Iterator[str]:
    yield f"output   {recipe.output}"
    for i, source in enumerate(recipe.sources):
        units = [work.unit for work in works if work.source == i]
        files = sum(len(unit.files) for unit in units)
        size = sum(unit.size for unit in units)
        yield f"source   {source.kind:<12} {files:,} files, {size / 1e6:,.1f} MB, {len(units):,} units of work"
    yield f"extract  {_settings(recipe.extract)}"
    for step in recipe.steps:
        yield f"step     {step.kind:<12} {_settings(step)}"
    for config in recipe.dedup:
        yield f"dedup    {config.kind:<12} {_settings(config)}"
    if recipe.mix:
        yield f"mix      {_settings(recipe.mix)}"
    yield f"tokenize {_settings(recipe.tokenize)}" if recipe.tokenize else "tokenize no: the build ends with documents"


def _settings(config: object) -> str:
    return ", ".join(f"{name} {value}" for name, value in to_table(config).items() if name != "kind")


def _sample(recipe: Recipe, works: Sequence[Work], scratch: str) -> tuple[list[tuple[int, Counts]], float]:
    """(source, counts) of each unit of the sample, and the seconds that one core took."""
    chosen: list[Work] = []
    for i in range(len(recipe.sources)):
        mine = [work for work in works if work.source == i]
        every = max(1, len(mine) // SAMPLE_UNITS)
        chosen += [dataclasses.replace(work, most=SAMPLE_RECORDS) for work in mine[::every][:SAMPLE_UNITS]]
    supervisor = Supervisor(recipe, f"{scratch}/lock")
    try:
        supervisor.run(dataclasses.replace(chosen[0], most=0))  # starts the process
        start = time.perf_counter()
        for work in chosen:
            supervisor.run(work)
        seconds = time.perf_counter() - start
    finally:
        supervisor.close()
    return [(work.source, work.counts()) for work in chosen], seconds


def _expected(
    recipe: Recipe, works: Sequence[Work], sampled: Sequence[tuple[int, Counts]], seconds: float, build: Build
) -> Iterator[str]:
    documents = size = work_bytes = read_bytes = 0.0
    for i in range(len(recipe.sources)):
        whole = sum(work.unit.size for work in works if work.source == i)
        found = total(counts for source, counts in sampled if source == i)
        times = whole / max(1, found.source_bytes)
        documents += times * found.documents
        size += times * found.bytes
        work_bytes += whole
        read_bytes += found.source_bytes
    found = total(counts for _, counts in sampled)
    workers = build.workers or build.cores
    share = found.documents / found.records if found.records else 0.0
    took = seconds * work_bytes / max(1.0, read_bytes)
    yield f"From a sample of {found.records:,} records, {found.source_bytes / 1e6:,.1f} MB, of which {share:.0%} stay:"
    yield f"extract  {documents:,.0f} documents, {size / 1e6:,.1f} MB of text; {duration(took)} on one core, " + (
        f"{duration(took / workers)} on {workers}"
    )
    passes = size / TEXT_BYTES_PER_SECOND
    for config in recipe.dedup:
        memory, disk, time_left = _cost(config, documents, size, passes)
        yield (
            f"dedup    {config.kind:<12} {memory / 1e6:,.1f} MB of memory, {disk / 1e6:,.1f} MB beside the documents, "
            + (duration(time_left))
        )
    if recipe.tokenize:
        yield f"tokenize at most {size / BYTES_PER_TOKEN / 1e6:,.1f} M tokens"
    yield f"disk     {size * (1 + len(recipe.dedup)) / 1e6:,.1f} MB for the documents of every stage"


def _cost(
    config: Documents | Lines | MinHash, documents: float, size: float, one_pass: float
) -> tuple[float, float, float]:
    """(bytes of memory, bytes of disk, seconds)."""
    if isinstance(config, Documents):
        return DOCUMENT_BYTES * documents, 0.0, 2 * one_pass
    if isinstance(config, Lines):
        lines = size / LINE_BYTES
        parts = max(1.0, -(-lines * TABLE_BYTES // config.max_memory))
        return min(lines * TABLE_BYTES, config.max_memory) + lines, 0.0, (2 + 2 * parts) * one_pass
    signatures = 4.0 * config.num_hashes * documents
    return (
        DOCUMENT_BYTES * documents,
        signatures,
        2 * one_pass + documents / DOCUMENTS_PER_SECOND * config.num_hashes / 128,
    )
