"""Equal paragraphs over all documents, whatever their case, accents, punctuation and white space (arXiv 1911.00359)."""

import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Literal

from cs336 import _text
from cs336.data.dedup.lines import DedupReport, RepeatedLines, check_repeats
from cs336.data.dedup.outputs import plan_outputs
from cs336.utils.files import Paths, replacing

MIN_CHARS = 20
_BREAK = re.compile(r"\n\s*\n")
_DIGITS = re.compile(r"\d")


def paragraphs_of(text: str) -> list[str]:
    """A text's paragraphs, each with the blank lines behind it: they make up the text."""
    ends = [*(found.end() for found in _BREAK.finditer(text)), len(text)]
    begins = [0, *ends]
    return [text[begin:end] for begin, end in zip(begins, ends, strict=False) if begin < end]


def keys_of(text: str, ignore_digits: bool) -> bytes:
    """What paragraphs are compared by, a line each: empty for one without a word."""
    keys = [_text.normalize(paragraph) for paragraph in paragraphs_of(text)]
    if ignore_digits:
        keys = [_DIGITS.sub("0", key) for key in keys]
    return "".join(f"{key}\n" for key in keys).encode()


def without_repeated(text: str, drop: Sequence[int], min_chars: int) -> tuple[str, int]:
    """(what stays, how many paragraphs go). drop: a flag a paragraph."""
    paragraphs = paragraphs_of(text)
    gone = [bool(flag) and not _stays(paragraph, min_chars) for paragraph, flag in zip(paragraphs, drop, strict=True)]
    if not any(gone):
        return text, 0
    kept = "".join(paragraph for paragraph, goes in zip(paragraphs, gone, strict=True) if not goes)
    return (kept.rstrip() if gone[-1] else kept), sum(gone)


def dedup_paragraphs(
    files: Paths,
    out_dir: str | os.PathLike,
    keep: Literal["none", "first"] = "first",
    min_chars: int = MIN_CHARS,
    ignore_digits: bool = False,
    max_memory: int = 1 << 32,
) -> DedupReport:
    """Write each file to `out_dir` under its name, without the paragraphs that an earlier one, or another of it, has.

    Paragraphs are parted by blank lines. They are equal when their words are: case, accents, punctuation and white
    space do not matter, nor with `ignore_digits` which digit stands where.

    keep: `"first"` keeps the first of equal paragraphs, `"none"` drops every copy.
    min_chars: shorter paragraphs stay, and so do those without a letter or digit.
    max_memory: bytes for the table of paragraphs; where they are not enough, the files are read several times.

    The report counts paragraphs. They are compared by 64-bit hashes, as dedup_lines compares lines.
    """
    check_repeats(keep, max_memory)
    pairs = plan_outputs(files, out_dir)

    def keys() -> Iterator[bytes]:
        return (keys_of(_read(source), ignore_digits) for source, _ in pairs)

    repeated = RepeatedLines(keys, keep, max_memory)
    dropped = 0
    for index, (source, target) in enumerate(pairs):
        text, gone = without_repeated(_read(source), repeated.of(index).tolist(), min_chars)
        with replacing(target, "wb") as out:
            out.write(text.encode("utf-8", "surrogateescape"))
        dropped += gone
    return DedupReport(len(repeated), dropped)


def _read(path: pathlib.Path) -> str:
    """Bytes that are not UTF-8 come back as they were."""
    return path.read_bytes().decode("utf-8", "surrogateescape")


def _stays(paragraph: str, min_chars: int) -> bool:
    """Whether a paragraph stays however often it is there."""
    return len(paragraph.strip()) < min_chars or not any(map(str.isalnum, paragraph))
