"""`cs336 sweep`, `ablate`, `batch-size`, `leaderboard`: questions that take many runs."""

from typing import Annotated, Literal

from tyro.conf import Positional, arg

from cs336.cli.common import Ints, MaybePath, Path, Stopped, check_output


def sweep(study: Positional[Path], retry: bool = False, workers: int | None = None, gpus: Ints = ()) -> None:
    """Train the runs of a study that are not trained yet, and write which configuration is best, and why.

    Args:
        study: TOML: a base configuration, what varies, seeds, search (grid, random, halving), budget, where to run.
        retry: train runs that have failed once more.
        workers: runs at once on this machine, in place of what the study's [where] says.
        gpus: the GPU of each worker in turn, in place of it too: more workers than GPUs share them.
    """
    import dataclasses

    from cs336.experiments import Study, run_study
    from cs336.experiments.study import Local
    from cs336.experiments.summary import save
    from cs336.report import write_study_report
    from cs336.utils.stages import Interrupted

    of = Study.load(study)
    if workers is not None or gpus:
        there = of.where if isinstance(of.where, Local) else Local()
        where = dataclasses.replace(
            there, workers=there.workers if workers is None else workers, gpus=gpus or there.gpus
        )
        of = dataclasses.replace(of, where=where)
    try:
        entries = run_study(of, retry=retry)
    except Interrupted:
        print("stopped; to continue, run the same command again")
        raise Stopped from None
    best = save(of, entries)
    _said_of(entries)
    if best is not None:
        print(f"best: {best}")
    print(f"report: {write_study_report(of.directory)}")


def ablate(
    config: Path,
    vary: Annotated[str, arg(metavar="KEY=VALUE,VALUE")],
    directory: Path,
    match: Literal["params", "flops", "none"] = "params",
    seeds: int = 3,
    budget: str | None = None,
    metric: str = "val/loss",
    workers: int = 1,
    gpus: Ints = (),
    retry: bool = False,
) -> None:
    """Train configurations that differ in one thing and are of one size, and say whether they differ by chance.

    `--vary mixer=attention,mamba2`, `mlp=all`, `norm=rms_norm,layer_norm`, `positions=...`, `placement=pre,post`, or a
    dotted key: `--vary optimizer.kind=adamw,muon --match none`. The first value is the reference.

    Args:
        config: TOML of `cs336 train`, with the budget of each run.
        vary: a part of every layer or a dotted key, and kinds or TOML values; all: every kind there is.
        directory: where the runs and the report are written; the same command continues them.
        match: solve the MLPs' d_ff for equal parameters, or for equal FLOPs a token.
        seeds: runs of each value.
        budget: of all runs together: 2e15flops, 500Mtok, 2h.
        metric: the lower the better.
        workers: runs at once.
        gpus: the GPU of each worker in turn.
        retry: train runs that have failed once more.
    """
    from cs336.experiments import run_study
    from cs336.experiments.ablation import Ablation, save
    from cs336.experiments.arms import make_arms, split_values
    from cs336.experiments.study import Local
    from cs336.report import write_ablation_report
    from cs336.training import TrainConfig
    from cs336.utils import config as configs
    from cs336.utils.stages import Interrupted

    key, equals, values = vary.partition("=")
    if not equals:
        raise ValueError(f"--vary takes KEY=VALUE,VALUE, got {vary!r}")
    base = TrainConfig.from_table({"run_dir": "."} | configs.read_table(config))
    arms = make_arms(base, key.strip(), split_values(values), match)
    where = Local(workers=workers, gpus=gpus)
    ablation = Ablation(directory, key.strip(), arms, seeds, match, budget, metric, where)
    for arm in arms:
        width = "" if arm.d_ff is None else f", d_ff {arm.d_ff:,}, {100 * arm.residual:+.3f} % from the first"
        print(f"{arm.name}: {arm.config.model.num_parameters():,} parameters{width}")
    try:
        entries = run_study(ablation, retry=retry)
    except Interrupted:
        print("stopped; to continue, run the same command again")
        raise Stopped from None
    for row in save(ablation, entries):
        if row.mean is not None:
            interval = "" if row.half_width is None else f" ± {row.half_width:.4f}"
            p = "" if row.p is None else f", p {row.p:.4f}{' (significant)' if row.significant else ''}"
            print(f"{row.name}: {metric} {row.mean:.4f}{interval}{p}")
    _said_of(entries)
    print(f"report: {write_ablation_report(directory)}")


def batch_size(
    config: Path,
    directory: Path,
    factors: tuple[int, ...] = (1, 2, 4, 8),
    places: int = 3,
    tokens: int | None = None,
    tolerance: float = 0.01,
) -> None:
    """Measure how large a batch may be before it wastes tokens, and recommend one.

    Trains the run, measures its gradient noise scale (arXiv:1812.06162), and branches off with larger batches from its
    checkpoints (arXiv:2505.23971).

    Args:
        config: TOML of `cs336 train`: its batch_size is the smallest that is compared, its budget of steps, tokens or
            FLOPs.
        directory: where everything is written; the same command continues it.
        factors: of batch_size, from 1 up.
        places: checkpoints that branches begin from, evenly over the run.
        tokens: of a branch; a tenth of the run's if not given.
        tolerance: nats that a larger batch may lose.
    """
    from cs336.experiments.batch_size import Branching, measure_batch_size
    from cs336.report import write_batch_size_report
    from cs336.training import TrainConfig
    from cs336.utils import config as configs
    from cs336.utils.stages import Interrupted

    base = TrainConfig.from_table({"run_dir": "."} | configs.read_table(config))
    try:
        found = measure_batch_size(Branching(directory, base, factors, places, tokens, tolerance))
    except Interrupted:
        print("stopped; to continue, run the same command again")
        raise Stopped from None
    print(f"recommended: batch_size {found['recommended']}, optimizer.lr {found['lr']:.3g}")
    print(found["reason"])
    print(f"report: {write_batch_size_report(directory)}")


def leaderboard_run(
    rule: Annotated[Positional[str], arg(metavar="RULE")],
    data: Path,
    directory: Path,
    recipe: MaybePath = None,
    author: str = "",
) -> None:
    """Train under a board's rule, and write a submission: one command to repeat it, its log, its loss, samples.

    Args:
        rule: as `cs336 leaderboard rules` lists them.
        data: a directory with token shards in train/ and val/, and tokenizer.json beside train's.
        directory: of the submission; the same command continues its run.
        recipe: TOML of `cs336 train` without data, budget and run_dir. Our best for the rule if not given.
        author: who submits it.
    """
    from cs336.experiments.leaderboard import compete
    from cs336.report import write_report
    from cs336.utils import config as configs
    from cs336.utils.stages import Interrupted

    try:
        entry = compete(rule, data, directory, None if recipe is None else configs.read_table(recipe), author)
    except Interrupted:
        print("stopped; to continue, run the same command again")
        raise Stopped from None
    print(f"{rule}: {entry['bits_per_byte']:.4f} bits per byte, loss {entry['loss']:.4f}")
    print(f"submission: {directory}, report: {write_report(directory / 'run')}")


def leaderboard_rules() -> None:
    """List the boards."""
    from cs336.experiments.leaderboard import load_rule, rules

    for name in rules():
        rule = load_rule(name)
        print(f"{name}: {rule.title}. Data: {rule.text}. Device: {rule.device}.")


def leaderboard_table(submissions: Positional[Path], output: MaybePath = None) -> None:
    """Rank the submissions below a directory, as Markdown.

    Args:
        submissions: folders that `cs336 leaderboard run` wrote, at any depth.
        output: write it here.
    """
    from cs336.experiments.leaderboard import markdown, read_submissions
    from cs336.utils.files import write_text

    check_output(output)
    table = markdown(read_submissions(submissions))
    if output is None:
        print(table, end="")
        return
    write_text(output, table)
    print(output)


def _said_of(entries) -> None:
    """What is not done, in a line each."""
    for state, why in (("failed", "see the report; --retry trains them again"), ("waiting", "beyond the budget")):
        if count := sum(entry.state == state for entry in entries):
            print(f"{count} {'run' if count == 1 else 'runs'} {state}: {why}")
