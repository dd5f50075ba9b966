"""`cs336 scaling design`, `coord-check`: which runs to make, and whether one learning rate serves every width."""

from typing import Any, Literal

from tyro.conf import Positional

from cs336.cli.common import Floats, MaybePath, Path, check_output
from cs336.utils.counted import counted

Kind = Literal["isoflop", "ladder", "wsd", "best"]


def design(
    kind: Positional[Kind],
    data: MaybePath = None,
    budgets: Floats = (),
    sizes: Floats = (),
    ratios: Floats = (),
    law: str = "epoch",
    points: int = 5,
    span: float = 4.0,
    ratio: float = 20.0,
    decay_part: float = 0.2,
    vocab_size: int | None = None,
    context_length: int = 128,
    head_dim: int = 16,
    aspect: int = 24,
    num_layers: int | None = None,
    d_ff_multiple: int = 16,
    lr_factor: float = 1.0,
    highest_lr: float = 0.02,
    batch_factor: float = 1.0,
    base: MaybePath = None,
    seeds: int = 1,
    directory: MaybePath = None,
    write: MaybePath = None,
) -> None:
    """List the runs that a law is fitted to, with their FLOPs, and write them as a study for `cs336 sweep`.

    isoflop: --budgets, each spent on several sizes. ladder: --sizes by --ratios. wsd: the same, where a size has one
    trunk that its runs branch off. best: one of --budgets, spent as --law says.

    Args:
        kind: isoflop, ladder, wsd or best.
        data: a directory with token shards in train/ and val/, which says the vocabulary; for --write.
        budgets: FLOPs of a run, as the model counts them.
        sizes: parameters, embeddings counted; the nearest model is taken.
        ratios: tokens a parameter.
        law: of best: what `fit --out` wrote, or epoch.
        points: of isoflop: sizes a budget.
        span: of isoflop: sizes go from 1 / span to span times the middle one.
        ratio: of isoflop: tokens a parameter of the middle one, about the optimum.
        decay_part: of wsd: of each run, in which the learning rate falls.
        vocab_size: where --data does not say it.
        context_length: tokens of a sequence.
        head_dim: features of a head, of every size.
        aspect: d_model over num_layers.
        num_layers: of every size, in place of --aspect.
        d_ff_multiple: that d_ff, 8/3 d_model, is rounded to.
        lr_factor: over the Step Law's learning rate.
        highest_lr: no run has a higher one.
        batch_factor: over the Step Law's batch.
        base: TOML of `cs336 train`: keys that all runs share.
        seeds: runs of each.
        directory: where the study writes; runs/NAME of the file if not given.
        write: the study's TOML.
    """
    from cs336.scaling import EPOCH, designs
    from cs336.scaling.saved import load_fit
    from cs336.utils import config as configs
    from cs336.utils.files import write_text

    if write is not None and data is None:
        raise ValueError("a study needs --data, a directory with token shards in train/ and val/")
    vocab_size = _vocab_size(data) if vocab_size is None else vocab_size
    family = designs.Family(
        vocab_size, context_length, head_dim, aspect, d_ff_multiple, lr_factor, highest_lr, batch_factor, num_layers
    )
    wanted, unwanted = (
        (("budgets",), ("sizes", "ratios")) if kind in ("isoflop", "best") else (("sizes", "ratios"), ("budgets",))
    )
    given = {"budgets": budgets, "sizes": sizes, "ratios": ratios}
    if not all(given[name] for name in wanted) or any(given[name] for name in unwanted):
        raise ValueError(f"{kind} takes --{' and --'.join(wanted)}, and no --{' or --'.join(unwanted)}")
    match kind:
        case "isoflop":
            runs = designs.isoflop(family, budgets, points, span, ratio)
        case "ladder":
            runs = designs.ladder(family, sizes, ratios)
        case "wsd":
            runs = designs.anneal(family, sizes, ratios, decay_part)
        case "best":
            fitted = EPOCH if law == "epoch" else load_fit(Path(law)).law
            runs = [designs.best(family, flops, fitted) for flops in budgets]
    print(designs.table(runs))
    total = designs.accounts(runs)
    saved = f", {100 * total.saved:.0f} % fewer than {total.separately:.4g} without trunks" if total.saved else ""
    print(f"{len(runs)} runs of {seeds} {'seed' if seeds == 1 else 'seeds'}, {seeds * total.flops:.4g} FLOPs{saved}")
    if write is None or data is None:
        return
    shared = {"schedule": {"kind": "linear", "min_lr_ratio": 0.0}, "eval_interval": 0, "sample_interval": 0}
    shared |= {"data": {side: str((data / side).resolve()) for side in ("train", "val")}}
    shared |= {} if base is None else configs.read_table(base)
    table: dict[str, Any] = {} if directory is None else {"directory": str(directory)}
    write_text(write, configs.dumps(table | {"seeds": seeds} | designs.study(runs, shared)))
    print(f"{write}: train them with `cs336 sweep {write}`")


def coord_check(
    widths: tuple[int, ...] = (32, 64, 128, 256),
    lr: float = 3e-3,
    steps: int = 4,
    seeds: int = 3,
    out: MaybePath = None,
) -> None:
    """How far activations move in the first steps, against the width: under muP equally far, else further.

    Args:
        widths: of d_model, multiples of 16; the smallest is muP's base.
        lr: of AdamW, at the base.
        steps: after which it is measured.
        seeds: that it is the mean of.
        out: a picture. Needs matplotlib: pip install 'cs336[plot]'.
    """
    from cs336.scaling.coordinates import measure

    check_output(out)
    kinds = {"standard": False, "muP": True}
    checks = {
        name: measure(widths, mup=mup, lr=lr, steps=steps, seeds=seeds, progress=True) for name, mup in kinds.items()
    }
    for name, check in checks.items():
        print(f"{name}: RMS of the change after {counted(steps, 'step')} at widths {', '.join(map(str, check.widths))}")
        for activation, slope in check.slopes().items():
            sizes = "  ".join(f"{size:9.4f}" for size in check.moved[activation][:, -1])
            print(f"  {activation:12} {sizes}   width^{slope:+.2f}")
    if out is not None:
        from cs336.scaling.plot import draw_coordinates

        draw_coordinates(checks, out)
        print(out)


def _vocab_size(data: Path | None) -> int:
    """The vocabulary of token shards, rounded up to a multiple of 64."""
    from cs336.utils.shards import read_meta

    if data is None:
        raise ValueError("say --vocab-size, or --data with token shards in train/ and val/")
    meta = read_meta(data / "train")
    return -(-meta.vocab_size // 64) * 64
