"""A process that makes runs: python -m cs336.scaling.api.worker DIRECTORY BACKEND, the latter as JSON.

Its input is a pipe that ends with the server: then, and at SIGTERM, it saves its run, which waits to be continued.
"""

import json
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from cs336.scaling.api.jobs import Backend, Interrupted, taken
from cs336.scaling.api.protocol import State
from cs336.scaling.api.simulator import Simulator
from cs336.scaling.api.store import Entry, Store

POLL = 0.05  # seconds between two looks for a run
IDLE = 5.0  # seconds without a run: then a worker ends, and whatever memory it holds is free


def make_backend(facts: dict[str, Any]) -> Backend:
    """The backend that dataclasses.asdict(backend) says."""
    if facts["kind"] == "simulator":
        return Simulator(**facts)
    from cs336.scaling.api.training import Training  # and torch with it

    return Training(**facts)


def work(store: Store, backend: Backend, stopped: Callable[[], bool]) -> State | None:
    """Claim one run, make it, and return what became of it; None if none waits."""
    claim = store.claim()
    if claim is None:
        return None
    entry = claim.entry
    folder = store.folder(entry.id)
    try:
        loss = backend.run(entry.job, folder, lambda: stopped() or store.cancelled(entry.id))
    except Interrupted:
        state: State = "cancelled" if store.cancelled(entry.id) else "waiting"
        store.settle(claim, state, taken(entry.job, folder))
        return state
    except Exception as error:  # whatever ends a run is what came of it
        store.settle(claim, "failed", taken(entry.job, folder), error=f"{type(error).__name__}: {error}"[:2000])
        return "failed"
    store.settle(claim, "done", taken(entry.job, folder), loss=loss)
    return "done"


def main(directory: str, facts: str) -> None:
    """Make runs until one fails, after which a device may be of no more use, or a while after the last."""
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's, which tells its workers

    def end_with_server() -> None:
        while os.read(0, 1):
            pass
        stopping.set()
        signal.raise_signal(signal.SIGTERM)

    threading.Thread(target=end_with_server, daemon=True).start()
    store, backend = Store(pathlib.Path(directory)), make_backend(json.loads(facts))
    last = time.monotonic()
    while not stopping.is_set() and time.monotonic() - last < IDLE:
        found = work(store, backend, stopping.is_set)
        if found == "failed":
            return
        if found is None:
            stopping.wait(POLL)
        else:
            last = time.monotonic()


def taken_of(store: Store) -> Callable[[Entry], Any]:
    """What a run has taken, for Store.recover and Store.cancel."""
    return lambda entry: taken(entry.job, store.folder(entry.id))


if __name__ == "__main__":
    main(*sys.argv[1:])
