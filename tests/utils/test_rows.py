"""The rows of a run, from either end."""

import json

import pytest

from cs336.utils import rows


def write(folder, *lines, end=b"\n"):
    (folder / "metrics.jsonl").write_bytes(b"\n".join(lines) + end)


@pytest.mark.parametrize("block", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize("end", [b"", b"\n", b'\n{"step": 4, "tor', b'\n{"name": "\xe2\x82'])
def test_what_is_torn_is_passed_over(tmp_path, monkeypatch, block, end):
    monkeypatch.setattr(rows, "BLOCK", block)
    found = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 3, "name": "long" * 20}]
    write(tmp_path, *(json.dumps(row).encode() for row in found), end=end)
    assert rows.read_rows(tmp_path) == found
    assert rows.newest_row(tmp_path) == found[2]
    assert rows.newest_row(tmp_path, lambda row: "loss" in row) == found[1]
    assert rows.newest_row(tmp_path, lambda row: "lr" in row) is None


def test_there_may_be_none(tmp_path):
    assert (rows.read_rows(tmp_path), rows.newest_row(tmp_path)) == ([], None)
    write(tmp_path, end=b"")
    assert (rows.read_rows(tmp_path), rows.newest_row(tmp_path)) == ([], None)


def test_the_newest_row_takes_as_long_for_a_long_run(tmp_path, monkeypatch):
    write(tmp_path, *(b'{"step": %d}' % step for step in range(100_000)))
    parsed = []
    monkeypatch.setattr(rows.json, "loads", lambda line, loads=json.loads: (parsed.append(line), loads(line))[1])
    assert rows.newest_row(tmp_path) == {"step": 99_999}
    assert len(parsed) <= 2
