"""Signals that ask a run to stop: it saves itself first."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, a scheduler, a closed terminal


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within the block a signal sets a flag, which the function that is yielded reads; a second one acts.

    A signal that was ignored before (SIGHUP under nohup) stays so. Outside the main thread all are left as they are.
    """
    stop = threading.Event()
    before: dict[int, Any] = {}

    def request(number: int, _: object) -> None:
        signal.signal(number, before[number])
        stop.set()
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping after this step; a second signal stops at once\n")  # print() is not reentrant

    if threading.current_thread() is threading.main_thread():
        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, request)
    try:
        yield stop.is_set
    finally:
        for restored, handler in before.items():
            signal.signal(restored, handler)
