"""What lies in a build's directory is what its sources and recipe make, whatever was there before."""

import json
import pathlib

import pytest

from cs336.data import Build, Recipe
from cs336.utils.config import parse

SOURCES = [{"kind": "jsonl", "paths": ["in"]}]
TOKENIZE = {"vocab_size": 280, "val_fraction": 0.3, "pack": 16}
TABLE = {"output": "out", "sources": SOURCES, "dedup": [{"kind": "documents"}], "tokenize": TOKENIZE}


def build():
    """The files that are made, by name: their bytes."""
    Build(parse(Recipe, TABLE), workers=1).run()
    out = pathlib.Path("out")
    files = [path for path in out.rglob("*") if path.suffix in (".jsonl", ".bin")]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A directory with a build in it, and what it made."""
    directory = tmp_path_factory.mktemp("build")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        pathlib.Path("in").mkdir()
        for place, name in enumerate("abc"):
            lines = [json.dumps({"text": f"a text of number {20 * place + i}"}) + "\n" for i in range(20)]
            pathlib.Path(f"in/{name}.jsonl").write_text("".join(lines))
        yield build()


@pytest.mark.parametrize(
    "name",
    [
        "1-extract/unread/00001.jsonl",
        "2-documents/documents/00002.jsonl",
        "2-documents/removed/00001.jsonl",
        "tokens/train/00000.bin",
        "packed/00000.bin",
    ],
)
def test_what_was_deleted_comes_back(built, name):
    pathlib.Path("out", name).unlink()
    assert build() == built


@pytest.mark.parametrize("stage", ["1-extract", "2-documents"])
def test_what_was_changed_is_made_again(built, stage):
    path = pathlib.Path("out", stage, "documents/00001.jsonl")
    damaged = bytearray(path.read_bytes())
    damaged[20] ^= 1  # the size stays
    path.write_bytes(damaged)
    other = pathlib.Path("out/1-extract/counts/00000.json")
    before = other.stat().st_mtime_ns
    assert build() == built
    assert other.stat().st_mtime_ns == before  # the unit that was not


def test_what_a_source_left_that_is_gone_goes(built):
    pathlib.Path("in/c.jsonl").unlink()
    left = {name: data for name, data in build().items() if name.startswith(("1-extract", "2-documents"))}
    assert left == {name: data for name, data in built.items() if name in left}
    assert {name.rpartition("/")[2] for name in left} == {"00000.jsonl", "00001.jsonl"}
