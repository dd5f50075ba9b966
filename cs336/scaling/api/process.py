"""Processes by more than their number, which the system gives again."""

import pathlib


def process_mark(pid: int) -> str | None:
    """When a process was started, and since which boot; None if there is none, or no /proc to say it."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
    return None if state == "Z" else f"{boot}:{fields[18]}"  # starttime, the 22nd of proc(5)
