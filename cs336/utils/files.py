"""Files that are whole or absent: written under a temporary name, flushed to the disk, then renamed."""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

Paths = str | os.PathLike | Sequence[str | os.PathLike]


def path_list(paths: Paths) -> list[pathlib.Path]:
    """One path, or several, as a list."""
    return [pathlib.Path(p) for p in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]


@contextlib.contextmanager
def replacing(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Open a file that takes `path`'s place when the block ends; if the block raises, `path` stays as it was.

    mode is "w" (UTF-8 text) or "wb". Raises OSError, with the name of the file, where it cannot be written.
    """
    path = pathlib.Path(path)
    if is_special(path):
        raise OSError(
            errno.EINVAL, "a device or a pipe, in whose place a file would be put: name a file", os.fspath(path)
        )
    temporary: pathlib.Path | None = None
    try:
        with _own(path, mode) as file:  # until it is in its place
            temporary = pathlib.Path(file.name)
            permissions = os.fstat(file.fileno()).st_mode  # as the umask says
            yield file
            file.flush()
            os.chmod(temporary, permissions)  # by name: a library may have put its own file in this one's place
            sync(temporary)
            os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):  # not there; or no place where anything can be removed
                temporary.unlink()
        # What fails is named as the user named it; a full disk is met by write(), which names no file.
        if isinstance(error, OSError) and error.errno and _is_temporary(error.filename, path):
            error.filename = os.fspath(path if path.parent.exists() else path.parent)
        raise
    sync(path.parent)


def _own(path: pathlib.Path, mode: str) -> IO:
    """A new file beside `path` that nobody else writes, in the place of one that a killed process left: two that write
    `path` at once would mix what they write in one, and put it in place as whole."""
    for number in itertools.count():
        temporary = path.with_name(f".{path.name}.{number}.tmp" if number else f".{path.name}.tmp")
        while True:
            file = open(temporary, mode, encoding=None if "b" in mode else "utf-8", opener=_untouched)  # noqa: SIM115
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                break
            except OSError:  # a file system without locks
                pass
            if _is_at(file, temporary):
                file.truncate(0)
                return file
            file.close()  # its writer has put it in place since
    raise AssertionError("unreachable")


def _is_temporary(name: Any, path: pathlib.Path) -> bool:
    """Whether an error is of a file that is written for `path`, or of none."""
    temporary = re.compile(rf"\.{re.escape(path.name)}\.(\d+\.)?tmp")
    return name is None or bool(temporary.fullmatch(os.path.basename(os.fsdecode(name))))


def _untouched(name: str, flags: int) -> int:
    """What another is writing is not cut off."""
    return os.open(name, flags & ~os.O_TRUNC, 0o666)


def _is_at(file: IO, path: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def read_text(path: str | os.PathLike) -> str:
    """A text file. Raises ValueError, naming it, for one that is not UTF-8."""
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from None


def write_text(path: str | os.PathLike, text: str) -> None:
    """A text, in the place of what was there."""
    with replacing(path) as file:
        file.write(text)


def write_json(path: str | os.PathLike, value: Any, **options: Any) -> None:
    """A JSON value, in the place of what was there. options: of json.dump."""
    with replacing(path) as file:
        json.dump(value, file, **options)


def write_json_lines(path: str | os.PathLike, rows: Iterable[Any]) -> None:
    """A JSON value a line, in the place of what was there."""
    with replacing(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def is_name(name: Any) -> bool:
    """Whether it is the name of a file within a directory: no path, and one that a file can have."""
    if not isinstance(name, str) or name in ("", ".", "..") or "\0" in name or pathlib.PurePath(name).name != name:
        return False
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def is_special(path: pathlib.Path) -> bool:
    """Whether there is something that is neither file nor directory, or a name of one's own descriptors."""
    if path.is_symlink() and os.readlink(path).startswith("/proc/"):  # /dev/stdout
        return True
    return path.exists() and not (path.is_file() or path.is_dir())


def sync(path: str | os.PathLike) -> None:
    """Flush one file, or one directory's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
