"""Listens until it is told to stop; runs that go on are then saved, and wait for the next server."""

import pathlib
import signal
import sys

import uvicorn
from starlette.middleware.trustedhost import TrustedHostMiddleware

from cs336.scaling.api.app import ServerConfig, make_app
from cs336.scaling.api.contest import Contest
from cs336.scaling.api.jobs import Backend
from cs336.scaling.api.pool import Pool
from cs336.scaling.api.store import Store
from cs336.utils.locks import locked

LOOPBACK = {"127.0.0.1", "localhost", "::1"}


class _Announcing(uvicorn.Server):
    """Tells its address once it listens; port 0 is one that is free."""

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            print(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}", flush=True)


def serve(directory: pathlib.Path, backend: Backend, config: ServerConfig) -> None:
    """Serve the training API of a directory until SIGTERM or Ctrl-C. Call it in the main thread.

    Raises RuntimeError where another server is at the directory, ValueError for what the configuration cannot be.
    """
    store = Store(directory)
    Contest(store, config.target, config.deadline)
    with locked(directory, "server.lock", advice="use another directory"):
        pool = Pool(store, backend, config.workers or len(config.gpus) or 2, config.gpus, config.drain)
        app = make_app(store, backend, config, pool=pool)
        if config.host in LOOPBACK:  # a name that someone made point here is no name of ours
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
        else:
            print(f"warning: keys travel to {config.host} as they are: put TLS before it", file=sys.stderr)
        # uvicorn raises the signal that stopped it once more when all is done: then it shall change nothing.
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            _Announcing(
                uvicorn.Config(
                    app,
                    host=config.host,
                    port=config.port,
                    log_level="warning",
                    access_log=False,
                    server_header=False,
                    limit_concurrency=config.max_connections,
                    timeout_graceful_shutdown=int(config.drain),
                )
            ).run()
        finally:
            signal.signal(signal.SIGTERM, before)
