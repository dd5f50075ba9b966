"""Listens until it is told to stop, and then until what is under way has ended."""

import sys

from cs336.inference import ranks
from cs336.inference.llm import LLM
from cs336.inference.server.app import Server
from cs336.inference.server.config import ServerConfig
from cs336.parallel.launch import rank
from cs336.utils.http_server import LOOPBACK, listen


def serve(llm: LLM, config: ServerConfig) -> None:
    """Serve a model over HTTP until SIGTERM or Ctrl-C: then no new connection is taken, and requests that are under way
    have config.drain seconds to end. Call it in the main thread. Of a divided model each
    rank calls it: the first listens, and the others do what it is asked."""
    if rank():
        ranks.follow(llm.engine)
        return
    app = Server(llm, config).app
    if config.host not in LOOPBACK and config.api_key is None:
        print(f"warning: anyone who reaches {config.host} may use this model: give --api-key", file=sys.stderr)
    listen(app, config.host, config.port, drain=config.drain, announce=_announce)


def _announce(address: str) -> None:
    print(f"{address}/ (chat), {address}/v1 (OpenAI's interface)", flush=True)
