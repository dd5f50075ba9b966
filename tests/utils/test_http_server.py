"""What a request must pass before a server reads it."""

import asyncio

import pytest

pytest.importorskip("uvicorn")

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from cs336.utils.http_server import Gate


async def length(request: Request):
    return PlainTextResponse(str(len(await request.body())))


async def admit(scope, headers):
    if headers.get(b"x-name") == b"mallory":
        raise HTTPException(403, "not you", {"X-Why": "name"})


def problem(status, message, headers):
    return PlainTextResponse(message, status, dict(headers))


def ask(*pieces, method="POST", **headers):
    """(status, text, headers, how many pieces of the body were read) of a request whose body comes in pieces."""
    app = Starlette(routes=[Route("/", length, methods=["GET", "POST"])])
    app.add_middleware(Gate, admit=admit, problem=problem, max_body_bytes=10)
    given = [(name.replace("_", "-").lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": "/", "query_string": b"", "headers": given}
    left, sent = list(pieces or [b""]), []

    async def receive():
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    start, *bodies = sent
    found = {name.decode(): value.decode() for name, value in start["headers"]}
    text = b"".join(body.get("body", b"") for body in bodies).decode()
    return start["status"], text, found, len(pieces) - len(left)


def test_what_is_admitted_is_read():
    assert ask(b"x" * 10, Content_Length="10")[:2] == (200, "10")
    assert ask(b"x" * 5, b"x" * 5)[:2] == (200, "10")
    assert ask(method="GET")[:2] == (200, "0")


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_body_that_says_it_is_too_large_is_not_read(method):
    status, text, headers, read = ask(b"x" * 11, method=method, Content_Length="11")
    assert (status, text, read) == (413, "the body must be no more than 10 bytes", 0)
    assert headers["connection"] == "close"  # or its bytes would be read as the next request


def test_a_body_that_becomes_too_large_is_read_no_further():
    assert ask(b"x" * 5, b"x" * 6, b"x")[::3] == (413, 2)


@pytest.mark.parametrize("length", ["-1", "1_0", "ten", "", "9" * 5000])
def test_a_length_that_is_none(length):
    assert ask(Content_Length=length)[0] == 413


def test_who_is_refused_learns_why():
    status, text, headers, read = ask(b"x", X_Name="mallory")
    assert (status, text, read) == (403, "not you", 0)
    assert (headers["x-why"], headers["connection"]) == ("name", "close")
