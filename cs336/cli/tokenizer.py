"""`cs336 tokenizer VERB`."""

import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from cs336.cli.common import MaybePath, Path, Paths, TextField, blocks, check_output, opened
from cs336.utils.documents import TEXT_FIELD, holds_documents, read_documents, read_texts, refuse_binary
from cs336.utils.special_tokens import END_OF_TEXT


def train(
    inputs: Positional[Paths],
    output: Path = Path("tokenizer.json"),  # noqa: B008 (immutable)
    vocab_size: int = 4096,
    special_tokens: tuple[str, ...] = (END_OF_TEXT,),
    pattern: str = "gpt2",
    num_threads: int | None = None,
    text_field: TextField = TEXT_FIELD,
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
    check_output(output, *inputs)
    for path in inputs:
        if path.is_file() and not holds_documents(path):
            refuse_binary(path)
    source: Iterable[str | Path] = list(inputs) or [Path("/dev/stdin")]
    if text_field != TEXT_FIELD:
        source = read_texts(inputs, text_field=text_field)
    trained = Tokenizer.train(source, vocab_size, special_tokens, pattern, num_threads, progress=sys.stderr.isatty())
    if not trained.merges and len(trained) < vocab_size:
        raise ValueError(f"there is nothing to merge in the text, so {output} was not written")
    trained.save(output)
    print(f"{output}: {trained.vocab_size} tokens, fingerprint {trained.fingerprint[:16]}")


def encode(
    tokenizer: Positional[Path],
    inputs: Positional[Paths] = (),
    shards: MaybePath = None,
    val_fraction: float | None = None,
    special: bool = False,
    eot_token: str = END_OF_TEXT,
    text_field: TextField = TEXT_FIELD,
) -> None:
    """Text to token ids: as numbers on standard output, or as token shards to train on.

    Args:
        tokenizer: tokenizer.json, ours or Hugging Face's, or SentencePiece's tokenizer.model.
        inputs: files of text, .gz, .xz, .bz2 and .zst unpacked, one after the other; standard input if there are none.
            For --shards also JSON lines, parquet, and directories.
        shards: directory that gets token shards: train/ and val/, documents held out by a hash of their text.
        val_fraction: of the documents, held out in val/; 0 writes the shards into the directory itself. 0.02 if not
            given; fewer than 200 documents are cut into pieces, of which 0.1.
        special: numbers alone: read special tokens in the text as their ids, not as ordinary text.
        eot_token: the special token behind each document of shards, </s> for a Llama 2's.
    """
    from cs336.tokenizer import convert

    loaded = convert.load(tokenizer)
    if shards is not None:
        from cs336.data import tokenize_corpus, tokenize_documents
        from cs336.data.corpus import FEW, for_split

        if not inputs:
            raise ValueError("--shards needs files or directories to read")
        documents = read_documents(inputs, text_field=text_field, metadata=False)
        what = "documents"
        if val_fraction != 0:
            head = list(itertools.islice(documents, FEW))
            if len(head) < FEW:
                what = f"pieces of {len(head)} document{'s' * (len(head) != 1)}"
            fraction, documents = for_split(itertools.chain(head, documents), val_fraction)
            train, val = tokenize_corpus(
                documents, loaded, shards, eot_token=eot_token, val_fraction=fraction, progress=True
            )
            written = {shards / "train": train, shards / "val": val}
        else:
            written = {shards: tokenize_documents(documents, loaded, shards, eot_token=eot_token, progress=True)}
        for place, meta in written.items():
            print(f"{place}: {meta.tokens:,} tokens of {meta.documents:,} {what}, {meta.text_bytes:,} bytes of text")
        return
    if separate := [path for path in inputs if path.exists() and holds_documents(path, text_field)]:
        raise ValueError(f"{separate[0]} holds separate documents: give --shards DIRECTORY to encode them")
    for i, token_id in enumerate(loaded.encode_iterable(blocks(inputs), "all" if special else (), ())):
        sys.stdout.write(f"{token_id}\n" if i % 16 == 15 else f"{token_id} ")
    sys.stdout.write("\n")


def decode(tokenizer: Positional[Path], inputs: Positional[Paths] = ()) -> None:
    """Token ids to the bytes they stand for, on standard output.

    Args:
        tokenizer: tokenizer.json, ours or Hugging Face's, or SentencePiece's tokenizer.model.
        inputs: files of numbers, or .bin token shards; standard input if there are none.
    """
    from cs336.tokenizer import convert

    loaded = convert.load(tokenizer)
    written = 0
    for ids in _ids(inputs):
        written += sys.stdout.buffer.write(loaded.decode_bytes(ids, at_start=not written))


def inspect(tokenizer: Positional[Path], text: str | None = None) -> None:
    """What a tokenizer is made of, or how it splits a text: in colours on a terminal, else one token a line.

    Args:
        tokenizer: tokenizer.json, ours or Hugging Face's, or SentencePiece's tokenizer.model.
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


def convert(
    tokenizer: Positional[Path],
    output: Positional[Path],
    to: Literal["json", "tiktoken", "gpt2"] | None = None,
    pattern: str | None = None,
    special_tokens: dict[str, int] | None = None,
) -> None:
    """A tokenizer in another format, with the same ids for every text, or why that cannot be.

    Args:
        tokenizer: tokenizer.json of ours or of Hugging Face, SentencePiece's tokenizer.model, tiktoken's ranks, or a
            directory with GPT-2's vocab.json and merges.txt.
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


def compare(
    tokenizers: Positional[
        Annotated[tuple[Path, ...], arg(metavar="TOKENIZER [TOKENIZER ...]", help_behavior_hint="")]
    ],
    text: Path,
    plot: MaybePath = None,
    pattern: str | None = None,
    text_field: TextField = TEXT_FIELD,
) -> None:
    """Bytes per token and speed of several tokenizers on the same text.

    Args:
        tokenizers: tokenizer.json or tokenizer.model files, tiktoken's ranks, or directories with GPT-2's files.
        text: a file of text, JSON lines or parquet, compressed or not, or a directory of them.
        plot: .png, .svg or .pdf file for a chart.
        pattern: how text is split first, where a tokenizer does not say: gpt2, cl100k, o200k or a regular expression.
    """
    from cs336.tokenizer import compare, convert

    if not tokenizers:
        raise ValueError("there is no tokenizer to compare: name one or more before --text")
    given = {path: None if convert.tells_pattern(path) else pattern for path in tokenizers}
    loaded = {str(path): convert.load(path, pattern) for path, pattern in given.items()}
    check_output(plot, text, *tokenizers)
    if plot is not None:
        compare.plot_format(plot)  # before the work, not after it
    documents: Iterable[str | bytes]
    if holds_documents(text, text_field):
        documents = read_texts(text, text_field=text_field)
    else:
        documents = [b"".join(blocks((text,)))]
    rows = compare.compare(loaded, list(documents))
    print("vocabulary      tokens  bytes/token  MB/s, first  again  tokenizer")
    for row in rows:
        speeds = f"{row.first:11.1f}  {row.again:5.1f}"
        print(f"{row.vocab_size:10,}  {row.tokens:10,}  {row.bytes_per_token:11.3f}  {speeds}  {row.name}")
    if plot is not None:
        compare.plot(rows, plot)
        print(plot)


def _ids(inputs: tuple[Path, ...]) -> Iterator[Iterable[int]]:
    if any(path.suffix == ".bin" for path in inputs):
        from cs336.utils.shards import open_tokens

        for shard in open_tokens(inputs)[0]:
            yield from (shard[i : i + (1 << 20)] for i in range(0, len(shard), 1 << 20))
        return
    for path in inputs or (None,):
        with opened(path) as file:
            yield from itertools.starmap(_numbers, enumerate(file, 1))


def _numbers(number: int, line: bytes) -> list[int]:
    try:
        return [int(word) for word in line.split()]
    except ValueError as error:
        raise ValueError(f"line {number} of the token ids: expected numbers between spaces ({error})") from None
