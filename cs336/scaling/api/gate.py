"""What a request must pass before it is read: a key, and a size of body that is taken, without dawdling."""

import asyncio
import json
from collections.abc import Callable

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cs336.scaling.api.store import User

OPEN = {"/", "/health", "/openapi.json"}  # without a key
BODY_SECONDS = 30.0  # between two pieces of a body


class Gate:
    """ASGI middleware: scope["state"]["user"] is whose key "Authorization: Bearer KEY" holds; others get 401."""

    def __init__(self, app: ASGIApp, *, user: Callable[[str], User | None], max_body_bytes: int):
        self._app, self._user, self._max_body_bytes = app, user, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        if scope["path"] not in OPEN:
            scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
            user = await run_in_threadpool(self._user, key) if scheme.lower() == "bearer" else None
            if user is None:
                message = "this server wants Authorization: Bearer, and the key of a user"
                return await _refused(401, message, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            scope.setdefault("state", {})["user"] = user
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_body_bytes:
            return await _refused(413, self._too_large)(scope, receive, send)
        return await self._app(scope, self._counted(receive), send)

    @property
    def _too_large(self) -> str:
        return f"the body must be no more than {self._max_body_bytes} bytes"

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
                raise HTTPException(413, self._too_large)
            return message

        return counted


def problem(status: int, message: str, headers: dict[str, str] | None = None, **more: str | float | None) -> Response:
    """An error as JSON, of any text, lone surrogates too."""
    content = json.dumps({"error": {"message": message} | more})
    return Response(content, status, headers, media_type="application/json")


def _refused(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """Before the body was read, which is then not read at all."""
    return problem(status, message, {"Connection": "close"} | (headers or {}))
