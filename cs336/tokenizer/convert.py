"""From one format of tokenizers to another, with the same ids for every text, or an error that says why not.

A tokenizer.json holds everything; GPT-2's two files and tiktoken's ranks hold neither the pattern nor which tokens are
special, so reading them needs both from the user: no pattern is guessed.
"""

import contextlib
import os
from pathlib import Path
from typing import Literal

from cs336.tokenizer.formats import NotOurs
from cs336.tokenizer.patterns import PATTERNS
from cs336.tokenizer.sentencepiece_model import is_model
from cs336.tokenizer.tokenizer import Specials, Tokenizer

Format = Literal["json", "tiktoken", "gpt2"]


def load(
    path: str | os.PathLike,
    pattern: str | None = None,
    special_tokens: dict[str, int] | None = None,
    *,
    without_normalizer: bool = False,
    allowed_special: Specials = (),
) -> Tokenizer:
    """Read a tokenizer.json (ours or Hugging Face's), SentencePiece's tokenizer.model, a file of tiktoken's ranks, or a
    directory with GPT-2's vocab.json and merges.txt.

    Args:
        pattern, special_tokens: for the last two, which do not hold them; the others have their own. GPT-2's files
            have the ids of special tokens: None is <|endoftext|> if it is there.
        without_normalizer: read a tokenizer.json that changes text first, which is then the caller's to do.
        allowed_special: the tokenizer's default, as in its constructor.

    Raises ValueError for a file of another kind, for one that does what a Tokenizer does not (it says what), if a
    pattern is missing or not wanted, and if a special token has another id in the files than the one given.
    """
    path = Path(path)
    if not tells_pattern(path):
        if pattern is None:
            raise ValueError(
                f"{path} is no tokenizer.json, and ranks and GPT-2's files do not say how text is split: give "
                f"its pattern, {', '.join(PATTERNS)} or a regular expression (on the command line: convert --pattern)"
            )
        if path.is_dir():
            files = path / "vocab.json", path / "merges.txt"
            tokenizer = Tokenizer.from_gpt2(*files, special_tokens, pattern, allowed_special)
        else:
            tokenizer = Tokenizer.from_tiktoken(path, pattern, special_tokens, allowed_special)
        for text, i in (special_tokens or {}).items():
            if (found := tokenizer.special_tokens[text]) != i:
                raise ValueError(f"{path}: the special token {text!r} was given as {i}, and its id is {found}")
        return tokenizer
    if pattern is not None or special_tokens is not None:
        raise ValueError(f"{path} has a pattern and special tokens of its own: give none")
    if is_model(path):
        return Tokenizer.from_sentencepiece(path, allowed_special)
    with contextlib.suppress(NotOurs):
        return Tokenizer.load(path, allowed_special)
    return Tokenizer.from_huggingface(path, without_normalizer, allowed_special)


def save(tokenizer: Tokenizer, path: str | os.PathLike, to: Format) -> list[str]:
    """Write a tokenizer.json, tiktoken's ranks, or a directory with vocab.json and merges.txt.

    Returns what the format does not hold and its readers must be told. Raises ValueError where the format would give
    other ids.
    """
    path = Path(path)
    if to == "json":
        tokenizer.save(path)
        return []
    if to == "tiktoken":
        tokenizer.to_tiktoken(path)
    else:
        tokenizer.to_gpt2(path / "vocab.json", path / "merges.txt")
    told = [f"the pattern {tokenizer.pattern}"]
    return told + [f"the special token {text} = {i}" for text, i in tokenizer.special_tokens.items()]


def tells_pattern(path: str | os.PathLike) -> bool:
    """Whether a tokenizer says how text is split first: a tokenizer.json does, and a tokenizer.model."""
    if os.path.isdir(path):
        return False
    if is_model(path):
        return True
    with open(path, "rb") as file:
        return file.read(64).lstrip().startswith(b"{")
