"""What Linux has to keep a process in, by its system calls: namespaces, mounts, Landlock, a filter of system calls.

namespaces(7), pivot_root(2), mount_setattr(2), landlock(7), seccomp(2). Standard library alone: the launcher that runs
this starts for every judged program, and must not wait for more.
"""

import ctypes
import os
import platform
import signal
import struct
from collections.abc import Iterable

NEWNS, NEWUSER, NEWPID, NEWNET = 0x00020000, 0x10000000, 0x20000000, 0x40000000
NEWCGROUP, NEWUTS, NEWIPC, NEWTIME = 0x02000000, 0x04000000, 0x08000000, 0x00000080
THREAD = 0x00010000
PRIVATE_EVERYTHING = NEWUSER | NEWPID | NEWNET | NEWIPC | NEWUTS | NEWCGROUP

_BIND, _RECURSIVE, _PRIVATE, _NOSUID, _NODEV = 4096, 16384, 1 << 18, 2, 4
_DETACH, _AT_FDCWD, _AT_RECURSIVE = 2, -100, 0x8000
_SET_PDEATHSIG, _SET_SECCOMP, _SET_NO_NEW_PRIVS, _BOUNDING_READ, _BOUNDING_DROP = 1, 22, 38, 23, 24
_LOAD, _IF_EQUAL, _IF_ABOVE, _IF_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026

# Numbers of system calls: by machine, then those that all share. A machine that is not here is refused.
_MACHINES = {
    "x86_64": (
        0xC000003E,
        {
            "clone": 56, "fork": 57, "vfork": 58, "kill": 62, "tkill": 200, "tgkill": 234, "rt_sigqueueinfo": 129,
            "rt_tgsigqueueinfo": 297, "socket": 41, "socketpair": 53, "shmget": 29, "shmat": 30, "semget": 64,
            "msgget": 68, "ptrace": 101, "pivot_root": 155, "chroot": 161, "mount": 165, "umount2": 166, "swapon": 167,
            "reboot": 169, "init_module": 175, "finit_module": 313, "kexec_load": 246, "add_key": 248,
            "request_key": 249, "keyctl": 250, "unshare": 272, "perf_event_open": 298, "name_to_handle_at": 303,
            "open_by_handle_at": 304, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312,
            "memfd_create": 319, "bpf": 321, "userfaultfd": 323, "personality": 135, "mq_open": 240, "prctl": 157,
            "prlimit64": 302, "setpriority": 141, "sched_setaffinity": 203, "mmap": 9,
            "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93, "lchown": 94, "fchownat": 260, "fchmodat": 268,
            "utime": 132, "utimes": 235, "futimesat": 261, "utimensat": 280, "setxattr": 188, "lsetxattr": 189,
            "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199, "syslog": 103,
            "fcntl": 72, "ioctl": 16, "inotify_init": 253, "inotify_init1": 294, "fanotify_init": 300,
            "sched_setscheduler": 144, "sched_setparam": 142, "sched_setattr": 314, "ioprio_set": 251,
            "migrate_pages": 256, "move_pages": 279,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "clone": 220, "kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240,
            "socket": 198, "socketpair": 199, "shmget": 194, "shmat": 196, "semget": 190, "msgget": 186, "ptrace": 117,
            "pivot_root": 41, "chroot": 51, "mount": 40, "umount2": 39, "swapon": 224, "reboot": 142,
            "init_module": 105, "finit_module": 273, "kexec_load": 104, "add_key": 217, "request_key": 218,
            "keyctl": 219, "unshare": 97, "perf_event_open": 241, "name_to_handle_at": 264, "open_by_handle_at": 265,
            "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "memfd_create": 279,
            "bpf": 280, "userfaultfd": 282, "personality": 92, "mq_open": 180, "prctl": 167, "prlimit64": 261,
            "setpriority": 140, "sched_setaffinity": 122, "mmap": 222,
            "fchmod": 52, "fchmodat": 53, "fchownat": 54, "fchown": 55, "utimensat": 88, "setxattr": 5, "lsetxattr": 6,
            "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15, "fremovexattr": 16, "syslog": 116,
            "fcntl": 25, "ioctl": 29, "inotify_init1": 26, "fanotify_init": 262,
            "sched_setscheduler": 119, "sched_setparam": 118, "sched_setattr": 274, "ioprio_set": 30,
            "migrate_pages": 238, "move_pages": 239,
        },
    ),
}  # fmt: skip
_SAME = {
    "pidfd_send_signal": 424, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsmount": 432, "fspick": 433, "pidfd_open": 434,
    "clone3": 435, "pidfd_getfd": 438, "process_madvise": 440, "mount_setattr": 442, "landlock_create_ruleset": 444,
    "landlock_add_rule": 445, "landlock_restrict_self": 446, "memfd_secret": 447,
    "fchmodat2": 452, "setxattrat": 463, "removexattrat": 466, "file_setattr": 469,
}  # fmt: skip

# No judged program needs these: each is a way around a limit, or a part of the kernel that has had holes. Network
# namespaces do not hold vsock, which reaches a virtual machine's host, so that there are no sockets at all; prctl
# would undo die_with_parent.
REFUSED = (
    "socket", "shmget", "shmat", "semget", "msgget", "mq_open", "ptrace", "pivot_root", "chroot", "mount", "umount2",
    "swapon", "reboot", "init_module", "finit_module", "kexec_load", "add_key", "request_key", "keyctl", "unshare",
    "setns", "perf_event_open", "name_to_handle_at", "open_by_handle_at", "process_vm_readv", "process_vm_writev",
    "kcmp", "memfd_create", "memfd_secret", "bpf", "userfaultfd", "personality", "prctl", "io_uring_setup",
    "io_uring_enter", "io_uring_register", "open_tree", "move_mount", "fsopen", "fsmount", "fspick", "pidfd_getfd",
    "process_madvise", "mount_setattr", "syslog",
)  # fmt: skip
# And these where no namespaces are around the program: other processes, how to have children, and what of a file
# Landlock does not guard.
REFUSED_OUTSIDE = (
    "socketpair", "kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal", "pidfd_open",
    "fork", "vfork", "prlimit64", "setpriority", "sched_setaffinity", "chmod", "fchmod", "fchmodat", "fchmodat2",
    "chown", "fchown", "lchown", "fchownat", "utime", "utimes", "futimesat", "utimensat", "setxattr", "lsetxattr",
    "fsetxattr", "setxattrat", "removexattr", "lremovexattr", "fremovexattr", "removexattrat", "file_setattr",
    "inotify_init", "inotify_init1", "fanotify_init", "sched_setscheduler", "sched_setparam", "sched_setattr",
    "ioprio_set", "migrate_pages", "move_pages",
)  # fmt: skip
# There, too: what has the kernel send a signal of one's choice to any process (F_SETSIG, F_SETOWN, F_SETOWN_EX), or
# holds up who opens a file (F_SETLEASE, F_NOTIFY); and of ioctl, by which an owner changes a file's attributes through
# a descriptor that only reads, all but TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX and FIOCLEX.
_FCNTL_REFUSED = (10, 8, 15, 1024, 1026)
_IOCTL_ALLOWED = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _number(name: str) -> int | None:
    machine = _MACHINES.get(platform.machine())
    if machine is None:
        raise OSError(f"system calls of {platform.machine()} are not known here, only of {', '.join(_MACHINES)}")
    return _SAME.get(name, machine[1].get(name))


def _syscall(name: str, *arguments) -> int:
    return _check(_libc.syscall(_number(name), *arguments), name)


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def fork(flags: int) -> int:
    """As os.fork, into new namespaces. Raises OSError where they are refused; there must be one thread."""
    return _syscall("clone", flags | signal.SIGCHLD, 0, 0, 0, 0)


def die_with_parent() -> None:
    """Undone by a change of user: to be called after it, too."""
    _check(_libc.prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def no_new_privileges() -> None:
    _check(_libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")


def drop_capabilities() -> None:
    """What root may do and others not, for this process once it runs another program. Root's own files stay its own."""
    capability = 0
    while _libc.prctl(_BOUNDING_READ, capability, 0, 0, 0) >= 0:
        _check(_libc.prctl(_BOUNDING_DROP, capability, 0, 0, 0), "prctl(PR_CAPBSET_DROP)")
        capability += 1


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    _check(
        _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()),
        f"mount of {source} on {target}",
    )


def tmpfs(target: str, size: int, mode: int) -> None:
    _mount("tmpfs", target, "tmpfs", _NOSUID | _NODEV, f"size={size},nr_inodes=4096,mode={mode:o}")


def bind(source: str, target: str, *, device: bool = False) -> None:
    """The same files in another place, read-only, and without devices unless it is one, which can be written to."""
    _mount(source, target, "none", _BIND | _RECURSIVE)
    read_only(target, recursive=True, device=device)


def read_only(target: str, *, recursive: bool = False, device: bool = False) -> None:
    attributes = struct.pack("=QQQQ", 1 | 2 | (0 if device else 4), 0, 0, 0)  # RDONLY, NOSUID, NODEV
    how = _AT_RECURSIVE if recursive else 0
    _syscall("mount_setattr", _AT_FDCWD, target.encode(), how, attributes, len(attributes))


def keep_mounts_to_self() -> None:
    _mount("none", "/", "none", _RECURSIVE | _PRIVATE)


def enter_root(root: str) -> None:
    """Make a mount the root, and let go of the old one."""
    os.chdir(root)
    _syscall("pivot_root", b".", b".")
    _check(_libc.umount2(b".", _DETACH), "umount of the old root")
    os.chdir("/")


def landlock_abi() -> int:
    """The version of Landlock, 0 without it."""
    return max(0, _libc.syscall(_number("landlock_create_ruleset"), None, 0, 1))


def landlock(readable: Iterable[str], writable: Iterable[str]) -> None:
    """From here on this process and its children read and run what is below `readable`, and change only what is below
    `writable`; no_new_privileges is to be called before. Raises OSError without Landlock 3."""
    abi = landlock_abi()
    if abi < 3:
        raise OSError(f"Landlock {abi} does not guard against truncation, which takes Landlock 3 (Linux 6.2)")
    rights = (1 << 15) - 1 | (1 << 15 if abi >= 5 else 0)
    read = 1 | 4 | 8  # execute, read a file, read a directory
    on_files = 1 | 2 | 4 | 1 << 14
    network = 3 if abi >= 4 else 0
    attributes = struct.pack("=QQ", rights, network)[: 16 if abi >= 4 else 8]
    ruleset = _syscall("landlock_create_ruleset", attributes, len(attributes), 0)
    for paths, allowed in ((readable, read), (writable, rights)):
        for path in paths:
            file = os.open(path, os.O_PATH | os.O_CLOEXEC)
            below = allowed & rights if os.path.isdir(path) else allowed & rights & on_files
            _syscall("landlock_add_rule", ruleset, 1, struct.pack("=Qi", below, file), 0)
            os.close(file)
    _syscall("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


def _by_second_argument(
    number: int, values: tuple[int, ...], *, of_these: int, of_others: int
) -> list[tuple[int, int, int, int]]:
    """Answer a system call by whether its second argument, of 32 bits, is one of some values."""
    count = len(values)
    compare = [(_IF_EQUAL, count - i, 0, value) for i, value in enumerate(values)]
    head = [(_IF_EQUAL, 0, count + 3, number), (_LOAD, 0, 0, 16 + 8)]
    return [*head, *compare, (_RETURN, 0, 0, of_others), (_RETURN, 0, 0, of_these)]


def filter_system_calls(*, namespaces: bool) -> None:
    """Refuse REFUSED, new namespaces and anonymous shared memory (which no process's size shows) with EPERM; without
    namespaces around it also REFUSED_OUTSIDE: then there are threads, but no children. Lasts, for children too.

    Classic BPF over struct seccomp_data {int nr; u32 arch; u64 ip; u64 args[6]}.
    """
    machine, numbers = _MACHINES[platform.machine()]
    program = [(_LOAD, 0, 0, 4), (_IF_EQUAL, 1, 0, machine), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    program += [(_IF_ABOVE, 0, 1, 0x40000000), (_RETURN, 0, 0, _EPERM)]  # x32's numbers
    program += [(_IF_EQUAL, 0, 1, _SAME["clone3"]), (_RETURN, 0, 0, _ENOSYS)]  # glibc then calls clone: flags to read
    for name in REFUSED if namespaces else REFUSED + REFUSED_OUTSIDE:
        if (number := _number(name)) is not None:
            program += [(_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _EPERM)]
    if not namespaces:
        program += _by_second_argument(numbers["fcntl"], _FCNTL_REFUSED, of_these=_EPERM, of_others=_ALLOW)
        program += _by_second_argument(numbers["ioctl"], _IOCTL_ALLOWED, of_these=_ALLOW, of_others=_EPERM)
    new = PRIVATE_EVERYTHING | NEWNS | NEWTIME
    flags, anonymous, shared = 16 + 8 * 3, 0x20, 1
    program += [
        (_IF_EQUAL, 0, 5, numbers["clone"]),
        (_LOAD, 0, 0, 16),
        (_IF_SET, 2, 0, new),
        (_IF_SET, 0, 0 if namespaces else 1, THREAD),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _EPERM),
        (_IF_EQUAL, 0, 4, numbers["mmap"]),
        (_LOAD, 0, 0, flags),
        (_IF_SET, 0, 2, anonymous),
        (_IF_SET, 0, 1, shared),
        (_RETURN, 0, 0, _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = b"".join(struct.pack("=HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    description = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    _check(_libc.prctl(_SET_SECCOMP, 2, description, 0, 0), "prctl(PR_SET_SECCOMP)")
