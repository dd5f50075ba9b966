"""Pre-tokenization: how text falls into the pieces that merges never cross.

The named patterns are scanned by csrc/cpu/text/pretokenize.cpp, which gives what these expressions give. Any other
expression runs in the `regex` package: slower, and with the whole of a text between two special tokens in memory.
"""

import itertools
from collections.abc import Callable

import regex

# As tiktoken has them. cl100k takes white space at the end of a text whole; $ would not do for that, since to some
# engines it means the end of a line.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s+(?![\s\S])|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}

# The same patterns as others write them.
_OTHER_SPELLINGS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt2",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": "gpt2",
    (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ): "cl100k",
}
# The vocabularies of tiktoken that have them.
_VOCABULARIES = {"r50k_base": "gpt2", "p50k_base": "gpt2", "cl100k_base": "cl100k", "o200k_base": "o200k"}
_NAME_OF = {expression: name for name, expression in PATTERNS.items()} | _OTHER_SPELLINGS | _VOCABULARIES


def canonical(pattern: str) -> str:
    """The name of a pattern that has one, else the regular expression itself, which is checked.

    Raises ValueError for what is neither a name nor a regular expression; a bare word is a name.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"pattern must be a str, got {type(pattern).__name__}")
    name = _NAME_OF.get(pattern, pattern)
    if name not in PATTERNS:
        if regex.fullmatch(r"[\w-]+", name):
            raise ValueError(f"there is no pattern {pattern!r}: give {', '.join(PATTERNS)} or a regular expression")
        try:
            regex.compile(name)
        except regex.error as error:
            raise ValueError(
                f"pattern {pattern!r} is neither one of {', '.join(PATTERNS)} nor a regular expression: {error}"
            ) from None
    return name


def for_core(pattern: str) -> str | Callable[[bytes], list[int]]:
    """What the core takes for a canonical pattern: its name, or a function from a text to the ends of its pieces."""
    if pattern in PATTERNS:
        return pattern
    find = regex.compile(pattern).finditer

    def split(data: bytes) -> list[int]:
        # A byte that is not UTF-8 is a character of its own. What the expression leaves out becomes a piece too.
        text = data.decode("utf-8", "surrogateescape")
        cuts = {0, len(text)}
        for match in find(text):
            cuts.update(match.span())
        edges = sorted(cuts)
        if len(text) == len(data):
            return edges[1:]
        ends, size = [], 0
        for begin, end in itertools.pairwise(edges):
            size += len(text[begin:end].encode("utf-8", "surrogateescape"))
            ends.append(size)
        return ends

    return split
