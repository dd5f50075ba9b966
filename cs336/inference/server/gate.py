"""What a request must pass before it is read: a key, a kind and size of body that are taken, and no dawdling."""

import asyncio
import hmac

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cs336.inference.server import answers

OPEN = {"/", "/health"}  # without a key
BODY_SECONDS = 30.0  # between two pieces of a body


class Gate:
    """ASGI middleware. api_key: that "Authorization: Bearer KEY" must hold; anyone passes if None."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, max_body_bytes: int):
        self._app, self._max_body_bytes = app, max_body_bytes
        self._wanted = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        refused = self._refuse(scope)
        if refused is not None:
            return await refused(scope, receive, send)
        return await self._app(scope, self._counted(receive), send)

    def _refuse(self, scope: Scope) -> JSONResponse | None:
        headers = dict(scope["headers"])
        if self._wanted is not None and scope["path"] not in OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self._wanted):
                content = answers.error("this server wants Authorization: Bearer, and its key", code="invalid_api_key")
                return JSONResponse(content, 401, {"WWW-Authenticate": "Bearer"})
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":  # others a page of any site may send without asking
                return JSONResponse(answers.error("the body must be application/json, and say so"), 415)
            length = headers.get(b"content-length", b"0")
            if not length.isdigit() or int(length) > self._max_body_bytes:
                return JSONResponse(answers.error(self._too_large), 413)
        return None

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
