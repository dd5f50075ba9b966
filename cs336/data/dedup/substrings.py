"""Repeated passages over all documents, cut out but for the first of each (arXiv 2107.06499).

A passage is repeated where `length` bytes or tokens of a document are there before, in an earlier document or, without
overlapping, in the same one:

    window at i goes  <=>  f + length <= i  for the first place f of an equal window

and what goes is the union of such windows. csrc/cpu/text/repeats.h says how they are found.
"""

import os
import pathlib
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from cs336 import _text
from cs336.data.dedup.outputs import plan_outputs
from cs336.tokenizer import Tokenizer
from cs336.utils.files import Paths, replacing
from cs336.utils.threads import thread_count

At = Literal["char", "word", "line"]
Span = tuple[int, int]
LENGTH = 200  # bytes, of 50 tokens of English
MAX_MEMORY = 1 << 32
EXAMPLES, EXAMPLE_CHARS = 10, 500
_SEPARATORS = {"word": b" \t\n\r\f\v", "line": b"\n"}
_MOST = (1 << 63) - 1


class Repeats:
    """The repeated passages of texts that are given in order. 8 bytes of memory a text, 16 a passage.

    Symbols are written to a temporary file in `directory`, a byte or token each, and looked at from there.
    """

    def __init__(
        self,
        texts: Iterable[bytes],
        length: int,
        tokenizer: Tokenizer | None = None,
        max_memory: int = MAX_MEMORY,
        num_threads: int | None = None,
        directory: pathlib.Path | None = None,
    ):
        check_substrings(length, max_memory)
        self._tokenizer = tokenizer
        self._sizes_V = None if tokenizer is None else _token_sizes(tokenizer)
        kind = np.dtype(np.uint8 if tokenizer is None else np.uint32)
        ends, size = array("q"), 0
        with tempfile.TemporaryFile(dir=directory) as file:
            for text in texts:
                symbols = text if tokenizer is None else self._ids(text).tobytes()
                file.write(symbols)
                size += len(symbols) // kind.itemsize
                ends.append(size)
            file.flush()
            corpus = np.memmap(file, kind, "r") if size else np.zeros(0, kind)
            spans_S2 = _text.repeats(corpus, np.array(ends, np.int64), length, max_memory, thread_count(num_threads))
        self._begins_D = np.array([0, *ends], np.int64)
        self._spans_S2, self._first_S = spans_S2, np.ascontiguousarray(spans_S2[:, 0])

    def of(self, index: int, text: bytes, at: At = "char") -> list[Span]:
        """What of a text, the one that was given as number `index`, is repeated: from byte to byte, in order.

        Ends move inward, to whole characters, words or lines.
        """
        begin, end = self._begins_D[index : index + 2]
        low, high = np.searchsorted(self._first_S, [begin, end])
        spans_S2 = self._spans_S2[low:high] - begin
        if len(spans_S2) and self._sizes_V is not None:
            spans_S2 = _sums(self._sizes_V[self._ids(text)])[spans_S2]
        moved = (_inward(text, first, last, at) for first, last in spans_S2.tolist())
        return [span for span in moved if span[0] < span[1]]

    def _ids(self, text: bytes) -> np.ndarray:
        assert self._tokenizer is not None
        return np.array(self._tokenizer.encode_ordinary(text), np.uint32)


@dataclass
class SubstringReport:
    """What went in, and what of it went."""

    documents: int = 0
    documents_cut: int = 0
    """That stay, without a passage or several."""
    documents_dropped: int = 0
    text_bytes: int = 0
    cut_bytes: int = 0
    """Whole documents that were dropped count too."""
    passages: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)
    """The first ten passages: the "id" of the document, and the "text"."""

    def cut(self, name: str, text: bytes, spans: Sequence[Span], max_cut: float) -> bytes | None:
        """What stays of a text, which is counted; None where all of it goes."""
        self.documents += 1
        self.text_bytes += len(text)
        if not spans:
            return text
        gone = sum(end - begin for begin, end in spans)
        self.passages += len(spans)
        for begin, end in spans[: EXAMPLES - len(self.examples)]:
            passage = text[begin:end].decode("utf-8", "replace")
            self.examples.append({"id": name, "text": passage[:EXAMPLE_CHARS]})
        left = _without(text, spans)
        if gone > max_cut * len(text) or not left.strip():
            self.documents_dropped += 1
            self.cut_bytes += len(text)
            return None
        self.documents_cut += 1
        self.cut_bytes += gone
        return left


def repeated_spans(
    texts: Iterable[str | bytes],
    length: int = LENGTH,
    at: At = "char",
    tokenizer: Tokenizer | None = None,
    max_memory: int = MAX_MEMORY,
    num_threads: int | None = None,
) -> list[list[Span]]:
    """Of each text the passages that were there before: text[begin:end], characters of a str and bytes of bytes.

    A passage is what windows of `length` bytes cover that equal an earlier window: in an earlier text, or in this one
    and not overlapping it. The first of equal ones stays, and no passage crosses from one text into another.

    length: in bytes of UTF-8, or in tokens of `tokenizer`; 200 bytes are about the 50 tokens of arXiv 2107.06499.
    at: where a passage may begin and end: at any character, or only where words or lines do. It is never longer for it.
    max_memory: bytes for tables; where they are not enough for the 10 bytes a byte that they take, the texts, which are
        in a temporary file, are read several times. num_threads: None for as many as this process may run on. The
        result is the same for any number of either.

    Exact: what is taken for equal has been compared. Raises ValueError for arguments that make no sense.
    """
    if isinstance(texts, str | bytes):
        raise TypeError(f"expected a list of texts, got one {type(texts).__name__}: give [text]")
    check_substrings(length, max_memory, at)
    texts = list(texts)
    repeats = Repeats(map(_encoded, texts), length, tokenizer, max_memory, num_threads)
    return [_spans_of(text, repeats.of(index, _encoded(text), at)) for index, text in enumerate(texts)]


def dedup_substrings(
    files: Paths,
    out_dir: str | os.PathLike,
    length: int = LENGTH,
    at: At = "char",
    max_cut: float = 1.0,
    tokenizer: Tokenizer | None = None,
    max_memory: int = MAX_MEMORY,
    num_threads: int | None = None,
) -> SubstringReport:
    """Write each file, one document, to `out_dir` under its name, without the passages that were there before.

    max_cut: a document of which a larger share goes is dropped whole, as is one of which nothing is left; 0: every one
        with a repeated passage. What a dropped document had first is cut from later ones all the same.
    The other arguments are those of `repeated_spans`.
    """
    check_substrings(length, max_memory, at, max_cut)
    pairs = plan_outputs(files, out_dir)

    def texts() -> Iterator[bytes]:
        return (source.read_bytes() for source, _ in pairs)

    repeats = Repeats(texts(), length, tokenizer, max_memory, num_threads, pathlib.Path(out_dir))
    report = SubstringReport()
    for index, ((source, target), text) in enumerate(zip(pairs, texts(), strict=True)):
        left = report.cut(str(source), text, repeats.of(index, text, at), max_cut)
        if left is not None:
            with replacing(target, "wb") as out:
                out.write(left)
    return report


def check_substrings(length: int, max_memory: int, at: At = "char", max_cut: float = 1.0) -> None:
    """Raises ValueError for what makes no sense."""
    if not isinstance(length, int) or not 1 <= length <= _MOST:
        raise ValueError(f"length must be 1 byte or token or more, a whole number below 2^63, got {length}")
    if not isinstance(max_memory, int) or not 1 <= max_memory <= _MOST:
        raise ValueError(f"max_memory is bytes, 1 or more, a whole number below 2^63, got {max_memory}")
    if at != "char" and at not in _SEPARATORS:
        raise ValueError(f'at is "char", "word" or "line", got {at!r}')
    if not 0 <= max_cut <= 1:
        raise ValueError(f"max_cut is a share of a document in 0..1, got {max_cut}")


def _inward(text: bytes, begin: int, end: int, at: At) -> Span:
    """The ends moved toward each other, to where a cut may be."""
    if at == "char":
        while begin < end and _inside(text, begin):
            begin += 1
        while end > begin and _inside(text, end):
            end -= 1
        return begin, end
    separators = _SEPARATORS[at]
    if begin > 0 and text[begin - 1] not in separators:
        found = [place for part in separators if (place := text.find(part, begin, end)) >= 0]
        begin = min(found) + 1 if found else end
    if end < len(text) and text[end - 1] not in separators and text[end] not in separators:
        end = max(begin, max(text.rfind(part, begin, end) for part in separators) + 1)
    return begin, end


def _inside(text: bytes, place: int) -> bool:
    """Whether a place is inside a character."""
    return place < len(text) and text[place] & 0xC0 == 0x80


def _without(text: bytes, spans: Sequence[Span]) -> bytes:
    begins = [0, *(end for _, end in spans)]
    ends = [*(begin for begin, _ in spans), len(text)]
    return b"".join(text[begin:end] for begin, end in zip(begins, ends, strict=True))


def _encoded(text: str | bytes) -> bytes:
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text


def _spans_of(text: str | bytes, spans: list[Span]) -> list[Span]:
    """From bytes to the units that the text is sliced by."""
    if isinstance(text, bytes) or text.isascii():
        return spans
    raw = np.frombuffer(_encoded(text), np.uint8)
    chars_B = _sums(raw & 0xC0 != 0x80)
    return [(int(chars_B[begin]), int(chars_B[end])) for begin, end in spans]


def _sums(sizes_N: np.ndarray) -> np.ndarray:
    """(N + 1,) int64: of what comes before each, and of all."""
    sums = np.zeros(len(sizes_N) + 1, np.int64)
    np.cumsum(sizes_N, out=sums[1:])
    return sums


def _token_sizes(tokenizer: Tokenizer) -> np.ndarray:
    """(V,) int64: bytes of each token."""
    sizes_V = np.zeros(tokenizer.vocab_size, np.int64)
    for token, spelled in tokenizer.vocab.items():
        sizes_V[token] = len(spelled)
    return sizes_V
