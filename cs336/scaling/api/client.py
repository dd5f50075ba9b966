"""A client of the training API, of the standard library alone.

client = Client("http://127.0.0.1:8336", key)
run = client.submit(parameters=1e8, tokens=2e9)
client.wait([run.id])
client.points()                               # runs that are done, for cs336.scaling.fit_chinchilla
"""

import http.client
import json
import pathlib
import time
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import Any

from cs336.scaling.api.protocol import Account, Leaderboard, RunDetails, RunInfo, State, Submission
from cs336.scaling.points import Points
from cs336.utils.config import read_table

TIMEOUT = 60.0  # seconds, of one request
RETRY = 0.2  # seconds until a server that is not there is asked again
POLL = 0.05, 2.0  # seconds between two looks at runs: at first, and at last
PAGE = 1000  # runs a request
ENDED = ("done", "failed", "cancelled")


class ApiError(ValueError):
    """What the server refused."""

    def __init__(self, status: int, error: Mapping[str, Any]):
        super().__init__(f"{error.get('message', 'the server gave no reason')} (status {status})")
        self.status = status
        self.field: str | None = error.get("field")
        self.run: str | None = error.get("run")
        """The run that is there already."""
        self.left: float | None = error.get("left")


class Client:
    """Of one user. Raises ApiError for what the server refuses, OSError where there is none.

    Args:
        url: of the server.
        key: of the user.
        patience: seconds in which a server that is not there, being started anew perhaps, is asked again. A run that
            is submitted again by this is made once.
    """

    def __init__(self, url: str, key: str, *, patience: float = 0.0):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"expected an address like http://127.0.0.1:8336, got {url!r}")
        if not (key.strip().isascii() and key.strip().isprintable()):
            raise ValueError("a key is one line of ASCII, as `cs336 scaling api add-user` printed it")
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._address, self._path = (parts.hostname, parts.port), parts.path.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key.strip()}", "Content-Type": "application/json"}
        self._patience = patience

    # ---- runs ----

    def submit(
        self,
        parameters: float | None = None,
        tokens: float | None = None,
        *,
        learning_rate: float | None = None,
        batch_tokens: float | None = None,
        seed: int | None = None,
        config: Mapping[str, Any] | str | pathlib.Path | None = None,
    ) -> RunInfo:
        """Enter a run, by its size or by a configuration of `cs336 train` (a table, or a TOML file), and reserve its
        price. Raises ApiError: 400 over budget, 409 where you have this run, 422 for what cannot be run."""
        if isinstance(config, str | pathlib.Path):
            config = read_table(config)
        asked: dict[str, Any] = {"parameters": parameters, "tokens": tokens, "learning_rate": learning_rate}
        asked |= {"seed": seed} | {"batch_tokens": batch_tokens, "config": config}
        body = {name: value for name, value in asked.items() if value is not None}
        return RunInfo.model_validate(self._ask("POST", "/runs", body))

    def run(self, id: str) -> RunDetails:
        """With its losses so far."""
        return RunDetails.model_validate(self._ask("GET", f"/runs/{urllib.parse.quote(id, safe='')}"))

    def runs(self, state: State | None = None) -> list[RunInfo]:
        """All, the newest first."""
        found: list[RunInfo] = []
        chosen = "" if state is None else f"&state={state}"
        while True:
            page = self._ask("GET", f"/runs?limit={PAGE}&skip={len(found)}{chosen}")
            found += map(RunInfo.model_validate, page)
            if len(page) < PAGE:
                return found

    def cancel(self, id: str) -> RunInfo:
        """A run that goes on ends soon."""
        return RunInfo.model_validate(self._ask("POST", f"/runs/{urllib.parse.quote(id, safe='')}/cancel"))

    def wait(self, ids: Iterable[str], timeout: float = 3600.0) -> list[RunInfo]:
        """Until these runs have ended, however. Raises TimeoutError, KeyError for one that is none of yours."""
        wanted, end, pause = list(ids), time.monotonic() + timeout, POLL[0]
        while True:
            found = {run.id: run for run in self.runs()}
            chosen = [found[id] for id in wanted]
            if all(run.state in ENDED for run in chosen):
                return chosen
            if time.monotonic() > end:
                raise TimeoutError(f"runs have not ended within {timeout:.0f} s")
            time.sleep(pause)
            pause = min(POLL[1], 1.5 * pause)

    def points(self) -> Points:
        """Runs that are done. Raises ValueError where there are none."""
        done = [run for run in reversed(self.runs("done")) if run.tokens is not None]
        if not done:
            raise ValueError("no run is done yet")
        columns = zip(*((run.parameters, run.tokens, run.loss, run.flops) for run in done), strict=True)
        return Points.of(*columns)

    # ---- the rest ----

    def account(self) -> Account:
        """What is left of the budget."""
        return Account.model_validate(self._ask("GET", "/account"))

    def predict(self, loss: float, parameters: float, tokens: float, *, final: bool = False) -> Submission:
        """Your final submission, in place of the one before. Raises ApiError 409 where it is not taken any more."""
        body = {"loss": loss, "parameters": parameters, "tokens": tokens, "final": final}
        return Submission.model_validate(self._ask("PUT", "/submission", body))

    def submission(self) -> Submission | None:
        found = self._ask("GET", "/submission")
        return None if found is None else Submission.model_validate(found)

    def leaderboard(self) -> Leaderboard:
        return Leaderboard.model_validate(self._ask("GET", "/leaderboard"))

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        end, lost = time.monotonic() + self._patience, False
        while True:
            try:
                status, answer = self._once(method, path, body)
            except (OSError, http.client.HTTPException) as error:
                lost = True
                if time.monotonic() > end:
                    where = f"{self._address[0]}:{self._address[1] or self._kind.default_port}"
                    raise OSError(
                        f"no server answers at {where} ({error}): start one with `cs336 scaling api serve`, "
                        "or give its address with --url"
                    ) from error
                time.sleep(RETRY)
                continue
            if status < 300:
                return answer
            refusal = answer.get("error", {}) if isinstance(answer, dict) else {}
            if status == 409 and lost and refusal.get("run"):  # the answer was lost, and not the run
                return self._ask("GET", f"/runs/{refusal['run']}")
            raise ApiError(status, refusal)

    def _once(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        connection = self._kind(*self._address, timeout=TIMEOUT)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, self._path + path, text, self._headers)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        try:
            return answer.status, json.loads(content)
        except ValueError:
            return answer.status, None
