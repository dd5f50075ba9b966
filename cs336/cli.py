"""`cs336 VERB`: one thin function a verb.

A verb is made when it is asked for: its imports are inside, so that `cs336 --help` does not wait for torch.
"""

import contextlib
import inspect
import itertools
import os
import pathlib
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Annotated, Any, Literal

import tyro
from tyro.conf import AvoidSubcommands, DisallowNone, FlagCreatePairsOff, Positional, arg

from cs336 import __version__
from cs336.utils.documents import holds_documents, open_bytes, read_documents, refuse_binary, unpacking
from cs336.utils.special_tokens import END_OF_TEXT
from cs336.utils.terminal import visible

DESCRIPTION = "One language-model stack, from raw bytes to trained models. Begin with: cs336 quickstart"
ROOT = pathlib.Path(__file__).parents[1]

Path = pathlib.Path
MaybePath = DisallowNone[Path | None]
Paths = Annotated[tuple[Path, ...], arg(metavar="[PATH ...]")]
Run = Callable[..., int | None]


class Stopped(Exception):
    """A signal stopped a run that can be continued."""


def quickstart(arguments: list[str]) -> Run:
    """Text to report in minutes: train a tokenizer and a language model, evaluate, generate.

    Stages whose output is current are skipped; after Ctrl-C the same command continues.
    """
    from cs336.quickstart import Interrupted, Quickstart
    from cs336.quickstart import quickstart as main_job

    def run(settings: Annotated[Quickstart, arg(name="")]) -> None:
        try:
            main_job(settings)
        except Interrupted:
            raise Stopped from None

    return run


def train(arguments: list[str]) -> Run:
    """Train a model on token shards, or continue the run that is in --run-dir.

    Settings come from --config FILE and from options, which win. `cs336 tokenizer encode --shards` makes the data.
    """
    from cs336.quickstart import keep_tokenizer, sampler
    from cs336.report import write_report
    from cs336.tokenizer import Tokenizer
    from cs336.training import TrainConfig, Trainer

    file = _option(arguments, "--config")
    default: Any = tyro.MISSING_NONPROP if file is None else TrainConfig.from_toml(file)

    def run(
        settings: Annotated[TrainConfig, arg(name=""), AvoidSubcommands] = default,
        config: MaybePath = None,
        tokenizer: MaybePath = None,
        prompt: tuple[str, ...] = ("",),
        print_config: bool = False,
    ) -> None:
        """
        Args:
            config: TOML file of settings, as --print-config writes it.
            tokenizer: tokenizer.json of the data: the run then writes samples, and exports it with the model. Kept in
                the run directory.
            prompt: what samples begin with; an empty one begins a document.
            print_config: print the settings as TOML, and do nothing else.
        """
        if print_config:
            print(settings.to_toml(), end="")
            return
        kept = settings.run_dir / "tokenizer.json"
        loaded = Tokenizer.load(tokenizer or kept) if tokenizer or kept.exists() else None
        trainer = Trainer(
            settings, tokenizer=loaded, sample=None if loaded is None else sampler(loaded, prompt, settings.seed)
        )
        if tokenizer is not None and loaded is not None:
            keep_tokenizer(loaded, settings.run_dir)
        finished = trainer.train().finished
        print(f"report: {write_report(settings.run_dir)}")
        if not finished:
            raise Stopped

    return run


def generate(arguments: list[str]) -> Run:
    """Continue a prompt with a trained model, as it is written."""
    import torch

    from cs336.inference import SamplingParams, stream
    from cs336.inference.load import find_model, find_tokenizer, load_model
    from cs336.tokenizer import Tokenizer

    def run(
        model: Positional[Path],
        prompt: str = "",
        tokenizer: MaybePath = None,
        device: str = "auto",
        sampling: Annotated[SamplingParams, arg(name="")] = SamplingParams(),  # noqa: B008 (frozen)
    ) -> None:
        """
        Args:
            model: an export, a checkpoint, or a run directory, of which the newest is taken.
            prompt: text to continue; - reads it from standard input, an empty one begins a document.
            tokenizer: tokenizer.json, if it is not where the model is.
            device: auto (a GPU if there is one), cpu, cuda.
        """
        found = find_model(model)
        loaded = Tokenizer.load(tokenizer or find_tokenizer(found))
        prompt = sys.stdin.read() if prompt == "-" else prompt
        network = load_model(found, device)
        torch.seed()  # without --seed every run is another
        shown = visible if sys.stdout.isatty() else str
        pieces = stream(network, loaded, prompt, sampling)
        print(shown(prompt + next(pieces, "")), end="", flush=True)  # together: a prompt that is refused is not written
        for piece in pieces:
            print(shown(piece), end="", flush=True)
        print()

    return run


def report(arguments: list[str]) -> Run:
    """Write a run directory's report.html."""
    from cs336.report import write_report

    def run(run_dir: Positional[Path]) -> None:
        """
        Args:
            run_dir: of a training run, finished or not.
        """
        print(write_report(run_dir))

    return run


def env(arguments: list[str]) -> Run:
    """What is installed, what is compiled, and what is missing."""
    from cs336.env import print_env

    def run() -> None:
        print_env()

    return run


def bench(arguments: list[str]) -> Run:
    """Time the kernels and training beside their peers: `cs336 bench ops`, `cs336 bench train`."""
    if not (ROOT / "benchmarks" / "run.py").exists():
        raise FileNotFoundError(
            "the benchmarks are in the repository, not in an installed package: run this in a clone"
        )

    def run() -> int:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "benchmarks.run", *arguments]
        return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=False).returncode

    return run


# ---- tokenizer ----


def tokenizer_train(
    inputs: Positional[Paths],
    output: Path = Path("tokenizer.json"),  # noqa: B008 (immutable)
    vocab_size: int = 4096,
    special_tokens: tuple[str, ...] = (END_OF_TEXT,),
    pattern: str = "gpt2",
    num_threads: DisallowNone[int | None] = None,
) -> None:
    """Train byte-pair encoding on text, JSON lines, parquet, compressed or not, or directories of them.

    Args:
        inputs: files or directories; standard input if there are none.
        output: where the tokenizer goes.
        vocab_size: tokens, the 256 bytes and the special ones included.
        special_tokens: texts that stand for one id; they come after the inputs.
        pattern: how text is split first: gpt2, cl100k, o200k or a regular expression.
        num_threads: as many as there are, if not given.
    """
    from cs336.tokenizer import Tokenizer

    if not inputs and (files := [text for text in special_tokens if os.path.exists(text)]):
        raise ValueError(f"--special-tokens has the name of a file, {files[0]}: name the files before the options")
    if not inputs and sys.stdin.isatty():
        print("reading standard input, up to Ctrl-D", file=sys.stderr)
    for path in inputs:
        if path.is_file() and not holds_documents(path):
            refuse_binary(path)
    source = list(inputs) or [Path("/dev/stdin")]
    trained = Tokenizer.train(source, vocab_size, special_tokens, pattern, num_threads, progress=sys.stderr.isatty())
    if not trained.merges and len(trained) < vocab_size:
        raise ValueError(f"there is nothing to merge in the text, so {output} was not written")
    trained.save(output)
    print(f"{output}: {trained.vocab_size} tokens, fingerprint {trained.fingerprint[:16]}")


def tokenizer_encode(
    tokenizer: Positional[Path],
    inputs: Positional[Paths] = (),
    shards: MaybePath = None,
    val_fraction: float = 0.02,
    special: bool = False,
) -> None:
    """Text to token ids: as numbers on standard output, or as token shards to train on.

    Args:
        tokenizer: tokenizer.json, ours or Hugging Face's.
        inputs: files of text, .gz, .xz and .bz2 unpacked, one after the other; standard input if there are none. For
            --shards also JSON lines, parquet, and directories.
        shards: directory that gets token shards: train/ and val/, documents held out by a hash of their text.
        val_fraction: of the documents, held out in val/; 0 writes the shards into the directory itself.
        special: numbers alone: read special tokens in the text as their ids, not as ordinary text.
    """
    from cs336.tokenizer import convert

    loaded = convert.load(tokenizer)
    if shards is not None:
        from cs336.data import tokenize_corpus, tokenize_documents

        if not inputs:
            raise ValueError("--shards needs files or directories to read")
        documents = read_documents(inputs)
        if val_fraction > 0:
            train, val = tokenize_corpus(documents, loaded, shards, val_fraction=val_fraction, progress=True)
            written = {shards / "train": train, shards / "val": val}
        else:
            written = {shards: tokenize_documents(documents, loaded, shards, progress=True)}
        for place, meta in written.items():
            print(f"{place}: {meta.tokens:,} tokens of {meta.documents:,} documents, {meta.text_bytes:,} bytes of text")
        return
    if separate := [path for path in inputs if path.exists() and holds_documents(path)]:
        raise ValueError(f"{separate[0]} holds separate documents: give --shards DIRECTORY to encode them")
    for i, token_id in enumerate(loaded.encode_iterable(_blocks(inputs), "all" if special else (), ())):
        sys.stdout.write(f"{token_id}\n" if i % 16 == 15 else f"{token_id} ")
    sys.stdout.write("\n")


def tokenizer_decode(tokenizer: Positional[Path], inputs: Positional[Paths] = ()) -> None:
    """Token ids to the bytes they stand for, on standard output.

    Args:
        tokenizer: tokenizer.json, ours or Hugging Face's.
        inputs: files of numbers, or .bin token shards; standard input if there are none.
    """
    from cs336.tokenizer import convert

    loaded = convert.load(tokenizer)
    for ids in _ids(inputs):
        sys.stdout.buffer.write(loaded.decode_bytes(ids))


def tokenizer_inspect(tokenizer: Positional[Path], text: DisallowNone[str | None] = None) -> None:
    """What a tokenizer is made of, or how it splits a text: in colours on a terminal, else one token a line.

    Args:
        tokenizer: tokenizer.json, ours or Hugging Face's.
        text: show the tokens of this text instead.
    """
    from rich.console import Console
    from rich.table import Table

    from cs336.tokenizer import convert
    from cs336.tokenizer.inspect import render
    from cs336.tokenizer.statistics import statistics

    loaded = convert.load(tokenizer)
    console = Console(highlight=False, markup=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    if text is None:
        for key, value in statistics(loaded).items():
            if isinstance(value, dict):
                value = "  ".join(f"{length}: {count}" for length, count in value.items())
            table.add_row(key.replace("_", " "), repr(value)[1:-1] if isinstance(value, list) else str(value))
    else:
        ids = loaded.encode(text, allowed_special="all")
        if console.color_system and not console.no_color:
            console.print(render(loaded, text))
        else:
            for token_id in ids:
                table.add_row(str(token_id), repr(loaded.token_bytes(token_id))[1:])
        table.add_row(f"{len(ids)} tokens", f"{len(loaded.decode_bytes(ids))} bytes")
    console.print(table)


def tokenizer_convert(
    tokenizer: Positional[Path],
    output: Positional[Path],
    to: DisallowNone[Literal["json", "tiktoken", "gpt2"] | None] = None,
    pattern: DisallowNone[str | None] = None,
    special_tokens: DisallowNone[dict[str, int] | None] = None,
) -> None:
    """A tokenizer in another format, with the same ids for every text, or why that cannot be.

    Args:
        tokenizer: tokenizer.json of ours or of Hugging Face, tiktoken's ranks, or a directory with GPT-2's vocab.json
            and merges.txt.
        output: the file, or for gpt2 the directory, to write.
        to: tiktoken for an output that ends in .tiktoken, else json, which Hugging Face reads too, if not given.
        pattern: how text is split first, which ranks and GPT-2's files do not say: gpt2, cl100k, o200k or a regular
            expression.
        special_tokens: pairs of text and id, which ranks and GPT-2's files do not say either.
    """
    from cs336.tokenizer import convert

    loaded = convert.load(tokenizer, pattern, special_tokens)
    untold = convert.save(loaded, output, to or ("tiktoken" if output.suffix == ".tiktoken" else "json"))
    print(f"{output}: {loaded.vocab_size} tokens, fingerprint {loaded.fingerprint[:16]}")
    for fact in untold:
        print(f"not in the format, tell its readers: {fact}")


def tokenizer_compare(
    tokenizers: Positional[Annotated[tuple[Path, ...], arg(metavar="TOKENIZER [TOKENIZER ...]")]],
    text: Path,
    plot: MaybePath = None,
    pattern: DisallowNone[str | None] = None,
) -> None:
    """Bytes per token and speed of several tokenizers on the same text.

    Args:
        tokenizers: tokenizer.json files, tiktoken's ranks, or directories with GPT-2's files.
        text: a file of text, JSON lines or parquet, compressed or not, or a directory of them.
        plot: .png, .svg or .pdf file for a chart.
        pattern: how text is split first, where a tokenizer does not say: gpt2, cl100k, o200k or a regular expression.
    """
    from cs336.tokenizer import compare, convert

    if not tokenizers:
        raise ValueError("there is no tokenizer to compare: name one or more before --text")
    given = {path: None if convert.tells_pattern(path) else pattern for path in tokenizers}
    loaded = {str(path): convert.load(path, pattern) for path, pattern in given.items()}
    if plot is not None:
        compare.plot_format(plot)  # before the work, not after it
    documents: Iterable[str | bytes] = read_documents(text) if holds_documents(text) else [b"".join(_blocks((text,)))]
    rows = compare.compare(loaded, list(documents))
    print("vocabulary      tokens  bytes/token  MB/s, first  again  tokenizer")
    for row in rows:
        speeds = f"{row.first:11.1f}  {row.again:5.1f}"
        print(f"{row.vocab_size:10,}  {row.tokens:10,}  {row.bytes_per_token:11.3f}  {speeds}  {row.name}")
    if plot is not None:
        compare.plot(rows, plot)
        print(plot)


@contextlib.contextmanager
def _open(path: Path | None) -> Iterator[IO[bytes]]:
    """A file, unpacked; standard input for None."""
    if path is None:
        yield sys.stdin.buffer
        return
    with unpacking(path), open_bytes(path) as file:
        yield file


def _blocks(inputs: tuple[Path, ...]) -> Iterator[bytes]:
    for path in inputs or (None,):
        with _open(path) as file:
            while block := file.read(1 << 16):
                yield block


def _ids(inputs: tuple[Path, ...]) -> Iterator[Iterable[int]]:
    if any(path.suffix == ".bin" for path in inputs):
        from cs336.utils.shards import open_tokens

        for shard in open_tokens(inputs)[0]:
            yield from (shard[i : i + (1 << 20)] for i in range(0, len(shard), 1 << 20))
        return
    for path in inputs or (None,):
        with _open(path) as file:
            yield from itertools.starmap(_numbers, enumerate(file, 1))


def _numbers(number: int, line: bytes) -> list[int]:
    try:
        return [int(word) for word in line.split()]
    except ValueError as error:
        raise ValueError(f"line {number} of the token ids: expected numbers between spaces ({error})") from None


# ---- the program ----

VERBS: dict[str, Callable[[list[str]], Run]] = {
    "quickstart": quickstart,
    "train": train,
    "generate": generate,
    "report": report,
    "env": env,
    "bench": bench,
}
TOKENIZER_VERBS: dict[str, Run] = {
    "train": tokenizer_train,
    "encode": tokenizer_encode,
    "decode": tokenizer_decode,
    "inspect": tokenizer_inspect,
    "convert": tokenizer_convert,
    "compare": tokenizer_compare,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one verb. The exit status: 0, 2 for an error that the user can mend, 130 after Ctrl-C."""
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        if os.environ.get("CS336_DEBUG") == "1":
            raise
        hint = " (CS336_DEBUG=1 shows where)" if isinstance(error, RuntimeError) else ""
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            hint = (
                ": only the tokenizer is installed. For the rest: pip install torch==2.13.0, then install cs336 again"
            )
        print(f"cs336: {_sentence(error)}{hint}", file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if verb == "--version":
        print(f"cs336 {__version__}")
        return 0
    if verb == "bench":
        return bench(rest)() or 0
    if "OMP_WAIT_POLICY" not in os.environ:
        # libgomp reads this when torch loads. By default threads spin for milliseconds while they wait for each other.
        # Where another process takes a core, that makes training 10 times slower; an idle machine gains 3 % by it.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    app = tyro.extras.SubcommandApp()
    for name, make in VERBS.items():
        app.command(name=name)(_described(make, rest) if name == verb else _named(make))
    nested = tyro.extras.SubcommandApp()
    for name, run in TOKENIZER_VERBS.items():
        nested.command(name=name)(run)
    app.command(nested, name="tokenizer", help="Train and use byte-level BPE tokenizers.")
    return (
        app.cli(prog="cs336", description=DESCRIPTION, args=arguments or ["--help"], config=(FlagCreatePairsOff,)) or 0
    )


def _named(make: Callable) -> Run:
    """In the list of verbs: the first line of its description."""

    def run() -> None:
        raise AssertionError(f"{make.__name__} was not made")

    run.__doc__ = (make.__doc__ or "").partition("\n")[0]
    return run


def _described(make: Callable[[list[str]], Run], rest: list[str]) -> Run:
    """The verb itself: its description, then that of its arguments."""
    run = make(rest)
    run.__doc__ = inspect.cleandoc(make.__doc__ or "") + "\n\n" + inspect.cleandoc(run.__doc__ or "")
    return run


def _option(arguments: list[str], name: str) -> str | None:
    """The value of an option that decides what the others are."""
    for i, word in enumerate(arguments):
        if word == name and i + 1 < len(arguments):
            return arguments[i + 1]
        if word.startswith(f"{name}="):
            return word.removeprefix(f"{name}=")
    return None


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
