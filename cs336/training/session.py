"""One process at a run: the lock on its directory, and signals that ask it to stop."""

import contextlib
import fcntl
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


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


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within the block Ctrl-C and SIGTERM set a flag, which the function that is yielded reads; a second one acts.

    Outside the main thread signals are left as they are.
    """
    stop = threading.Event()
    before: dict[int, Any] = {}

    def request(number: int, _: object) -> None:
        signal.signal(number, before[number])
        stop.set()
        os.write(2, b"\nstopping after this step; a second signal stops at once\n")  # print() is not reentrant

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, request)
    try:
        yield stop.is_set
    finally:
        for restored, handler in before.items():
            signal.signal(restored, handler)
