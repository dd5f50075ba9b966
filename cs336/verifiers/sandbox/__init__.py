"""Runs Python that a model wrote, in a process that cannot reach this one, its files, its network or its secrets.

    outcome = run("print(input()[::-1])", stdin="abc")
    outcome.stdout                      # "cba\\n"
    isolation()                         # what this machine lets us have, found by trying to break out

Two levels. "namespaces": the program is alone in a world of its own (Linux user, process, mount, network, IPC
namespaces; a root file system of Python's files and an empty /tmp; limits; a filter of system calls). "landlock", where
the kernel or a container refuses those: no children, sockets or signals, and no files but Python's and a temporary
directory. Without namespaces a run is refused unless `weak=True`, and without Landlock it is refused.
"""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

LAUNCHER = pathlib.Path(__file__).with_name("launch.py")
GRACE = 20.0  # seconds that a launcher may take beyond its program's: a machine can be busy
Ending = Literal["exit", "time", "memory", "output", "processes"]
Level = Literal["namespaces", "landlock", "none"]

# Tries to get out, and prints what it got: nothing of this may succeed.
PROBE = """
import os, socket, sys
def reads(path):
    try: return bool(open(path, "rb").read(1))
    except OSError: return False
def writes(path):
    try: open(path, "x").close(); os.remove(path); return True
    except OSError: return False
def connects():
    try: socket.socket().close(); return True
    except OSError: return False
def forks():
    children = 0
    try:
        while children < 200:
            pid = os.fork()
            if not pid: sys.stdin.read(); os._exit(0)
            children += 1
    except OSError: pass
    return children > 100
def signals():
    try: os.kill(PARENT, 0); return True
    except OSError: return False
got = {
    "network": connects(),
    "files": any(map(reads, FILES)) or any(map(writes, WRITES)),
    "environment": bool(os.environ.get("HOST_SECRET")) or reads(f"/proc/{PARENT}/environ"),
    "other processes": signals(),
    "any number of processes": forks(),
}
print(*(name for name, held in got.items() if held), sep=", ", end="")
"""


@dataclass(frozen=True)
class Limits:
    """Of one program and all its children together; the processes and the time of the CPU each."""

    seconds: float = 5.0
    """Of the wall clock."""
    memory: int = 512 << 20
    """Bytes, resident; also the address space of each process."""
    output: int = 1 << 20
    """Bytes of standard output, and of standard error."""
    disk: int = 16 << 20
    """Bytes of its temporary directory; without namespaces, of each file there."""
    processes: int = 16

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not 0 < (value := getattr(self, field.name)) < float("inf"):
                raise ValueError(f"{field.name} must be above 0, got {value}")


@dataclass(frozen=True)
class Outcome:
    ending: Ending
    """"exit" where it ended by itself; else the limit that it passed, for which it was killed."""
    exit_code: int
    """As of subprocess: the negative of a signal's number where one ended it."""
    stdout: str
    stderr: str
    """Both up to the limit, with U+FFFD for what is not UTF-8."""
    seconds: float
    memory: int
    """Most bytes seen resident; looked at every 10 ms."""

    @property
    def ok(self) -> bool:
        return self.ending == "exit" and self.exit_code == 0


@dataclass(frozen=True)
class Isolation:
    level: Level
    held: bool
    """Whether a program that tried every way out got nothing."""
    reason: str
    """What stands between here and "namespaces", or what a program got."""

    def __str__(self) -> str:
        return f"{self.level}{'' if self.held else ' (does not hold)'}{': ' if self.reason else ''}{self.reason}"


class NotIsolated(RuntimeError):
    """The machine cannot keep a program in."""


def run(program: str, stdin: str = "", limits: Limits = Limits(), *, weak: bool = False) -> Outcome:
    """Run a Python program, as a script. Threads may call this at the same time.

    weak: be content with Landlock where there are no namespaces.
    Raises NotIsolated, with what is in the way, where the isolation asked for is not to be had.
    """
    return _launch(program, _level(weak), limits, stdin=stdin)


def converse(
    programs: tuple[str, str], limits: tuple[Limits, Limits], *, weak: bool = False
) -> tuple[Outcome, Outcome]:
    """Run two programs at once, each behind its own walls: what one writes to standard output, which is not kept, the
    other reads. Raises what `run` does."""
    level = _level(weak)
    (a_reads, b_writes), (b_reads, a_writes) = os.pipe(), os.pipe()
    with ThreadPoolExecutor(2) as pool:
        both = [
            pool.submit(_launch, program, level, limit, dialog=dialog)
            for program, limit, dialog in zip(programs, limits, ((a_reads, a_writes), (b_reads, b_writes)), strict=True)
        ]
        first, second = (future.result() for future in both)
    return first, second


@functools.cache
def isolation() -> Isolation:
    """What keeps programs in on this machine: the best level that starts, and whether an attempt to get out failed."""
    reasons = []
    levels: tuple[Level, ...] = ("namespaces", "landlock")
    for level in levels:
        try:
            got = _probe(level)
        except NotIsolated as error:
            reasons.append(f"no {level}: {error}")
            continue
        return Isolation(level, not got, "; ".join([*reasons, *([f"a program got: {got}"] if got else [])]))
    return Isolation("none", False, "; ".join(reasons))


def _probe(level: Level) -> str:
    with tempfile.NamedTemporaryFile() as secret:
        secret.write(b"secret")
        secret.flush()
        known = {
            "PARENT": os.getpid(),
            "FILES": ["/etc/passwd", secret.name],
            "WRITES": [f"{place}/.judged-{os.getpid()}" for place in ("/var/tmp", "/dev/shm", sys.prefix, "/usr")],
        }
        outcome = _launch("".join(f"{k} = {v!r}\n" for k, v in known.items()) + PROBE, level, Limits(seconds=20))
    if not outcome.ok:
        raise NotIsolated(f"the probe ended by {outcome.ending}, {outcome.exit_code}: {outcome.stderr[-300:]}")
    return outcome.stdout


def _level(weak: bool) -> Level:
    found = isolation()
    if found.held and (found.level == "namespaces" or weak):
        return found.level
    if found.held:
        raise NotIsolated(f"programs can be kept in by Landlock alone here ({found.reason}): allow that with weak=True")
    raise NotIsolated(f"programs cannot be kept in here: {found}")


def _launch(
    program: str, level: Level, limits: Limits, *, stdin: str = "", dialog: tuple[int, int] | None = None
) -> Outcome:
    """dialog: pipes in place of standard input and output, which this closes."""
    prefixes = {sys.prefix, sys.base_prefix, *map(os.path.realpath, (sys.prefix, sys.base_prefix))}
    job: dict[str, Any] = {
        "program": program,
        "stdin": stdin,
        "level": level,
        "limits": dataclasses.asdict(limits),
        "dialog": dialog,
        "python": sys.executable,
        "readable": sorted(prefixes),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-S", "-s", "-B", str(LAUNCHER)],
            input=json.dumps(job).encode(),
            capture_output=True,
            env={},
            pass_fds=dialog or (),
            timeout=limits.seconds + GRACE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NotIsolated(f"the launcher did not end within {GRACE:.0f} s of its program's limit") from None
    finally:
        for file in dialog or ():
            os.close(file)
    if done.returncode:
        raise NotIsolated(f"the launcher failed: {done.stderr.decode(errors='replace')[-400:]}")
    report = json.loads(done.stdout)
    if report["ending"] == "setup":
        raise NotIsolated(report["reason"])
    return Outcome(**report)
