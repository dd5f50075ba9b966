"""Listens until it is told to stop, and then until what is under way has ended."""

import signal
import sys

import uvicorn
from starlette.middleware.trustedhost import TrustedHostMiddleware

from cs336.inference import ranks
from cs336.inference.llm import LLM
from cs336.inference.server.app import Server, ServerConfig
from cs336.parallel.launch import rank

LOOPBACK = {"127.0.0.1", "localhost", "::1"}


class _Announcing(uvicorn.Server):
    """Tells its address once it listens; port 0 is one that is free."""

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            print(f"{address}/ (chat), {address}/v1 (OpenAI's interface)", flush=True)


def serve(llm: LLM, config: ServerConfig) -> None:
    """Serve a model over HTTP until SIGTERM or Ctrl-C: then no new connection is taken, and requests that are under way
    have config.drain seconds to end. Call it in the main thread. Of a divided model each
    rank calls it: the first listens, and the others do what it is asked."""
    if rank():
        ranks.follow(llm.engine)
        return
    app = Server(llm, config).app
    if config.host in LOOPBACK:  # a name that someone made point here is no name of ours
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
    elif config.api_key is None:
        print(f"warning: anyone who reaches {config.host} may use this model: give --api-key", file=sys.stderr)
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
                timeout_graceful_shutdown=int(config.drain),
            )
        ).run()
    finally:
        signal.signal(signal.SIGTERM, before)
