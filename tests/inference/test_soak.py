"""Many clients at once, of every kind: each gets its own tokens, all of them and once, and no page is left behind."""

import asyncio
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from inference.serving import CONFIG, TOKENIZER, ask, connect, listening, read_events, tiny_llm, until

from cs336.inference import SamplingParams
from cs336.inference.server.config import ServerConfig
from cs336.models import Transformer, save_pretrained

PROMPTS = [f"{word} and then" for word in ("the cat", "the dog", "the cat sat", "rain", "the cat sat on the mat")]
LENGTHS = (1, 7, 23, 40)
MALFORMED = [
    b"{",
    b"[]",
    b'{"prompt": 5}',
    b'{"prompt": "a", "max_tokens": -1}',
    b'{"prompt": [[999999]]}',
    b"\x00" * 99,
]


def expected(llm):
    """The log of tokens that each prompt has, greedily."""
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=max(LENGTHS), logprobs=0))
    return [[t.id for t in o.outputs[0].logprobs] for o in outputs]


async def client(port, number, want, done):
    draw = random.Random(number)
    i, count = draw.randrange(len(PROMPTS)), draw.choice(LENGTHS)
    body = {"prompt": PROMPTS[i], "temperature": 0, "max_tokens": count, "stream": True, "logprobs": 0}
    kind = ("whole", "slow", "leaves", "malformed", "not streamed")[number % 5]
    if kind == "malformed":
        status, _ = await ask(port, draw.choice(MALFORMED))
        assert status == 400
    elif kind == "leaves":
        reader, writer = await connect(port, body | {"max_tokens": 100})
        for _ in range(draw.randrange(12)):
            await reader.readline()
        writer.transport.abort()
    else:
        tokens, reason = await tokens_of(port, body | {"stream": kind != "not streamed"}, 0.002 * (kind == "slow"))
        assert tokens == [token_text(id) for id in want[i][:count]]
        assert reason == "length"
    done.append(kind)


async def tokens_of(port, body, pause):
    while True:
        reader, writer = await connect(port, body)
        try:
            status, found = await read_events(reader, pause)
        finally:
            writer.close()
        if status != 429:
            break
        await asyncio.sleep(0.05)
    assert status == 200
    if not body["stream"]:
        (choice,) = json.loads(found[0])["choices"]
        return choice["logprobs"]["tokens"], choice["finish_reason"]
    assert found.pop() == b"[DONE]"
    choices = [json.loads(event)["choices"][0] for event in found]
    return [token for c in choices for token in c["logprobs"]["tokens"]], choices[-1]["finish_reason"]


def token_text(id):
    return chr(id) if id < 128 else f"bytes:\\x{id:02x}"


def soak(clients, **options):
    llm = tiny_llm(**options)
    want = expected(llm)
    with listening(llm, ServerConfig(max_requests=clients)) as (server, port):
        done, step = [], llm.engine.step

        def step_of_many():  # those that are neither malformed nor leave: then pages are short
            if server.under_way < clients * 3 // 5:
                time.sleep(0.001)
                return []
            llm.engine.step = step
            return step()

        llm.engine.step = step_of_many

        async def all_of_them():
            await asyncio.gather(*(client(port, number, want, done) for number in range(clients)))

        asyncio.run(all_of_them())
        assert len(done) == clients
        until(lambda: server.under_way == 0 and not llm.engine.busy)
    llm.engine.check()
    assert llm.engine.cache.in_use == 0
    assert not server.worker._tickets
    assert not server.worker.is_alive()
    return llm.engine


def test_fifty_clients():
    engine = soak(50, num_pages=20, overlap=True)
    assert engine.stats.cached_tokens > 0
    assert engine.scheduler.num_preemptions > 0


@pytest.mark.slow
def test_a_thousand_clients():
    options = {"num_pages": 200, "max_seqs": 64, "max_step_tokens": 512}
    soak(250, **options)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    soak(1000, **options)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 48 << 10, f"four times the clients took {grown} KiB more"  # their sockets and coroutines


def test_sigterm_drains(tmp_path):
    save_pretrained(Transformer(CONFIG), tmp_path / "model", TOKENIZER)
    command = [sys.executable, "-m", "cs336", "serve", str(tmp_path / "model"), "--device", "cpu", "--port", "0"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "0"}  # the interpreter would take minutes
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        port = int(line.partition("127.0.0.1:")[2].partition("/")[0])

        async def stop_while_it_writes():
            body = {"prompt": "a", "max_tokens": 100, "stream": True, "logprobs": 0, "ignore_eos": True}
            reader, writer = await connect(port, body)
            await reader.readuntil(b"data: ")
            process.send_signal(signal.SIGTERM)
            rest = [json.loads(line[6:]) async for line in reader if line.startswith(b"data: {")]
            writer.close()
            return rest

        rest = asyncio.run(stop_while_it_writes())
        assert sum(len(event["choices"][0]["logprobs"]["tokens"]) for event in rest) == 99
        assert rest[-1]["choices"][0]["finish_reason"] == "length"
        assert process.wait(60) == 0
        with pytest.raises(ConnectionRefusedError):
            asyncio.run(connect(port, {"prompt": "a"}))
    finally:
        process.kill()
        process.wait()
