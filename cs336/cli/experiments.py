"""`cs336 sweep`, `ablate`, `batch-size`, `leaderboard`: questions that take many runs."""

from tyro.conf import Positional

from cs336.cli.common import Path, Stopped


def sweep(study: Positional[Path], retry: bool = False) -> None:
    """Train the runs of a study that are not trained yet, and write which configuration is best, and why.

    Args:
        study: TOML: a base configuration, what varies, seeds, search (grid, random, halving), budget, where to run.
        retry: train runs that have failed once more.
    """
    from cs336.experiments import Study, run_study
    from cs336.experiments.summary import save
    from cs336.report import write_study_report
    from cs336.utils.stages import Interrupted

    of = Study.load(study)
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


def _said_of(entries) -> None:
    """What is not done, in a line each."""
    for state, why in (("failed", "see the report; --retry trains them again"), ("waiting", "beyond the budget")):
        if count := sum(entry.state == state for entry in entries):
            print(f"{count} {'run' if count == 1 else 'runs'} {state}: {why}")
