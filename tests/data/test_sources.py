"""Sources of a recipe: what they find, what documents keep, what is bounded and named."""

import bz2
import gzip
import json
import lzma
import time

import pytest

from cs336.data.extract.record import Extract, document_of, page_facts
from cs336.data.sources import Limits, Record, Unread
from cs336.data.sources.configs import Code, Html, HuggingFace, Jsonl, Parquet, Pdf, Text, Warc
from cs336.data.step import Removed

SMALL = Limits(record_bytes=1000)


def read(source, limits=SMALL):
    return [found for unit in source.units() for found in source.read(unit, limits)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


class TestFinding:
    def test_directories_files_and_patterns_in_order(self, tmp_path):
        for name in ("b/2.html", "b/1.htm", "a.html", "a.txt", ".hidden/x.html"):
            write(tmp_path / name, "<p>x")
        found = read(Html((str(tmp_path),)))
        assert [r.id.removeprefix(str(tmp_path)) for r in found] == ["/a.html", "/b/1.htm", "/b/2.html"]
        found = read(Html((f"{tmp_path}/b/*", f"{tmp_path}/a.txt")))
        assert [r.id.removeprefix(str(tmp_path)) for r in found] == ["/b/1.htm", "/b/2.html", "/a.txt"]

    def test_errors(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere does not exist: expected a file, a directory"):
            Html((str(tmp_path / "nowhere"),)).units()
        with pytest.raises(FileNotFoundError, match=r"holds no file of this source: expected \.htm, \.html"):
            Html((str(tmp_path),)).units()
        with pytest.raises(FileNotFoundError, match=r"\*\.gz holds no file"):
            Warc((f"{tmp_path}/*.gz",)).units()
        with pytest.raises(ValueError, match="paths is empty: name files"):
            Html(())

    def test_small_files_share_a_unit_and_the_output_is_no_source(self, tmp_path, monkeypatch):
        monkeypatch.setattr("cs336.data.sources.unit.RUN_FILES", 2)
        for i in range(5):
            write(tmp_path / f"{i}.txt", "x" * i)
        write(tmp_path / "out" / "9.txt", "x")
        units = Text((str(tmp_path),)).units(without=tmp_path / "out")
        assert [len(unit.files) for unit in units] == [2, 2, 1]
        assert [unit.size for unit in units] == [1, 5, 4]


class TestFiles:
    def test_text(self, tmp_path):
        write(tmp_path / "a.md", b"\xef\xbb\xbf# caf\xc3\xa9 \xff")
        write(tmp_path / "b.txt", b"a\0b")
        write(tmp_path / "c.txt", "x" * 1001)
        text, binary, large = read(Text((str(tmp_path),), name="notes", licence="CC0-1.0"))
        assert text.content == "# café \ufffd"
        assert dict(text.metadata) == {"collection": "notes", "licence": "CC0-1.0"}
        assert (binary.reason, binary.damaged) == ("binary", False)
        assert (large.reason, large.detail) == ("too large", "1,001 bytes; 1,000 are read")

    def test_code_keeps_the_licence_that_it_names(self, tmp_path):
        write(tmp_path / "LICENSE", "MIT License\n\nPermission is hereby\n granted, free of charge, to any person")
        write(tmp_path / "src/a.py", "print()\n")
        write(tmp_path / "src/b.c", "// SPDX-License-Identifier: GPL-2.0-only WITH Classpath-exception-2.0\nint x;")
        write(tmp_path / "deep/LICENSE", "Apache License\n   Version 2.0, January 2004")
        write(tmp_path / "deep/x/y.rs", "fn main() {}")
        write(tmp_path / "node_modules/z/i.js", "x")
        found = {r.id.rpartition("/")[2]: dict(r.metadata) for r in read(Code((str(tmp_path),)))}
        assert found == {
            "a.py": {"licence": "MIT"},
            "b.c": {"licence": "GPL-2.0-only WITH Classpath-exception-2.0"},
            "y.rs": {"licence": "Apache-2.0"},
        }


ROWS = ({"text": "one", "id": "x", "link": "http://a"}, {"text": "two", "license": "mit", "timestamp": "2020"})


class TestRows:
    @pytest.mark.parametrize("packing", ["", ".gz", ".bz2", ".xz", ".zst"])
    def test_json_lines(self, tmp_path, packing):
        plain = b"\xef\xbb\xbf\n" + b"\n\n".join(json.dumps(row).encode() for row in ROWS)
        pack = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
        if packing == ".zst":
            pack[".zst"] = pytest.importorskip("zstandard").compress
        path = write(tmp_path / f"a.jsonl{packing}", pack[packing](plain))
        one, two = read(Jsonl((str(tmp_path),)))
        assert (one.content, one.id, one.metadata["url"]) == ("one", "x", "http://a")
        assert (two.content, two.id) == ("two", f"{path}:4")
        assert (two.metadata["licence"], two.metadata["date"]) == ("mit", "2020")

    def test_each_bad_line_is_named_and_the_others_read(self, tmp_path):
        lines = ['{"text": 3}', "{", "[1]", '{"txt": "a"}', "[" * 50_000, '{"text": "\\ud800\xff"}', '{"text": "good"}']
        write(tmp_path / "a.jsonl", "\n".join(lines).encode("latin-1"))
        found = read(Jsonl((str(tmp_path),)), Limits(record_bytes=100_000))
        assert [r.content for r in found if isinstance(r, Record)] == ["\ufffd\ufffd\ufffd\ufffd", "good"]
        assert [(r.id.rpartition(":")[2], r.reason) for r in found[:5]] == [(str(i), "damaged") for i in range(1, 6)]
        assert "\"text\" must be a text; it has 'txt': name one with text_field" in found[3].detail
        assert [r.number for r in found] == list(range(7))

    @pytest.mark.parametrize("packed", [False, True])
    def test_one_line_without_end_is_passed_over_in_little_memory(self, tmp_path, packed):
        """400 MB packed; 200 MB plain."""
        path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
        pack = gzip.compress if packed else bytes
        body = pack(b"x" * 100_000_000)  # members of gzip follow each other
        with path.open("wb") as file:
            file.write(pack(b'{"text": "first"}\n{"text": "'))
            for _ in range(4 if packed else 2):
                file.write(body)
            file.write(pack(b'"}\n{"text": "last"}\n'))
        start = time.perf_counter()
        first, long, last = read(Jsonl((str(path),)), Limits(record_bytes=1 << 20))
        assert (first.content, last.content) == ("first", "last")
        assert long.reason == "too large"
        assert long.id.endswith(":2")
        assert time.perf_counter() - start < 60

    def test_a_line_of_the_largest_size_is_read(self, tmp_path):
        row = json.dumps({"text": "x" * 100})
        write(tmp_path / "a.jsonl", f"{row}\n{row}x\n{row}")
        found = read(Jsonl((str(tmp_path),)), Limits(record_bytes=len(row)))
        assert [type(r) for r in found] == [Record, Unread, Record]

    def test_a_packed_file_that_is_cut_off(self, tmp_path):
        packed = gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(5000)))
        write(tmp_path / "a.jsonl.gz", packed[:-100])
        found = read(Jsonl((str(tmp_path),)))
        assert len(found) > 100
        assert found[-1].reason == "damaged"
        assert "cannot be unpacked further" in found[-1].detail

    def test_parquet(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(
            pyarrow.table({"text": ["a", None, "x" * 2000], "url": ["u", "v", "w"]}), tmp_path / "a.parquet"
        )
        write(tmp_path / "b.parquet", b"PAR1 no")
        a, none, large, broken = read(Parquet((str(tmp_path),)))
        assert (a.content, dict(a.metadata)) == ("a", {"url": "u"})
        assert "must be a text" in none.detail
        assert large.reason == "too large"
        assert (broken.reason, broken.id) == ("damaged", f"{tmp_path}/b.parquet:1")

    def test_what_pyarrow_cannot_do_ends_one_file(self, tmp_path, monkeypatch):
        pyarrow = pytest.importorskip("pyarrow")

        def broken(path):
            yield {"text": "a"}, 0.5
            raise pyarrow.ArrowNotImplementedError("integers of less than 8 bits")

        monkeypatch.setattr("cs336.data.sources.rows._parquet_rows", broken)
        write(tmp_path / "a.parquet", "")
        page, unread = read(Parquet((str(tmp_path),)))
        assert (page.content, unread.reason) == ("a", "damaged")
        assert "less than 8 bits" in unread.detail

    def test_hugging_face_directories(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        write(tmp_path / "hub/README.md", "---\nlicense: cc-by-4.0\n---\n# data")
        write(tmp_path / "hub/data/train-00000-of-00001.jsonl", '{"text": "train"}')
        write(tmp_path / "hub/data/test-00000-of-00001.jsonl", '{"text": "test"}')
        (record,) = read(HuggingFace((str(tmp_path / "hub"),)))
        assert (record.content, record.metadata["licence"]) == ("train", "cc-by-4.0")
        with pytest.raises(ValueError, match="has no split 'validation', only test, train"):
            HuggingFace((str(tmp_path / "hub"),), split="validation").units()

        saved = tmp_path / "saved/train/data-00000-of-00001.arrow"
        saved.parent.mkdir(parents=True)
        table = pyarrow.table({"text": [f"row {i}" for i in range(600)]})
        with pyarrow.OSFile(str(saved), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
        assert [r.content for r in read(HuggingFace((str(tmp_path / "saved"),)))] == [f"row {i}" for i in range(600)]


class TestExtraction:
    def document(self, content, type="text/html", **metadata):
        return document_of(Record(0, "r", "f", type, content, metadata), Extract())

    def test_a_page_keeps_what_it_says_of_itself(self):
        page = b"""<head><link rel="canonical" href="http://x.org/a"><link rel=license href='http://cc/by'>
            <meta property="article:published_time" content="2024-05-06"></head><p>text of a page</p>"""
        facts = {"url": "http://x.org/a", "licence": "http://cc/by", "date": "2024-05-06"}
        assert page_facts(page) == facts
        document = self.document(page, date="2025", collection="c")
        assert document.metadata == facts | {"date": "2025", "collection": "c"}
        assert "text of a page" in document.text

    def test_what_has_no_text(self):
        assert self.document(b"<p> </p>") == Removed("no text")
        removed = self.document(b"%PDF-1.7 nothing", "application/pdf")
        assert removed.reason == "unreadable"
        assert "damaged, encrypted or no PDF" in removed.detail

    def test_hostile_pages_take_linear_time(self):
        start = time.perf_counter()
        for page in (
            b"<div>" * 100_000 + b"deep" + b"</div>" * 100_000,
            b"<a " * 300_000,
            b"<a rel=license " * 100_000,
            b"\xff\xfe\xfd" * 100_000,
            b"<a href=" + b"x" * 1_000_000,
        ):
            self.document(page)
        assert time.perf_counter() - start < 20


def test_pdf_and_limits(tmp_path):
    write(tmp_path / "a.pdf", b"%PDF-1.4 x")
    (record,) = read(Pdf((str(tmp_path),)))
    assert record.type == "application/pdf"
    with pytest.raises(ValueError, match="worker_bytes 5 is too little for records of 67,108,864 bytes: give"):
        Limits(worker_bytes=5)
    with pytest.raises(ValueError, match="must be more than 0, got 0"):
        Limits(record_bytes=0)
