"""How fast a model answers: many requests at once, few requests closely, or a server from outside.

TTFT: time to first token; ITL: between two tokens; TPOT: mean ITL of a request. MBU: the bytes that decoding must read,
weights a step and keys and values a token, over the time and what the device's memory could move; MFU: the FLOPs of all
tokens over what it could compute.
"""

import asyncio
import contextlib
import dataclasses
import json
import math
import random
import statistics
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from tyro.conf import Positional, arg

from cs336.inference import ranks
from cs336.inference.engine import EngineConfig
from cs336.inference.llm import LLM
from cs336.inference.sampling import SamplingParams
from cs336.parallel.launch import rank
from cs336.utils.device import peak_bandwidth, peak_flops


@dataclass(frozen=True)
class Load:
    """Requests of random tokens."""

    num_requests: int = 256
    input_len: tuple[int, int] = (100, 1024)
    """Tokens of a prompt: the fewest and the most."""
    output_len: tuple[int, int] = (100, 1024)
    temperature: float = 0.6
    shared_prefix: int = 0
    """Tokens that all prompts begin with."""
    seed: int = 0

    def __post_init__(self):
        if self.num_requests < 1:
            raise ValueError(f"num_requests must be 1 or more, got {self.num_requests}")
        if self.shared_prefix < 0:
            raise ValueError(f"shared_prefix must be 0 tokens or more, got {self.shared_prefix}")
        for name in ("input_len", "output_len"):
            least, most = getattr(self, name)
            if not 1 <= least <= most:
                raise ValueError(f"{name} must be 1 <= fewest <= most, got {least} and {most}")

    def within(self, context_length: int) -> "Load":
        """The same, with prompts and answers of at most half the context each."""
        half = context_length // 2
        prompt = max(1, half - self.shared_prefix)
        (a, b), (c, d) = self.input_len, self.output_len
        inputs, outputs = (min(a, prompt), min(b, prompt)), (min(c, half), min(d, half))
        return dataclasses.replace(self, input_len=inputs, output_len=outputs)

    def requests(self, vocab_size: int) -> list[tuple[list[int], SamplingParams]]:
        """First the prompts are drawn, then the lengths of the answers."""
        draw = random.Random(self.seed)
        prefix = [draw.randrange(vocab_size) for _ in range(self.shared_prefix)]
        prompts = [
            prefix + [draw.randrange(vocab_size) for _ in range(draw.randint(*self.input_len))]
            for _ in range(self.num_requests)
        ]
        lengths = [draw.randint(*self.output_len) for _ in prompts]
        return [
            (p, SamplingParams(temperature=self.temperature, ignore_eos=True, max_tokens=n))
            for p, n in zip(prompts, lengths, strict=True)
        ]


@dataclass
class Times:
    """Of one request: when it was sent, and when each token came."""

    sent: float
    tokens: list[float] = field(default_factory=list)

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.tokens, self.tokens[1:], strict=False)]


def run_engine(llm: LLM, requests: Sequence[tuple[list[int], SamplingParams]]) -> dict[str, Any]:
    """All of them at once through the engine: what came of it, by name."""
    engine, times, peak = llm.engine, {}, 0.0
    cached, steps = engine.stats.cached_tokens, engine.stats.steps
    drafted, accepted = sum(engine.stats.drafted), sum(engine.stats.accepted)
    begin = time.perf_counter()
    for ids, params in requests:
        times[engine.add(ids, params)] = Times(time.perf_counter())
    while engine.busy:
        updates, now = engine.step(), time.perf_counter()
        peak = max(peak, engine.cache.in_use / engine.cache.num_pages)
        for update in updates:
            times[update.sample.request].tokens.append(now)
    seconds = time.perf_counter() - begin
    found = summary(list(times.values()), seconds)
    inputs, outputs = sum(len(ids) for ids, _ in requests), found["output_tokens"]
    steps = engine.stats.steps - steps
    shared = engine.stats.cached_tokens - cached
    found |= {"input_tokens": inputs, "steps": steps, "cache_peak": round(peak, 4), "cached_tokens": shared}
    if engine.speculates:
        found["drafted_tokens"] = sum(engine.stats.drafted) - drafted
        found["accepted_tokens"] = sum(engine.stats.accepted) - accepted
    return found | _shares(llm, requests, steps, seconds, inputs - shared + outputs)


def _shares(llm: LLM, requests, steps: int, seconds: float, tokens: int) -> dict[str, Any]:
    config, device = llm.model.config, llm.model.device
    width = llm.model.compute_dtype.itemsize
    weights = width * (config.num_parameters(embeddings=False) + config.vocab_size * config.d_model)
    kept = config.state_bytes(1, width)
    read = sum(n * len(ids) + n * (n - 1) // 2 for ids, n in ((ids, p.max_tokens) for ids, p in requests)) * kept
    shares: dict[str, Any] = {}
    devices = ranks.size(llm.model)
    if bandwidth := peak_bandwidth(device):
        shares["mbu"] = round((steps * weights + read) / seconds / bandwidth / devices, 4)
    if flops := peak_flops(device, llm.model.compute_dtype):
        shares["mfu"] = round(tokens * config.flops_per_token(0) / 3 / seconds / flops / devices, 4)
    return shares


def summary(times: Sequence[Times], seconds: float) -> dict[str, Any]:
    """Of requests of which each had a token at least: milliseconds, by name."""
    tokens = sum(len(t.tokens) for t in times)
    gaps = [gap for t in times for gap in t.gaps]
    tpot = [statistics.fmean(t.gaps) for t in times if t.gaps]
    found: dict[str, Any] = {"requests": len(times), "output_tokens": tokens, "seconds": round(seconds, 3)}
    found |= {"req_s": round(len(times) / seconds, 3), "tok_s": round(tokens / seconds, 1)}
    for name, values in (("ttft", [t.tokens[0] - t.sent for t in times if t.tokens]), ("tpot", tpot), ("itl", gaps)):
        for share in (50, 99):
            found[f"{name}_p{share}_ms"] = round(1e3 * _percentile(values, share), 3)
    return found


def _percentile(values: Sequence[float], share: int) -> float:
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * share / 100) - 1)] if ordered else math.nan


def _tell(kind: str, found: dict[str, Any]) -> None:
    if rank():
        return
    for name, value in found.items():
        print(f"{name:>16}  {value}")
    print(json.dumps({"bench": kind} | {k: None if v != v else v for k, v in found.items()}))


Model = Annotated[str, arg(metavar="MODEL")]


def offline(
    model: Positional[Model],
    draft: str | None = None,
    device: str = "auto",
    load: Annotated[Load, arg(name="")] = Load(),
    engine: Annotated[EngineConfig, arg(name="")] = EngineConfig(max_seqs=256),  # noqa: B008
) -> None:
    """Many requests at once, as fast as they go. Under torchrun its processes divide the model.

    Args:
        model: an export, a checkpoint, or a run directory.
        draft: a smaller one, which drafts what the model then verifies.
        device: auto (a GPU if there is one), cpu, cuda.
    """
    llm = LLM(model, draft=draft, device=device, tensor_parallel=True, **vars(engine))
    _warm_up(llm)
    _tell("offline", run_engine(llm, _requests(load, llm)))


def latency(
    model: Positional[Model],
    device: str = "auto",
    batch_size: int = 1,
    input_len: int = 512,
    output_len: int = 128,
    repeats: int = 3,
    speculation: Literal["none", "ngram"] = "none",
    draft: str | None = None,
    exit_layer: int | None = None,
) -> None:
    """A few requests of one size, closely: the median of some repeats.

    Args:
        model: an export, a checkpoint, or a run directory.
        device: auto (a GPU if there is one), cpu, cuda.
        batch_size: requests at once.
        input_len, output_len: tokens of each.
        repeats: of which that with the median time is told.
        speculation: ngram: draft what followed the same tokens before, and verify it all at once.
        draft: draft by this smaller model.
        exit_layer: draft by the first so many layers.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be 1 or more, got {repeats}")
    loads = [Load(batch_size, (input_len, input_len), (output_len, output_len), seed=seed) for seed in range(repeats)]
    drafting: dict[str, Any] = {"speculation": None if speculation == "none" else speculation}
    drafting |= {"draft": draft, "exit_layer": exit_layer}
    llm = LLM(model, device=device, max_seqs=batch_size, prefix_cache=False, **drafting)
    _warm_up(llm)
    found = [run_engine(llm, _requests(load, llm)) for load in loads]
    found.sort(key=lambda row: row["seconds"])
    _tell("latency", found[len(found) // 2])


def _requests(load: Load, llm: LLM) -> list[tuple[list[int], SamplingParams]]:
    return _fitted(load, llm.model.config.context_length).requests(llm.model.config.vocab_size)


def _fitted(load: Load, context: int) -> Load:
    fitted = load.within(context)
    if fitted != load and rank() == 0:
        print(f"to fit the context of {context}: prompts of {fitted.input_len} tokens, answers of {fitted.output_len}")
    return fitted


def _warm_up(llm: LLM) -> None:
    run_engine(llm, Load(2, (8, 8), (4, 4)).requests(llm.model.config.vocab_size))
    if llm.model.device.type == "cuda":
        torch.cuda.synchronize()


def serve(
    url: Annotated[Positional[str], arg(metavar="URL")] = "http://127.0.0.1:8000",
    concurrency: int = 32,
    api_key: str | None = None,
    vocab_size: int = 256,
    load: Annotated[Load, arg(name="")] = Load(),
) -> None:
    """Requests to a server that runs, so many at once, as its clients see them.

    Args:
        url: of the server.
        concurrency: requests at once.
        api_key: if it wants one.
        vocab_size: prompts are made of the tokens below this.
    """
    for name, value in (("concurrency", concurrency), ("vocab_size", vocab_size)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    if context := _context_of(url, api_key):
        load = _fitted(load, context)
    times, seconds, failed = asyncio.run(_ask_all(url, concurrency, api_key, load.requests(vocab_size)))
    if failed:
        raise ValueError(f"{len(failed)} of {load.num_requests} requests failed, the first with: {failed[0]}")
    _tell("serve", summary(times, seconds) | {"concurrency": concurrency})


def _context_of(url: str, api_key: str | None) -> int | None:
    """The max_model_len that cs336's servers and vLLM's tell; None where it is not told."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    asked = urllib.request.Request(f"{url.rstrip('/')}/v1/models", headers=headers)
    with (
        contextlib.suppress(OSError, ValueError, LookupError, TypeError),
        urllib.request.urlopen(asked, timeout=60) as answer,
    ):
        return int(json.load(answer)["data"][0]["max_model_len"])
    return None


async def _ask_all(url: str, concurrency: int, api_key: str | None, requests):
    turn, times, failed = asyncio.Semaphore(concurrency), [], []

    async def one(ids: list[int], params: SamplingParams) -> None:
        async with turn:
            try:
                times.append(await _ask(url, api_key, ids, params))
            except (OSError, ValueError) as error:
                failed.append(str(error))

    begin = time.perf_counter()
    await asyncio.gather(*(one(ids, params) for ids, params in requests))
    return times, time.perf_counter() - begin, failed


async def _ask(url: str, api_key: str | None, ids: list[int], params: SamplingParams) -> Times:
    """One streamed completion. HTTP/1.0, for the events then come without chunks around them."""
    where = urllib.parse.urlsplit(url)
    body: dict[str, Any] = {"prompt": ids, "max_tokens": params.max_tokens, "temperature": params.temperature}
    data = json.dumps(body | {"stream": True, "ignore_eos": True, "logprobs": 0}).encode()
    head = f"POST /v1/completions HTTP/1.0\r\nHost: {where.hostname}\r\nContent-Type: application/json\r\n"
    if api_key is not None:
        head += f"Authorization: Bearer {api_key}\r\n"
    reader, writer = await asyncio.open_connection(where.hostname, where.port or 80)
    try:
        times = Times(time.perf_counter())
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        status = await reader.readline()
        if b" 200 " not in status:
            answer = (await reader.read()).partition(b"\r\n\r\n")[2]
            raise ValueError(f"{status.decode().strip()}: {answer.decode(errors='replace')}")
        async for line in reader:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise ValueError(event["error"]["message"])
                times.tokens += [time.perf_counter()] * len(event["choices"][0]["logprobs"]["tokens"])
        if len(times.tokens) != params.max_tokens:
            raise ValueError(f"{len(times.tokens)} tokens came of {params.max_tokens}")
        return times
    finally:
        writer.close()
