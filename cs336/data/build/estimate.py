"""The plan of a build, and what it will take, from a sample of each source."""

from collections.abc import Iterator, Sequence

from cs336.data.build.counts import total
from cs336.data.build.job import Build
from cs336.data.build.sample import Sample, take_sample, warning
from cs336.data.build.unit import Work
from cs336.data.dedup.lines import TABLE_BYTES
from cs336.data.recipe import Documents, Lines, MinHash, Recipe
from cs336.utils.config import to_table
from cs336.utils.duration import duration

DOCUMENT_BYTES = 70  # of memory: digests or keys, their order, where each document is
BYTES_PER_TOKEN = 4.2  # of English text, by a tokenizer of 32,000
LINE_BYTES = 60  # of web text, the mean
DOCUMENTS_PER_SECOND = 8000.0  # that MinHash signs, one core, 1.5 kB each; measured by benchmarks/end_to_end
TEXT_BYTES_PER_SECOND = 60e6  # of another pass over documents


def estimate(build: Build) -> Iterator[str]:
    """Lines for a person: the plan, then documents, time, memory and disk of each stage, from a sample.

    Nothing is written to the output directory. Raises what the sources and steps raise, and, last, ValueError for a
    build that is certain to fail.
    """
    recipe = build.recipe
    build.check()
    works = [Work(number, source, unit, "", "") for number, (source, unit) in enumerate(build.units())]
    yield from _plan(recipe, works)
    yield ""
    sample = take_sample(recipe, works)
    yield from _expected(recipe, works, sample, build)
    if found := warning(recipe, sample):
        yield f"warning  {found}"


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


def _expected(recipe: Recipe, works: Sequence[Work], sample: Sample, build: Build) -> Iterator[str]:
    documents, size = sample.documents, sample.bytes
    found = total(counts for _, counts in sample.counts)
    workers = build.workers or build.cores
    share = found.documents / found.records if found.records else 0.0
    took = sample.seconds * sum(work.unit.size for work in works) / max(1, found.source_bytes)
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
