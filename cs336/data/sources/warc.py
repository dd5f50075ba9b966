"""WARC, WET and ARC archives, record by record; damaged records are named and passed over.

Written out, because the readers that exist stop or go silent at the first damaged member, and a record that unpacks
without end has to cost what is read of it, not what it holds (see Members).
"""

from collections.abc import Iterator
from typing import IO

from cs336.data.sources.http import parse_response
from cs336.data.sources.members import LONGEST_LINE, Members, Short
from cs336.data.sources.record import HTML, PDF, TEXT, Damaged, Limits, Record, Unread, charset_of, media_type, sniff

MOST_FIELDS = 200  # lines of a record's head
SKIPPED = 16  # times record_bytes: more of a record that is too large is looked over, not unpacked
Head = dict[str, str]


def read_archive(file: IO[bytes], name: str, limits: Limits) -> Iterator[Record | Unread]:
    """The pages of an archive, and what is none: `request` records, other statuses than 200, images, damaged ones.

    file: seekable. name: of the file, for ids of records that have none.
    """
    members = Members(file)
    arc_version, number = 1, 0
    while True:
        kind: str | None = None
        head: Head = {}
        try:
            members.mark()
            head = _head(members, arc_version)
            if not head:
                return
            kind, size = head["type"], int(head["length"])
            if size > limits.record_bytes:
                found: Record | Unread = _unread(
                    number, head, name, members, "too large", f"{size:,} bytes; {limits.record_bytes:,} are read"
                )
                if size > SKIPPED * limits.record_bytes and members.packed:
                    yield found
                    number += 1
                    if members.resync():
                        continue
                    return
                members.skip(size)
            elif kind in ("response", "resource", "conversion", "arc"):
                found = _page(number, head, members.take(size), name, members, limits)
            else:
                if kind == "filedesc":
                    arc_version = 2 if members.take(size).lstrip()[:1] == b"2" else 1
                else:
                    members.skip(size)
                found = _unread(number, head, name, members, kind, damaged=False)
            yield found
        except Damaged as error:
            yield _unread(number, head, name, members, "damaged", str(error))
            if not isinstance(error, Short) and not members.resync():
                return
        number += 1


def _unread(
    number: int, head: Head, name: str, members: Members, reason: str, detail: str = "", damaged: bool = True
) -> Unread:
    return Unread(number, _id(head, name, members), name, reason, detail, damaged, members.position)


def _id(head: Head, name: str, members: Members) -> str:
    return head.get("url") or head.get("id") or f"{name}@{members.begin}"


def _head(members: Members, arc_version: int) -> Head:
    """{} at the end of the archive."""
    while (line := members.line()).strip() == b"":
        if not line:
            return {}
        members.mark()
    if line.startswith(b"WARC/"):
        return _warc_head(members)
    return _arc_head(line, arc_version)


def _warc_head(members: Members) -> Head:
    fields: Head = {}
    last = ""
    for _ in range(MOST_FIELDS):
        line = members.line()
        if not line:
            raise Damaged("the file ends within its head")
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        if not text:
            break
        if text[0] in " \t" and last:
            fields[last] += " " + text.strip()
            continue
        field, colon, value = text.partition(":")
        if not colon:
            raise Damaged(f"its head holds a line without a name: {text[:60]!r}")
        last = field.strip().lower()
        fields[last] = value.strip()
    else:
        raise Damaged(f"its head has more than {MOST_FIELDS} lines of at most {LONGEST_LINE} bytes")
    length = fields.get("content-length", "")
    if not (length.isascii() and length.isdigit()) or len(length) > 18:
        raise Damaged(f"its Content-Length is {length!r}, not a number of bytes")
    return {
        "type": fields.get("warc-type", "unknown").lower(),
        "length": length,
        "url": fields.get("warc-target-uri", "").strip("<>"),
        "id": fields.get("warc-record-id", "").strip("<>"),
        "date": fields.get("warc-date", ""),
        "content": fields.get("content-type", ""),
        "identified": fields.get("warc-identified-payload-type", ""),
    }


def _arc_head(line: bytes, version: int) -> Head:
    """`URL IP date type length`, or in version 2 `URL IP date type status checksum location offset file length`."""
    parts = line.decode("utf-8", "replace").rstrip("\r\n").rsplit(" ", 9 if version == 2 else 4)
    if len(parts) < 5 or ("://" not in parts[0] and not parts[0].startswith("dns:")):
        raise Damaged(f"a record should begin here, not {line[:60]!r}")
    url, _, date, content = parts[:4]
    if not (parts[-1].isascii() and parts[-1].isdigit()) or not date.isdigit() or len(parts[-1]) > 18:
        raise Damaged(f"its head is not `URL IP date type length`: {line[:60]!r}")
    kind = "filedesc" if url.startswith("filedesc:") else "arc" if url.startswith("http") else "dns"
    stamp = f"{date[:4]}-{date[4:6]}-{date[6:8]}T{date[8:10]}:{date[10:12]}:{date[12:14]}Z" if len(date) == 14 else date
    return {"type": kind, "length": parts[-1], "url": url, "id": "", "date": stamp, "content": content}


def _page(number: int, head: Head, block: bytes, name: str, members: Members, limits: Limits) -> Record | Unread:
    header = head["content"]
    response = None
    try:
        if media_type(header) == "application/http" or head["type"] == "arc":
            response = parse_response(block)
            if response.status != 200:
                return _unread(number, head, name, members, f"status {response.status}", damaged=False)
            header = response.headers.get("content-type", "")
        kind = TEXT if head["type"] == "conversion" else media_type(header)
        if kind in ("unknown type", "application/octet-stream"):
            kind = media_type(head.get("identified", ""))
        if response is not None and kind in (HTML, PDF, TEXT, "unknown type"):  # others may be as broken as they like
            block = response.body(limits.record_bytes)
    except Damaged as error:
        return _unread(number, head, name, members, "damaged", str(error))
    kind = sniff(block) if kind == "unknown type" else kind
    if kind not in (HTML, PDF, TEXT):
        return _unread(number, head, name, members, kind, damaged=False)
    content: bytes | str = block.decode("utf-8", "replace") if head["type"] == "conversion" else block
    metadata = {key: head[key] for key in ("url", "date") if head[key]}
    return Record(number, _id(head, name, members), name, kind, content, metadata, members.position, charset_of(header))
