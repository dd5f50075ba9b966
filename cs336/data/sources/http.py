"""The page within a record of HTTP: status, headers, and a body that may be chunked and packed."""

import re
import zlib
from dataclasses import dataclass

from cs336.data.sources.record import Damaged

CHUNK = re.compile(rb"\s*([0-9a-fA-F]{1,8})(?:;[^\r\n]*)?\r?\n")
CONTROL = re.compile(rb"[\x01-\x08\x0e-\x1a\x1c-\x1f]")  # a tenth of what is packed, nothing of most texts
OPENING = re.compile(
    rb"\xef\xbb\xbf|\xff\xfe|\xfe\xff|%PDF-|\s*<(?:!doctype|!--|\?xml|[a-z][a-z0-9]*[\s>/])", re.IGNORECASE
)
HEAD = 1024
STATUS = re.compile(rb"HTTP/\d(?:\.\d)?\s+(\d{3})")


@dataclass(frozen=True)
class Response:
    status: int
    headers: dict[str, str]
    packed: bytes
    """Its body, as it was sent."""

    def body(self, most_bytes: int) -> bytes:
        """Raises Damaged for one that cannot be unpacked, or is more than most_bytes."""
        body = self.packed
        for coding in reversed(self.headers.get("content-encoding", "").lower().split(",")):  # the last was put on last
            body = _decoded(body, coding.strip(), most_bytes)
        return body


def parse_response(block: bytes) -> Response:
    """Raises Damaged for what is no response."""
    found = STATUS.match(block)
    if found is None:
        raise Damaged("its block is no HTTP response")
    head, _, body = (
        re.split(rb"(\r?\n\r?\n)", block, maxsplit=1) if re.search(rb"\n\r?\n", block) else (block, b"", b"")
    )
    headers = {}
    for line in head.split(b"\n")[1:]:
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    if "chunked" in headers.get("transfer-encoding", "").lower() and CHUNK.match(body):
        body = _joined(body)
    return Response(int(found[1]), headers, body)


def _joined(body: bytes) -> bytes:
    """The chunks of a body; as it is, where what follows is none (many writers join them and keep the header)."""
    parts: list[bytes] = []
    at = 0
    while (size := CHUNK.match(body, at)) is not None:
        length = int(size[1], 16)
        if length == 0:
            return b"".join(parts)
        parts.append(body[size.end() : size.end() + length])
        at = size.end() + length
    return b"".join(parts) if at >= len(body) else body


def _decoded(body: bytes, coding: str, most_bytes: int) -> bytes:
    """As it is where it is not packed, whatever the header says: archives often unpack it and keep the header."""
    if coding in ("gzip", "x-gzip") and body[:2] == b"\x1f\x8b":
        return _inflated(body, 31, most_bytes)
    if coding == "deflate" and body:
        if body[0] & 0x0F == 8 and int.from_bytes(body[:2], "big") % 31 == 0:
            return _inflated(body, 15, most_bytes)
        return _inflated(body, -15, most_bytes) if _seems_packed(body) else body
    if coding in ("br", "zstd") and _seems_packed(body):
        raise Damaged(f"its body is packed with {coding}, which is not read")
    return body


def _seems_packed(body: bytes) -> bool:
    """By its control characters, of which a page or a text may hold a stray one; NULs, as UTF-16 has them, are none."""
    head = body[:HEAD].replace(b"\0", b"")
    return OPENING.match(head) is None and len(CONTROL.findall(head)) * 100 > len(head)


def _inflated(body: bytes, window: int, most_bytes: int) -> bytes:
    inflate = zlib.decompressobj(window)
    try:
        text = inflate.decompress(body, most_bytes)
    except zlib.error as error:
        raise Damaged(f"its body cannot be unpacked ({error})") from None
    if inflate.unconsumed_tail:
        raise Damaged(f"its body unpacks to more than {most_bytes:,} bytes")
    return text
