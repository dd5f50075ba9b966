"""The program: finds the verb, runs it, and turns what went wrong into a sentence and an exit status."""

import difflib
import errno
import inspect
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import tyro
from tyro.conf import FlagCreatePairsOff

from cs336 import __version__
from cs336.cli import (
    NOT_WHOLE,
    alignment,
    data,
    data_classifier,
    experiments,
    plan_parallel,
    plan_run,
    scaling,
    scaling_api,
    scaling_designs,
    tokenizer,
)
from cs336.cli.alignment import dpo, grpo, ppo, reward, sft
from cs336.cli.common import Make, Run, Stopped
from cs336.cli.compress import compress
from cs336.cli.env import bench, env
from cs336.cli.evaluate import evaluate
from cs336.cli.model import compare_hf, generate, info, report
from cs336.cli.quickstart import quickstart
from cs336.cli.serving import chat, serve
from cs336.cli.train import train

DESCRIPTION = "One language-model stack, from raw bytes to trained models. Begin with: cs336 quickstart"

Group = tuple[Mapping[str, Any], str]  # verbs, or groups of them by name; what they are for
VERBS: dict[str, Make] = {
    "quickstart": quickstart,
    "train": train,
    "sft": sft,
    "reward": reward,
    "dpo": dpo,
    "ppo": ppo,
    "grpo": grpo,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "evaluate": evaluate,
    "compress": compress,
    "compare-hf": compare_hf,
    "report": report,
    "env": env,
    "bench": bench,
}
OWN_OPTIONS = {
    "train",
    "bench",
    "sft",
    "reward",
    "dpo",
    "ppo",
    "grpo",
    "compress",
}  # which read the rest of the command line themselves
TOKENIZER_VERBS: dict[str, Run] = {
    "train": tokenizer.train,
    "encode": tokenizer.encode,
    "decode": tokenizer.decode,
    "inspect": tokenizer.inspect,
    "convert": tokenizer.convert,
    "compare": tokenizer.compare,
}
MODEL_VERBS: dict[str, Run] = {"info": info}
DATA_VERBS: dict[str, Run] = {"build": data.build, "demo": data.demo}
ALIGN_VERBS: dict[str, Run] = {"demo": alignment.demo, "ladder": alignment.ladder, "pairs": alignment.pairs}
SCALING_VERBS: dict[str, Run] = {
    "fit": scaling.fit,
    "predict": scaling.predict,
    "plot": scaling.plot,
    "collapse": scaling.collapse,
    "forecast": scaling.forecast,
    "grade": scaling.grade,
    "design": scaling_designs.design,
    "coord-check": scaling_designs.coord_check,
}
API_VERBS: dict[str, Run] = {
    "serve": scaling_api.serve,
    "add-user": scaling_api.add_user,
    "users": scaling_api.users,
    "reveal": scaling_api.reveal,
    "submit": scaling_api.submit,
    "runs": scaling_api.runs,
    "status": scaling_api.status,
    "cancel": scaling_api.cancel,
    "account": scaling_api.account,
    "predict": scaling_api.predict,
    "leaderboard": scaling_api.leaderboard,
}
STUDY_VERBS: dict[str, Run] = {
    "sweep": experiments.sweep,
    "ablate": experiments.ablate,
    "batch-size": experiments.batch_size,
}
BOARD_VERBS: dict[str, Run] = {
    "run": experiments.leaderboard_run,
    "rules": experiments.leaderboard_rules,
    "table": experiments.leaderboard_table,
}
PLAN_VERBS: dict[str, Run] = {"run": plan_run.run, "parallel": plan_parallel.parallel}
CLASSIFIER_VERBS: dict[str, Run] = {"train": data_classifier.train, "apply": data_classifier.apply}
CLASSIFIER = {"classifier": (CLASSIFIER_VERBS, "Train and apply linear n-gram classifiers of documents.")}
API = {"api": (API_VERBS, "Serve training runs under a budget, and submit them.")}
GROUPS: dict[str, Group] = {
    "tokenizer": (TOKENIZER_VERBS, "Train and use byte-level BPE tokenizers."),
    "model": (MODEL_VERBS, "What a model is made of."),
    "data": (DATA_VERBS | CLASSIFIER, "Build training data from crawls, pages, papers, texts and tables."),
    "align": (ALIGN_VERBS, "Make preferences, and see all stages of alignment at work."),
    "leaderboard": (BOARD_VERBS, "Compete under a budget: rules over local files, and submissions to them."),
    "scaling": (SCALING_VERBS | API, "Fit scaling laws to finished runs, and predict others."),
    "plan": (PLAN_VERBS, "Predict what a run takes before paying for it."),
}
TREE: Mapping[str, Any] = VERBS | STUDY_VERBS | GROUPS


def main(arguments: list[str] | None = None) -> int:
    """As cs336.cli.main, whose verbs can be imported."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"cs336: {message}", file=sys.stderr)
            status = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return status
    except (Stopped, KeyboardInterrupt) as stop:
        if isinstance(stop, KeyboardInterrupt):
            print("\ninterrupted; training and quickstart go on with the same command", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `cs336 ... | head`
        _drop_output()
        return 1
    except (ValueError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        if os.environ.get("CS336_DEBUG") == "1":
            raise
        hint = " (CS336_DEBUG=1 shows where)" if isinstance(error, RuntimeError) else ""
        if isinstance(error, ModuleNotFoundError) and error.name:  # errors that say what to install name no module
            only = "only the tokenizer is installed. For the rest: pip install torch==2.13.0, then install cs336 again"
            hint = f": {only if error.name == 'torch' else NOT_WHOLE}"
        try:
            sys.stdout.flush()
        except OSError as full:  # what was printed, and would be tried again at the end
            _drop_output()
            if isinstance(error, OSError) and error.errno == full.errno and not error.filename:
                full.filename, error = "standard output", full
        print(f"cs336: {_sentence(error)}{hint}", file=sys.stderr)
        return 2


def _drop_output() -> None:
    """What is still to be written to standard output goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: list[str]) -> int:
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if verb == "--version":
        print(f"cs336 {__version__}")
        return 0
    if "OMP_WAIT_POLICY" not in os.environ:
        # libgomp reads this when torch loads. By default threads spin for milliseconds while they wait for each other.
        # Where another process takes a core, that makes training 10 times slower; an idle machine gains 3 % by it.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    _check_place(arguments)
    if verb in OWN_OPTIONS:
        return VERBS[verb](rest)() or 0
    app = tyro.extras.SubcommandApp()
    for name, make in VERBS.items():
        app.command(name=name)(_described(make, rest) if name == verb else _named(make))
    for name, run in STUDY_VERBS.items():
        app.command(name=name)(run)
    for name, (verbs, help) in GROUPS.items():
        app.command(_group(verbs), name=name, help=help)
    return (
        app.cli(prog="cs336", description=DESCRIPTION, args=arguments or ["--help"], config=(FlagCreatePairsOff,)) or 0
    )


def _group(verbs: Mapping[str, Any]) -> tyro.extras.SubcommandApp:
    app = tyro.extras.SubcommandApp()
    for name, found in verbs.items():
        if isinstance(found, tuple):
            app.command(_group(found[0]), name=name, help=found[1])
        else:
            app.command(name=name)(found)
    return app


def verb_paths(verbs: Mapping[str, Any] = TREE, *above: str) -> Iterator[tuple[str, ...]]:
    """Of all verbs, with their groups."""
    for name, found in verbs.items():
        if isinstance(found, tuple):
            yield from verb_paths(found[0], *above, name)
        else:
            yield (*above, name)


def _check_place(arguments: list[str]) -> None:
    """Raises ValueError for a verb that there is not, or that another group has, with the one that was meant; and for a
    group without a verb."""
    verbs, paths = TREE, list(verb_paths())
    for depth, word in enumerate(arguments):
        if word.startswith("-"):
            return
        if word not in verbs:
            above = " ".join(["cs336", *arguments[:depth]])
            there = [path for path in paths if path[-1] == word]
            nearer = [path for path in there if path[:depth] == tuple(arguments[:depth])]
            meant = [" ".join(("cs336", *path)) for path in nearer or there]
            meant = meant or [f"{above} {name}" for name in difflib.get_close_matches(word, verbs, 2, 0.6)]
            hint = " or ".join(f"`{name}`" for name in meant)
            known = f"did you mean {hint}?" if meant else f"`{above}` has {', '.join(verbs)}"
            raise ValueError(f"there is no `{above} {word}`: {known}")
        if not isinstance(verbs[word], tuple):
            return
        verbs = verbs[word][0]
    if arguments:
        raise ValueError(f"`cs336 {' '.join(arguments)}` has {', '.join(verbs)}: name one, or --help")


def _named(make: Make) -> Run:
    """In the list of verbs: the first line of its description."""

    def run() -> None:
        raise AssertionError(f"{make.__name__} was not made")

    run.__doc__ = (make.__doc__ or "").partition("\n")[0]
    return run


def _described(make: Make, rest: list[str]) -> Run:
    """The verb itself: its description, then that of its arguments."""
    run = make(rest)
    run.__doc__ = inspect.cleandoc(make.__doc__ or "") + "\n\n" + inspect.cleandoc(run.__doc__ or "")
    return run


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # of write(), which names nothing
        return f"standard output, or a file: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
