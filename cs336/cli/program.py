"""The program: finds the verb, runs it, and turns what went wrong into a sentence and an exit status."""

import contextlib
import difflib
import errno
import inspect
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import tyro

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
from cs336.cli.common import OPTIONS, Late, OwnOptions, Stopped
from cs336.cli.compress import compress
from cs336.cli.env import bench, env
from cs336.cli.evaluate import evaluate
from cs336.cli.model import compare_hf, generate, info, report
from cs336.cli.quickstart import quickstart
from cs336.cli.serving import chat, serve
from cs336.cli.train import train

IMPORTING = "<frozen importlib._bootstrap>"  # the file of the frames below a module that is being imported
ANSWERING = (["generate"], ["chat"], ["serve"])  # which leave nothing to go on with
DESCRIPTION = "One language-model stack, from raw bytes to trained models. Begin with: cs336 quickstart"


class Group(NamedTuple):
    verbs: Mapping[str, Any]
    """Functions, Lates and groups, by name."""
    description: str


TREE: dict[str, Any] = {
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
    "sweep": experiments.sweep,
    "ablate": experiments.ablate,
    "batch-size": experiments.batch_size,
    "tokenizer": Group(
        {
            "train": tokenizer.train,
            "encode": tokenizer.encode,
            "decode": tokenizer.decode,
            "inspect": tokenizer.inspect,
            "convert": tokenizer.convert,
            "compare": tokenizer.compare,
        },
        "Train and use byte-level BPE tokenizers.",
    ),
    "model": Group({"info": info}, "What a model is made of."),
    "data": Group(
        {
            "build": data.build,
            "demo": data.demo,
            "stdlib": data.stdlib,
            "classifier": Group(
                {"train": data_classifier.train, "apply": data_classifier.apply},
                "Train and apply linear n-gram classifiers of documents.",
            ),
        },
        "Build training data from crawls, pages, papers, texts and tables.",
    ),
    "align": Group(
        {"demo": alignment.demo, "ladder": alignment.ladder, "pairs": alignment.pairs},
        "Make preferences, and see all stages of alignment at work.",
    ),
    "leaderboard": Group(
        {
            "run": experiments.leaderboard_run,
            "rules": experiments.leaderboard_rules,
            "table": experiments.leaderboard_table,
        },
        "Compete under a budget: rules over local files, and submissions to them.",
    ),
    "scaling": Group(
        {
            "fit": scaling.fit,
            "predict": scaling.predict,
            "plot": scaling.plot,
            "collapse": scaling.collapse,
            "forecast": scaling.forecast,
            "grade": scaling.grade,
            "design": scaling_designs.design,
            "coord-check": scaling_designs.coord_check,
            "api": Group(
                {
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
                },
                "Serve training runs under a budget, and submit them.",
            ),
        },
        "Fit scaling laws to finished runs, and predict others.",
    ),
    "plan": Group(
        {"run": plan_run.run, "parallel": plan_parallel.parallel}, "Predict what a run takes before paying for it."
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """As cs336.cli.main, whose verbs can be imported."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _interrupts_kept(), warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"cs336: {message}", file=sys.stderr)
            status = _run(words)
        sys.stdout.flush()
        return status
    except (Stopped, KeyboardInterrupt) as stop:
        if isinstance(stop, KeyboardInterrupt):
            hint = "" if words[:1] in ANSWERING else "; training and quickstart go on with the same command"
            print(f"\ninterrupted{hint}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `cs336 ... | head`
        _drop_output()
        return 1
    except (ValueError, OSError, ImportError, RuntimeError, FloatingPointError, MemoryError) as error:
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


@contextlib.contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Where Ctrl-C falls into the initialisation of a compiled module, the import drops KeyboardInterrupt, and what it
    left half made fails as another error. Raises KeyboardInterrupt for it. A Ctrl-C outside of imports is not noted:
    what fails after a verb has dealt with it, as chat does, is another matter."""
    own = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not own:
        yield
        return
    seen = list[int]()

    def note(number: int, frame: Any) -> None:
        if any(f.f_code.co_filename == IMPORTING for f, _ in traceback.walk_stack(frame)):
            seen.append(number)
        own(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    except (AttributeError, ImportError, SystemError) as error:
        if seen:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, own)


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
    if isinstance(own := TREE.get(verb), OwnOptions):
        return own.make(rest)() or 0
    app = _app(TREE, arguments)
    return app.cli(prog="cs336", description=DESCRIPTION, args=arguments or ["--help"], config=OPTIONS) or 0


def _app(verbs: Mapping[str, Any], arguments: list[str]) -> tyro.extras.SubcommandApp:
    app = tyro.extras.SubcommandApp()
    for name, found in verbs.items():
        rest = arguments[1:] if arguments[:1] == [name] else None
        if isinstance(found, Group):
            app.command(_app(found.verbs, rest or []), name=name, help=found.description)
        else:
            app.command(name=name)(
                _listed(found) if rest is None else found.verb(rest) if isinstance(found, Late) else found
            )
    return app


def _listed(verb: Any) -> Callable[[], None]:
    """A verb that is not called, for the list of verbs: what the first paragraph says of it."""

    def listed() -> None:
        raise AssertionError("a verb that is listed was called")

    listed.__doc__ = inspect.cleandoc(verb.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    return listed


def verb_paths(verbs: Mapping[str, Any] = TREE, *above: str) -> Iterator[tuple[str, ...]]:
    """Of all verbs, with their groups."""
    for name, found in verbs.items():
        if isinstance(found, Group):
            yield from verb_paths(found.verbs, *above, name)
        else:
            yield (*above, name)


def _check_place(arguments: list[str]) -> None:
    """Raises ValueError for a verb that there is not, or that another group has, with the one that was meant; and for a
    group without a verb."""
    verbs: Mapping[str, Any] = TREE
    paths = list(verb_paths())
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
        if not isinstance(verbs[word], Group):
            return
        verbs = verbs[word].verbs
    if arguments:
        raise ValueError(f"`cs336 {' '.join(arguments)}` has {', '.join(verbs)}: name one, or --help")


def _sentence(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"the memory of this machine does not suffice: {str(error) or 'give it less at once'}"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # of write(), which names nothing
        return f"standard output, or a file: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
