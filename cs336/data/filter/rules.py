"""The published quality rules, each with its reason and the counts behind it.

    verdict = gopher_quality(text)
    verdict.keep, verdict.reason, verdict.counts     # False, "fewer than 50 words", {"words": 12, ...}

Counting is native (csrc/cpu/text/rules*). The thresholds are the papers': Gopher (arXiv 2112.11446), C4 (1910.10683),
FineWeb (2406.17557). Words are those of a rule-based English tokenizer, lengths are in characters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from cs336 import _text

TOP_NGRAM_CHARS = {2: 0.20, 3: 0.18, 4: 0.16}
REPEATED_NGRAM_CHARS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


@dataclass(frozen=True)
class Verdict:
    """keep: whether the text passes. reason: the first rule that it breaks, or None. counts: what was counted."""

    keep: bool
    reason: str | None
    counts: Mapping[str, int] = field(repr=False)

    def __bool__(self) -> bool:
        return self.keep


@dataclass(frozen=True)
class C4Verdict(Verdict):
    """text: the lines that C4 keeps of it."""

    text: str = field(default="", repr=False)


def _verdict(counts: Mapping[str, int], broken: dict[str, bool]) -> Verdict:
    reason = next((name for name, is_broken in broken.items() if is_broken), None)
    return Verdict(reason is None, reason, counts)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def gopher_quality(
    text: str,
    min_words: int = 50,
    max_words: int = 100_000,
    min_word_length: float = 3,
    max_word_length: float = 10,
    max_symbols_per_word: float = 0.1,
    max_bullet_lines: float = 0.9,
    max_ellipsis_lines: float = 0.3,
    min_letter_words: float = 0.8,
    min_stop_words: int = 2,
) -> Verdict:
    """Gopher's quality rules: length, word length, symbols, bullets, ellipses, letters, English stop words."""
    c = _text.gopher_quality_counts(text)
    mean_length = _share(c["plain_chars"], c["plain_words"])
    return _verdict(
        c,
        {
            f"fewer than {min_words} words": c["plain_words"] < min_words,
            f"more than {max_words} words": c["plain_words"] > max_words,
            f"mean word length below {min_word_length}": mean_length < min_word_length,
            f"mean word length above {max_word_length}": mean_length > max_word_length,
            "too many hashes": _share(c["hashes"], c["words"]) > max_symbols_per_word,
            "too many ellipses": _share(c["ellipses"], c["words"]) > max_symbols_per_word,
            "too many bullet lines": _share(c["bullet_lines"], c["lines"]) > max_bullet_lines,
            "too many lines end in an ellipsis": _share(c["ellipsis_lines"], c["lines"]) > max_ellipsis_lines,
            "too few words with letters": _share(c["letter_words"], c["words"]) < min_letter_words,
            f"fewer than {min_stop_words} stop words": c["stop_words"] < min_stop_words,
        },
    )


def gopher_repetition(
    text: str,
    max_repeated_parts: float = 0.3,
    max_repeated_chars: float = 0.2,
    max_top_ngram_chars: Mapping[int, float] = TOP_NGRAM_CHARS,
    max_repeated_ngram_chars: Mapping[int, float] = REPEATED_NGRAM_CHARS,
) -> Verdict:
    """Gopher's repetition rules: paragraphs, lines, the most frequent n-gram (n = 2..4), repeated n-grams (5..10)."""
    c = _text.gopher_repetition_counts(text)
    chars = c["chars"]
    broken = {
        "empty": chars == 0,
        "repeated paragraphs": _share(c["repeated_paragraphs"], c["paragraphs"]) > max_repeated_parts,
        "characters in repeated paragraphs": _share(c["repeated_paragraph_chars"], chars) > max_repeated_chars,
        "repeated lines": _share(c["repeated_lines"], c["lines"]) > max_repeated_parts,
        "characters in repeated lines": _share(c["repeated_line_chars"], chars) > max_repeated_chars,
    }
    for n, most in max_top_ngram_chars.items():
        broken[f"characters in the top {n}-gram"] = _share(c[f"top_{n}_gram_chars"], chars) > most
    for n, most in max_repeated_ngram_chars.items():
        broken[f"characters in repeated {n}-grams"] = _share(c[f"repeated_{n}_gram_chars"], chars) > most
    return _verdict(c, broken)


def fineweb_quality(
    text: str,
    min_ended_lines: float = 0.12,
    max_short_lines: float = 0.67,
    max_repeated_chars: float = 0.01,
    max_newlines_per_word: float = 0.3,
) -> Verdict:
    """FineWeb's rules: lines that end a sentence, short lines, characters in repeated lines, lists."""
    c = _text.fineweb_counts(text)
    return _verdict(
        c,
        {
            "empty": c["lines"] == 0,
            "too few lines end a sentence": _share(c["ended_lines"], c["lines"]) < min_ended_lines,
            "too many short lines": _share(c["short_lines"], c["lines"]) > max_short_lines,
            "characters in repeated lines": _share(c["repeated_chars"], c["chars"]) > max_repeated_chars,
            "too many line ends for its words": _share(c["newlines"], c["words"]) > max_newlines_per_word,
        },
    )


def c4_quality(text: str, min_sentences: int = 5) -> C4Verdict:
    """C4's rules. They work line by line: `text` of the verdict is what is left, and `counts` what became of the lines.

    A line stays that ends in . ? ! or a quote, has three words or more, none above 1000 characters, and speaks neither
    of JavaScript nor of policies; a document with "lorem ipsum" or "{" in such a line, or too few sentences left, goes.
    """
    counts, kept = _text.c4_counts(text)
    verdict = _verdict(
        counts,
        {
            "lorem ipsum": counts["lorem_ipsum"] > 0,
            "curly bracket": counts["curly_bracket"] > 0,
            f"fewer than {min_sentences} sentences": counts["sentences"] < min_sentences,
        },
    )
    return C4Verdict(verdict.keep, verdict.reason, verdict.counts, kept)
