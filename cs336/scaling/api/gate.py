"""Whose request it is, and how one that is refused is answered."""

import json
from collections.abc import Awaitable, Callable, Mapping

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from cs336.scaling.api.store import User

OPEN = {"/", "/health", "/openapi.json"}  # without a key


def admission(user: Callable[[str], User | None]) -> Callable[[Scope, Mapping[bytes, bytes]], Awaitable[None]]:
    """For Gate: scope["state"]["user"] is whose key "Authorization: Bearer KEY" holds; others get 401."""

    async def admit(scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        if scope["path"] in OPEN:
            return
        scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        found = await run_in_threadpool(user, key) if scheme.lower() == "bearer" else None
        if found is None:
            message = "this server wants Authorization: Bearer, and the key of a user"
            raise HTTPException(401, message, {"WWW-Authenticate": "Bearer"})
        scope.setdefault("state", {})["user"] = found

    return admit


def problem(
    status: int, message: str, headers: Mapping[str, str] | None = None, **more: str | float | None
) -> Response:
    """An error as JSON, of any text, lone surrogates too."""
    content = json.dumps({"error": {"message": message} | more})
    return Response(content, status, headers, media_type="application/json")
