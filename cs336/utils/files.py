"""Files that are whole or absent: written under a temporary name, flushed to the disk, then renamed."""

import contextlib
import errno
import json
import os
import pathlib
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
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            permissions = os.fstat(file.fileno()).st_mode  # as the umask says
            yield file
            file.flush()
        os.chmod(temporary, permissions)  # by name: a library may have put its own file in this one's place
        sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # not there; or no place where anything can be removed
            temporary.unlink()
        # What fails is named as the user named it; a full disk is met by write(), which names no file.
        if isinstance(error, OSError) and error.errno and error.filename in (None, os.fspath(temporary)):
            error.filename = os.fspath(path if path.parent.exists() else path.parent)
        raise
    sync(path.parent)


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
