"""The plan of a build, and what it will take, from a sample of each source."""

from collections.abc import Iterator, Sequence

from cs336.data.build.counts import total
from cs336.data.build.job import Build
from cs336.data.build.sample import Sample, take_sample, warning
from cs336.data.build.unit import Work
from cs336.data.dedup.lines import TABLE_BYTES
from cs336.data.recipe import AnyDedup, Documents, Lines, MinHash, Paragraphs, Recipe, Substrings
from cs336.data.step import Semantic
from cs336.utils.config import to_table
from cs336.utils.duration import duration

DOCUMENT_BYTES = 70  # of memory: digests or keys, their order, where each document is
BYTES_PER_TOKEN = 4.2  # of English text, by a tokenizer of 32,000
LINE_BYTES = 60  # of web text, the mean
PARAGRAPH_BYTES = 300  # of web text, the mean
NORMALIZED_BYTES_PER_SECOND = 100e6  # of paragraphs that are compared
WINDOW_BYTES = 10  # of memory, a byte of text
REPEATS_BYTES_PER_SECOND = 20e6  # that are looked up, one core
HASHED_BYTES_PER_SECOND = 500e6  # that are passed over in a part they do not fall to, one core
FEATURES = 768  # of an embedding
EMBEDDED_BYTES_PER_SECOND = 2e4  # one core, a model of 124M
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


def _cost(config: AnyDedup | Semantic, documents: float, size: float, one_pass: float) -> tuple[float, float, float]:
    """(bytes of memory, bytes of disk, seconds)."""
    if isinstance(config, Documents):
        return DOCUMENT_BYTES * documents, 0.0, 2 * one_pass
    if isinstance(config, Lines):
        lines = size / LINE_BYTES
        parts = max(1.0, -(-lines * TABLE_BYTES // config.max_memory))
        return min(lines * TABLE_BYTES, config.max_memory) + lines, 0.0, (2 + 2 * parts) * one_pass
    if isinstance(config, Paragraphs):
        paragraphs = size / PARAGRAPH_BYTES
        parts = max(1.0, -(-paragraphs * TABLE_BYTES // config.max_memory))
        memory = min(paragraphs * TABLE_BYTES, config.max_memory) + paragraphs
        passes = 1 + parts * (1 if config.keep == "first" else 2)
        return memory, 0.0, passes * (one_pass + size / NORMALIZED_BYTES_PER_SECOND) + one_pass
    if isinstance(config, Substrings):
        symbols = size if config.tokenizer is None else size / BYTES_PER_TOKEN
        parts = max(1.0, -(-symbols * WINDOW_BYTES // config.max_memory))
        took = symbols / REPEATS_BYTES_PER_SECOND + (parts - 1) * symbols / HASHED_BYTES_PER_SECOND
        return min(symbols * WINDOW_BYTES, config.max_memory) + symbols / 8, size, 2 * one_pass + took
    if isinstance(config, MinHash):
        signatures = 4.0 * config.num_hashes * documents
        signed = documents / DOCUMENTS_PER_SECOND * config.num_hashes / 128
        return DOCUMENT_BYTES * documents, signatures, 2 * one_pass + signed
    return DOCUMENT_BYTES * documents, 4.0 * FEATURES * documents, 2 * one_pass + size / EMBEDDED_BYTES_PER_SECOND
