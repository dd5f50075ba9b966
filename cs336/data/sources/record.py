"""What a source yields: records, and what could not be one."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HTML, PDF, TEXT = "text/html", "application/pdf", "text/plain"


class Damaged(ValueError):
    """A record, or the rest of its file, cannot be read."""


@dataclass(frozen=True, slots=True)
class Record:
    """One page, paper or text, as its source holds it."""

    number: int
    """Its place among all that its unit yields, from 0."""
    id: str
    """The record's own id or URL, else the file and the place in it."""
    source: str
    """The file."""
    type: str
    """text/html, application/pdf or text/plain."""
    content: bytes | str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """url, date, licence where they are known, and the fields of a JSON line or columns of a parquet file."""
    position: int = 0
    """Bytes of the unit's files that are read, this record included."""
    charset: str = ""
    """Of content that is bytes, as the header that came with it says."""


@dataclass(frozen=True, slots=True)
class Unread:
    """What is no record: damaged, too large, or of a kind that holds no text."""

    number: int
    id: str
    source: str
    reason: str
    """One of a few words that are counted: "damaged", "status 404", "image/png"."""
    detail: str = ""
    damaged: bool = True
    """Listed one by one; False: only counted."""
    position: int = 0


@dataclass(frozen=True)
class Limits:
    """Bounds of one record: what crosses one loses that record alone."""

    record_bytes: int = 64 << 20
    """Unpacked bytes of one record."""
    record_seconds: float = 60.0
    """Time that reading, extraction and every step may take for one record."""
    worker_bytes: int = 8 << 30
    """Memory of one worker process."""

    def __post_init__(self):
        if self.record_bytes < 1 or not self.record_seconds > 0:
            raise ValueError(
                f"record_bytes and record_seconds must be more than 0, got {self.record_bytes}, {self.record_seconds}"
            )
        if self.worker_bytes < (floor := 1 << 30) + 8 * self.record_bytes:
            raise ValueError(
                f"worker_bytes {self.worker_bytes:,} is too little for records of {self.record_bytes:,} bytes: give "
                f"{floor + 8 * self.record_bytes:,} or more"
            )


def media_type(header: str) -> str:
    """`Text/HTML; charset=utf-8` -> text/html, with XHTML as HTML and what is written in characters as text/plain."""
    name = header.partition(";")[0].strip().lower()
    if name in ("application/xhtml+xml", "text/html"):
        return HTML
    if name in ("text/plain", "text/markdown", "text/x-markdown"):
        return TEXT
    return name or "unknown type"


def charset_of(header: str) -> str:
    """`text/html; charset="utf-8"` -> utf-8; "" where it names none."""
    found = re.search(r"""(?i);\s*charset\s*=\s*["']?([^\s"';]+)""", header)
    return found[1] if found else ""


def sniff(content: bytes) -> str:
    """The type of bytes that nobody named."""
    head = content[:1024].lstrip()
    if head.startswith(b"%PDF-"):
        return PDF
    if re.match(rb"(?i)<(?:!doctype html|html|head|body|\?xml[^>]*>\s*<(?:!doctype )?html)", head):
        return HTML
    return "unknown type" if b"\0" in head else TEXT
