"""`cs336 compress`."""

from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from cs336.cli.common import MaybePath, Path, Run

Format = Literal["cs336", "compressed-tensors", "gptq", "awq"]
Method = Literal["int8", "int4", "gptq", "awq"]


def compress(arguments: list[str]) -> Run:
    """Write a model with fewer bits a weight: a directory that generate, serve, chat and evaluate take."""
    from cs336.inference.quantization import compress as write

    def run(
        model: Positional[Path],
        out: Path,
        method: Method = "int8",
        group: Annotated[int, arg(aliases=["--group-size"])] = 128,
        calibrate: MaybePath = None,
        bits: Literal[4, 8] = 4,
        samples: int = 128,
        act_order: bool = False,
        asymmetric: bool = False,
        device: str = "auto",
        format: Format = "cs336",
    ) -> None:
        """
        Args:
            model: an export, a checkpoint, or a run directory, of which the newest is taken.
            out: the directory to write, new or empty; what gptq or awq began there goes on.
            method: int8 or int4 weights, rounded to the nearest; gptq, which makes good what rounding does to the
                layers' outputs on calibration text; awq, which scales up the features that are large there.
            group: neighbours in a row of a weight that share a scale; -1: the whole row.
            calibrate: a text, JSON lines, parquet or a directory of them; a tenth is held out to measure.
            bits: a weight, with gptq and awq.
            samples: windows of text that are read, of the model's context or 2048 tokens.
            act_order: gptq rounds the features with the largest inputs first.
            asymmetric: give each group a zero besides its scale.
            device: where gptq and awq work, a block at a time: auto (a GPU if there is one), cpu, cuda.
            format: of the files: ours, or compressed-tensors', GPTQ's or AWQ's, which transformers and vLLM read too.
        """
        size = None if group == -1 else group
        options: dict[str, Any] = {"calibrate": calibrate, "bits": bits, "samples": samples, "act_order": act_order}
        options |= {"asymmetric": asymmetric, "device": device, "format": format}
        print(f"{write(model, out, method, size, **options)}, in {out}")

    return run
