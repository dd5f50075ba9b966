import bz2
import gzip
import json
import lzma
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cs336.utils import documents
from cs336.utils.documents import Document, holds_documents, read_documents, read_texts
from cs336.utils.special_tokens import END_OF_TEXT


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def zst(data):
    """Two frames, as `cat` of two files makes them."""
    zstandard = pytest.importorskip("zstandard")
    return b"".join(map(zstandard.compress, (data[: len(data) // 2], data[len(data) // 2 :])))


def jsonl(*texts):
    return "".join(json.dumps({"text": t}) + "\n" for t in texts)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text("ab\n<|", min_size=1).filter(str.strip), min_size=1, max_size=8), st.integers(1, 30))
def test_separators_are_found_across_blocks(tmp_path_factory, texts, block):
    path = put(tmp_path_factory.mktemp("s") / "a.txt", END_OF_TEXT.join(["x" * block, *texts]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BLOCK_CHARS", block + len(END_OF_TEXT))
        assert list(read_texts(path)) == ["x" * block, *texts]


@settings(deadline=None, max_examples=50)
@given(st.text("ab \n\r", max_size=300))
def test_a_lone_text_file_is_cut_at_line_ends(tmp_path_factory, text):
    path = put(tmp_path_factory.mktemp("s") / "a.txt", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_CHARS", 20)
        pieces = [d.text for d in documents._Reader(END_OF_TEXT, "text", metadata=True).file(path, alone=True)]
    assert "".join(pieces) == text
    assert all(len(p) >= 20 and p[-1] in "\n\r" for p in pieces[:-2])


def test_a_text_file_in_a_directory_is_one_document(tmp_path):
    text = "line\n" * 10_000
    put(tmp_path / "d/a.txt", text)
    put(tmp_path / "d/b.md", f"one{END_OF_TEXT}two")
    assert list(read_texts(tmp_path / "d")) == [text, "one", "two"]
    assert len(list(read_texts(tmp_path / "d/a.txt"))) == 7


def test_a_long_file_in_a_directory_is_cut(tmp_path):
    text = "line\n" * 300_000
    put(tmp_path / "d/a.txt", text)
    pieces = list(read_texts(tmp_path / "d"))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) < 9000


def test_a_directory_is_read_without_one_below_it(tmp_path):
    put(tmp_path / "d/a.txt", "one")
    put(tmp_path / "d/e/f/b.txt", "two")
    put(tmp_path / "d/e/g/c.txt", "three")
    assert list(read_texts(tmp_path / "d", without=tmp_path / "d" / "e" / ".." / "e" / "f")) == ["one", "three"]


def test_a_directory_is_read_in_sorted_order(tmp_path):
    put(tmp_path / "b/2.txt", "b2")
    put(tmp_path / "b/1.jsonl", jsonl("b1", "b1 again"))
    put(tmp_path / "a/z.py", "az")
    put(tmp_path / "top.txt", "top")
    put(tmp_path / ".hidden", "no")
    put(tmp_path / ".git/config", "no")
    put(tmp_path / "a/__pycache__/z.txt", "no")
    put(tmp_path / "a/image.png", b"\x89PNG\0\0")
    put(tmp_path / "a/empty.txt", " \n")
    (tmp_path / "a/dangling").symlink_to("nowhere")
    assert list(read_texts(tmp_path)) == ["top", "az", "b1", "b1 again", "b2"]
    assert list(read_texts([tmp_path / "b/2.txt", tmp_path / "a"])) == ["b2", "az"]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress), (".zst", zst)],
)
def test_compressed(tmp_path, suffix, compress):
    assert list(read_texts(put(tmp_path / f"a.txt{suffix}", compress(b"hello")))) == ["hello"]
    with pytest.raises(ValueError, match=r"a\.txt.* is damaged"):
        list(read_texts(put(tmp_path / f"a.txt{suffix}", compress(b"hello" * 999)[:-1])))
    whole = compress(jsonl("one", "two" * 9999).encode())
    path = put(tmp_path / f"a.jsonl{suffix}", whole)
    assert list(read_texts(path)) == ["one", "two" * 9999]
    for damaged in (whole[:-20], whole[:20] + b"\x55" * 20 + whole[40:], b"nonsense"):
        put(path, damaged)
        with pytest.raises(ValueError, match=r"damaged|expected an object") as error:
            list(read_texts(path))
        assert str(path) in str(error.value)


def test_json_files_that_are_json_lines(tmp_path):
    """As C4 is published; other .json files, of a source tree say, are texts."""
    line = b'{"text": "one", "url": "u"}\n'
    (tmp_path / "c4.json.gz").write_bytes(gzip.compress(line + b'{"text": "two"}\n'))
    (tmp_path / "package.json").write_text('{"name": "x"}')
    (tmp_path / "pretty.json").write_text('{\n  "text": "no"\n}\n')
    (tmp_path / "settings.json").write_text('{"text": {"size": 12}, "version": 2}')
    (tmp_path / "translation.json").write_text('{"text": null}')
    (tmp_path / "list.json").write_bytes(b"[" + line + b"]")
    assert holds_documents(tmp_path / "c4.json.gz")
    assert list(read_texts(tmp_path / "c4.json.gz")) == ["one", "two"]
    assert not any(
        holds_documents(tmp_path / f"{name}.json") for name in ("package", "pretty", "list", "settings", "translation")
    )
    assert holds_documents(tmp_path / "package.json", "name")
    texts = ['[{"text', '{"name"', '{\n  "te', '{"text"', '{"text"']
    assert [d.text[:7] for d in read_documents(tmp_path)] == ["one", "two", *texts]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfthree\xff")
    (tmp_path / "c.jsonl").write_bytes(b'\xef\xbb\xbf\n{"text": "four"}\n')
    assert list(read_texts(tmp_path)) == ["one", "two", "three\ufffd", "four"]


def test_bad_utf8_is_replaced(tmp_path):
    assert list(read_texts(put(tmp_path / "a.txt", b"caf\xe9\r\n"))) == ["caf\ufffd\r\n"]
    assert list(read_texts(put(tmp_path / "a.jsonl", b'{"text": "caf\xe9"}'))) == ["caf\ufffd"]
    (text,) = read_texts(put(tmp_path / "a.jsonl", rb'{"text": "a\ud800b"}'))
    text.encode()
    assert text[0] + text[-1] == "ab"


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"txt": "a"}', '{"text": 3}', "[" * 100_000])
def test_a_bad_json_line_is_named(tmp_path, line):
    path = put(tmp_path / "a.jsonl", jsonl("fine") + "\n" + line + "\n")
    found = read_texts(path)
    assert next(found) == "fine"
    with pytest.raises(ValueError, match=r"a\.jsonl:3"):
        next(found)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": ["one", None, "three"]}), path)
    assert list(read_texts(path)) == ["one", "three"]
    parquet.write_table(pyarrow.table({"body": ["one"]}), path)
    with pytest.raises(ValueError, match='no column "text", only: body'):
        list(read_texts(path))
    parquet.write_table(pyarrow.table({"text": [1]}), path)
    with pytest.raises(ValueError, match="must hold strings, got int"):
        list(read_texts(path))
    with pytest.raises(ValueError, match="not a parquet file"):
        list(read_texts(put(path, b"nonsense")))


def test_a_damaged_parquet_file_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    ends, latin = pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xe9")
    parquet.write_table(
        pyarrow.table({"text": pyarrow.StringArray.from_buffers(1, ends, latin)}), tmp_path / "a.parquet"
    )
    with pytest.raises(ValueError, match=r"a\.parquet is damaged: 'utf-8'"):
        list(read_documents(tmp_path / "a.parquet"))


def test_a_line_that_no_memory_holds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST_LINE", 100)
    put(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "one"}\n{"text": "' + b"x" * 10_000 + b'"}\n'))
    with pytest.raises(ValueError, match=r"gz:2: a line of more than 100 bytes"):
        list(read_documents(tmp_path / "a.jsonl.gz"))


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'cs336\[data\]'"):
        list(read_texts(put(tmp_path / "a.parquet", b"")))


def test_missing_and_binary(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist: expected a text"):
        list(read_texts(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="is binary"):
        list(read_texts(put(tmp_path / "a.png", b"\x89PNG\0\0")))


def test_a_document_knows_where_it_came_from(tmp_path):
    lines = put(tmp_path / "d/a.jsonl", '{"text": "one", "id": 7, "url": "u"}\n\n{"text": "two"}\n')
    text = put(tmp_path / "d/b.txt", f"three{END_OF_TEXT}four")
    put(tmp_path / "d/c.txt", "five")
    one, two, three, four, five = read_documents(tmp_path / "d")
    assert one == Document("one", "7", str(lines), {"url": "u"})
    assert two == Document("two", f"{lines}:3", str(lines), {})
    assert (three.id, four.id, four.source, five.id) == (f"{text}:1", f"{text}:2", str(text), str(tmp_path / "d/c.txt"))
    assert [d.metadata for d in read_documents(lines, metadata=False)] == [{}, {}]


def test_the_columns_of_a_parquet_file_are_metadata(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": ["x", "y"], "body": ["one", "two"], "score": [0.5, 0.25]}), path)
    assert list(read_documents(path, text_field="body")) == [
        Document("one", "x", str(path), {"score": 0.5}),
        Document("two", "y", str(path), {"score": 0.25}),
    ]
    first = next(read_documents(path, text_field="body", metadata=False))
    assert (first.id, first.metadata) == ("x", {})


def test_the_text_may_be_in_another_field(tmp_path):
    path = put(tmp_path / "a.jsonl", '{"content": "one", "title": "t"}\n')
    assert list(read_texts(path, text_field="content")) == ["one"]
    with pytest.raises(ValueError, match=r"a\.jsonl:1: .*\{\"text\": .*it has 'content', 'title': name one"):
        list(read_texts(path))


def test_zstandard_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ImportError, match=r"a\.jsonl\.zst needs zstandard: pip install 'cs336\[data\]'"):
        list(read_texts(put(tmp_path / "a.jsonl.zst", b"(\xb5/\xfd")))
