"""Listens until it is told to stop; runs that go on are then saved, and wait for the next server."""

import functools
import pathlib
import sys

from cs336.scaling.api.app import ServerConfig, make_app
from cs336.scaling.api.contest import Contest
from cs336.scaling.api.jobs import Backend
from cs336.scaling.api.pool import Pool
from cs336.scaling.api.store import Store
from cs336.utils.http_server import LOOPBACK, listen
from cs336.utils.locks import locked


def serve(directory: pathlib.Path, backend: Backend, config: ServerConfig) -> None:
    """Serve the training API of a directory until SIGTERM or Ctrl-C. Call it in the main thread.

    Raises RuntimeError where another server is at the directory, ValueError for what the configuration cannot be.
    """
    store = Store(directory)
    Contest(store, config.target, config.deadline)
    with locked(directory, "server.lock", advice="use another directory"):
        pool = Pool(store, backend, config.workers or len(config.gpus) or 2, config.gpus, config.drain)
        app = make_app(store, backend, config, pool=pool)
        if config.host not in LOOPBACK:
            print(f"warning: keys travel to {config.host} as they are: put TLS before it", file=sys.stderr)
        announce = functools.partial(print, flush=True)
        most = config.max_connections
        listen(app, config.host, config.port, drain=config.drain, announce=announce, limit_concurrency=most)
