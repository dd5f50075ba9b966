"""Documents that hold a part of an evaluation set: an n-gram of words that one of its items has too.

    index = Decontaminator(["gsm8k-test.jsonl", "mmlu/"], ngram=13)
    index.find(document.text)            # None, or Match(item="gsm8k-test.jsonl:12", ngram="natalia sold ...", ...)

Words are compared in lower case, without accents and punctuation (csrc/cpu/text/shingles.h).
"""

import pathlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cs336 import _text
from cs336.data.step import Apply, Removed
from cs336.utils.documents import Document, files_below, is_blank, open_bytes, parse_line, unpacking
from cs336.utils.files import Paths, path_list

SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Match:
    item: str
    """The file of the evaluation set and the line in it."""
    ngram: str
    """The first one that is shared, normalized."""
    count: int
    """How many n-grams of the text are in evaluation sets."""


class Decontaminator:
    """The n-grams of evaluation sets.

    paths: JSON lines, compressed or not, or directories of them. An item is a line; its text is all strings in it, in
        order, also those within lists and objects, or only those of `fields`.
    ngram: words. Items with fewer cannot be found: `short_items` counts them.

    Raises ValueError that names the file and the line for what is no JSON object, or has none of the fields.
    """

    def __init__(self, paths: Paths, ngram: int = 13, fields: Sequence[str] | None = None):
        if ngram < 1:
            raise ValueError(f"ngram must be at least 1, got {ngram}")
        self._index = _text.NgramIndex(ngram)
        self._items: list[str] = []
        self.ngram, self.short_items = ngram, 0
        for where, text in _items(paths, fields):
            self.short_items += self._index.add(text, len(self._items)) == 0
            self._items.append(where)
        if not self._items:
            raise ValueError(f"there is no evaluation item in {', '.join(map(str, path_list(paths)))}")

    @property
    def items(self) -> int:
        return len(self._items)

    def __len__(self) -> int:
        """Distinct n-grams."""
        return len(self._index)

    def find(self, text: str | bytes) -> Match | None:
        """What of the evaluation sets is in a text."""
        found = self._index.find(text)
        if found is None:
            return None
        count, item, ngram = found
        return Match(self._items[item], ngram, count)


@dataclass(frozen=True)
class Decontaminate:
    """Removes a document that shares an n-gram of words with an evaluation set."""

    paths: tuple[pathlib.Path, ...]
    ngram: int = 13
    fields: tuple[str, ...] | None = None
    """Of an evaluation item; all of its strings if not given."""
    min_matches: int = 1
    """n-grams that a document has to share."""
    kind: Literal["decontaminate"] = "decontaminate"

    def __post_init__(self):
        if self.ngram < 1 or self.min_matches < 1 or not self.paths:
            raise ValueError(
                f"expected one path or more, ngram >= 1 and min_matches >= 1, got {len(self.paths)} paths, "
                f"{self.ngram}, {self.min_matches}"
            )

    def build(self) -> Apply:
        index = Decontaminator(self.paths, self.ngram, self.fields)

        def apply(document: Document) -> Document | Removed:
            match = index.find(document.text)
            if match is None or match.count < self.min_matches:
                return document
            return Removed("contaminated", f"{match.item}: {match.ngram} ({match.count} n-grams)")

        return apply


def _items(paths: Paths, fields: Sequence[str] | None) -> Iterator[tuple[str, str]]:
    """(file:line, its text)"""
    for path in path_list(paths):
        files = [p for p in files_below(path) if set(p.suffixes) & set(SUFFIXES)] if path.is_dir() else [path]
        for file in files:
            with unpacking(file), open_bytes(file) as lines:
                for number, line in enumerate(lines, 1):
                    if not is_blank(line):
                        yield f"{file}:{number}", _text_of(line, f"{file}:{number}", fields)


def _text_of(line: bytes, where: str, fields: Sequence[str] | None) -> str:
    try:
        row = parse_line(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: an evaluation item is a JSON object ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: an evaluation item is a JSON object, got {type(row).__name__}")
    if fields is not None:
        if not row.keys() & set(fields):
            raise ValueError(f"{where}: has none of the fields {', '.join(fields)}, only {', '.join(map(repr, row))}")
        row = {name: row[name] for name in fields if name in row}
    return "\n".join(_strings(row))


def _strings(value: Any) -> Iterator[str]:
    """Those within, in order; without recursion, for JSON may be deep."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting += reversed(value.values())
        elif isinstance(value, list):
            waiting += reversed(value)


def overlaps(items: Sequence[str], documents: Iterable[str], ngram: int = 13) -> dict[int, str]:
    """Items that share `ngram` words in a row with a document: those words, normalized, by the item's place."""
    index, found = _text.NgramIndex(ngram), {}
    for place, item in enumerate(items):
        index.add(item, place)
    for document in documents:
        if index.find(document) is None:
            continue
        words = _text.NgramIndex(ngram)
        words.add(document, 0)
        for place, item in enumerate(items):
            if place not in found and (match := words.find(item)) is not None:
                found[place] = match[2]
    return found
