"""WARC and ARC archives: whole, packed, damaged, hostile."""

import gzip
import io
import random
import time
import tracemalloc
import zlib

import pytest

from cs336.data.extract.record import Extract, document_of
from cs336.data.sources import Limits, Record, Unread, WarcWriter, read_archive

DATE = "2025-03-01T12:00:00Z"
SMALL = Limits(record_bytes=100_000)


def crawl(*, packed=True, pages=3):
    file = io.BytesIO()
    writer = WarcWriter(file, packed=packed)
    writer.record("warcinfo", "application/warc-fields", b"software: test\r\n", date=DATE)
    for i in range(pages):
        writer.record("request", "application/http", b"GET / HTTP/1.1\r\n\r\n", date=DATE, url=f"http://x.org/{i}")
        writer.page(f"http://x.org/{i}", f"<p>page {i}</p>".encode() + b"x" * 50 * i, date=DATE)
    return file.getvalue()


def read(archive, limits=SMALL):
    return list(read_archive(io.BytesIO(archive), "a.warc", limits))


def pages(found):
    return [r.content for r in found if isinstance(r, Record)]


def bad(found):
    return [(r.reason, r.detail) for r in found if isinstance(r, Unread) and r.damaged]


WHOLE = [f"<p>page {i}</p>".encode() + b"x" * 50 * i for i in range(3)]


@pytest.mark.parametrize("packing", ["plain", "member a record", "one member", "zstd", "zstd frame a record"])
def test_reads_every_packing(packing):
    plain = crawl(packed=False)
    if packing.startswith("zstd"):
        zstandard = pytest.importorskip("zstandard")
        parts = plain.split(b"WARC/1.1")[1:] if "record" in packing else [plain]
        head = b"WARC/1.1" if "record" in packing else b""
        archive = b"".join(zstandard.compress(head + part) for part in parts)
    else:
        archive = {"plain": plain, "member a record": crawl(), "one member": gzip.compress(plain)}[packing]
    found = read(archive)
    assert pages(found) == WHOLE
    assert [r.number for r in found] == list(range(7))
    assert {r.reason for r in found if isinstance(r, Unread)} == {"warcinfo", "request"}
    first = next(r for r in found if isinstance(r, Record))
    assert (first.id, first.type) == ("http://x.org/0", "text/html")
    assert dict(first.metadata) == {"url": "http://x.org/0", "date": DATE}
    assert 0 < first.position <= len(archive) + 4


def test_conversion_records_of_wet_are_text():
    file = io.BytesIO()
    WarcWriter(file).record("conversion", "text/plain", "caf\u00e9 \xff".encode() + b"\xff", date=DATE, url="http://x/")
    (record,) = read(file.getvalue())
    assert (record.type, record.content) == ("text/plain", "caf\u00e9 \xff\ufffd")


def test_other_statuses_and_types_are_counted():
    file = io.BytesIO()
    writer = WarcWriter(file)
    writer.page("http://x/1", b"gone", status=404, date=DATE)
    writer.page("http://x/2", b"\x89PNG", type="image/png", date=DATE)
    writer.page("http://x/3", b"%PDF-1.7 ...", type="application/octet-stream", date=DATE)
    writer.page("http://x/4", b"<!doctype html><p>", type="", date=DATE)
    found = read(file.getvalue())
    assert [r.reason for r in found[:2]] == ["status 404", "image/png"]
    assert not any(r.damaged for r in found[:2])
    assert [r.type for r in found[2:]] == ["application/pdf", "text/html"]


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "raw deflate"])
def test_bodies_that_are_packed(encoding):
    page = b"<p>hello</p>" * 50
    raw = zlib.compressobj(wbits=-15)
    packed = {
        "gzip": gzip.compress(page),
        "deflate": zlib.compress(page),
        "raw deflate": raw.compress(page) + raw.flush(),
    }
    head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: {encoding.split()[-1]}\r\n\r\n".encode()
    file = io.BytesIO()
    WarcWriter(file).record("response", "application/http", head + packed[encoding], date=DATE, url="http://x/")
    (record,) = read(file.getvalue())
    assert record.content == page


@pytest.mark.parametrize("encoding", ["deflate", "br", "zstd"])
def test_bodies_that_are_not_packed_as_they_say(encoding):
    """An archive may have unpacked a body; one that is packed, and cannot be read, is named."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: {encoding}\r\n\r\n".encode()
    file = io.BytesIO()
    for body in ("<p>été".encode(), b"%PDF-1.4\n%\xe2\xe3\x00", bytes(range(160, 256)) + b"\x07" + bytes(range(64))):
        WarcWriter(file).record("response", "application/http", head + body, date=DATE, url="http://x/")
    text, paper, packed = read(file.getvalue())
    assert text.content == "<p>été".encode()
    assert packed.reason == "damaged"
    assert ("cannot be unpacked" if encoding == "deflate" else f"packed with {encoding}") in packed.detail
    assert encoding == "deflate" or paper.content.startswith(b"%PDF")


def answer(body, coding, status="200 OK", type="text/html"):
    """What is read of one response."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {type}\r\nContent-Encoding: {coding}\r\n\r\n".encode()
    file = io.BytesIO()
    WarcWriter(file).record("response", "application/http", head + body, date=DATE, url="http://x/")
    (found,) = read(file.getvalue())
    return found


@pytest.mark.parametrize("coding", ["deflate", "br", "zstd", "br, deflate"])
def test_pages_with_control_characters_are_not_packed(coding):
    bodies = [b"<p>ok\0 page</p>", b"\0<!-- \1 --><p>page", b"a text " * 20 + b"\1"]
    bodies += ["\ufeff<p>hello".encode("utf-16-le"), "\ufeffд".encode("utf-16-be"), "<p>hello".encode("utf-16-le")]
    assert [answer(body, coding).content for body in bodies] == bodies


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br"])
def test_what_is_no_page_is_not_unpacked(coding):
    packed = bytes(range(160, 256)) + b"\x07" + bytes(range(64))
    body = gzip.compress(packed)[:-9] + b"broken" if coding == "gzip" else packed
    assert answer(body, coding).reason == "damaged"
    assert answer(body, coding, type="").reason == "damaged"
    for found, reason in [
        (answer(body, coding, status="404 Not Found"), "status 404"),
        (answer(body, coding, type="image/jpeg"), "image/jpeg"),
    ]:
        assert (found.reason, found.damaged) == (reason, False)


def test_bodies_that_are_packed_several_times():
    page = b"<p>hello</p>" * 50
    twice = gzip.compress(zlib.compress(page))
    assert answer(twice, "deflate, GZIP").content == page
    assert answer(page, "deflate, gzip").content == page
    assert answer(zlib.compress(page), "deflate, identity").content == page
    random.seed(0)
    brotli = random.randbytes(300)
    for body, coding in ((gzip.compress(brotli), "br, gzip"), (brotli, "gzip, br")):
        assert "packed with br" in answer(body, coding).detail


def test_the_header_names_the_encoding_of_a_page():
    text = "Zażółć gęślą jaźń: zupełnie zwykłe zdanie po polsku."
    for content_type in ("text/html; charset=iso-8859-2", 'text/plain; Charset="ISO-8859-2"'):
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\n\r\n".encode()
        file = io.BytesIO()
        page = (f"<p>{text}</p>" if "html" in content_type else text).encode("iso-8859-2")
        WarcWriter(file).record("response", "application/http", head + page, date=DATE, url="http://x/")
        (record,) = read(file.getvalue())
        assert document_of(record, Extract("full")).text == text


def test_bodies_in_chunks_joined_or_not():
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nTransfer-Encoding: chunked\r\n\r\n"
    for body, expected in [
        (b"5\r\nhello\r\n6;x=1\r\n world\r\n0\r\n\r\n", b"hello world"),
        (b"hello world", b"hello world"),
        (b"fade in, and nothing else", b"fade in, and nothing else"),
    ]:
        file = io.BytesIO()
        WarcWriter(file).record("response", "application/http", head + body, date=DATE, url="http://x/")
        assert pages(read(file.getvalue())) == [expected]


def arc(version=1):
    page = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<p>arc</p>"
    between = " 200 checksum - 17 file.arc" if version == 2 else ""
    first = f"{version} 0 Alexa\nURL IP-address Archive-date Content-type Archive-length\n".encode()
    head = f"filedesc://a.arc 0.0.0.0 20250301120000 text/plain{between} {len(first)}\n".encode()
    row = f"http://x.org/a b 1.2.3.4 20250301120000 text/html{between} {len(page)}\n".encode()
    return head + first + b"\n" + row + page + b"\n"


def test_arc():
    found = read(arc())
    assert pages(found) == [b"<p>arc</p>"]
    assert dict(found[1].metadata) == {"url": "http://x.org/a b", "date": DATE}


# ---- damage ----


@pytest.mark.parametrize("packed", [True, False])
def test_a_truncated_archive_keeps_what_came_before(packed):
    archive = crawl(packed=packed)
    found = read(archive[:-40])
    assert pages(found) == WHOLE[:2]
    assert len(bad(found)) == 1
    assert found[-1].id == "http://x.org/2"


def test_what_follows_a_damaged_member_is_read():
    archive = bytearray(crawl())
    begins = [i for i in range(len(archive)) if archive[i : i + 3] == b"\x1f\x8b\x08"]
    archive[begins[2] + 30 : begins[2] + 40] = b"\0" * 10  # page 0
    found = read(bytes(archive))
    assert pages(found) == WHOLE[1:]
    ((reason, detail),) = bad(found)
    assert reason == "damaged"
    assert "cannot be unpacked" in detail or "early" in detail


def test_what_follows_a_wrong_length_is_read():
    for wrong in (b"5", b"5000", b"-1", b"x"):
        for packed in (True, False):
            file = io.BytesIO()
            writer = WarcWriter(file, packed=packed)
            writer.page("http://x/0", b"<p>zero</p>", date=DATE)
            head = b"WARC/1.1\r\nWARC-Type: resource\r\nContent-Type: text/html\r\nContent-Length: "
            writer.raw(head + wrong + b"\r\n\r\n<p>broken</p>\r\n\r\n")
            for i in (1, 2):
                writer.page(f"http://x/{i}", f"<p>{i}</p>".encode(), date=DATE)
            found = read(file.getvalue())
            whole = [page for page in pages(found) if page != b"<p>br"]
            assert whole == [b"<p>zero</p>", b"<p>1</p>", b"<p>2</p>"], (wrong, packed)
            assert len(bad(found)) >= 1


def test_random_damage_never_raises_and_never_hangs():
    rng = random.Random(0)
    for packed in (True, False):
        archive = crawl(packed=packed, pages=6)
        for _ in range(150):
            damaged = bytearray(archive)
            for _ in range(rng.randint(1, 5)):
                at = rng.randrange(len(damaged))
                damaged[at : at + rng.randint(0, 30)] = rng.randbytes(rng.randint(0, 30))
            numbers = [r.number for r in read(bytes(damaged))]
            assert numbers == list(range(len(numbers)))


def test_bytes_that_are_no_archive():
    for content in (b"", b"\n\n\n"):
        assert read(content) == []
    for content in (b"hello", random.Random(1).randbytes(5000), b"\x1f\x8b\x08" + b"\xff" * 100, b"WARC/1.0\r\n"):
        assert [reason for reason, _ in bad(read(content))] == ["damaged"]
    with pytest.raises(ValueError, match="lz4, which is not read: unpack it"):
        read(b"\x04\x22\x4d\x18....")


# ---- hostile ----


def bomb(size):
    """A record that unpacks to `size` bytes of zeros, and a whole one after it."""
    file = io.BytesIO()
    head = (
        f"WARC/1.1\r\nWARC-Type: response\r\nWARC-Target-URI: http://x/bomb\r\nContent-Length: {size}\r\n\r\n".encode()
    )
    packer = zlib.compressobj(9, wbits=31)
    file.write(packer.compress(head))
    for _ in range(size >> 20):
        file.write(packer.compress(b"\0" * (1 << 20)))
    file.write(packer.flush())
    WarcWriter(file).page("http://x/after", b"<p>after</p>", date=DATE)
    return file.getvalue()


@pytest.mark.parametrize("declared", [True, False])
def test_a_bomb_costs_little_and_names_itself(declared):
    archive = bomb(256 << 20)
    if not declared:
        archive = gzip.compress(b"WARC/1.1\r\nWARC-Type: x\r\n") + archive  # its head goes on into the bomb
    tracemalloc.start()
    start = time.perf_counter()
    found = read(archive)
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pages(found) == [b"<p>after</p>"]
    assert found[-2].reason == ("too large" if declared else "damaged")
    assert seconds < 10
    assert peak < 20 << 20


def test_a_packed_body_that_is_a_bomb():
    body = gzip.compress(b"\0" * (16 << 20))
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: gzip\r\n\r\n"
    file = io.BytesIO()
    WarcWriter(file).record("response", "application/http", head + body, date=DATE, url="http://x/body")
    (found,) = read(file.getvalue())
    assert (found.id, found.reason, found.detail) == (
        "http://x/body",
        "damaged",
        "its body unpacks to more than 100,000 bytes",
    )


def test_a_head_without_end():
    for head in (b"WARC/1.1\r\n" + b"x" * (1 << 20), b"WARC/1.1\r\n" + b"a: b\r\n" * 100_000):
        ((reason, detail),) = bad(read(head))
        assert reason == "damaged"
        assert "longer than 65536" in detail or "more than 200 lines" in detail
