"""Deduplication as stages: the documents of one stage's directory to another's, file by file in the same order."""

import hashlib
import pathlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from cs336.data.build.counts import Passed, text_bytes
from cs336.data.build.store import Store, read_file, write_index
from cs336.data.build.unit import SAMPLES, line_of, removed_line
from cs336.data.dedup.lines import RepeatedLines
from cs336.data.dedup.minhash import near_duplicates
from cs336.data.dedup.paragraphs import keys_of, without_repeated
from cs336.data.dedup.substrings import Repeats, SubstringReport
from cs336.data.recipe import AnyDedup, Documents, Lines, MinHash, Paragraphs, Substrings
from cs336.data.step import Removed, Semantic
from cs336.tokenizer import Tokenizer
from cs336.utils.contents import Contents
from cs336.utils.documents import Document
from cs336.utils.files import replacing

Decide = Callable[[int, Document], Document | Removed]


def run_dedup(
    config: AnyDedup | Semantic,
    source: pathlib.Path,
    target: pathlib.Path,
    *,
    keep_removed: bool,
    seed: int,
    seen: Contents,
) -> Passed:
    """Write to `target` what of the documents in `source` stays, and its index last."""
    store = Store(source)
    extra: dict[str, Any] = {}
    target.mkdir(parents=True, exist_ok=True)
    if isinstance(config, Documents):
        decide = _equal_documents(store)
    elif isinstance(config, Lines):
        decide = _equal_lines(config, store, extra)
    elif isinstance(config, Paragraphs):
        decide = _equal_paragraphs(config, store, extra)
    elif isinstance(config, Substrings):
        decide = _repeated_passages(config, store, target, extra)
    elif isinstance(config, MinHash):
        decide = _near_duplicates(config, store, seed)
    else:
        decide = _same_meaning(config, store, target, seed)
    passed, counted = _write(config.kind, decide, store, target, keep_removed)
    write_index(target, [path.name for path in store.files], counted | extra, seen)
    return passed


def _write(
    kind: str, decide: Decide, store: Store, target: pathlib.Path, keep_removed: bool
) -> tuple[Passed, dict[str, Any]]:
    """What was passed over, and what the index says."""
    passed = Passed(kind)
    samples: Counter[str] = Counter()
    left = left_bytes = index = 0
    for folder in ("documents", "removed"):
        (target / folder).mkdir(parents=True, exist_ok=True)
    for path in store.files:
        with (
            replacing(target / "documents" / path.name, "wb") as documents,
            replacing(target / "removed" / path.name, "wb") as removed,
        ):
            for document in read_file(path):
                size = text_bytes(document.text)
                passed.documents += 1
                passed.bytes += size
                found = decide(index, document)
                index += 1
                if isinstance(found, Document):
                    documents.write(line_of(found))
                    left += 1
                    left_bytes += text_bytes(found.text)
                    continue
                passed.remove(found.reason, size)
                samples[found.reason] += 1
                if keep_removed or samples[found.reason] <= SAMPLES:
                    removed.write(removed_line(kind, found, document, whole=keep_removed))
    facts = {"name": kind, "documents": passed.documents, "bytes": passed.bytes, "removed": passed.removed}
    return passed, {"passed": facts, "documents": left, "bytes": left_bytes}


def _equal_documents(store: Store) -> Decide:
    """By 128 bits of a hash: among n documents two different ones are taken for equal with a chance of n^2 / 2^129."""
    digests = bytearray()
    for document in store:
        digests += hashlib.blake2b(_bytes_of(document), digest_size=16).digest()
    digests_N = np.frombuffer(digests, np.dtype([("high", "<u8"), ("low", "<u8")]))
    _, first_U, inverse_N = np.unique(digests_N, return_index=True, return_inverse=True)
    first_N = first_U[inverse_N]

    def decide(index: int, document: Document) -> Document | Removed:
        first = int(first_N[index])
        return document if first == index else Removed("equal document", f"equals {store.document(first).id}")

    return decide


def _near_duplicates(config: MinHash, store: Store, seed: int) -> Decide:
    first = near_duplicates(
        store.texts, config.num_hashes, config.num_bands, config.ngram, config.threshold, config.unit, seed
    )

    def decide(index: int, document: Document) -> Document | Removed:
        if first[index] == index:
            return document
        return Removed("near duplicate", f"like {store.document(first[index]).id}")

    return decide


def _same_meaning(config: Semantic, store: Store, target: pathlib.Path, seed: int) -> Decide:
    """Embeddings are in a temporary file while their rows are compared."""
    from cs336.data.dedup.semantic import semantic_duplicates  # which loads torch

    features = 0
    with tempfile.TemporaryFile(dir=target) as file:
        for row_D in config.embed(iter(store)):
            features = features or len(row_D)
            if len(row_D) != features:
                raise ValueError(f"expected embeddings of one length, got some of {features} and {len(row_D)} numbers")
            file.write(np.asarray(row_D, np.float32).tobytes())
        file.flush()
        shape = (len(store), features)
        rows_ND = np.memmap(file, np.float32, "r", shape=shape) if len(store) else np.zeros((0, 1), np.float32)
        options: dict[str, Any] = {"keep": config.keep, "centre": config.centre, "device": config.device}
        first = semantic_duplicates(rows_ND, config.threshold, config.num_clusters, seed, **options)

    def decide(index: int, document: Document) -> Document | Removed:
        if first[index] == index:
            return document
        return Removed("semantic duplicate", f"means the same as {store.document(first[index]).id}")

    return decide


def _repeated_passages(config: Substrings, store: Store, target: pathlib.Path, extra: dict[str, Any]) -> Decide:
    tokenizer = None if config.tokenizer is None else Tokenizer.load(config.tokenizer)
    repeats = Repeats(_encoded(store), config.length, tokenizer, config.max_memory, directory=target)
    report = SubstringReport()
    extra["repeats"] = vars(report)  # filled as documents pass

    def decide(index: int, document: Document) -> Document | Removed:
        text = _bytes_of(document)
        spans = repeats.of(index, text, config.at)
        left = report.cut(document.id, text, spans, config.max_cut)
        if left is None:
            gone = sum(end - begin for begin, end in spans)
            return Removed("repeated passages", f"{gone:,} of {len(text):,} bytes were there before")
        return document if left is text else replace(document, text=left.decode("utf-8", "surrogatepass"))

    return decide


def _equal_paragraphs(config: Paragraphs, store: Store, extra: dict[str, Any]) -> Decide:
    def keys() -> Iterator[bytes]:
        return (keys_of(document.text, config.ignore_digits) for document in store)

    repeated = RepeatedLines(keys, config.keep, config.max_memory)
    extra |= {"paragraphs": len(repeated), "paragraphs_dropped": 0}

    def decide(index: int, document: Document) -> Document | Removed:
        text, dropped = without_repeated(document.text, repeated.of(index).tolist(), config.min_chars)
        extra["paragraphs_dropped"] += dropped
        return _left(document, text, dropped, "paragraph")

    return decide


def _equal_lines(config: Lines, store: Store, extra: dict[str, Any]) -> Decide:
    repeated = RepeatedLines(lambda: _encoded(store), config.keep, config.max_memory)
    extra |= {"lines": len(repeated), "lines_dropped": 0}

    def decide(index: int, document: Document) -> Document | Removed:
        lines = [f"{line}\n" for line in document.text.split("\n")]
        lines[-1] = lines[-1][:-1]  # which has no end of its own, and is none where it is empty
        drop = [*repeated.of(index).tolist(), 0]
        kept = [line for line, gone in zip(lines, drop, strict=False) if not gone or _stays(line, config.min_chars)]
        dropped = len(lines) - len(kept)
        extra["lines_dropped"] += dropped
        return _left(document, "".join(kept), dropped, "line")

    return decide


def _left(document: Document, text: str, dropped: int, part: str) -> Document | Removed:
    """The document with the text that is left, if one is; the same one where no part was dropped."""
    if not dropped:
        return document
    if not text or text.isspace():
        return Removed(f"no {part} left", f"{dropped:,} {part}s that others have")
    return replace(document, text=text)


def _stays(line: str, min_chars: int) -> bool:
    """Whether a line stays however often it is there: an empty or a short one."""
    return line.isspace() or len(line.removesuffix("\n")) < min_chars


def _encoded(store: Store) -> Iterator[bytes]:
    return map(_bytes_of, store)


def _bytes_of(document: Document) -> bytes:
    return document.text.encode("utf-8", "surrogatepass")
