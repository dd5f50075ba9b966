"""What files hold, as one number: the same under another name, in another place, at another time."""

import contextlib
import hashlib
import json
import os
import pathlib

from cs336.utils.documents import files_below
from cs336.utils.files import write_json


class Contents:
    """Digests of files and directories, remembered in a file: one that looks as it did is not read again.

        with Contents("runs/quickstart/.contents.json") as contents:
            contents.digest("corpus")

    A file looks as it did if its size, time of modification and inode are those of the last time.
    """

    def __init__(self, remembered: str | os.PathLike):
        self._path = pathlib.Path(remembered)
        self._known: dict[str, list] = {}
        with contextlib.suppress(FileNotFoundError, ValueError):
            self._known = json.loads(self._path.read_text(encoding="utf-8"))
        self._changed = False

    def __enter__(self) -> "Contents":
        return self

    def __exit__(self, *_: object) -> None:
        if self._changed:
            write_json(self._path, self._known)

    def digest(self, path: str | os.PathLike, without: pathlib.Path | None = None) -> str:
        """Of a file: its bytes and name; of a directory: those of its files, with their places in it, but not those
        below the directory `without`. How the path is spelled does not count."""
        path = pathlib.Path(path)
        if path.is_dir():
            held = [[p.relative_to(path).as_posix(), self.file(p)] for p in files_below(path, without)]
        else:
            held = [[path.name, self.file(path)]]
        return hashlib.sha256(json.dumps(held).encode()).hexdigest()

    def file(self, path: pathlib.Path) -> str:
        """SHA-256 of a file's bytes, in hex."""
        path = path.resolve()
        stat = path.stat()
        looks, name = [stat.st_size, stat.st_mtime_ns, stat.st_ino], str(path)
        if self._known.get(name, [])[:3] != looks:
            with path.open("rb") as file:
                self._known[name] = [*looks, hashlib.file_digest(file, "sha256").hexdigest()]
            self._changed = True
        return self._known[name][3]
