"""Starts one judged program behind walls, watches it, and says how it ended. Run as a script, by its path: it reads a
job from standard input, JSON, and writes a report to standard output, JSON. Standard library alone.

    launcher     forks into new user, process, network, IPC, host-name and cgroup namespaces
      program    is process 1 in there: makes a root of its own, gives up every right, and becomes Python on main.py

Process 1 cannot leave orphans: when it ends the kernel ends all others of its namespace. It dies with the launcher, and
the launcher with who started it. Nothing that the program says is read but its output, which the launcher cuts.
"""

import contextlib
import json
import os
import resource
import select
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
from typing import NoReturn

import kernel

ROOT = "/proc"  # a directory that every Linux has, and no file of which is needed inside
INNER_ID, NOBODY = 1000, 65534
TICK = 0.01  # seconds between two looks at a program: it can write 50 MB in that
SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/sbin", "/etc/ld.so.cache", "/nix/store")
DEVICES = ("/dev/null", "/dev/urandom", "/dev/random")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
PAGE = os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    job = json.load(sys.stdin.buffer)
    kernel.die_with_parent()
    place = None
    try:
        if job["level"] != "namespaces":
            place = tempfile.mkdtemp(prefix="judged-")
        report = watch(job, place)
    except OSError as error:
        report = {"ending": "setup", "reason": str(error)}
    finally:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
    json.dump(report, sys.stdout)


def write_maps(process: int) -> None:
    """Say who a process is in its new user namespace: INNER_ID, and 0 first where this user is 0 outside."""
    users = {os.geteuid(): INNER_ID} if os.geteuid() else {0: 0, NOBODY: INNER_ID}
    groups = {os.getegid(): INNER_ID} if os.geteuid() else {0: 0, NOBODY: INNER_ID}
    maps = ["\n".join(f"{inner} {outer} 1" for outer, inner in ids.items()) for ids in (users, groups)]
    for name, text in (("setgroups", "deny"), ("uid_map", maps[0]), ("gid_map", maps[1])):
        with open(f"/proc/{process}/{name}", "w") as file:
            file.write(text)


def watch(job: dict, place: str | None) -> dict:
    """Start the program, and look after it until it has ended or passed a limit."""
    limits = job["limits"]
    inputs, outputs, errors, failed = os.pipe(), os.pipe(), os.pipe(), os.pipe()
    dialog = job.get("dialog") or ()  # (read, write), in place of standard input and output
    stdin, stdout = dialog or (inputs[0], outputs[1])
    ready, go = os.pipe()
    child = os.fork() if place else kernel.fork(kernel.PRIVATE_EVERYTHING)
    if not child:
        os.close(go)
        become(job, place, stdin, stdout, errors[1], failed[1], ready)
    for file in (inputs[0], outputs[1], errors[1], failed[1], ready, *dialog):
        os.close(file)
    if not place:
        write_maps(child)
    os.close(go)
    with open(failed[0], "rb") as told:
        if reason := told.read():
            os.waitpid(child, 0)
            return {"ending": "setup", "reason": reason.decode(errors="replace")}
    start, watched = time.monotonic(), os.pidfd_open(child)
    out, err = Collected(outputs[0], limits["output"]), Collected(errors[0], limits["output"])
    threading.Thread(target=feed, args=(inputs[1], job["stdin"].encode()), daemon=True).start()
    ending, peak = "exit", 0
    while not select.select([watched], (), (), TICK)[0]:
        memory, processes = use_of(child)
        peak = max(peak, memory)
        if time.monotonic() - start > limits["seconds"]:
            ending = "time"
        elif memory > limits["memory"]:
            ending = "memory"
        elif out.over or err.over:
            ending = "output"
        elif processes > 2 * limits["processes"]:  # zombies among them: the kernel's own limit did not hold
            ending = "processes"
        if ending != "exit":
            signal.pidfd_send_signal(watched, signal.SIGKILL)
            break
    _, status = os.waitpid(child, 0)  # after all others of its namespace
    seconds = time.monotonic() - start
    texts = out.text(), err.text()
    if ending == "exit" and (out.over or err.over):
        ending = "output"
    return {
        "ending": ending,
        "exit_code": os.waitstatus_to_exitcode(status),
        "stdout": texts[0],
        "stderr": texts[1],
        "seconds": seconds,
        "memory": peak,
    }


class Collected(threading.Thread):
    """What is written to a pipe, until there is more than the limit."""

    def __init__(self, file: int, limit: int):
        super().__init__(daemon=True)
        self._file, self._limit, self._bytes = file, limit, bytearray()
        self.start()

    def run(self) -> None:
        while not self.over and (block := os.read(self._file, 1 << 16)):
            self._bytes += block

    @property
    def over(self) -> bool:
        return len(self._bytes) > self._limit

    def text(self) -> str:
        self.join()
        return self._bytes[: self._limit].decode(errors="replace")


def feed(file: int, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError), open(file, "wb") as pipe:
        pipe.write(data)


def use_of(process: int) -> tuple[int, int]:
    """(bytes that a process and those below it hold in memory, how many they are)"""
    total = count = 0
    waiting = [process]
    while waiting:
        place, count = f"/proc/{waiting.pop()}", count + 1
        with contextlib.suppress(OSError, IndexError):  # it ended meanwhile
            with open(f"{place}/statm") as file:
                total += int(file.read().split()[1]) * PAGE
            for thread in os.listdir(f"{place}/task"):
                with open(f"{place}/task/{thread}/children") as file:
                    waiting += map(int, file.read().split())
    return total, count


def become(job: dict, place: str | None, stdin: int, stdout: int, stderr: int, failed: int, ready: int) -> NoReturn:
    """In the child: go behind the walls, and be the program. Tells `failed` what is in the way."""
    try:
        kernel.die_with_parent()
        os.read(ready, 1)  # until the maps are written
        os.setsid()
        limits, python = job["limits"], job["python"]
        if place is None:
            place = "/tmp"
            make_root(job["readable"], limits["disk"])
        with open(f"{place}/main.py", "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(job["program"])
        os.chdir(place)
        for limit, value in (
            (resource.RLIMIT_CPU, int(limits["seconds"]) + 1),
            (resource.RLIMIT_AS, limits["memory"]),
            (resource.RLIMIT_FSIZE, limits["disk"]),
            (resource.RLIMIT_NOFILE, 64),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MEMLOCK, 0),
        ):
            resource.setrlimit(limit, (value, value))
        namespaces = job["level"] == "namespaces"
        if namespaces:
            resource.setrlimit(resource.RLIMIT_NPROC, (limits["processes"],) * 2)
            if os.geteuid() == 0:
                os.setresgid(INNER_ID, INNER_ID, INNER_ID)
                os.setresuid(INNER_ID, INNER_ID, INNER_ID)
        elif os.geteuid() == 0:
            kernel.drop_capabilities()
        kernel.no_new_privileges()
        kernel.die_with_parent()  # the change of user undid it
        alone = select.poll()
        alone.register(failed, 0)
        if alone.poll(0):
            os._exit(1)  # the launcher died before this could die with it
        for pipe, number in ((stdin, 0), (stdout, 1), (stderr, 2)):
            os.dup2(pipe, number)
        os.closerange(3, failed)
        os.closerange(failed + 1, 1 << 16)
        if not namespaces:
            devices = [path for path in DEVICES if os.path.exists(path)]
            kernel.landlock([path for path in (*SYSTEM, *job["readable"], *devices) if os.path.exists(path)], [place])
        kernel.filter_system_calls(namespaces=namespaces)
        os.execve(
            python,
            [python, "-s", "-B", "-X", "utf8", f"{place}/main.py"],
            {**ENVIRONMENT, "HOME": place, "TMPDIR": place},
        )
    except Exception as error:  # whatever it is, the launcher must hear of it
        os.write(failed, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(1)


def make_root(readable: list[str], disk: int) -> None:
    """A root of Python's files, a few devices and an empty /tmp, and nothing else: no home, no /proc, no /sys."""
    kernel.unshare(kernel.NEWNS)
    kernel.keep_mounts_to_self()
    named = [path for path in (*SYSTEM, *DEVICES, *readable) if os.path.lexists(path)]
    sources = [inside for path in named for inside in _open_to_all(path)]
    kernel.tmpfs(ROOT, 1 << 20, 0o755)
    os.mkdir(f"{ROOT}/tmp")
    kernel.tmpfs(f"{ROOT}/tmp", disk, 0o1777)  # before the files, for Python's own may be below /tmp
    for source in sorted(set(sources)):
        target = ROOT + source
        if os.path.lexists(target):  # within one before it
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(source):
            os.symlink(os.readlink(source), target)
        elif os.path.isdir(source):
            os.mkdir(target)
            kernel.bind(source, target)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
            kernel.bind(source, target, device=stat.S_ISCHR(os.stat(source).st_mode))
    kernel.enter_root(ROOT)
    kernel.read_only("/")


def _open_to_all(path: str) -> list[str]:
    """A path, or for a directory that its owner alone may enter, what is in it: the program is another user."""
    if os.path.isdir(path) and not os.path.islink(path) and not os.stat(path).st_mode & stat.S_IXOTH:
        return [os.path.join(path, name) for name in os.listdir(path)]
    return [path]


if __name__ == "__main__":
    main()
