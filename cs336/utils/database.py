"""A file of SQLite's, in WAL mode, that any number of processes of one machine read and write."""

import contextlib
import os
import pathlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from cs336.utils.locks import in_turn

Entry = TypeVar("Entry")
PATIENCE = 60  # seconds that a transaction waits for another process's


class Database:
    """Made where there is none.

    Args:
        path: of the file.
        what: it is, for errors.
        schema: its tables, as statements of which each ends a line with a semicolon.
        version: of the schema.

    Raises ValueError for a file that is something else or of another version, OSError where it cannot be written.
    """

    def __init__(self, path: pathlib.Path, what: str, schema: str, version: int):
        self.path, self._what = path, what
        with in_turn(path), self.transaction() as db:  # SQLite does not wait where two turn a new file to WAL
            (found,) = db.execute("PRAGMA user_version").fetchone()
            if found not in (0, version):
                raise ValueError(f"{path} is {what} of format {found}, expected {version}: use another directory")
            if found == 0:
                for statement in schema.split(";\n"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {version}")

    @contextlib.contextmanager
    def transaction(self, *, write: bool = True) -> Iterator[sqlite3.Connection]:
        """All of the block or nothing of it. write=False: waits for nobody."""
        try:
            with contextlib.closing(sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None)) as db:
                db.row_factory = sqlite3.Row
                if write:
                    db.execute("PRAGMA journal_mode = WAL")
                    db.execute("PRAGMA foreign_keys = ON")
                db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                try:
                    yield db
                    db.execute("COMMIT")
                except BaseException:
                    if db.in_transaction:
                        db.execute("ROLLBACK")
                    raise
        except sqlite3.OperationalError as error:
            raise OSError(f"{self.path} cannot be read or written: {error}") from error
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path} is not {self._what} ({error}): use another directory") from error


@dataclass(frozen=True)
class Claim(Generic[Entry]):
    """A run that this process is at."""

    entry: Entry
    _lock: contextlib.ExitStack

    def release(self) -> None:
        self._lock.close()


class Queue(Database):
    """Of runs that processes claim: whoever is at one holds a file in `claims`. Made where there is none."""

    def __init__(self, directory: str | os.PathLike, file: str, what: str, schema: str, version: int):
        self.directory = pathlib.Path(directory)
        self.claims = self.directory / "claims"
        self.claims.mkdir(parents=True, exist_ok=True)
        super().__init__(self.directory / file, what, schema, version)
