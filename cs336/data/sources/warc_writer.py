"""Writes WARC: a gzip member a record, as crawlers do."""

import gzip
import hashlib
from typing import IO

VERSION = b"WARC/1.1"


class WarcWriter:
    """Appends records to a binary file. The same calls give the same bytes."""

    def __init__(self, file: IO[bytes], *, packed: bool = True):
        self._file, self._packed = file, packed

    def page(self, url: str, content: bytes, *, type: str = "text/html", status: int = 200, date: str) -> None:
        """A response of HTTP. date: ISO 8601, such as 2025-01-01T00:00:00Z."""
        head = f"HTTP/1.1 {status} -\r\nContent-Type: {type}\r\nContent-Length: {len(content)}\r\n\r\n"
        self.record("response", "application/http; msgtype=response", head.encode() + content, date=date, url=url)

    def record(self, kind: str, type: str, block: bytes, *, date: str, url: str = "") -> None:
        name = hashlib.sha256(f"{kind} {url} {date}".encode() + block).hexdigest()
        fields = {
            "WARC-Type": kind,
            "WARC-Record-ID": f"<urn:sha256:{name}>",
            "WARC-Date": date,
            **({"WARC-Target-URI": url} if url else {}),
            "Content-Type": type,
            "Content-Length": str(len(block)),
        }
        lines = [VERSION, *(f"{field}: {value}".encode() for field, value in fields.items())]
        self.raw(b"\r\n".join(lines) + b"\r\n\r\n" + block + b"\r\n\r\n")

    def raw(self, record: bytes) -> None:
        """Bytes as they are, broken ones too."""
        self._file.write(gzip.compress(record, 6, mtime=0) if self._packed else record)
