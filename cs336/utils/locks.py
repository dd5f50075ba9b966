"""One process at a directory."""

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def locked(directory: pathlib.Path, name: str = ".lock") -> Iterator[None]:
    """Hold a directory that exists, by a file in it; the system lets go of it when the process ends, however it ends.

    Raises RuntimeError if another process holds it.
    """
    with open(directory / name, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"another process is at work in {directory}: wait for it, or use another run_dir"
            ) from None
        yield
