"""What our servers share: a gate before the body of a request, and listening until a signal ends it."""

import asyncio
import errno
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = {"127.0.0.1", "localhost", "::1"}
BODY_SECONDS = 30.0  # between two pieces of a body
PAGE_POLICY = (  # Content-Security-Policy of a page that loads nothing from elsewhere
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)


class Gate:
    """ASGI middleware: a request passes if it is admitted and its body is no larger than is taken, and keeps coming.

    Args:
        admit: called with the scope and its headers before the body is read; raises HTTPException for what it refuses.
        problem: makes the answer to what is refused, of a status, a message and headers.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        admit: Callable[[Scope, Mapping[bytes, bytes]], Awaitable[None]],
        problem: Callable[[int, str, Mapping[str, str]], Response],
        max_body_bytes: int,
    ):
        self._app, self._admit, self._problem, self._max_body_bytes = app, admit, problem, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        try:
            await self._admit(scope, headers)
            length = headers.get(b"content-length", b"0")
            if not length.isdigit() or len(length) > 18 or int(length) > self._max_body_bytes:
                raise self._too_large()
        except HTTPException as error:  # the body is not read, so that nothing may follow it
            closing = {"Connection": "close"} | dict(error.headers or {})
            return await self._problem(error.status_code, error.detail, closing)(scope, receive, send)
        return await self._app(scope, self._counted(receive), send)

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the body must be no more than {self._max_body_bytes} bytes")

    def _counted(self, receive: Receive) -> Receive:
        read, whole = 0, False

        async def counted() -> Message:
            nonlocal read, whole
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), BODY_SECONDS)
            except TimeoutError:
                raise HTTPException(408, f"no more of the body came for {BODY_SECONDS:.0f} seconds") from None
            read += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if read > self._max_body_bytes:
                raise self._too_large()
            return message

        return counted


class _Announcing(uvicorn.Server):
    """Tells its address once it listens; port 0 is one that is free."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[str], None]):
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._announce(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets of a host's addresses. Raises OSError that says what to do where the port is taken or cannot be had."""
    if not 0 <= port < 2**16:
        raise ValueError(f"port must be 0 to {2**16 - 1}, and 0 is one that is free, got {port}")
    found: list[socket.socket] = []
    refused: OSError | None = None
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, *_, address in dict.fromkeys(places):
            try:
                found.append(socket.create_server(address, family=family))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # ::1, where there is no IPv6
                    raise
                refused = error
        if refused and not found:
            raise refused
    except OSError as error:
        for opened in found:
            opened.close()
        if error.errno == errno.EADDRINUSE:
            message = f"port {port} of {host} is taken: stop what listens there, or give another --port (0: a free one)"
        else:
            why = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
            message = f"cannot listen to {host}, port {port}: {why}: give another --host or --port"
        raise OSError(message) from None
    return found


def check_free(host: str, port: int) -> None:
    """Raises as `bind` does: before a model is read, not after."""
    for opened in bind(host, port):
        opened.close()


def listen(
    app: Starlette, host: str, port: int, *, drain: float, announce: Callable[[str], None], **options: Any
) -> None:
    """Serve until SIGTERM or Ctrl-C: then no new connection is taken, and requests that are under way have `drain`
    seconds to end. On loopback, answer to its own names alone. Call it in the main thread. options: uvicorn's.

    Raises as `bind` does."""
    sockets = bind(host, port)
    if host in LOOPBACK:  # a name that someone made point here is no name of ours
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
    options |= {"log_level": "warning", "access_log": False, "server_header": False}
    config = uvicorn.Config(app, timeout_graceful_shutdown=int(drain), **options)
    # uvicorn raises the signal that stopped it once more when all is done: then it shall change nothing.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        _Announcing(config, announce).run(sockets)
    finally:
        signal.signal(signal.SIGTERM, before)
