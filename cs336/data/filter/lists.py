"""Lists of words and addresses that a user brings: no list of others is shipped.

A list is a UTF-8 file, an entry a line; empty lines and those that begin with "#" are passed over.
"""

import pathlib
import re
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cs336 import _text
from cs336.data.step import Apply, Removed
from cs336.utils.documents import Document, files_below, open_bytes, refuse_binary, unpacking

WORD = re.compile(r"[^\W_]+")
LONGEST_HOST = 253  # that the domain name system has


class PhraseMatcher:
    """Finds phrases in texts, in one pass however many there are. Upper and lower case, and runs of white space, are
    one.

    whole_words: "ass" is not found in "class". Scripts that do not part words (Han, kana, Thai, Lao, Burmese, Khmer)
        are searched within words too.
    """

    def __init__(self, phrases: list[str], whole_words: bool = True):
        self.phrases = sorted({_plain(p) for p in phrases} - {""})
        self._native = _text.Phrases(self.phrases, whole_words)

    def find(self, text: str, most: int = 1 << 62) -> tuple[int, str | None]:
        """(occurrences, overlapping ones too, but no more than `most`; the first phrase or None)."""
        count, first = self._native.find(_plain(text), most)
        return count, None if first is None else self.phrases[first]


@dataclass(frozen=True)
class BadWords:
    """Removes documents with more than `most` of the phrases of a list.

    path: a list for every document, or a directory of lists that are named by language ("en", "de.txt"), of which each
        document gets that of its metadata field `language_field`; a language without a list passes.
    """

    path: pathlib.Path
    most: int = 0
    language_field: str = "language"
    kind: Literal["bad_words"] = "bad_words"

    def __post_init__(self):
        if self.most < 0:
            raise ValueError(f"most must be at least 0, got {self.most}")

    def build(self) -> Apply:
        paths = list(files_below(self.path)) if self.path.is_dir() else [self.path]
        matchers = {path.name.partition(".")[0].lower(): PhraseMatcher(list(_entries(path))) for path in paths}
        if not any(matcher.phrases for matcher in matchers.values()):
            raise ValueError(f"{self.path} holds no words")
        for_all = None if self.path.is_dir() else matchers.popitem()[1]

        def apply(document: Document) -> Document | Removed:
            matcher = for_all or matchers.get(str(document.metadata.get(self.language_field)).lower())
            count, first = matcher.find(document.text, self.most + 1) if matcher else (0, None)
            return Removed("bad words", f"{first!r}") if count > self.most else document

        return apply


@dataclass(frozen=True)
class UrlList:
    """Removes documents by their address, which is the metadata field `field`; those without one pass.

    domains: lists of hosts, each with all below it ("bad.example" is "www.bad.example" too); lines of hosts files
        ("0.0.0.0 bad.example") are read as well.
    words: lists of words or phrases that an address must not have between its punctuation.
    substrings: lists of strings that must be nowhere in it.
    """

    domains: tuple[pathlib.Path, ...] = ()
    words: tuple[pathlib.Path, ...] = ()
    substrings: tuple[pathlib.Path, ...] = ()
    field: str = "url"
    kind: Literal["url_list"] = "url_list"

    def __post_init__(self):
        if not (self.domains or self.words or self.substrings):
            raise ValueError("a URL list needs files of domains, words or substrings")

    def build(self) -> Apply:
        domains = {_host(entry.split()[-1]) for path in self.domains for entry in _entries(path)}
        words = PhraseMatcher([" ".join(WORD.findall(entry)) for path in self.words for entry in _entries(path)])
        substrings = PhraseMatcher([entry for path in self.substrings for entry in _entries(path)], whole_words=False)

        def apply(document: Document) -> Document | Removed:
            url = document.metadata.get(self.field)
            if not isinstance(url, str):
                return document
            if found := next((d for d in _domains_of(url) if d in domains), None):
                return Removed("url: domain", found)
            if found := words.find(" ".join(WORD.findall(urllib.parse.unquote(url))), 1)[1]:
                return Removed("url: word", found)
            if found := substrings.find(url, 1)[1]:
                return Removed("url: substring", found)
            return document

        return apply


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _entries(path: pathlib.Path) -> Iterator[str]:
    refuse_binary(path)
    with unpacking(path), open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            try:
                entry = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number} is not UTF-8: {error}") from None
            if entry and not entry.startswith("#"):
                yield entry


def _host(name: str) -> str:
    """As it is compared: in lower case, in ASCII as an address has it, without a dot at the ends."""
    name = name.lower().strip(".")
    try:
        return name if name.isascii() else name.encode("idna").decode()
    except UnicodeError:
        return name


def _domains_of(url: str) -> Iterator[str]:
    """The host of an address, then what it lies in: a.b.c, b.c, c."""
    try:
        host = urllib.parse.urlsplit(url if "//" in url else f"//{url}").hostname
    except ValueError:  # of [ without ]
        return
    rest = _host(host or "")
    while rest and len(rest) <= LONGEST_HOST:
        yield rest
        rest = rest.partition(".")[2]
