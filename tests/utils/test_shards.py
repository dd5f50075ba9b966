import json
import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cs336.utils import shards
from cs336.utils.shards import ShardWriter, open_tokens, read_meta, read_shard, token_dtype, write_shard


def write(directory, ids, vocab_size=1000, tokenizer="t", **kwargs):
    with ShardWriter(directory, vocab_size=vocab_size, tokenizer=tokenizer, eot_id=0, **kwargs) as writer:
        writer.write(np.array(ids, np.int64), documents=1, text_bytes=10)
    return writer.meta


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 999), max_size=40), st.integers(1, 41), st.sampled_from([1000, 70_000]))
def test_round_trip(tmp_path_factory, ids, shard_tokens, vocab_size):
    directory = tmp_path_factory.mktemp("tokens")
    meta = write(directory, ids, vocab_size, shard_tokens=shard_tokens)
    found, read = open_tokens(directory)
    assert read == meta == read_meta(directory)
    assert meta.tokens == len(ids)
    assert [len(s) for s in found] == [len(ids[i : i + shard_tokens]) for i in range(0, len(ids), shard_tokens)]
    assert [int(t) for s in found for t in s] == ids
    assert all(s.dtype == token_dtype(vocab_size) for s in found)
    assert not list(directory.glob(".*"))


def test_header_is_llm_c(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(5, dtype=np.uint16))
    write_shard(tmp_path / "b.bin", np.arange(5, dtype=np.uint32))
    for name, magic, version, width in (("a.bin", 20240520, 1, 2), ("b.bin", 20240801, 7, 4)):
        data = (tmp_path / name).read_bytes()
        assert len(data) == 256 * 4 + 5 * width
        assert np.frombuffer(data, "<i4", 3).tolist() == [magic, version, 5]
        assert read_shard(tmp_path / name).tolist() == list(range(5))
    assert isinstance(read_shard(tmp_path / "a.bin"), np.memmap)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:100], "header of 1024 bytes, the file has 100"),
        (lambda b: b[:-1], "promises 5 tokens, 1034 bytes in all; the file has 1033"),
        (lambda b: b + b"\0", "the file has 1035"),
        (lambda b: b"\0" + b[1:], "not a token shard"),
        (lambda b: b[:4] + b"\2" + b[5:], "version 2 of the shard format, expected 1"),
        (lambda b: b[:8] + b"\xff\xff\xff\xff" + b[12:], "promises -1 tokens"),
    ],
)
def test_damaged_shard_is_named(tmp_path, damage, message):
    path = tmp_path / "a.bin"
    write_shard(path, np.arange(5, dtype=np.uint16))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        read_shard(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("ids", [[-1], [1000], [3, 70_000]])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, ids):
    with pytest.raises(ValueError, match=r"ids must be in 0\.\.999"):
        write(tmp_path, ids)


def test_shape_and_dtype_are_checked(tmp_path):
    with pytest.raises(ValueError, match="1-D uint16 or uint32"):
        write_shard(tmp_path / "a.bin", np.arange(5))
    writer = ShardWriter(tmp_path, vocab_size=9, tokenizer="t", eot_id=0)
    with pytest.raises(ValueError, match="1-D integers"):
        writer.write(np.zeros(3))
    with pytest.raises(ValueError, match="shard_tokens"):
        ShardWriter(tmp_path, vocab_size=9, tokenizer="t", eot_id=0, shard_tokens=0)


SMALL = {"vocab_size": 9, "tokenizer": "t", "eot_id": 0, "shard_tokens": 2}


def write_and_fail(directory, ids):
    with ShardWriter(directory, **SMALL) as writer:
        writer.write(np.array(ids, int))
        raise FileNotFoundError("no such text")


def test_a_failed_write_leaves_no_tokens(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_and_fail(tmp_path, [1] * 5)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="unfinished"):
        open_tokens(tmp_path)


@pytest.mark.parametrize("ids", [[], [1] * 5])
def test_a_source_that_fails_costs_no_tokens(tmp_path, ids):
    write(tmp_path, range(20), shard_tokens=4)
    with pytest.raises(FileNotFoundError):
        write_and_fail(tmp_path, ids)
    assert [int(token) for shard in open_tokens(tmp_path)[0] for token in shard] == list(range(20))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("count", [5, 50_000])  # that are written as the shard ends, and before
def test_a_disk_that_is_full_is_named(tmp_path, count):
    write(tmp_path, range(20))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            write(tmp_path, [1] * count)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.filename == str(tmp_path)
    assert [int(token) for shard in open_tokens(tmp_path)[0] for token in shard] == list(range(20))
    write(tmp_path, range(3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000.bin", shards.META]


def test_a_process_that_died_costs_no_tokens(tmp_path):
    write(tmp_path, range(20), shard_tokens=4)
    ShardWriter(tmp_path, **SMALL).write(np.ones(5, int))  # never closed
    assert [int(token) for shard in open_tokens(tmp_path)[0] for token in shard] == list(range(20))
    write(tmp_path, range(3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000.bin", shards.META]


def test_a_shorter_rewrite_forgets_the_longer_and_nothing_else(tmp_path):
    (tmp_path / "2024-measured.bin").write_bytes(b"precious")
    write(tmp_path, range(20), shard_tokens=4)
    write(tmp_path, range(3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000.bin", "2024-measured.bin", shards.META]
    assert open_tokens(tmp_path)[0][0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 99}', '{"format": 1, "tokenizer": "t", "shards": []}'])
def test_damaged_sidecar_is_named(tmp_path, text):
    write(tmp_path, range(20))
    (tmp_path / shards.META).write_text(text)
    with pytest.raises(ValueError, match=r"meta\.json cannot be used"):
        open_tokens(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"shards": ["../a/00000.bin"]},
        {"shards": ["/etc/passwd"]},
        {"shards": [{}]},
        {"shards": ["\0"]},
        {"shards": ["\ud800"]},
        {"shards": "00000.bin"},
        {"tokenizer_file": "../tokenizer.json"},
        {"tokens": "20"},
        {"vocab_size": 0},
        {"documents": -1},
        {"text_bytes": True},
        {"tokenizer": ["t"]},
    ],
    ids=repr,
)
def test_a_sidecar_that_names_other_files_or_says_nonsense_is_refused(tmp_path, wrong):
    write(tmp_path / "a", range(20))
    found = json.loads((tmp_path / "a" / shards.META).read_text())
    (tmp_path / "a" / shards.META).write_text(json.dumps(found | wrong))
    with pytest.raises(ValueError, match=rf"meta\.json cannot be used \(.*{next(iter(wrong))[:4]}|no file of its dir"):
        open_tokens(tmp_path / "a")
    assert not shards.shards_are_whole(tmp_path / "a")


def test_sidecar_and_shards_must_agree(tmp_path):
    write(tmp_path, range(20))
    write_shard(tmp_path / "00000.bin", np.arange(5, dtype=np.uint16))
    with pytest.raises(ValueError, match="counts 20 tokens, the shards hold 5"):
        open_tokens(tmp_path)


def test_several_directories_are_one_set(tmp_path):
    write(tmp_path / "a", range(20))
    write(tmp_path / "b", range(7))
    write(tmp_path / "c", range(7), tokenizer="another")
    found, meta = open_tokens([tmp_path / "a", tmp_path / "b"])
    assert (sum(map(len, found)), meta.tokens, meta.documents, meta.text_bytes) == (27, 27, 2, 20)
    assert open_tokens([tmp_path / "a", tmp_path / "b/00000.bin"])[1] is None
    with pytest.raises(ValueError, match="different tokenizers"):
        open_tokens([tmp_path / "a", tmp_path / "c"])
    with pytest.raises(FileNotFoundError, match="token shards"):
        open_tokens(tmp_path / "nowhere")


def test_sidecar_is_plain_json(tmp_path):
    meta = write(tmp_path, range(20))
    found = json.loads((tmp_path / shards.META).read_text())
    assert found["tokens"] == meta.tokens == 20
    counts = {"documents", "tokens", "text_bytes"}
    assert set(found) == {"tokenizer", "tokenizer_file", "vocab_size", "eot_id", "shards", "format"} | counts


def test_the_folder_above_says_which_are_inside(tmp_path):
    write(tmp_path / "train", [1, 2, 0])
    with pytest.raises(ValueError, match=r"did you mean .*train\?"):
        read_meta(tmp_path)


@pytest.mark.parametrize(("at", "end"), [(0, 9), (3, 9), (4, 9), (7, 9), (5, 6)])
def test_a_writer_goes_on_where_another_died(tmp_path, at, end):
    write(tmp_path / "whole", range(end), shard_tokens=4)
    settings = {"vocab_size": 1000, "tokenizer": "t", "eot_id": 0, "shard_tokens": 4}
    died = ShardWriter(tmp_path / "a", **settings)
    died.write(np.arange(at), documents=1, text_bytes=5)
    state = json.loads(json.dumps(died.state_dict()))
    died.write(np.full(6, 7))  # after the record: written again by the next
    died._file.flush()
    with ShardWriter(tmp_path / "a", **settings) as writer:
        assert writer.load_state_dict(state)
        writer.write(np.arange(at, end), text_bytes=5)
    names = [path.name for path in (tmp_path / "whole").iterdir()]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(names)
    for name in names:
        if name != shards.META:
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (writer.meta.tokens, writer.meta.documents, writer.meta.text_bytes) == (end, 1, 10)


def test_a_writer_whose_shards_are_gone_is_not_gone_on_with(tmp_path):
    died = ShardWriter(tmp_path, **SMALL)
    died.write(np.ones(3, int))
    state = died.state_dict()
    (tmp_path / ".unfinished/00000.bin").unlink()
    assert not ShardWriter(tmp_path, **SMALL).load_state_dict(state)
