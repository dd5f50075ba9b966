"""`cs336 compress`."""

from typing import Literal

from tyro.conf import Positional

from cs336.cli.common import Path, Run


def compress(arguments: list[str]) -> Run:
    """Write a model with fewer bits a weight: a directory that generate, serve, chat and evaluate take."""
    from cs336.inference.quantization import compress as write

    def run(model: Positional[Path], out: Path, method: Literal["int8", "int4"] = "int8", group: int = 128) -> None:
        """
        Args:
            model: an export, a checkpoint, or a run directory, of which the newest is taken.
            out: the directory to write, new or empty.
            method: int8 or int4 weights, rounded to the nearest.
            group: neighbours in a row of a weight that share a scale.
        """
        print(f"{write(model, out, method, group)}, in {out}")

    return run
