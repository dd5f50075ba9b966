"""Ranks that watch one another, so that none waits for one that has died or hangs, and all can say which it was.

Each rank writes a sign of life into the group's store, with the number of collectives it has begun in each group. One
whose signs stop is dead. If no rank begins another collective for `timeout` seconds, those hang that are behind the
others of a group and wait in none themselves.
"""

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from torch.distributed import distributed_c10d

from cs336.parallel.collectives import started
from cs336.parallel.launch import RankError, rank, together, world_size

BEAT = 1.0  # seconds between two signs of life, at most
MISSED = 5  # signs that are missing of a rank that is dead
Tell = Callable[[BaseException], None]
Counts = dict[str, int]
"""Of a rank: collectives begun, by the ranks that take part: see collectives.started."""


@contextlib.contextmanager
def watching(timeout: float, tell: Tell) -> Iterator[None]:
    """Within the block a rank that dies, fails or hangs ends the others, which name it.

    A collective that fails raises RankError in its place. A rank that waits in one for too long cannot be told: `tell`
    is called with the RankError, and the process ends with status 1.
    """
    if world_size() == 1:
        yield
        return
    watch = _Watch(timeout, tell)
    try:
        yield
    except BaseException as error:
        watch.end(f"{type(error).__name__}: {error}")
        if _in_collective(error) and (lost := watch.lost()):
            raise RankError(lost) from error
        raise
    watch.end(None)


class _Watch:
    def __init__(self, timeout: float, tell: Tell):
        self.timeout, self.tell = timeout, tell
        self.beat = min(BEAT, timeout / 10)
        store: Any = distributed_c10d._get_default_store()
        self.store = store.clone()  # a connection of its own
        self.keys = [f"cs336/alive/{r}" for r in range(world_size())]
        self.signs = [json.dumps([0, {}, None, False])] * world_size()
        self.seen = [time.monotonic()] * world_size()
        self.count = 0
        self.ended = threading.Event()
        self.lock = threading.Lock()
        self._sign()
        together(lambda: None)  # from here on every key is there
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.thread.start()

    def _sign(self, end: str | None = None, over: bool = False) -> None:
        """[beats, collectives begun in each group, why it failed, whether it is over]"""
        self.count += 1
        with self.lock:
            self.store.set(self.keys[rank()], json.dumps([self.count, started(), end, over]))

    def _look(self) -> None:
        with self.lock:
            signs = [value.decode() for value in self.store.multi_get(self.keys)]
        now = time.monotonic()
        for r, sign in enumerate(signs):
            if sign != self.signs[r]:
                self.signs[r], self.seen[r] = sign, now

    def _run(self) -> None:
        begun: list[Counts] = []
        moved = time.monotonic()
        while not self.ended.wait(self.beat):
            try:
                self._sign()
                self._look()
            except RuntimeError:  # the store is gone, and with it whoever started this
                return
            values = [json.loads(sign) for sign in self.signs]
            now = [value[1] for value in values]
            if now != begun or any(value[3] for value in values):
                begun, moved = now, time.monotonic()
            elif time.monotonic() - moved > self.timeout:
                self._give_up(begun)

    def _give_up(self, begun: list[Counts]) -> None:
        behind = held_up_by(begun)
        if rank() in behind:  # the others speak first: they would find this one dead, and not know why
            time.sleep(MISSED * self.beat)
        who = _named(behind) if behind else "no rank is behind the others"
        error = RankError(f"{who}: nothing went on for {self.timeout:g} s (parallel.timeout)")
        self.tell(error)
        print(f"cs336: rank {rank()} gives up waiting: {error}", file=sys.stderr, flush=True)
        os._exit(1)

    def end(self, failure: str | None) -> None:
        self.ended.set()
        self.thread.join()
        with contextlib.suppress(RuntimeError):  # the store may be gone
            self._sign(failure, over=True)

    def lost(self) -> str:
        """Who failed or died, after a collective failed here; "" if all others are well."""
        until, first = time.monotonic() + (MISSED + 1) * self.beat, None
        while time.monotonic() < until or self._unsure(first):
            with contextlib.suppress(RuntimeError):
                self._look()
            first = first or list(self.signs)
            time.sleep(self.beat / 4)
        values = [json.loads(sign) for sign in self.signs]
        failed = [f"rank {r}: {v[2]}" for r, v in enumerate(values) if r != rank() and v[2] and not _follows(v[2])]
        silent = [r for r, v in enumerate(values) if not v[3] and time.monotonic() - self.seen[r] > MISSED * self.beat]
        return "; ".join([*failed, *([f"{_named(silent)}: died"] if silent else [])])

    def _unsure(self, first: list[str] | None) -> bool:
        """Whether a rank that is not over has given no sign since the first look, and may yet: a look can take long."""
        if first is None:
            return True
        same = [r for r, sign in enumerate(self.signs) if sign == first[r] and not json.loads(sign)[3]]
        return any(time.monotonic() - self.seen[r] <= MISSED * self.beat for r in same)


def held_up_by(begun: list[Counts]) -> list[int]:
    """The ranks for which the others wait: behind in a group, and not themselves waiting in another."""
    behind, waiting = set[int](), set[int]()
    for group in {key for counts in begun for key in counts if key}:
        counts = {r: begun[r].get(group, 0) for r in map(int, group.split(","))}
        late = {r for r, count in counts.items() if count < max(counts.values())}
        behind |= late
        waiting |= counts.keys() - late if late else set()
    return sorted(behind - waiting or behind)


def _named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _follows(text: str) -> bool:
    """Whether a failure may be what another rank's led to: a collective that could not go on."""
    return text.startswith(("RankError", "RuntimeError", "DistBackendError"))


def _in_collective(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError) or isinstance(error, RankError):
        return False
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(m.startswith(("cs336.parallel.", "torch.distributed")) and m != __name__ for m in modules)
