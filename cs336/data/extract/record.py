"""A record of a source as a document: the text of a page, of a paper, or as it is."""

import math
import re
from dataclasses import dataclass
from typing import Any

from cs336.data.extract.html import Format, Mode, html_to_text
from cs336.data.extract.pdf import MOST_PAGES, pdf_to_text
from cs336.data.sources.record import HTML, PDF, Record
from cs336.data.step import Removed
from cs336.utils.documents import Document

HEAD = 1 << 16  # bytes of a page in which it says what it is
ATTRIBUTE = rb"""\s*=\s*["']?([^"'\s>]{1,500})"""
TAG = re.compile(rb"<(?:link|meta|a)\b[^<>]{1,1000}>", re.IGNORECASE)
LICENCE = re.compile(rb"""\brel\s*=\s*["']?license\b""", re.IGNORECASE)
CANONICAL = re.compile(rb"""\brel\s*=\s*["']?canonical\b""", re.IGNORECASE)
PUBLISHED = re.compile(
    rb"""\b(?:property|name|itemprop)\s*=\s*["']?(?:article:published_time|datePublished|date)\b""", re.IGNORECASE
)
HREF, CONTENT = (re.compile(rb"\b" + name + ATTRIBUTE, re.IGNORECASE) for name in (b"href", b"content"))


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
            text = html_to_text(content, settings.mode, settings.format)
            metadata = page_facts(content) | metadata if isinstance(content, bytes) else metadata
        else:
            text = content if isinstance(content, str) else content.decode("utf-8", "replace")
    except ValueError as error:
        return Removed("unreadable", str(error))
    if not text or text.isspace():
        return Removed("no text")
    return Document(text, record.id, record.source, metadata)


def page_facts(page: bytes) -> dict[str, Any]:
    """licence, url and date, where a page names them: rel=license, rel=canonical, the time it was published."""
    facts: dict[str, Any] = {}
    for tag in TAG.finditer(page[:HEAD] + page[HEAD:][-HEAD:]):
        for fact, mark, value in (
            ("licence", LICENCE, HREF),
            ("url", CANONICAL, HREF),
            ("date", PUBLISHED, CONTENT),
        ):
            if fact not in facts and mark.search(tag[0]) and (found := value.search(tag[0])):
                facts[fact] = found[1].decode("utf-8", "replace")
    return facts
