"""Programs that try to get out, to stay, or to take all there is."""
# ruff: noqa: E501 (a program a line)

import contextlib
import dataclasses
import os
import pathlib
import subprocess
import sys
import threading
import time
import uuid

import pytest

from cs336.verifiers import sandbox
from cs336.verifiers.sandbox import Limits

LEVEL = sandbox.isolation().level
pytestmark = pytest.mark.skipif(LEVEL != "namespaces", reason=f"programs are not kept in here: {sandbox.isolation()}")
SMALL = Limits(seconds=30, memory=128 << 20, output=1 << 16, disk=1 << 20, processes=8)
BRIEF = Limits(seconds=0.7, memory=128 << 20, output=1 << 16, disk=1 << 20, processes=8)

# Each gets PARENT (this process), CANARY (a file of the host), SECRET (its text, and an environment variable's),
# MARK (a word no other process has) and `attempt`, which prints "got" where what it is given succeeds. Were all walls
# down, nothing of the host would be changed but CANARY: what is tried elsewhere changes nothing, or is undone. Threads
# are started by _thread, for threading's wait until they run, which those that memory is short for never do.
PRELUDE = """
import _thread, ctypes, fcntl, os, resource, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def attempt(function, *arguments):
    try: result = function(*arguments)
    except (OSError, MemoryError, RuntimeError, ValueError): return None
    print("got", result)
def made(path):
    open(path, "x").close()
    os.remove(path)
    return path
def checked(result):
    if result == -1: raise OSError(ctypes.get_errno(), "refused")
    return result
"""
REFUSED = {
    "read the environment": "print(dict(os.environ)); [attempt(open, f'/proc/{p}/environ') for p in (1, PARENT, 'self')]",
    "read a file of the host": "attempt(open, CANARY)",
    "read passwords": "attempt(open, '/etc/passwd'); attempt(open, '/etc/shadow')",
    "look into homes": "attempt(os.listdir, os.path.expanduser('~root/.ssh')); attempt(os.listdir, '/home')",
    "write a file of the host": "attempt(open, CANARY, 'w'); attempt(os.remove, CANARY)",
    "write where Python is": "attempt(open, os.__file__, 'ab'); s = os.stat(os.__file__); attempt(lambda: os.utime(os.__file__, ns=(s.st_atime_ns, s.st_mtime_ns)))",
    "write into system directories": "attempt(made, '/usr/bin/judged'); attempt(made, '/judged'); attempt(made, '/dev/judged'); attempt(os.utime, '/dev/null', None)",
    "link to a file of the host": "os.symlink(CANARY, 'link'); attempt(open, 'link'); attempt(open, 'link', 'w'); attempt(os.link, os.__file__, 'hard')",
    "go up from the root": "attempt(open, '/tmp/' + '../' * 40 + CANARY.lstrip('/')); attempt(os.chroot, '/tmp')",
    "change whose files are": "attempt(os.chmod, CANARY, 0o777); attempt(os.chown, CANARY, 1, 1); attempt(os.utime, CANARY); attempt(os.truncate, CANARY, 0)",
    "remount writable": "attempt(lambda: checked(libc.mount(b'none', b'/', b'none', 4096 | 32, 0)))",
    "make namespaces": "attempt(lambda: checked(libc.unshare(0x10000000))); attempt(lambda: checked(libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0)))",
    "make a device": "attempt(os.mknod, '/tmp/disk', 0o60666, os.makedev(254, 0))",
    "become root": "attempt(os.setuid, 0); attempt(os.setgroups, [0]); attempt(os.seteuid, 0)",
    "raise its limits": "[attempt(resource.setrlimit, what, (-1, -1)) for what in (resource.RLIMIT_NPROC, resource.RLIMIT_AS, resource.RLIMIT_FSIZE)]",
    "open the network": "attempt(socket.socket); attempt(socket.create_connection, ('1.1.1.1', 53)); attempt(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW)",
    "reach the virtual machine's host": "attempt(socket.socket, 40, socket.SOCK_STREAM)",
    "signal this process": "attempt(os.kill, PARENT, 0); attempt(os.kill, os.getppid() or PARENT, 0)",
    "have the kernel signal this process": "attempt(fcntl.fcntl, os.pipe()[0], fcntl.F_SETOWN, PARENT)",
    "trace this process": "attempt(lambda: checked(libc.ptrace(16, PARENT, 0, 0)))",
    "outlive this process": "attempt(lambda: checked(libc.prctl(1, 0, 0, 0, 0)))",
    "use what was left open": "[attempt(os.fstat, number) for number in range(3, 200)]",
    "use memory no process owns": "attempt(lambda: checked(libc.memfd_create(b'x', 0))); import mmap; attempt(mmap.mmap, -1, 1 << 20)",
    "fill the disk": "attempt(lambda: [open(f'/tmp/{i}', 'wb').write(bytes(1 << 18)) for i in range(64)])",
    "fill the directory": "attempt(lambda: [open(f'/tmp/{i}', 'w').close() for i in range(9999)])",
    "fork without end": "attempt(lambda: [os.fork() or time.sleep(9) for _ in range(99)])",
    "allocate without end": "attempt(lambda: len(bytearray(1 << 30)))",
    "open files without end": "attempt(lambda: len([open('/dev/null') for _ in range(999)]))",
    "start threads without end": "attempt(lambda: [_thread.start_new_thread(time.sleep, (9,)) for _ in range(999)])",
}  # fmt: skip
STOPPED = {
    "loop": ("while True: pass", "time"),
    "sleep": ("time.sleep(99)", "time"),
    "ignore signals": ("[signal.signal(s, signal.SIG_IGN) for s in range(1, 32) if s not in (9, 19)]\nwhile True: pass", "time"),
    "stop itself": ("os.kill(os.getpid(), signal.SIGSTOP)\nwhile True: signal.pause()", "time"),
    "fork bomb": ("def f():\n  while True:\n    try: os.fork()\n    except OSError: pass\nf()", "time"),
    "threads that spin": ("def f():\n  while True: pass\n[threading.Thread(target=f).start() for _ in range(4)]", "time"),
    "memory of many": ("for _ in range(6):\n  if not os.fork(): break\nx = bytearray(60 << 20)\ntime.sleep(9)", "memory"),
    "print without end": ("while True: print('x' * 9999)", "output"),
    "complain without end": ("while True: os.write(2, b'x' * 9999)", "output"),
    "children that print": ("os.fork(); os.fork()\nwhile True: os.write(1, b'x' * 9999)", "output"),
}  # fmt: skip
KILLED_WITH_IT = {
    "orphans": "if not os.fork():\n  os.setsid()\n  if os.fork(): os._exit(0)\n  [os.close(n) for n in range(3)]\n  os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(60)', MARK])\ntime.sleep(0.2)",
    "orphans of a killed one": "if not os.fork(): os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(60)', MARK])\ntime.sleep(60)",
    "orphans that respawn": "subprocess.Popen([sys.executable, '-c', 'import os, time\\nwhile True:\\n  try:\\n    if os.fork(): os._exit(0)\\n  except BlockingIOError: pass\\n  time.sleep(0.01)', MARK], start_new_session=True)\ntime.sleep(0.2)",
}  # fmt: skip


@pytest.fixture
def host(tmp_path, monkeypatch):
    secret, mark = uuid.uuid4().hex, uuid.uuid4().hex
    canary = tmp_path / "canary"
    canary.write_text(secret)
    monkeypatch.setenv("HOST_SECRET", secret)
    known = {"PARENT": os.getpid(), "CANARY": str(canary), "MARK": mark}
    yield PRELUDE + "".join(f"{name} = {value!r}\n" for name, value in known.items()), secret, mark
    assert canary.read_text() == secret
    assert list(tmp_path.iterdir()) == [canary]


def alive(mark, unless=None):
    """Processes whose command line has the mark, and not what is given beside it."""
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = process.read_bytes()
            found += [process] if mark.encode() in line and (unless is None or unless not in line) else []
    return found


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, host):
    prelude, secret, _ = host
    outcome = sandbox.run(f"{prelude}{REFUSED[name]}\nprint('tried', flush=True)\nos._exit(0)", "", SMALL)
    assert "tried\n" in outcome.stdout, outcome
    assert "got" not in outcome.stdout, outcome
    assert secret not in outcome.stdout + outcome.stderr
    assert outcome.ending == "exit"


@pytest.mark.parametrize("name", STOPPED)
def test_what_is_stopped(name, host):
    program, ending = STOPPED[name]
    start = time.monotonic()
    limits = dataclasses.replace(BRIEF, seconds=BRIEF.seconds if ending == "time" else 60)
    outcome = sandbox.run(host[0] + program, "", limits)
    assert outcome.ending == ending
    assert outcome.exit_code == -9
    assert len(outcome.stdout) <= limits.output
    assert len(outcome.stderr) <= limits.output
    assert outcome.memory < 2 * limits.memory
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("name", KILLED_WITH_IT)
def test_nothing_outlives_a_program(name, host):
    prelude, _, mark = host
    outcome = sandbox.run(prelude + KILLED_WITH_IT[name], "", BRIEF)
    assert outcome.ending in ("exit", "time")
    assert not outcome.stderr
    assert not alive(mark)


def test_nothing_outlives_this_process(host):
    """It is killed while its program, which has children, runs."""
    prelude, _, mark = host
    child = f"import time; time.sleep(60) # {mark}"
    program = f"{prelude}subprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(60)"
    caller = f"from cs336.verifiers import sandbox; sandbox.run({program!r}, limits=sandbox.Limits(seconds=60))"
    process = subprocess.Popen([sys.executable, "-c", caller])
    deadline = time.monotonic() + 60

    def inside():  # the caller's own command line holds the mark, too, and what it forks has that until it is another
        return alive(mark, unless=b"sandbox.run")

    while not inside() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert inside()
    process.kill()
    process.wait()
    while inside() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not inside()


@pytest.mark.parametrize(
    ("program", "exit_code"),
    [
        ("os._exit(0)", 0), ("os._exit(7)", 7), ("sys.exit('no')", 1), ("raise SystemExit", 0), ("1 / 0", 1),
        ("ctypes.string_at(0)", -11),
    ],
)  # fmt: skip
def test_how_it_ended(program, exit_code):
    outcome = sandbox.run(PRELUDE + program, "", SMALL)
    assert (outcome.ending, outcome.exit_code) == ("exit", exit_code)
    assert outcome.ok is (exit_code == 0)


def test_ordinary_programs_run():
    def run(program, stdin=""):
        return sandbox.run(program, stdin, Limits(seconds=60))

    outcome = run("import sys\nprint(sys.stdin.read()[::-1])\nprint('é', file=sys.stderr)", "añb\x00" * 50_000)
    assert outcome.stdout == "\x00bña" * 50_000 + "\n"
    assert outcome.stderr == "é\n"
    assert outcome.ok
    assert run("import sys; sys.stdout.buffer.write(b'\\xff')").stdout == "\ufffd"
    assert run("pass", "x" * (1 << 20)).ok  # input that nobody reads
    program = (
        "import subprocess, sys\nprint(subprocess.run([sys.executable, '-c', 'print(1)'], capture_output=True).stdout)"
    )
    assert run(program).stdout == "b'1\\n'\n"
    files = "import tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'x' * 1000)\nimport numpy; print(numpy.arange(3).sum())"
    assert run(files).stdout == "3\n"


def test_threads_may_run_programs_at_the_same_time():
    found = {}

    def one(i):
        program = f"import os, time\nos.fork()\ntime.sleep(0.2)\nprint({i})"
        found[i] = sandbox.run(program, limits=Limits(seconds=60)).stdout

    threads = [threading.Thread(target=one, args=(i,)) for i in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert {i: text.split()[0] for i, text in found.items()} == {i: str(i) for i in range(6)}


def test_isolation_says_what_it_found(monkeypatch):
    assert str(sandbox.isolation()) == "namespaces"
    assert sandbox._probe("namespaces") == ""
    landlock = sandbox.Isolation("landlock", True, "no namespaces: refused")
    monkeypatch.setattr(sandbox, "isolation", lambda: landlock)
    with pytest.raises(sandbox.NotIsolated, match=r"by Landlock alone here .* weak=True"):
        sandbox.run("print(1)")
    assert sandbox.run("print(1)", weak=True).stdout == "1\n"
    monkeypatch.setattr(sandbox, "isolation", lambda: sandbox.Isolation("namespaces", False, "a program got: network"))
    for weak in (False, True):
        with pytest.raises(sandbox.NotIsolated, match=r"cannot be kept in here: .*network"):
            sandbox.run("print(1)", weak=weak)


def test_a_probe_tells_of_a_hole(monkeypatch):
    """The same probe, where nothing keeps it in."""
    known = f"PARENT, FILES, WRITES = {os.getpid()}, ['/etc/passwd'], ['/dev/shm/.judged']\n"
    probe = sandbox.PROBE.replace("< 200", "< 150").replace("sys.stdin.read()", "os._exit(0)")
    done = subprocess.run([sys.executable, "-c", known + probe], capture_output=True, text=True, check=True)
    assert set(done.stdout.split(", ")) >= {"network", "files", "environment", "other processes"}


UNGUARDED = {
    "fill the disk",
    "fill the directory",
    "become root",
}  # this may be root, and then stays it, without rights


@pytest.mark.parametrize("name", sorted(REFUSED.keys() - UNGUARDED))
def test_landlock_refuses_nearly_as_much(name, host, monkeypatch):
    monkeypatch.setattr(sandbox, "isolation", lambda: sandbox.Isolation("landlock", True, ""))
    prelude, secret, _ = host
    program = f"{prelude}{REFUSED[name].replace('/tmp', os.curdir)}\nprint('tried', flush=True)\nos._exit(0)"
    outcome = sandbox.run(program, "", SMALL, weak=True)
    assert "tried\n" in outcome.stdout, outcome
    assert "got" not in outcome.stdout, outcome
    assert secret not in outcome.stdout + outcome.stderr


ONLY_WITHOUT_NAMESPACES = {  # to others' processes and files, of which there are none within namespaces
    "have the kernel choose a signal": "fcntl.fcntl(os.pipe()[0], 10, 9)",
    "be leased a file": "fcntl.fcntl(open('main.py'), fcntl.F_SETLEASE, fcntl.F_RDLCK)",
    "ask for a file's attributes": "fcntl.ioctl(open('main.py'), 0x80086601, bytearray(8))",
    "schedule a process": "os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))",
    "watch files": "checked(libc.inotify_init1(0))",
}


@pytest.mark.parametrize("name", ONLY_WITHOUT_NAMESPACES)
def test_landlock_refuses_system_calls(name, monkeypatch):
    """By EPERM, which none of these has another reason for."""
    monkeypatch.setattr(sandbox, "isolation", lambda: sandbox.Isolation("landlock", True, ""))
    outcome = sandbox.run(f"{PRELUDE}{ONLY_WITHOUT_NAMESPACES[name]}", "", SMALL, weak=True)
    assert "PermissionError: [Errno 1]" in outcome.stderr, outcome
    usual = "import os, fcntl\nfcntl.fcntl(0, fcntl.F_GETFL)\nos.set_blocking(0, False)\nprint(os.isatty(0))"
    assert sandbox.run(usual, "", SMALL, weak=True).stdout == "False\n"


@pytest.mark.parametrize("name", ["loop", "print without end", "ignore signals"])
def test_landlock_stops(name, host, monkeypatch):
    monkeypatch.setattr(sandbox, "isolation", lambda: sandbox.Isolation("landlock", True, ""))
    program, ending = STOPPED[name]
    outcome = sandbox.run(host[0] + program, "", BRIEF, weak=True)
    assert (outcome.ending, outcome.exit_code) == (ending, -9)


def test_limits_are_checked():
    with pytest.raises(ValueError, match="seconds must be above 0, got 0"):
        Limits(seconds=0)
    with pytest.raises(ValueError, match="memory must be above 0"):
        Limits(memory=-1)
