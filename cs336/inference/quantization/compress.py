"""A model's directory in, a smaller one out, which every verb takes that took the first."""

import os
import pathlib
from dataclasses import dataclass

from cs336.inference.load import find_model, load_model, load_tokenizer
from cs336.inference.quantization.rounding import quantize_
from cs336.models import Transformer, save_pretrained
from cs336.nn import QuantMethod


@dataclass(frozen=True)
class Compressed:
    bytes_before: int
    """Of the weights."""
    bytes_after: int

    def __str__(self) -> str:
        before, after = self.bytes_before / 2**20, self.bytes_after / 2**20
        return f"weights: {before:,.2f} MiB -> {after:,.2f} MiB, {before / after:.2f} times smaller"


def compress(
    model: str | os.PathLike, out: str | os.PathLike, method: QuantMethod = "int8", group: int = 128
) -> Compressed:
    """Write the model at `model` (an export, a checkpoint, a run directory or a GGUF file) with quantised weights.

    group: neighbours in a row of a weight that share a scale.
    Raises FileExistsError for a directory that holds something, FileNotFoundError where there is no model, ValueError
    for what cannot be quantised.
    """
    out = pathlib.Path(out)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is there already and holds something: name another directory")
    found = find_model(model)
    try:
        tokenizer = load_tokenizer(found)
    except FileNotFoundError:
        tokenizer = None
    network = load_model(found, "cpu")
    before = _nbytes(network)
    save_pretrained(quantize_(network, method, group), out, tokenizer)
    return Compressed(before, _nbytes(network))


def _nbytes(model: Transformer) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())
