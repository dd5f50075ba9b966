"""Who may ask: a key, and a kind of body that no page of another site can send."""

import hmac
from collections.abc import Awaitable, Callable, Mapping

from starlette.exceptions import HTTPException
from starlette.types import Scope

OPEN = {"/", "/health"}  # without a key


def admission(api_key: str | None) -> Callable[[Scope, Mapping[bytes, bytes]], Awaitable[None]]:
    """For Gate. api_key: that "Authorization: Bearer KEY" must hold; anyone passes if None."""
    wanted = None if api_key is None else f"Bearer {api_key}".encode()

    async def admit(scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        known = wanted is None or hmac.compare_digest(headers.get(b"authorization", b""), wanted)
        if not known and scope["path"] not in OPEN:
            message = "this server wants Authorization: Bearer, and its key"
            raise HTTPException(401, message, {"WWW-Authenticate": "Bearer"})
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":  # others a page of any site may send without asking
                raise HTTPException(415, "the body must be application/json, and say so")

    return admit
