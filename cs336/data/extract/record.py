"""A record of a source as a document: the text of a page, of a paper, or as it is."""

import math
import re
from dataclasses import dataclass
from typing import Any

from cs336.data.extract.encoding import decode
from cs336.data.extract.html import Format, Mode, html_to_text
from cs336.data.extract.pdf import MOST_PAGES, pdf_to_text
from cs336.data.sources.record import HTML, PDF, Record
from cs336.data.step import Removed
from cs336.utils.documents import Document

HEAD = 1 << 16  # bytes at either end of a page in which it says what it is
TAG_BYTES, LOOKED_AT = 1000, 8  # the longest tag, and how often a word is looked up
VALUE = r"""\s*=\s*["']?([^"'\s>]{1,500})"""
HREF, CONTENT = (re.compile((rf"\b{name}" + VALUE).encode(), re.IGNORECASE) for name in ("href", "content"))
FACTS = (  # (fact, a word that stands in the tag that names it, how it stands there, where the fact is)
    ("licence", b"license", rb"""\brel\s*=\s*["']?license\b""", HREF),
    ("url", b"canonical", rb"""\brel\s*=\s*["']?canonical\b""", HREF),
    ("date", b"published_time", rb"""\bproperty\s*=\s*["']?article:published_time\b""", CONTENT),
    ("date", b"datepublished", rb"""\b(?:name|itemprop)\s*=\s*["']?datepublished\b""", CONTENT),
)


@dataclass(frozen=True)
class Extract:
    """How pages and papers become text."""

    mode: Mode = "main"
    """Of a page: main is its content alone, full is everything that it shows."""
    format: Format = "text"
    """Of a page: text, or markdown with headings, lists, tables, code and links."""
    max_pages: int = MOST_PAGES
    """Of a PDF; those after them are left out."""


def document_of(record: Record, settings: Extract = Extract()) -> Document | Removed:
    """The document of a record, with url, date and licence in its metadata where they are known.

    Removed: "unreadable" for a page or PDF that cannot be read, "no text" for one without a visible character.
    """
    metadata = dict(record.metadata)
    content = record.content
    try:
        if record.type == PDF:
            assert isinstance(content, bytes)
            text = pdf_to_text(content, settings.max_pages, math.inf)  # the same on a slow machine
        elif record.type == HTML:
            text = html_to_text(content, settings.mode, settings.format, record.charset)
            metadata = page_facts(content) | metadata if isinstance(content, bytes) else metadata
        else:
            text = content if isinstance(content, str) else decode(content, record.charset)
    except ValueError as error:
        return Removed("unreadable", str(error))
    if not text or text.isspace():
        return Removed("no text")
    return Document(text, record.id, record.source, metadata)


def page_facts(page: bytes) -> dict[str, Any]:
    """licence, url and date, where a page names them: rel=license, rel=canonical, the time it was published."""
    facts: dict[str, Any] = {}
    ends = page[:HEAD] + page[HEAD:][-HEAD:]
    lower = ends.lower()
    for fact, word, mark, value in FACTS:
        at = -1
        for _ in range(LOOKED_AT if fact not in facts else 0):
            at = lower.find(word, at + 1)
            if at < 0:
                break
            begin, end = lower.rfind(b"<", max(0, at - TAG_BYTES), at), lower.find(b">", at, at + TAG_BYTES)
            if begin >= 0 and re.search(mark, lower[begin:end]) and (found := value.search(ends[begin:end])):
                facts[fact] = found[1].decode("utf-8", "replace")
                break
    return facts
