"""A recipe: sources, extraction, steps over each document, deduplication, tokens. A TOML file is one:

output = "build/crawl"
[[sources]]
kind = "warc"
paths = ["crawl/*.warc.gz"]
[[steps]]
kind = "language"
[[steps]]
kind = "gopher_quality"
[[dedup]]
kind = "minhash"
[tokenize]
tokenizer = "tokenizer.json"
"""

import math
import pathlib
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pydantic

from cs336.data.decontaminate import Decontaminate
from cs336.data.dedup import paragraphs, substrings
from cs336.data.dedup.lines import check_repeats
from cs336.data.dedup.minhash import check_minhash, check_seed
from cs336.data.extract.record import Extract
from cs336.data.filter import steps as filters
from cs336.data.filter.classifier import ClassifierFilter
from cs336.data.filter.lists import BadWords, UrlList
from cs336.data.filter.perplexity import Perplexity
from cs336.data.mix import Buckets
from cs336.data.pack import MAX_CONTEXT
from cs336.data.sources.configs import Source
from cs336.data.sources.record import Limits
from cs336.tokenizer import Tokenizer
from cs336.utils.shards import MAX_SHARD_TOKENS, SHARD_TOKENS
from cs336.utils.special_tokens import END_OF_TEXT

AnyStep = (
    filters.Length
    | filters.Language
    | filters.GopherQuality
    | filters.GopherRepetition
    | filters.FineWeb
    | filters.C4
    | filters.MaskPii
    | UrlList
    | BadWords
    | ClassifierFilter
    | Perplexity
    | Decontaminate
)
Step = Annotated[AnyStep, pydantic.Field(discriminator="kind")]


@dataclass(frozen=True)
class Documents:
    """Drops documents whose text equals an earlier one's. 16 bytes of memory a document."""

    kind: Literal["documents"] = "documents"


@dataclass(frozen=True)
class Lines:
    """Drops lines that several documents have, such as navigation and notices."""

    keep: Literal["first", "none"] = "first"
    """first: of equal lines the first stays; none: no copy stays."""
    min_chars: int = 20
    """Shorter lines stay: they are alike by chance, and code and lists need them. So do empty ones."""
    max_memory: int = 1 << 32
    """Bytes for the table of lines; with fewer the documents are read several times."""
    kind: Literal["lines"] = "lines"

    def __post_init__(self):
        check_repeats(self.keep, self.max_memory)


@dataclass(frozen=True)
class Paragraphs:
    """Drops paragraphs that several documents have, whatever their case, accents, punctuation and white space."""

    keep: Literal["first", "none"] = "first"
    """first: of equal paragraphs the first stays; none: no copy stays."""
    min_chars: int = paragraphs.MIN_CHARS
    """Shorter paragraphs stay, headings for example. So do those without a letter or digit."""
    ignore_digits: bool = False
    """Paragraphs are equal where only their digits differ: dates and counts of a page."""
    max_memory: int = 1 << 32
    """Bytes for the table of paragraphs; with fewer the documents are read several times."""
    kind: Literal["paragraphs"] = "paragraphs"

    def __post_init__(self):
        check_repeats(self.keep, self.max_memory)


@dataclass(frozen=True)
class Substrings:
    """Cuts out passages that were there before, exactly, wherever they begin and end."""

    length: int = substrings.LENGTH
    """Bytes, or tokens of `tokenizer`, that have to be equal at least."""
    at: Literal["char", "word", "line"] = "char"
    """Where a passage may begin and end."""
    max_cut: float = 1.0
    """A document of which a larger share goes is dropped whole; 0: every one with a repeated passage."""
    tokenizer: pathlib.Path | None = None
    """A tokenizer.json; None: length is in bytes of UTF-8."""
    max_memory: int = substrings.MAX_MEMORY
    """Bytes for the tables; with fewer the text is read several times."""
    kind: Literal["substrings"] = "substrings"

    def __post_init__(self):
        substrings.check_substrings(self.length, self.max_memory, self.at, self.max_cut)

    def check(self) -> None:
        if self.tokenizer is None:
            return
        if not self.tokenizer.is_file():
            raise FileNotFoundError(f"{self.tokenizer} does not exist: the substrings' tokenizer is a tokenizer.json")
        Tokenizer.load(self.tokenizer)


@dataclass(frozen=True)
class MinHash:
    """Drops near duplicates: of documents whose n-grams are alike the first stays."""

    num_hashes: int = 128
    num_bands: int = 16
    ngram: int = 5
    threshold: float = 0.8
    """Jaccard similarity of the sets of n-grams, from which on two documents are duplicates."""
    unit: Literal["word", "char"] = "word"
    kind: Literal["minhash"] = "minhash"

    def __post_init__(self):
        check_minhash(self.num_hashes, self.num_bands, self.ngram, self.threshold)


AnyDedup = Documents | Lines | Paragraphs | Substrings | MinHash
Dedup = Annotated[AnyDedup, pydantic.Field(discriminator="kind")]


@dataclass(frozen=True)
class Mix:
    """How much of each source there is in the tokens. A document is repeated or left out by its text and the seed."""

    weights: dict[str, float]
    """Of every source, by its name: shares of the text."""
    max_epochs: float = 4.0
    """Times that a source may be repeated (arXiv 2305.16264)."""
    total_bytes: float | None = None
    """Of the mixture; None: as much as keeps the weights exact."""
    buckets: Buckets | None = None
    """Repeats by a score that a classifier or perplexity step noted."""

    def __post_init__(self):
        if not self.weights or not all(0 < weight < math.inf for weight in self.weights.values()):
            raise ValueError(f"weights must name sources, each with a number above 0, got {self.weights}")
        if not 0 < self.max_epochs < math.inf:
            raise ValueError(f"max_epochs must be above 0, got {self.max_epochs}")


@dataclass(frozen=True)
class Tokenize:
    """Token shards in OUTPUT/tokens/train and OUTPUT/tokens/val."""

    tokenizer: pathlib.Path | None = None
    """A tokenizer.json; None: one is trained on the documents."""
    vocab_size: int = 32_000
    """Of the tokenizer that is trained."""
    val_fraction: float = 0.01
    """Of the documents, held out by their text; 0: all are for training, and the shards are in OUTPUT/tokens."""
    shuffle: bool = True
    """Documents in another order than the sources have them, decided by the seed."""
    shard_tokens: int = SHARD_TOKENS
    pack: int | None = None
    """Context length of windows that hold whole documents, in OUTPUT/packed; None: only documents one after another."""

    def __post_init__(self):
        if self.pack is not None and not 1 <= self.pack <= MAX_CONTEXT:
            raise ValueError(f"pack is a context length in 1..{MAX_CONTEXT}, got {self.pack}")
        if self.vocab_size < 257:
            raise ValueError(f"vocab_size must be 257 or more: 256 bytes, {END_OF_TEXT}, merges; got {self.vocab_size}")
        if not 0 < self.shard_tokens <= MAX_SHARD_TOKENS:
            raise ValueError(f"shard_tokens must be in 1..{MAX_SHARD_TOKENS}, got {self.shard_tokens}")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction must be at least 0 and below 1, got {self.val_fraction}")


@dataclass(frozen=True)
class Recipe:
    """What to build. The same recipe over the same files gives the same bytes, by whichever engine.

    A subclass with other unions in `steps` and `dedup` has more kinds of them: cs336.inference.stages.ModelRecipe.
    """

    output: pathlib.Path
    """The directory of the build; the same command goes on with what is there."""
    sources: tuple[Source, ...]
    extract: Extract = field(default_factory=Extract)
    steps: tuple[Step, ...] = ()
    """Over each document, in order."""
    dedup: tuple[Dedup, ...] = ()
    """Over all documents, in order."""
    mix: Mix | None = None
    """None: every document once."""
    tokenize: Tokenize | None = None
    """None: the build ends with documents."""
    limits: Limits = field(default_factory=Limits)
    keep_removed: bool = False
    """Every removed document is kept whole in OUTPUT/*/removed; otherwise the first few of each reason, cut short."""
    seed: int = 0

    def __post_init__(self):
        if not self.sources:
            raise ValueError("the recipe has no source: add a table [[sources]]")
        check_seed(self.seed)
        names = {source.name for source in self.sources}
        if self.mix is not None and names != set(self.mix.weights):
            raise ValueError(
                f"mix.weights must name every source and nothing else: they name {sorted(self.mix.weights)}, and the "
                f"sources' names are {sorted(names)}"
            )
        if self.mix is not None and self.tokenize is None:
            raise ValueError("a mix is of tokens: add a table [tokenize]")
