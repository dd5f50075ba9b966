"""The methods of `cs336 compress` that give each weight fewer bits."""

from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from cs336.cli.common import Path

Format = Literal["cs336", "compressed-tensors", "gptq", "awq"]
Group = Annotated[int, arg(aliases=["--group-size"])]


def int8(
    model: Positional[Path], out: Path, group: Group = 128, asymmetric: bool = False, format: Format = "cs336"
) -> None:
    """Weights in 8 bits, rounded to the nearest.

    Args:
        model: an export, a checkpoint, or a run directory, of which the newest is taken.
        out: the directory to write, new or empty.
        group: neighbours in a row of a weight that share a scale; -1: the whole row.
        asymmetric: give each group a zero besides its scale.
        format: of the files: ours, or compressed-tensors' or GPTQ's, which transformers and vLLM read too.
    """
    _quantized(model, out, "int8", group, asymmetric=asymmetric, format=format)


def int4(
    model: Positional[Path], out: Path, group: Group = 128, asymmetric: bool = False, format: Format = "cs336"
) -> None:
    """Weights in 4 bits, rounded to the nearest.

    Args:
        model: an export, a checkpoint, or a run directory, of which the newest is taken.
        out: the directory to write, new or empty.
        group: neighbours in a row of a weight that share a scale; -1: the whole row.
        asymmetric: give each group a zero besides its scale.
        format: of the files: ours, or compressed-tensors', GPTQ's or AWQ's, which transformers and vLLM read too.
    """
    _quantized(model, out, "int4", group, asymmetric=asymmetric, format=format)


def fp8(
    model: Positional[Path], out: Path, group: Group = -1, format: Literal["cs336", "compressed-tensors"] = "cs336"
) -> None:
    """Weights as floats of 8 bits (e4m3), rounded to the nearest.

    Args:
        model: an export, a checkpoint, or a run directory, of which the newest is taken.
        out: the directory to write, new or empty.
        group: neighbours in a row of a weight that share a scale; -1: the whole row.
        format: of the files: ours, or compressed-tensors', which transformers and vLLM read too.
    """
    _quantized(model, out, "fp8", group, format=format)


def gptq(
    model: Positional[Path],
    out: Path,
    calibrate: Path,
    bits: Literal[4, 8] = 4,
    group: Group = 128,
    act_order: bool = False,
    asymmetric: bool = False,
    samples: int = 128,
    device: str = "auto",
    format: Format = "cs336",
) -> None:
    """Weights in 4 or 8 bits; those not yet rounded make good what rounding does to outputs on text.

    Args:
        model: an export, a checkpoint, or a run directory, of which the newest is taken.
        out: the directory to write; what was begun there goes on.
        calibrate: text, JSON lines or parquet, a tenth of which is held out to measure on.
        bits: a weight.
        group: neighbours in a row of a weight that share a scale; -1: the whole row.
        act_order: round the features with the largest inputs first.
        asymmetric: give each group a zero besides its scale.
        samples: windows of text that are read, of the model's context or 2048 tokens.
        device: where blocks take turns: auto (a GPU if there is one), cpu, cuda.
        format: of the files: ours, or compressed-tensors', GPTQ's or AWQ's, which transformers and vLLM read too.
    """
    options: dict[str, Any] = {"calibrate": calibrate, "bits": bits, "act_order": act_order, "samples": samples}
    _quantized(model, out, "gptq", group, asymmetric=asymmetric, device=device, format=format, **options)


def awq(
    model: Positional[Path],
    out: Path,
    calibrate: Path,
    bits: Literal[4, 8] = 4,
    group: Group = 128,
    asymmetric: bool = False,
    samples: int = 128,
    device: str = "auto",
    format: Format = "cs336",
) -> None:
    """Weights in 4 or 8 bits, which are scaled up while they are rounded where features are large on text.

    Args:
        model: an export, a checkpoint, or a run directory, of which the newest is taken.
        out: the directory to write; what was begun there goes on.
        calibrate: text, JSON lines or parquet, a tenth of which is held out to measure on.
        bits: a weight.
        group: neighbours in a row of a weight that share a scale; -1: the whole row.
        asymmetric: give each group a zero besides its scale.
        samples: windows of text that are read, of the model's context or 2048 tokens.
        device: where blocks take turns: auto (a GPU if there is one), cpu, cuda.
        format: of the files: ours, or compressed-tensors', GPTQ's or AWQ's, which transformers and vLLM read too.
    """
    options: dict[str, Any] = {"calibrate": calibrate, "bits": bits, "samples": samples, "device": device}
    _quantized(model, out, "awq", group, asymmetric=asymmetric, format=format, **options)


def _quantized(model: Path, out: Path, method: Any, group: int, **options: Any) -> None:
    from cs336.inference.quantization import compress

    print(f"{compress(model, out, method, None if group == -1 else group, **options)}, in {out}")
