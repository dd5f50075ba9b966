"""A model's directory in, a smaller one out, which every verb takes that took the first."""

import functools
import json
import os
import pathlib
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from rich.console import Console

from cs336.inference.load import find_model, load_model, load_tokenizer, read_config
from cs336.inference.quantization.calibrated import BLOCK_METHODS, METHOD_OF_BITS, RESULT, Calibrated
from cs336.inference.quantization.rounding import quantize_
from cs336.models import Transformer, save_pretrained
from cs336.models.huggingface import check_quantized_as, has_weights
from cs336.nn import QuantMethod
from cs336.nn.checks import check_flags
from cs336.nn.quantized import METHODS
from cs336.utils.files import write_json
from cs336.utils.stages import Outcome, Stage, run_stages

Method = Literal["int8", "int4", "fp8", "gptq", "awq"]
Format = Literal["cs336", "compressed-tensors", "gptq", "awq"]


@dataclass(frozen=True)
class Compressed:
    bytes_before: int
    """Of the weights."""
    bytes_after: int
    bits_before: float | None = None
    """Per byte of the calibration text's part that is held out, where there is a text."""
    bits_after: float | None = None

    def __str__(self) -> str:
        before, after = self.bytes_before / 2**20, self.bytes_after / 2**20
        text = f"weights: {before:,.2f} MiB -> {after:,.2f} MiB, {before / after:.2f} times smaller"
        if self.bits_before is not None and self.bits_after is not None:
            text += f"; held-out text: {self.bits_before:.4f} -> {self.bits_after:.4f} bits per byte"
        return text


def compress(
    model: str | os.PathLike,
    out: str | os.PathLike,
    method: Method = "int8",
    group: int | None = 128,
    *,
    calibrate: str | os.PathLike | None = None,
    bits: int = 4,
    samples: int = 128,
    act_order: bool = False,
    asymmetric: bool = False,
    activations: bool = False,
    device: str = "auto",
    format: Format = "cs336",
) -> Compressed:
    """Write the model at `model` (an export, a checkpoint, a run directory or a GGUF file) with quantised weights.

    Args:
        method: int8, int4 and fp8 round to the nearest. gptq and awq read text. The same call goes on where one that
            was killed stopped, and does not repeat one that is finished.
        group: neighbours in a row of a weight that share a scale; None: the whole row.
        calibrate: of gptq and awq: text, JSON lines, parquet or a directory of them. A tenth is held out to measure.
        bits: of gptq and awq, 4 or 8.
        samples: windows of text that are read, each of the model's context or 2048 tokens.
        act_order: gptq rounds the features with the largest inputs first.
        asymmetric: a group has a zero besides its scale.
        activations: fp8 rounds what the layers read too, as the model runs, with a scale a token.
        device: auto (a GPU if there is one), cpu, cuda: where the blocks of a calibrated method take turns.
        format: of the files: ours, or compressed-tensors', GPTQ's or AWQ's, which transformers and vLLM read too.

    Raises ValueError for a directory that holds another model, and for what cannot be quantised; FileNotFoundError
    where there is no model or text.
    """
    check_flags(act_order=act_order, asymmetric=asymmetric, activations=activations)
    if activations and method != "fp8":
        raise ValueError(f"activations are rounded to fp8 beside weights in fp8, got {method}: leave activations out")
    out, found = pathlib.Path(out), find_model(model)
    if method in BLOCK_METHODS:
        if bits in METHOD_OF_BITS:
            check_quantized_as(read_config(found), format, METHOD_OF_BITS[bits], group, order=act_order)
        if calibrate is None:
            raise ValueError(f"{method} reads calibration text: name one with calibrate (--calibrate TEXT)")
        options: dict[str, Any] = {
            "samples": samples,
            "act_order": act_order,
            "asymmetric": asymmetric,
            "device": device,
        }
        options |= {"format": format}
        return Compressed(**Calibrated(found, out, method, group, pathlib.Path(calibrate), bits, **options).run())
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join((*METHODS, *BLOCK_METHODS))}, got {method!r}")
    if calibrate is not None or act_order:
        raise ValueError(f"{method} rounds to the nearest and reads no text: leave it out, or take gptq or awq")
    check_quantized_as(read_config(found), format, cast(QuantMethod, method), group)

    def quantise() -> Outcome:
        try:
            tokenizer = load_tokenizer(found)
        except FileNotFoundError:
            tokenizer = None
        network = load_model(found, "cpu")
        before = nbytes(network)
        quantize_(network, cast(QuantMethod, method), group, asymmetric=asymmetric, activations=activations)
        save_pretrained(network, out, tokenizer, quantized_as=format)
        result = Compressed(before, nbytes(network))
        write_json(out / RESULT, asdict(result), indent=2)
        return Outcome(str(result))

    settings = {"method": method, "group": group, "asymmetric": asymmetric, "activations": activations}
    made = ("config.json", "model.safetensors", RESULT)
    source, whole = ((found,), settings | {"format": format}), functools.partial(has_weights, out)
    stage = Stage("quantise", method, quantise, (RESULT,), *source, kept=made, is_whole=whole)
    run_stages(out, [stage], Console(quiet=True))
    return Compressed(**json.loads((out / RESULT).read_text(encoding="utf-8")))


def nbytes(model: Transformer) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())
