"""The server: OpenAI's routes over one engine."""

import asyncio
import contextlib
import functools
import json
import pathlib
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from cs336.inference.llm import LLM
from cs336.inference.sampling import SamplingParams
from cs336.inference.server import answers
from cs336.inference.server.answers import Answers, choice
from cs336.inference.server.config import ServerConfig
from cs336.inference.server.gate import admission
from cs336.inference.server.protocol import (
    MOST_STOPS,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generation,
    TokenizeRequest,
)
from cs336.inference.server.worker import EngineFailed, Message, Ticket, Worker
from cs336.inference.tools import Tools
from cs336.utils.http_server import PAGE_POLICY, Gate

Call = Callable[..., Awaitable[Response]]
# What an error begins with: the field that it is of.
NAMES = {*CompletionRequest.model_fields, *ChatRequest.model_fields, *TokenizeRequest.model_fields}
NAMES |= {"best_of", "suffix", "functions", "audio", "modalities"}
FIELD = re.compile(rf"({'|'.join(sorted(NAMES))})\b[\w.$-]*")
EITHER = {  # fields of several types, of which pydantic names only the first that does not fit
    "prompt": "a text, token ids, or a list of either",
    "stop": f"a text, or a list of at most {MOST_STOPS} texts",
    "tool_choice": 'a text, or {"type": "function" or "allowed_tools", ...}',
}
PAGE = pathlib.Path(__file__).with_name("page.html")


class UnknownModel(HTTPException):
    pass


class Group:
    """The tickets of one HTTP request, and their place among those that are under way."""

    def __init__(self, server: "Server", prompts: list[tuple[list[int], SamplingParams]]):
        self._server, self._deadline = server, time.monotonic() + server.config.timeout
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self.tickets = [Ticket(ids, p, self.messages, number) for number, (ids, p) in enumerate(prompts)]
        self.size = sum(ticket.params.n for ticket in self.tickets)
        self._open = False

    async def check(self) -> None:
        """Raises ValueError for what the engine refuses. A grammar may take seconds to read, beside the event loop."""
        validate = self._server.llm.engine.validate
        for ticket in self.tickets:
            if ticket.params.grammar is None:
                validate(ticket.ids, ticket.params)
            else:
                await asyncio.to_thread(validate, ticket.ids, ticket.params)

    def begin(self) -> None:
        """Raises ValueError for too many, HTTPException where there is no place."""
        server, most = self._server, self._server.config.max_requests
        if self.size > most:
            raise ValueError(f"{self.size} continuations were asked for at once, {most} is the most: ask for fewer")
        if server.under_way + self.size > most:
            message = f"{server.under_way} sequences are under way, {most} is the most: come back later"
            raise HTTPException(429, message, {"Retry-After": "1"})
        server.under_way += self.size
        self._open = True
        for ticket in self.tickets:
            server.worker.submit(ticket)

    def close(self) -> None:
        """What has not ended is cancelled, and the place is free."""
        if self._open:
            self._open = False
            self._server.under_way -= self.size
            for ticket in self.tickets:
                self._server.worker.cancel(ticket)

    async def updates(self) -> AsyncIterator[Message]:
        """As they come, until all have ended. Raises what went wrong, and TimeoutError after the server's."""
        left = len(self.tickets)
        while left:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                ticket, message = await self.messages.get()
            if isinstance(message, Exception):
                raise message
            left -= message is None
            if message is not None:
                yield ticket, message

    @property
    def requests(self) -> list[Any]:
        return [ticket.request for ticket in self.tickets]


class EventStream(StreamingResponse):
    """Server-sent events. The group is closed whatever becomes of the connection, even before the first event."""

    def __init__(self, events: AsyncIterator[str], group: Group):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._group = group

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._group.close()


class Server:
    """`app` is the ASGI application."""

    def __init__(self, llm: LLM, config: ServerConfig | None = None):
        self.llm, self.config = llm, ServerConfig() if config is None else config
        if llm.tokenizer is None:
            raise ValueError("a server needs a tokenizer: give LLM one")
        self.worker = Worker(llm.engine)
        self.answers = Answers(self.config.name or llm.name, llm.tokenizer)
        self.under_way = 0
        self.app = FastAPI(title="cs336", lifespan=self._lifespan, docs_url=None, redoc_url=None, openapi_url=None)
        admit, most = admission(self.config.api_key), self.config.max_body_bytes
        self.app.add_middleware(Gate, admit=admit, problem=_problem, max_body_bytes=most)
        for kind, handler in (
            (RequestValidationError, _invalid),
            (UnknownModel, _unknown_model),
            (HTTPException, _http_error),
            (ValueError, _value_error),
            (EngineFailed, _failed),
            (TimeoutError, _timed_out),
            (Exception, _unexpected),
        ):
            self.app.add_exception_handler(kind, handler)
        gets: dict[str, Call] = {"/": self._page, "/health": self._health, "/metrics": self._metrics}
        gets |= {"/v1/models": self._models, "/v1/models/{model:path}": self._model}
        posts: dict[str, Call] = {"/v1/completions": self._completions, "/v1/chat/completions": self._chat}
        posts |= {"/tokenize": self._tokenize, "/detokenize": self._detokenize}
        for method, calls in (("GET", gets), ("POST", posts)):
            for path, call in calls.items():
                self.app.add_api_route(path, call, methods=[method], response_model=None)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI):
        self.worker.begin()
        yield
        await asyncio.to_thread(self.worker.stop)

    # ---- what generates ----

    async def _completions(self, asked: CompletionRequest, http: Request) -> Response:
        self._check_model(asked)
        llm, prompts = self.llm, asked.prompts
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        encoded = iter(llm.encode(texts))
        ids = [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]
        room = llm.engine.max_len
        group = Group(self, [(i, asked.params(room - len(i))) for i in ids])
        shown = [""] * len(ids)
        if asked.echo:
            begin = len(llm.tokenizer.begin_ids)  # of a prompt of text, and not in it
            shown = [llm.decode(i[begin:] if isinstance(p, str) else i) for p, i in zip(prompts, ids, strict=True)]
        id = f"cmpl-{uuid.uuid4().hex}"

        def whole() -> dict[str, Any]:
            choices = self.answers.completion(asked, group.requests, shown)
            return self.answers.envelope(id, "text_completion", choices, usage=used())

        def used() -> dict[str, Any]:
            return answers.usage(group.requests, echo_alone=asked.max_tokens == 0)

        def piece(ticket: Ticket, update, begun: set[int]) -> list[dict[str, Any]]:
            sample, token = update.sample, update.token
            index = ticket.number * asked.n + sample.index
            found: list[dict[str, Any]] = []
            if asked.echo and index not in begun:
                begun.add(index)
                tokens = self.answers.echoed(asked, sample.request)
                logprobs = None if asked.logprobs is None else self.answers.completion_logprobs(tokens)
                found.append(choice(index, None, text=shown[ticket.number], logprobs=logprobs))
            text, tokens = update.text, [token or sample.end] if token or sample.end else []
            if asked.max_tokens == 0:
                text, tokens = "", []
            logprobs = None if asked.logprobs is None else self.answers.completion_logprobs(tokens)
            if text or update.finish_reason or logprobs:
                found.append(choice(index, update.finish_reason, text=text, logprobs=logprobs))
            return [self.answers.envelope(id, "text_completion", [c]) for c in found]

        last = functools.partial(self._last, id, "text_completion", used)
        return await self._answer(asked, http, group, whole, piece, last)

    async def _chat(self, asked: ChatRequest, http: Request) -> Response:
        self._check_model(asked)
        llm, tools = self.llm, Tools(asked.tools, asked.tool_choice, asked.parallel_tool_calls)
        extra = dict(asked.chat_template_kwargs)
        if asked.reasoning_effort is not None:
            extra = llm.chat_template.of_effort(asked.reasoning_effort) | extra
        prompt = llm.chat_template.render(asked.messages, tools=tools.offered, extra=extra)
        (ids,) = llm.encode([prompt])
        params = asked.params(llm.engine.max_len - len(ids), llm.chat_template.stop)
        params = await asyncio.to_thread(llm.calling, params, tools, prompt)  # a grammar may take seconds to write
        group = Group(self, [(ids, params)])
        readers = [llm.reader(tools, prompt) for _ in range(asked.n)]
        id, object = f"chatcmpl-{uuid.uuid4().hex}", "chat.completion"

        def whole() -> dict[str, Any]:
            (request,) = group.requests
            return self.answers.envelope(id, object, self.answers.chat(asked, request, readers), usage=used())

        def used() -> dict[str, Any]:
            return answers.usage(group.requests)

        def piece(ticket: Ticket, update, begun: set[int]) -> list[dict[str, Any]]:
            sample, token = update.sample, update.token
            found: list[dict[str, Any]] = []
            if sample.index not in begun:
                begun.add(sample.index)
                found.append(choice(sample.index, None, delta={"role": "assistant", "content": ""}))
            logprobs = self.answers.chat_logprobs([token]) if asked.logprobs and token else None
            deltas, reason = answers.deltas(readers[sample.index], update.text, update.finish_reason)
            if logprobs and not deltas:
                deltas = [{"content": ""}]
            for delta in deltas:
                found.append(choice(sample.index, None, delta=delta, logprobs=logprobs))
                logprobs = None  # they are told once
            if reason:
                found.append(choice(sample.index, reason, delta={}))
            return [self.answers.envelope(id, f"{object}.chunk", [c]) for c in found]

        last = functools.partial(self._last, id, f"{object}.chunk", used)
        return await self._answer(asked, http, group, whole, piece, last)

    def _last(self, id: str, object: str, used: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The last event, which tells what was used."""
        return self.answers.envelope(id, object, [], usage=used())

    async def _answer(
        self,
        asked: Generation,
        http: Request,
        group: Group,
        whole: Callable[[], dict[str, Any]],
        piece: Callable[[Ticket, Any, set[int]], list[dict[str, Any]]],
        last: Callable[[], dict[str, Any]],
    ) -> Response:
        await group.check()
        group.begin()
        if asked.stream:
            return EventStream(_events(group, piece, last if asked.wants_usage else None), group)
        try:
            await _until_gone(http, _drained(group))
            return _json(whole())
        finally:
            group.close()

    def _check_model(self, asked: Generation | TokenizeRequest | DetokenizeRequest) -> None:
        if asked.model is not None:
            self._check_name(asked.model)

    def _check_name(self, model: str) -> None:
        if model != self.answers.name:
            raise UnknownModel(404, f"there is no model {model!r:.80} here, but {self.answers.name!r}")

    # ---- the rest ----

    async def _page(self) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": PAGE_POLICY})

    async def _health(self) -> Response:
        if self.worker.failure is not None:
            raise EngineFailed(f"the engine has failed: {self.worker.failure}")
        return JSONResponse({"status": "ok"})

    async def _metrics(self) -> Response:
        return Response(self.worker.metrics.render(), media_type="text/plain; version=0.0.4")

    async def _models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._about]})

    async def _model(self, model: str) -> Response:
        self._check_name(model)
        return JSONResponse(self._about)

    @property
    def _about(self) -> dict[str, Any]:
        about = {"id": self.answers.name, "object": "model", "created": 0, "owned_by": "cs336"}
        return about | {"max_model_len": self.llm.engine.max_len}

    async def _tokenize(self, asked: TokenizeRequest) -> Response:
        self._check_model(asked)
        if (asked.prompt is None) == (asked.messages is None):
            raise ValueError("give either a prompt or messages")
        text = asked.prompt
        if asked.messages is not None:
            text = self.llm.chat_template.render(asked.messages, tools=Tools(asked.tools).offered)
        ids = self.llm.tokenizer.encode_prompt(text)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": self.llm.engine.max_len})

    async def _detokenize(self, asked: DetokenizeRequest) -> Response:
        self._check_model(asked)
        return _json({"prompt": self.llm.decode(asked.tokens)})


async def _events(group: Group, piece, last) -> AsyncIterator[str]:
    begun: set[int] = set()
    try:
        async for ticket, update in group.updates():
            for content in piece(ticket, update, begun):
                yield f"data: {json.dumps(content)}\n\n"
        if last is not None:
            yield f"data: {json.dumps(last())}\n\n"
        yield "data: [DONE]\n\n"
    except TimeoutError:
        yield f"data: {json.dumps(answers.error('the request took too long', 'timeout'))}\n\n"
    except (ValueError, RuntimeError) as error:
        yield f"data: {json.dumps(answers.error(str(error), 'server_error'))}\n\n"


async def _drained(group: Group) -> None:
    async for _ in group.updates():
        pass


async def _until_gone(http: Request, work) -> None:
    """Await the work, or the end of the connection. Raises HTTPException for the latter."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise HTTPException(499, "the client has gone")
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


def _json(content: dict[str, Any], status: int = 200) -> Response:
    """Of any text, lone surrogates too."""
    return Response(json.dumps(content), status, media_type="application/json")


# ---- errors, as OpenAI's ----


async def _invalid(http: Request, error: Any) -> Response:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return JSONResponse(answers.error(f"the body is not JSON: {first['ctx']['error']}"), 400)
    if first["type"] == "missing" and first["loc"] == ("body",):
        return JSONResponse(answers.error("the body is empty: expected a JSON object"), 400)
    if len(first["loc"]) > 2 and (field := first["loc"][1]) in EITHER:
        return JSONResponse(answers.error(f"{field} must be {EITHER[field]}", param=field), 400)
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    message = f"{where}: {first['msg']}" if where else first["msg"]
    return JSONResponse(answers.error(message, param=where or None), 400)


def _problem(status: int, message: str, headers: Mapping[str, str] | None) -> Response:
    kind = {429: "rate_limit_exceeded", 404: "not_found_error"}.get(status, "invalid_request_error")
    content = answers.error(message, kind, "invalid_api_key" if status == 401 else None)
    return JSONResponse(content, status, headers)


async def _unknown_model(http: Request, error: Any) -> Response:
    return JSONResponse(answers.error(error.detail, "not_found_error", "model_not_found", "model"), 404)


async def _http_error(http: Request, error: Any) -> Response:
    return _problem(error.status_code, str(error.detail), error.headers)


async def _value_error(http: Request, error: Exception) -> Response:
    field, message = FIELD.match(str(error)), re.match(r"message (\d+)\b", str(error))
    param = field[0] if field else f"messages.{message[1]}" if message else None
    return _json(answers.error(str(error), param=param), 400)


async def _failed(http: Request, error: Exception) -> Response:
    return JSONResponse(answers.error(str(error), "server_error"), 503)


async def _timed_out(http: Request, error: Exception) -> Response:
    return JSONResponse(answers.error("the request took too long", "timeout"), 504)


async def _unexpected(http: Request, error: Exception) -> Response:
    return JSONResponse(answers.error("an error of the server's own, which its log describes", "server_error"), 500)
