"""The methods of `cs336 compress` that give each weight fewer bits."""

from typing import Annotated, Any, Literal

from tyro.conf import arg

from cs336.cli.common import Model, Path

OutDir = Annotated[Path, arg(help="the directory to write; what was begun there goes on.")]
Calibrate = Annotated[Path, arg(help="text, JSON lines or parquet, a tenth of which is held out to measure on.")]
Group = Annotated[
    int,
    arg(help="neighbours in a row of a weight that share a scale; -1: the whole row.", aliases=["--group-size"]),
]
Asymmetric = Annotated[bool, arg(help="give each group a zero besides its scale.")]
FormatName = Literal["cs336", "compressed-tensors", "gptq", "awq"]
Format = Annotated[
    FormatName,
    arg(help="of the files: ours, or compressed-tensors', GPTQ's or AWQ's, which transformers and vLLM read too."),
]


def int8(
    model: Model,
    out: OutDir,
    group: Group = 128,
    asymmetric: Asymmetric = False,
    format: FormatName = "cs336",
) -> None:
    """Weights in 8 bits, rounded to the nearest.

    Args:
        format: of the files: ours, or compressed-tensors' or GPTQ's, which transformers and vLLM read too.
    """
    _quantized(model, out, "int8", group, asymmetric=asymmetric, format=format)


def int4(
    model: Model, out: OutDir, group: Group = 128, asymmetric: Asymmetric = False, format: Format = "cs336"
) -> None:
    """Weights in 4 bits, rounded to the nearest."""
    _quantized(model, out, "int4", group, asymmetric=asymmetric, format=format)


def fp8(
    model: Model,
    out: OutDir,
    group: Group = -1,
    activations: bool = False,
    format: Literal["cs336", "compressed-tensors"] = "cs336",
) -> None:
    """Weights as floats of 8 bits (e4m3), rounded to the nearest.

    Args:
        activations: round what the layers read too, as the model runs, with a scale a token.
        format: of the files: ours, or compressed-tensors', which transformers and vLLM read too.
    """
    _quantized(model, out, "fp8", group, activations=activations, format=format)


def gptq(
    model: Model,
    out: OutDir,
    calibrate: Calibrate,
    bits: Literal[4, 8] = 4,
    group: Group = 128,
    act_order: bool = False,
    asymmetric: Asymmetric = False,
    samples: int = 128,
    device: str = "auto",
    format: Format = "cs336",
) -> None:
    """Weights in 4 or 8 bits; those not yet rounded make good what rounding does to outputs on text.

    Args:
        bits: a weight.
        act_order: round the features with the largest inputs first.
        samples: windows of text that are read, of the model's context or 2048 tokens.
        device: where blocks take turns: auto (a GPU if there is one), cpu, cuda.
    """
    options: dict[str, Any] = {"calibrate": calibrate, "bits": bits, "act_order": act_order, "samples": samples}
    _quantized(model, out, "gptq", group, asymmetric=asymmetric, device=device, format=format, **options)


def awq(
    model: Model,
    out: OutDir,
    calibrate: Calibrate,
    bits: Literal[4, 8] = 4,
    group: Group = 128,
    asymmetric: Asymmetric = False,
    samples: int = 128,
    device: str = "auto",
    format: Format = "cs336",
) -> None:
    """Weights in 4 or 8 bits, which are scaled up while they are rounded where features are large on text.

    Args:
        bits: a weight.
        samples: windows of text that are read, of the model's context or 2048 tokens.
        device: where blocks take turns: auto (a GPU if there is one), cpu, cuda.
    """
    options: dict[str, Any] = {"calibrate": calibrate, "bits": bits, "samples": samples, "device": device}
    _quantized(model, out, "awq", group, asymmetric=asymmetric, format=format, **options)


def _quantized(model: Path, out: Path, method: Any, group: int, **options: Any) -> None:
    from cs336.inference.quantization import compress

    print(f"{compress(model, out, method, None if group == -1 else group, **options)}, in {out}")
