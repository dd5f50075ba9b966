"""One process at a directory."""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def locked(directory: str | os.PathLike, name: str = ".lock", *, advice: str = "use another run_dir") -> Iterator[None]:
    """Hold a directory that exists, by a file in it; the system lets go of it when the process ends, however it ends.

    advice: what else the user of a directory that is held can do.
    Raises RuntimeError if another process holds it.
    """
    with open(pathlib.Path(directory) / name, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another process is at work in {directory}: wait for it, or {advice}") from None
        yield


@contextlib.contextmanager
def in_turn(path: pathlib.Path) -> Iterator[None]:
    """One process at a time at a file, each waiting for the last: for moments, such as to read and rewrite it."""
    with open(path.with_name(f".{path.name}.lock"), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_locked(directory: str | os.PathLike, name: str = ".lock") -> bool:
    """Whether a process, this one too, holds the directory now."""
    try:
        with open(pathlib.Path(directory) / name) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
