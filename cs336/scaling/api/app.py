"""The server's routes. Each is one transaction of the store, in a thread."""

import contextlib
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from cs336.scaling.api.contest import ClosedError, Contest
from cs336.scaling.api.gate import admission, problem
from cs336.scaling.api.jobs import Backend, FieldError, curve, newest_loss, taken
from cs336.scaling.api.pool import Pool
from cs336.scaling.api.protocol import (
    Account,
    Leaderboard,
    Prediction,
    Problem,
    RunDetails,
    RunInfo,
    RunRequest,
    State,
    Submission,
)
from cs336.scaling.api.store import DuplicateError, Entry, FullError, OverBudgetError, Store, User
from cs336.scaling.api.worker import taken_of
from cs336.utils.http_server import PAGE_POLICY, Gate

PAGE = pathlib.Path(__file__).with_name("page.html")
MEANINGS = {
    400: "The account does not hold what the run takes, or the body is no JSON.",
    401: "No key, or one of nobody.",
    404: "You have no such run.",
    408: "The body came too slowly.",
    409: "You have this run already, or the contest is closed.",
    413: "The body is too large.",
    422: "What is asked for cannot be; `field` names what is to blame.",
    429: "Too many of your runs wait.",
}


@dataclass(frozen=True)
class ServerConfig:
    """Whom a server listens to, and how much it takes."""

    host: str = "127.0.0.1"
    port: int = 8336
    workers: int | None = None
    """Runs at once. None: as many as there are GPUs, else 2."""
    gpus: tuple[int, ...] = ()
    """The GPU of each worker in turn, counted among those that the server sees."""
    target: float | None = None
    """FLOPs of the run that users predict."""
    deadline: str | None = None
    """Of their submissions: 2026-12-01T18:00, UTC if it says no offset."""
    max_waiting: int = 1000
    """Runs of one user that wait."""
    max_body_bytes: int = 64 << 10
    max_connections: int = 256
    drain: float = 60.0
    """Seconds that runs and requests may take to end, after SIGTERM."""


def make_app(
    store: Store, backend: Backend, config: ServerConfig | None = None, *, pool: Pool | None = None
) -> FastAPI:
    """The ASGI application. pool: started and stopped with it; None: workers are somebody else's."""
    config = ServerConfig() if config is None else config
    contest = Contest(store, config.target, config.deadline)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        if pool is not None:
            pool.start()
        yield
        if pool is not None:
            pool.stop()

    app = FastAPI(title="cs336 training API", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, admit=admission(store.user), problem=problem, max_body_bytes=config.max_body_bytes)
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)

    @app.get("/", response_class=HTMLResponse)
    def page() -> Response:
        """The dashboard."""
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/account", responses=_may(401))
    def account(user: Whose) -> Account:
        """What is left of your budget."""
        return store.accounts(user.name)[0]

    @app.post("/runs", status_code=201, responses=_may(400, 401, 408, 409, 413, 422, 429))
    def submit(asked: RunRequest, user: Whose) -> RunInfo:
        """Enter a run and reserve what it takes."""
        id = store.submit(user, backend.plan(asked), most_waiting=config.max_waiting)
        return _info(_found(store, user, id), store)

    @app.get("/runs", responses=_may(401, 422))
    def runs(
        user: Whose,
        state: State | None = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
        skip: Annotated[int, Query(ge=0, le=2**53)] = 0,
    ) -> list[RunInfo]:
        """Yours, the newest first."""
        return [_info(entry, store) for entry in store.runs(user.name, state=state, limit=limit, skip=skip)]

    @app.get("/runs/{id}", responses=_may(401, 404, 422))
    def run(id: str, user: Whose) -> RunDetails:
        """One of yours, with its losses so far."""
        entry = _found(store, user, id)
        more = {"curve": curve(store.folder(id)), "config": entry.job.config}
        return RunDetails.model_validate(_info(entry, store).model_dump() | more)

    @app.post("/runs/{id}/cancel", responses=_may(401, 404, 422))
    def cancel(id: str, user: Whose) -> RunInfo:
        """End a run; what it did not take is back in your account once its state says cancelled."""
        _found(store, user, id)
        store.cancel(user.name, id, taken_of(store))
        return _info(_found(store, user, id), store)

    @app.put("/submission", responses=_may(400, 401, 408, 409, 413, 422))
    def predict(asked: Prediction, user: Whose) -> Submission:
        """Your final submission, in place of the one before."""
        return contest.submit(user, asked)

    @app.get("/submission", responses=_may(401))
    def submission(user: Whose) -> Submission | None:
        """Your newest; null if there is none."""
        return contest.of(user)

    @app.get("/leaderboard", responses=_may(401))
    def leaderboard(user: Whose) -> Leaderboard:
        """Everybody's, scored once the true run is revealed."""
        return contest.board()

    return app


def _user(request: Request, _: Annotated[Any, Security(HTTPBearer(auto_error=False))]) -> User:
    """Whom the gate has let in."""
    return request.state.user


Whose = Annotated[User, Depends(_user)]


def _may(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem, "description": MEANINGS[status]} for status in statuses}


def _found(store: Store, user: User, id: str) -> Entry:
    entry = store.run(user.name, id)
    if entry is None:
        raise HTTPException(404, f"you have no run {id:.40}")
    return entry


def _info(entry: Entry, store: Store) -> RunInfo:
    job, loss, done = entry.job, entry.loss, 1.0 if entry.state == "done" else 0.0
    if entry.state != "done" and entry.attempts:
        so_far, folder = taken(job, store.folder(entry.id)), store.folder(entry.id)
        if job.tokens:
            done = min(1.0, so_far.tokens / job.tokens)
        elif job.seconds:
            done = min(1.0, so_far.seconds / job.seconds)
        loss = newest_loss(folder)
    kept = {name: getattr(entry, name) for name in ("id", "state", "reserved", "charged", "error", "attempts")}
    kept |= {name: getattr(entry, name) for name in ("submitted", "started", "ended")}
    kept |= {name: getattr(job, name) for name in ("parameters", "tokens", "flops", "learning_rate", "batch_tokens")}
    return RunInfo(seed=job.seed, done=done, loss=loss, **kept)


# ---- errors ----


async def _invalid(request: Request, error: Any) -> Response:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return problem(400, f"the body is no JSON: {first['ctx']['error']}")
    where = ".".join(str(part) for part in first["loc"][1:])
    said = first["msg"].removeprefix("Value error, ")
    if not where and first["type"].endswith("_type"):
        said = "the body must be a JSON object, sent with Content-Type: application/json"
    return problem(422, f"{where}: {said}" if where else said, field=where or None)


async def _field(request: Request, error: Any) -> Response:
    return problem(422, str(error), field=error.field)


async def _http_error(request: Request, error: Any) -> Response:
    return problem(error.status_code, str(error.detail), error.headers)


async def _duplicate(request: Request, error: Any) -> Response:
    return problem(409, str(error), run=error.run)


async def _over_budget(request: Request, error: Any) -> Response:
    return problem(400, str(error), left=error.left)


async def _closed(request: Request, error: Any) -> Response:
    return problem(409, str(error))


async def _full(request: Request, error: Any) -> Response:
    return problem(429, str(error), {"Retry-After": "5"})


async def _unexpected(request: Request, error: Any) -> Response:
    return problem(500, "an error of the server's own, which its log describes")


HANDLERS: dict[type[Exception] | int, Callable[..., Any]] = {
    RequestValidationError: _invalid,
    FieldError: _field,
    HTTPException: _http_error,
    DuplicateError: _duplicate,
    OverBudgetError: _over_budget,
    ClosedError: _closed,
    FullError: _full,
    Exception: _unexpected,
}
