"""The thread that owns the engine: takes requests from an event loop, and brings updates back to it."""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cs336.inference import ranks
from cs336.inference.engine import NOT_FINITE, Engine, Request, Update
from cs336.inference.sampling import SamplingParams
from cs336.inference.server.metrics import Metrics


class EngineFailed(RuntimeError):
    """The engine raised, and does not run any more."""


@dataclass(eq=False)
class Ticket:
    """A request on its way. `messages` are (ticket, update), and at the end (ticket, None), or what went wrong."""

    ids: Sequence[int]
    params: SamplingParams
    messages: "asyncio.Queue[Message]"
    number: int = 0
    """Among those that share their messages."""
    request: Request | None = None
    cancelled: bool = False
    newest: float = 0.0
    """When its newest token came."""


Message = tuple[Ticket, Update | Exception | None]


class Worker(threading.Thread):
    def __init__(self, engine: Engine):
        super().__init__(name="engine", daemon=True)
        self._own, self.metrics = engine, Metrics(engine)
        self._engine: Engine | ranks.Leader = engine
        self.failure: Exception | None = None
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tickets: dict[Request, Ticket] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    # ---- from the event loop ----

    def begin(self) -> None:
        """Start; the updates go to the loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self.start()

    def submit(self, ticket: Ticket) -> None:
        """The engine must have found it valid. Raises EngineFailed where it does not run any more."""
        if self.failure is not None:
            raise EngineFailed(f"the engine has failed: {self.failure}") from self.failure
        self._calls.put(lambda: self._add(ticket))

    def cancel(self, ticket: Ticket) -> None:
        """End a request that has not ended, in a moment."""
        self._calls.put(lambda: self._cancel(ticket))

    def stop(self) -> None:
        """End the thread, and what still runs with it."""
        self._calls.put(None)
        self.join()

    # ---- in the thread ----

    def run(self) -> None:
        try:
            with ranks.leading(self._own) as self._engine:
                while self._take_calls():
                    if self._engine.busy:
                        self._deliver(self._engine.step())
        except Exception as error:  # whatever it was, those who wait are told, and no request is taken any more
            self.failure = error
            self._send([(ticket, EngineFailed(f"the engine has failed: {error}")) for ticket in self._tickets.values()])
            raise

    def _take_calls(self) -> bool:
        """What the loop asked for; waits for it where there is nothing else to do. False: to stop."""
        block = not self._engine.busy
        while True:
            try:
                call = self._calls.get(block)
            except queue.Empty:
                return True
            if call is None:
                return False
            call()
            block = False

    def _add(self, ticket: Ticket) -> None:
        if ticket.cancelled:
            return
        try:
            ticket.request = self._engine.add(ticket.ids, ticket.params)
        except ValueError as error:
            self._send([(ticket, error)])
        else:
            self._tickets[ticket.request] = ticket

    def _cancel(self, ticket: Ticket) -> None:
        ticket.cancelled = True
        if ticket.request is not None and self._tickets.pop(ticket.request, None) is not None:
            self._engine.cancel(ticket.request)
            self.metrics.requests.labels("cancelled").inc()

    def _deliver(self, updates: list[Update]) -> None:
        now = time.perf_counter()
        messages: list[Message] = []
        for update in updates:
            request = update.sample.request
            if (ticket := self._tickets.get(request)) is None:
                continue
            if not ticket.newest:
                self.metrics.time_to_first_token.observe(now - request.arrived)
            elif ticket.params.n == 1:
                self.metrics.inter_token_latency.observe(now - ticket.newest)
            ticket.newest = now
            messages.append((ticket, update))
            if request.finished:
                del self._tickets[request]
                self.metrics.request_latency.observe(now - request.arrived)
                self.metrics.requests.labels("error" if request.error else "finished").inc()
                messages.append((ticket, _error(request.error) if request.error else None))
        self._send(messages)

    def _send(self, messages: list[Message]) -> None:
        """In one call, for each wakes the loop."""

        def put() -> None:
            for message in messages:
                message[0].messages.put_nowait(message)

        assert self._loop is not None
        if messages and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(put)


def _error(reason: str) -> Exception:
    """Of a request that ended so: the model's, or else the request's own."""
    return EngineFailed(reason) if reason == NOT_FINITE else ValueError(reason)
