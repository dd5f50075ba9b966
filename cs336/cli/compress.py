"""`cs336 compress`: a method a function, whose parameters are the options that the method has."""

import difflib
import os
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from cs336.cli import quantize
from cs336.cli.common import OPTIONS, Device, Model, OwnOptions, Path, Run
from cs336.cli.quantize import Calibrate, OutDir

Windows = Annotated[int, arg(help="windows of the text that are read.")]


@OwnOptions
def compress(arguments: list[str]) -> Run:
    """Write a smaller model: a directory that generate, serve, chat and evaluate take."""

    def run() -> int:
        rest = list(arguments)
        if rest[:1] == ["pareto"]:
            tyro.cli(pareto, prog="cs336 compress pareto", args=rest[1:], config=OPTIONS)
            return os.EX_OK
        method = _taken(rest)
        if method is None and {"-h", "--help"} & set(rest):
            print(_overview())
            return os.EX_OK
        call = METHODS[method or DEFAULT]
        named = "" if method is None else f" --method {method}"
        tyro.cli(call, prog=f"cs336 compress{named}", args=rest, config=OPTIONS)
        return os.EX_OK

    return run


def magnitude(model: Model, out: OutDir, calibrate: Calibrate, sparsity: str = "0.5", samples: Windows = 128) -> None:
    """The smallest weights become zero.

    Args:
        sparsity: the share of each matrix, or 2:4, two of each four neighbours in a row.
    """
    _pruned(model, out, "magnitude", calibrate, samples, sparsity=_sparsity(sparsity))


def wanda(model: Model, out: OutDir, calibrate: Calibrate, sparsity: str = "0.5", samples: Windows = 128) -> None:
    """Weights that matter least become zero: small ones, of features that are small on text.

    Args:
        sparsity: the share of each row, or 2:4, two of each four neighbours in it.
    """
    _pruned(model, out, "wanda", calibrate, samples, sparsity=_sparsity(sparsity))


def prune_depth(
    model: Model, out: OutDir, calibrate: Calibrate, sparsity: float = 0.25, samples: Windows = 128
) -> None:
    """Layers that change their tokens least are dropped.

    Args:
        sparsity: the share of the layers that go.
    """
    _pruned(model, out, "prune-depth", calibrate, samples, sparsity=sparsity)


def prune_width(
    model: Model,
    out: OutDir,
    calibrate: Calibrate,
    sparsity: float = 0.25,
    head_sparsity: float = 0.0,
    samples: Windows = 128,
) -> None:
    """MLP neurons and attention heads that say least are taken out.

    Args:
        sparsity: the share of the neurons of each MLP that goes.
        head_sparsity: the share of the key-value heads that goes, with their query heads.
    """
    _pruned(model, out, "prune-width", calibrate, samples, sparsity=sparsity, head_sparsity=head_sparsity)


def distill(
    model: Positional[Path],
    student: Path,
    out: OutDir,
    calibrate: Path,
    steps: int = 200,
    batch_size: int = 8,
    lr: float = 1e-4,
    top_k: int = 64,
    samples: Windows = 1024,
    divergence: Literal["forward", "reverse"] = "forward",
    cross_entropy: float = 0.0,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """A smaller model, such as a pruned one, learns what the model expects.

    Args:
        model: the teacher: an export, a checkpoint, or a run directory, of which the newest is taken.
        student: a smaller model of the same tokenizer, which is not changed.
        calibrate: text, JSON lines or parquet to learn from, a tenth of which is held out to measure on.
        steps: of the optimizer.
        batch_size: windows of text a step.
        lr: the learning rate at its highest.
        top_k: tokens that the teacher names in each place, kept on disk.
        divergence: forward covers all that the teacher allows; reverse keeps to what it prefers.
        cross_entropy: the share of the loss that is the text's own next token.
        seed: of the order of the windows.
    """
    from cs336.compression import DistillConfig
    from cs336.compression import distill as learn

    config = DistillConfig(steps, batch_size, lr, top_k, samples, divergence, cross_entropy, seed)
    print(f"{learn(model, student, out, calibrate=calibrate, config=config, device=device)}, in {out}")


def pareto(
    models: Positional[tuple[Path, ...]],
    text: Path,
    out: Path = Path("pareto"),  # noqa: B008 (immutable)
    tasks: tuple[str, ...] = (),
    limit: int | None = None,
    device: Device = "auto",
) -> None:
    """Models side by side: what each costs and what it is worth, in pareto.json and on a page.

    Args:
        models: exports, checkpoints or run directories.
        text: text, JSON lines or parquet that none of them has read, for bits per byte.
        out: the directory to write; what is measured there already is not measured again.
        tasks: KIND:FILE or TOML files, as cs336 evaluate takes them.
        limit: ask no more questions of a task than this.
    """
    from cs336.compression import pareto as measure
    from cs336.report.pareto import write_pareto

    measure(models, out, text=text, tasks=tasks, limit=limit, device=device)
    print(write_pareto(out / "pareto.json"))


METHODS: dict[str, Run] = {
    "int8": quantize.int8,
    "int4": quantize.int4,
    "fp8": quantize.fp8,
    "gptq": quantize.gptq,
    "awq": quantize.awq,
    "magnitude": magnitude,
    "wanda": wanda,
    "prune-depth": prune_depth,
    "prune-width": prune_width,
    "distill": distill,
}
DEFAULT = "int8"


def _pruned(model: Path, out: Path, method: str, calibrate: Path, samples: int, **options: Any) -> None:
    from cs336.compression import prune

    print(f"{prune(model, out, method, calibrate=calibrate, samples=samples, **options)}, in {out}")


def _sparsity(said: str) -> Any:
    if said == "2:4":
        return said
    try:
        return float(said)
    except ValueError:
        raise ValueError(f"--sparsity is 2:4 or a share from 0 to below 1, got {said!r}") from None


def _taken(arguments: list[str]) -> str | None:
    """The method that the arguments name, which are left without it."""
    for i, argument in enumerate(arguments):
        flag, equals, method = argument.partition("=")
        if flag != "--method":
            continue
        if not equals and i + 1 < len(arguments):
            method = arguments[i + 1]
        if method not in METHODS:
            close = difflib.get_close_matches(method, METHODS, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"--method is one of {', '.join(METHODS)}, got {method!r}{hint}")
        del arguments[i : i + (1 if equals else 2)]
        return method
    return None


def _overview() -> str:
    rows = [f"  {name:<12}{(call.__doc__ or '').partition(chr(10))[0]}" for name, call in METHODS.items()]
    return "\n".join(
        [
            "usage: cs336 compress MODEL --out DIR [--method METHOD] [OPTIONS]",
            "       cs336 compress pareto MODEL MODEL ... --text FILE [OPTIONS]",
            "",
            (compress.__doc__ or "").strip(),
            "",
            f"methods ({DEFAULT} if none is named), whose options --method METHOD --help shows:",
            *rows,
        ]
    )
