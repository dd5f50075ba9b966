"""Where deduplicated files go: the same names in another directory, each whole or absent."""

import os
import pathlib
import shutil

from cs336.utils.files import Paths, path_list, replacing


def plan_outputs(files: Paths, out_dir: str | os.PathLike) -> list[tuple[pathlib.Path, pathlib.Path]]:
    """Pairs of an input and its output, in order; makes the directory.

    Raises FileNotFoundError for an input that is no file, ValueError where two would have one output, or an output
    would be one of the inputs.
    """
    out_dir = pathlib.Path(out_dir)
    sources: dict[str, pathlib.Path] = {}
    for path in path_list(files):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file: expected the files to deduplicate, not a directory of them")
        if path.name in sources:
            raise ValueError(
                f"{sources[path.name]} and {path} have one name, and so would their outputs in {out_dir}: rename one"
            )
        if path.parent.resolve() == out_dir.resolve():
            raise ValueError(f"{path} is in the output directory itself and would be overwritten: choose another one")
        sources[path.name] = path
    out_dir.mkdir(parents=True, exist_ok=True)
    return [(path, out_dir / name) for name, path in sources.items()]


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
    with open(source, "rb") as reader, replacing(target, "wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
