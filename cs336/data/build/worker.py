"""A worker process: reads units of work from its standard input, one JSON line each, and makes their files."""

import _thread
import fcntl
import importlib
import json
import mmap
import os
import resource
import struct
import sys
import threading
import traceback
from typing import Any

from cs336.data.build.unit import Line, Work
from cs336.data.recipe import Recipe
from cs336.data.sources.unit import Unit
from cs336.utils.config import parse, to_table


def main(beat: int, lock: str) -> None:
    """Work until standard input ends, which it does when the supervisor is gone.

    beat: a descriptor of eight bytes for the number of the record that is being read or worked on, where the supervisor
        sees it without a word between them.
    lock: a file to hold shared, so that a build begins only when no worker of an earlier one is left.
    """
    held = open(lock, "a")  # noqa: SIM115 (until the process ends)
    fcntl.flock(held, fcntl.LOCK_SH)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be taken for a reply
    with mmap.mmap(beat, 8) as number:
        lines = _Lines()
        recipe = recipe_of(json.loads(next(lines)))
        _bound(recipe.limits.worker_bytes)
        try:
            line = Line(recipe)
            print(json.dumps({"ready": True}), file=replies, flush=True)
            for request in lines:
                line.run(work_of(json.loads(request)), lambda at: struct.pack_into("<q", number, 0, at))
                print(json.dumps({"done": True}), file=replies, flush=True)
        except MemoryError:  # as a record was read: that record's fault
            traceback.print_exc()
            os._exit(1)
        except Exception as error:  # told to the supervisor, which raises it for the user
            traceback.print_exc()
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=replies, flush=True)


class _Lines:
    """Standard input, read beside the work: when it ends the supervisor is gone, and so is the reason to live."""

    def __init__(self):
        self._lines: list[str] = []
        self._more = threading.Semaphore(0)
        _thread.start_new_thread(self._read, ())

    def _read(self) -> None:
        for line in sys.stdin:
            self._lines.append(line)
            self._more.release()
        os._exit(0)

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        self._more.acquire()
        return self._lines.pop(0)


def described(recipe: Recipe) -> dict[str, Any]:
    """A recipe for another process: its class by name, which may know more kinds of steps than Recipe."""
    kind = type(recipe)
    return {"module": kind.__module__, "class": kind.__qualname__, "table": to_table(recipe)}


def recipe_of(description: dict[str, Any]) -> Recipe:
    """What `described` described. Raises ImportError where this process cannot import the class."""
    try:
        kind = getattr(importlib.import_module(description["module"]), description["class"])
    except AttributeError:
        name = "{module}.{class}".format(**description)
        raise ImportError(f"a worker cannot import the recipe's class {name}: put it into a module") from None
    return parse(kind, description["table"])


def request_of(work: Work) -> dict[str, Any]:
    unit = {"files": work.unit.files, "size": work.unit.size, "root": work.unit.root}
    lost = [[number, *why] for number, why in work.lost.items()]
    fields = {name: getattr(work, name) for name in ("number", "source", "directory", "key", "end", "most")}
    return fields | {"unit": unit, "lost": lost}


def work_of(request: dict[str, Any]) -> Work:
    unit = Unit(tuple(request["unit"]["files"]), request["unit"]["size"], request["unit"]["root"])
    lost = {number: (reason, detail) for number, reason, detail in request["lost"]}
    return Work(**{**request, "unit": unit, "lost": lost})


def _bound(size: int) -> None:
    """A document that asks for more memory than this fails, and not the machine."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = size if hard == resource.RLIM_INFINITY else min(size, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
