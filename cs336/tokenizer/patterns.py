"""Pre-tokenization: how text falls into the pieces that merges never cross.

The named patterns are scanned by csrc/cpu/text/pretokenize.cpp, which gives what these expressions give. Any other
expression runs in the `regex` package: slower, and with the whole of a text between two special tokens in memory. One
that all engines read alike (cs336/tokenizer/dialect.py) means what it means to them; the rest is what `regex` makes of
it, and cannot be handed to another engine.
"""

import itertools
from collections.abc import Callable

import regex

from cs336.tokenizer.dialect import quoted, translate

_ANY_CASE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _capitals_first(numbers: str, newlines: str, contractions: str = "", without: str = "") -> str:
    """The expressions of o200k's family: a word is capitals and then small letters."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    capital, small = (
        rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{without}]",
        rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{without}]",
    )
    words = f"{lead}{capital}*{small}+{contractions}|{lead}{capital}+{small}*{contractions}"
    return rf"{words}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+{newlines}|{_SPACES}"


def _any_letters(numbers: str) -> str:
    """Those of cl100k's, but for cl100k itself."""
    return rf"{_ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


_KANA_AND_HAN = r"\u3040-\u30ff\u4e00-\u9fa5"
_DEEPSEEK = (  # one after the other, each within the pieces of the one before
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    rf"|{_SPACES}",
)


def _deepseek_as_one() -> str:
    """The three as one expression, which says where the parts end that the first two make."""
    cjk, word, symbol = _KANA_AND_HAN, r"[\p{L}\p{M}]", r"[\p{P}\p{S}]"
    rest, cjk_rest = rf"[^\s\p{{L}}\p{{M}}\p{{P}}\p{{S}}\p{{N}}{cjk}]", rf"[{cjk}&&[^\p{{L}}\p{{M}}\p{{P}}\p{{S}}]]"
    outside, inside = f"[{word}&&[^{cjk}]]", f"[{word}&&[{cjk}]]"
    return (
        r"\p{N}{1,3}|[!\"#$%&'()*+,\-./:;<=>?@\[\\\]\^_`{|}~][A-Za-z]+"
        rf"|[^\r\n\p{{L}}\p{{P}}\p{{S}}\p{{N}}{cjk}]?{outside}+| ?[{symbol}&&[^{cjk}]]+[\r\n]*"
        rf"|\s*[\r\n]+|\s+(?![^\s\p{{N}}{cjk}])|\s+"
        f"|{cjk_rest}?{inside}+|[{symbol}&&[{cjk}]]+"
        f"|(?:{rest}(?!{outside}))+|(?:{cjk_rest}(?!{inside}))+"
    )


PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # SmolLM2 and StarCoder: each digit alone before all else, so that white space ends at one as at the end of a text.
    "gpt2_digits": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
    # White space at the end of a text goes whole; $ would not do for that: to some engines it is the end of a line.
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s+(?![\s\S])|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    "llama3": _any_letters(r"\p{N}{1,3}"),
    "qwen2": _any_letters(r"\p{N}"),  # Qwen2.5 and Qwen3 too
    "o200k": _capitals_first(r"\p{N}{1,3}", r"[\r\n/]*", _ANY_CASE + "?"),
    "tekken": _capitals_first(r"\p{N}", r"[\r\n/]*"),  # Mistral
    "kimi": r"[\p{Han}]+|" + _capitals_first(r"\p{N}{1,3}", r"[\r\n]*", _ANY_CASE + "?", r"&&[^\p{Han}]"),  # Kimi K2
    "deepseek": _deepseek_as_one(),  # V3 and R1
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
# What splits one after the other come to.
_SEQUENCES = {_DEEPSEEK: "deepseek", (r"\p{N}", PATTERNS["gpt2"]): "gpt2_digits"}
# The vocabularies of tiktoken that have them.
_VOCABULARIES = {"r50k_base": "gpt2", "p50k_base": "gpt2", "cl100k_base": "cl100k", "o200k_base": "o200k"}
_NAME_OF = {expression: name for name, expression in PATTERNS.items()} | _OTHER_SPELLINGS | _VOCABULARIES


_KINDS = "aA1 \n\r\t'!_\u00e9\u4e2d\u0301\U0001f600"  # a character of each that expressions tell apart


def canonical(pattern: str) -> str:
    """The name of a pattern that has one, else the regular expression itself, which is checked.

    Raises ValueError for what is neither a name nor a regular expression; a bare word is a name.
    """
    return _checked(pattern, lambda expression: regex.compile(_for_regex(expression)), "a regular expression")


def portable(pattern: str) -> str:
    """`canonical`, of what all engines read alike. Raises ValueError for any other pattern too."""
    alike = "a regular expression that tiktoken and Hugging Face's tokenizers read alike"
    return _checked(pattern, translate, alike)


def _checked(pattern: str, check: Callable[[str], object], what: str) -> str:
    if not isinstance(pattern, str):
        raise TypeError(f"pattern must be a str, got {type(pattern).__name__}")
    name = _NAME_OF.get(pattern, pattern)
    if name not in PATTERNS:
        if regex.fullmatch(r"[\w-]+", name):
            raise ValueError(f"there is no pattern {pattern!r}: give {', '.join(PATTERNS)} or a regular expression")
        try:
            name.encode()  # as files hold it
            check(name)
        except (regex.error, ValueError, RecursionError) as error:
            raise ValueError(
                f"pattern {quoted(pattern)} is neither one of {', '.join(PATTERNS)} nor {what}: {error}"
            ) from None
    return name


def left_out(pattern: str) -> str | None:
    """A character of some text that the expression does not match, or None where it matches all that was tried: texts
    of one character, a few of each kind in every order, and all there are in a row."""
    if pattern in PATTERNS:
        return None
    find = regex.compile(_for_regex(pattern)).finditer
    every = "".join(map(chr, itertools.chain(range(0xD800), range(0xE000, 0x110000))))
    for text in itertools.chain(
        every[: len(every) // 90],
        ("".join(few) for size in (2, 3) for few in itertools.product(_KINDS, repeat=size)),
        (every[i : i + 256] for i in range(0, len(every), 256)),  # an expression may look at all behind each
    ):
        at = 0
        for match in find(text):
            if match.start() > at:
                break
            at = match.end()
        if at < len(text):
            return text[at]
    return None


def is_portable(pattern: str) -> bool:
    try:
        portable(pattern)
    except ValueError:
        return False
    return True


def _for_regex(expression: str) -> str:
    """What `regex` is given for an expression: its translation, or itself where engines do not read it alike."""
    try:
        return translate(expression)
    except (ValueError, RecursionError):
        return expression


def of_sequence(expressions: tuple[str, ...]) -> str | None:
    """The pattern that splits one after the other come to, or None if there is none for them."""
    if len(expressions) == 1:
        return canonical(expressions[0])
    named = tuple(PATTERNS.get(name, name) for name in (_NAME_OF.get(e, e) for e in expressions))
    return _SEQUENCES.get(named)


def for_core(pattern: str) -> str | Callable[[bytes], list[int]]:
    """What the core takes for a canonical pattern: its name, or a function from a text to the ends of its pieces."""
    if pattern in PATTERNS:
        return pattern
    find = regex.compile(_for_regex(pattern)).finditer

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
