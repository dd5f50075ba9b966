"""What the verbs' files share.

A verb is a function that makes a function: its imports are inside, so that `cs336 --help` does not wait for torch. The
inner one's arguments are the verb's options, and its description is that of the outer.
"""

import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import IO, Annotated

from tyro.conf import DisallowNone, arg

from cs336.utils.documents import open_bytes, unpacking

Path = pathlib.Path
MaybePath = DisallowNone[Path | None]
Paths = Annotated[tuple[Path, ...], arg(metavar="[PATH ...]", help_behavior_hint="")]
Run = Callable[..., int | None]
Make = Callable[[list[str]], Run]


class Stopped(Exception):
    """A signal stopped a run that can be continued."""


@contextlib.contextmanager
def opened(path: Path | None) -> Iterator[IO[bytes]]:
    """A file, unpacked; standard input for None."""
    if path is None:
        yield sys.stdin.buffer
        return
    with unpacking(path), open_bytes(path) as file:
        yield file


def blocks(inputs: tuple[Path, ...]) -> Iterator[bytes]:
    """The bytes of files, one after the other; of standard input if there are none."""
    for path in inputs or (None,):
        with opened(path) as file:
            while block := file.read(1 << 16):
                yield block
