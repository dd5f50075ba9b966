"""What a library says of a disk that takes no more is an OSError, which names the file and leaves what was there."""

import errno
import pathlib
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file

from cs336.utils.files import replacing
from cs336.utils.tensor_file import save_tensors


@pytest.fixture
def little_room(monkeypatch):
    """Files may have 4,096 bytes, as on a disk that is nearly full."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def save(path: pathlib.Path, tensors):
    with replacing(path, "wb") as file:
        save_tensors(tensors, file.name, {"format": "pt"})


def test_a_file_that_does_not_fit_is_an_oserror_and_leaves_what_was_there(tmp_path, little_room):
    path = tmp_path / "model.safetensors"
    save(path, {"w": torch.ones(8)})
    with pytest.raises(OSError, match="File too large") as raised:
        save(path, {"w": torch.zeros(4096)})
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(path))
    assert load_file(path)["w"].sum() == 8
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
