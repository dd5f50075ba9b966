import errno
import os
import pathlib

import pytest

from cs336.utils import files
from cs336.utils.files import path_list, replacing


def test_replaces_whole(tmp_path):
    path = tmp_path / "a.json"
    for text in ("one", "é"):
        with replacing(path) as file:
            file.write(text)
        assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail():
        with replacing(path, "wb") as file:
            file.write(b"new")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space") as caught:
        fail()
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_at_once_do_not_mix(tmp_path):
    path = tmp_path / "a.txt"
    (tmp_path / ".a.txt.tmp").write_text("left by one that was killed, and longer than what comes")
    with replacing(path) as first:
        first.write("first, ")
        first.flush()
        with replacing(path) as second:
            second.write("second")
            assert second.name != first.name
        assert path.read_text() == "second"
        first.write("whole")
    assert path.read_text() == "first, whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_has_ended_since_is_not_written_over(tmp_path, monkeypatch):
    """Between opening a temporary file and locking it, another may have put it in place."""
    path, flock = tmp_path / "a.txt", files.fcntl.flock

    def put_in_place_first(file, how):
        monkeypatch.setattr(files.fcntl, "flock", flock)
        os.replace(file.name, path)
        path.write_text("theirs")
        flock(file, how)

    monkeypatch.setattr(files.fcntl, "flock", put_in_place_first)
    with replacing(path) as file:
        assert path.read_text() == "theirs"
        file.write("ours")
    assert path.read_text() == "ours"


def test_what_is_put_in_place_is_held_until_it_is_there(tmp_path, monkeypatch):
    path, rename = tmp_path / "a.txt", os.replace

    def with_another(source, target):
        monkeypatch.setattr(os, "replace", rename)
        with replacing(path) as second:
            second.write("second")
            rename(source, target)
            assert path.read_text() == "first"

    monkeypatch.setattr(os, "replace", with_another)
    with replacing(path) as first:
        first.write("first")
    assert path.read_text() == "second"


def test_a_writer_that_cannot_begin_leaves_anothers_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    with replacing(path) as first:
        first.write("first")
        with monkeypatch.context() as patch:
            patch.setattr(files, "_own", lambda *_: (tmp_path / "none" / ".a.txt.tmp").open())
            with pytest.raises(FileNotFoundError) as raised, replacing(path):
                raise AssertionError("it was opened")
        assert raised.value.filename == str(path)
    assert path.read_text() == "first"


def test_path_list(tmp_path):
    assert path_list("a") == path_list(["a"]) == path_list(path_list("a"))


def test_a_missing_directory_is_named(tmp_path):
    path = tmp_path / "none" / "a.json"
    with pytest.raises(FileNotFoundError) as caught, replacing(path):
        pass
    assert caught.value.filename == str(path.parent)


def test_a_device_or_a_pipe_stays_what_it_is(tmp_path):
    pipe, output = tmp_path / "pipe", tmp_path / "stdout"
    os.mkfifo(pipe)
    output.symlink_to("/proc/self/fd/1")
    before = [(name, os.lstat(tmp_path / name).st_mode) for name in sorted(os.listdir(tmp_path))]
    for path in (pipe, output):
        with pytest.raises(OSError, match="a device or a pipe, in whose place a file would be put"), replacing(path):
            raise AssertionError("it was opened")
    assert [(name, os.lstat(tmp_path / name).st_mode) for name in sorted(os.listdir(tmp_path))] == before


def test_a_place_that_cannot_be_written_is_named_as_the_user_named_it(tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))

    monkeypatch.setattr(files, "open", refuse, raising=False)
    monkeypatch.setattr(pathlib.Path, "unlink", refuse)  # which says so even of what is not there
    with pytest.raises(OSError, match="Read-only file system") as raised, replacing(tmp_path / "a.json"):
        pass
    assert raised.value.filename == str(tmp_path / "a.json")
