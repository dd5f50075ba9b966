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
