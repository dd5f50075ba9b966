"""A tiny model, served on loopback, and a client that reads events as they come."""

import asyncio
import contextlib
import json
import threading
import time

import torch

from cs336.inference import LLM
from cs336.models import Transformer, TransformerConfig
from cs336.tokenizer import Tokenizer

TOKENIZER = Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"])
CONFIG = TransformerConfig(257, 128, num_layers=1, d_model=32, num_heads=4, num_kv_heads=2, init_std=0.3)


def tiny_llm(**options):
    torch.manual_seed(5)
    options = {"page_size": 8, "max_seqs": 8, "max_step_tokens": 64} | options
    return LLM(Transformer(CONFIG).eval(), TOKENIZER, quiet=True, **options)


@contextlib.contextmanager
def listening(llm, config=None):
    """(server, its port): uvicorn in a thread, until the block ends."""
    import uvicorn

    from cs336.inference.server.app import Server

    server = Server(llm, config)
    loop = uvicorn.Server(uvicorn.Config(server.app, port=0, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        until(lambda: loop.started or not thread.is_alive())
        yield server, loop.servers[0].sockets[0].getsockname()[1]
    finally:
        loop.should_exit = True
        thread.join()


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


async def connect(port, body, path="/v1/completions", head=""):
    """Send a request: its reader and writer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head += f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(f"POST {path} HTTP/1.0\r\n{head}".encode() + data)
    await writer.drain()
    return reader, writer


async def read_events(reader, pause=0.0):
    """The status, and the events or else the whole body."""
    status = int((await reader.readline()).split()[1])
    head = await reader.readuntil(b"\r\n\r\n")
    if b"event-stream" not in head:
        return status, [await reader.read()]
    events = []
    async for line in reader:
        if line.startswith(b"data: "):
            events.append(line[6:].strip())
            await asyncio.sleep(pause)
    return status, events


async def ask(port, body, pause=0.0, **how):
    reader, writer = await connect(port, body, **how)
    try:
        return await read_events(reader, pause)
    finally:
        writer.close()
