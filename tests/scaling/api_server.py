"""A training API on loopback, in this process's thread or as a program of its own."""

import contextlib
import os
import pathlib
import subprocess
import sys
import threading
import time

from cs336.scaling.api import Client, Simulator, Store

ROOT = pathlib.Path(__file__).parents[2]
SLOW = Simulator(time_scale=1e-3)  # 1e16 FLOPs take 25 ms, 1e18 take 2.5 s


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)
    return found


@contextlib.contextmanager
def listening(directory, backend=None, *, workers=0, grace=10.0, **config):
    """(its store, its address): uvicorn in a thread until the block ends. workers=0: nobody makes its runs."""
    import uvicorn

    from cs336.scaling.api.app import ServerConfig, make_app
    from cs336.scaling.api.pool import Pool

    store, backend = Store(directory), backend or Simulator()
    pool = Pool(store, backend, workers, grace=grace) if workers else None
    app = make_app(store, backend, ServerConfig(**config), pool=pool)
    loop = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        until(lambda: loop.started or not thread.is_alive())
        yield store, f"http://127.0.0.1:{loop.servers[0].sockets[0].getsockname()[1]}"
    finally:
        loop.should_exit = True
        thread.join()


def program(directory, *options, port=0):
    """(process, address) of `cs336 scaling api serve`, once it listens."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cs336", "scaling", "api", "serve", str(directory), "--port", str(port), *options]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def user(store, name="ada", amount=1e18, kind="flops"):
    return store.user(store.add_user(name, kind, amount))


def client(store, url, name="ada", amount=1e18, kind="flops", **options):
    return Client(url, store.add_user(name, kind, amount), **options)


def balances(store):
    """user -> (reserved, charged, left); asks the ledger whether it is consistent."""
    return {a.user: (a.reserved, a.charged, a.left) for a in store.accounts()}
