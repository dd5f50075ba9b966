"""What the verbs' files share.

A verb is a function, whose arguments are its options. Its imports are inside, so that `cs336 --help` does not wait for
torch; where its arguments' types or defaults take such an import, a Late makes the function.
"""

import contextlib
import inspect
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import IO, Annotated, Any, Literal

from tyro.conf import DisallowNone, FlagCreatePairsOff, Positional, arg

from cs336.utils.documents import open_bytes, unpacking
from cs336.utils.files import is_special

Path = pathlib.Path
MaybePath = Path | None
Paths = Annotated[tuple[Path, ...], arg(metavar="[PATH ...]", help_behavior_hint="")]
Ints = Annotated[tuple[int, ...], arg(help_behavior_hint="")]
Floats = Annotated[tuple[float, ...], arg(help_behavior_hint="")]
Model = Annotated[
    Positional[Path],
    arg(help="an export, a checkpoint, or a run directory, of which the newest is taken."),
]
ModelTokenizer = Annotated[
    MaybePath,
    arg(help="tokenizer.json, ours or Hugging Face's, if it is not where the model is."),
]
Draft = Annotated[
    MaybePath,
    arg(help="a smaller model of the same tokenizer, which drafts what the model then verifies."),
]
Device = Annotated[str, arg(help="auto (a GPU if there is one), cpu, cuda.")]
WeightType = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    arg(help="of the weights. auto: as they were saved."),
]
TextField = Annotated[str, arg(help="of JSON lines and parquet: the field that holds the text.")]
Run = Callable[..., int | None]
OPTIONS = (FlagCreatePairsOff, DisallowNone)
"""How verbs read options: there is no --no-FLAG, and the word None is a text, not the absence of one."""


class Late:
    """Decorates what makes a verb of the rest of the command line: it describes the verb, what it makes the options."""

    def __init__(self, make: Callable[[list[str]], Run]):
        self.make, self.__doc__ = make, make.__doc__

    def verb(self, rest: list[str]) -> Run:
        """The verb itself."""
        run = self.make(rest)
        run.__doc__ = inspect.cleandoc(self.__doc__ or "") + "\n\n" + inspect.cleandoc(run.__doc__ or "")
        return run


class OwnOptions(Late):
    """The same of a verb that reads the rest of the command line itself."""


def weight_dtype(name: WeightType) -> Any:
    """torch's, or None: as the weights were saved."""
    from cs336.inference import load

    return load.weight_dtype(name)


class Stopped(Exception):
    """A signal stopped a run that can be continued."""


def check_output(path: Path | None, *inputs: Path) -> None:
    """Before the work, not after it: raises ValueError for a file that cannot be written, or is one that is read."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path} is a directory: expected the name of a file to write")
    if is_special(path):
        raise ValueError(f"{path} is a device or a pipe: expected the name of a file to write")
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no directory {path.parent}; make it, or write elsewhere")
    if path.exists() and any(source.exists() and path.samefile(source) for source in inputs):
        raise ValueError(f"{path} is what is read, and would be written over: write elsewhere")


@contextlib.contextmanager
def warnings_after() -> Iterator[None]:
    """What is warned of in the block is said when it ends: not in the middle of a line that is being written."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for warning in caught:
        warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)


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
