"""Deduplication as stages: the documents of one stage's directory to another's, file by file in the same order."""

import hashlib
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from cs336 import _text
from cs336.data.build.counts import Passed, text_bytes
from cs336.data.build.store import Store, read_file, write_index
from cs336.data.build.unit import SAMPLES, line_of, removed_line
from cs336.data.dedup.lines import TABLE_BYTES
from cs336.data.dedup.minhash import near_duplicates
from cs336.data.recipe import Documents, Lines, MinHash
from cs336.data.step import Removed
from cs336.utils.documents import Document
from cs336.utils.files import replacing

Decide = Callable[[int, Document], Document | Removed]


def run_dedup(
    config: Documents | Lines | MinHash, source: pathlib.Path, target: pathlib.Path, *, keep_removed: bool, seed: int
) -> Passed:
    """Write to `target` what of the documents in `source` stays, and its index last."""
    store = Store(source)
    extra: dict[str, int] = {}
    if isinstance(config, Documents):
        decide = _equal_documents(store)
    elif isinstance(config, Lines):
        decide = _equal_lines(config, store, extra)
    else:
        decide = _near_duplicates(config, store, seed)
    return _write(config.kind, decide, store, target, keep_removed, extra)


def _write(
    kind: str, decide: Decide, store: Store, target: pathlib.Path, keep_removed: bool, extra: dict[str, int]
) -> Passed:
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
    counted = {"passed": facts, "documents": left, "bytes": left_bytes, **extra}
    write_index(target, [path.name for path in store.files], counted)
    return passed


def _equal_documents(store: Store) -> Decide:
    """By 128 bits of a hash: among n documents two different ones are taken for equal with a chance of n^2 / 2^129."""
    digests = bytearray()
    for document in store:
        digests += hashlib.blake2b(document.text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
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


def _equal_lines(config: Lines, store: Store, extra: dict[str, int]) -> Decide:
    """Which lines go is known before anything is written; a byte a line of memory, and the table of one part."""
    begins_D = np.cumsum([0, *(_text.count_lines(text) for text in _encoded(store))])
    drop_L = np.zeros(int(begins_D[-1]), np.uint8)
    parts = max(1, -(-len(drop_L) * TABLE_BYTES // config.max_memory))
    first = config.keep == "first"
    for part in range(parts):
        lines = _text.LineDedup(part, parts, 1)
        if not first:
            for text in _encoded(store):
                lines.count(text)
        for index, text in enumerate(_encoded(store)):
            lines.drop_repeated(text, first, drop_L[begins_D[index] : begins_D[index + 1]], None)
    extra["lines"] = len(drop_L)
    extra["lines_dropped"] = 0

    def decide(index: int, document: Document) -> Document | Removed:
        lines = [f"{line}\n" for line in document.text.split("\n")]
        lines[-1] = lines[-1][:-1]  # which has no end of its own, and is none where it is empty
        drop = [*drop_L[begins_D[index] : begins_D[index + 1]].tolist(), 0]
        kept = [line for line, gone in zip(lines, drop, strict=False) if not gone or _stays(line, config.min_chars)]
        dropped = len(lines) - len(kept)
        if not dropped:
            return document
        extra["lines_dropped"] += dropped
        text = "".join(kept)
        if not text or text.isspace():
            return Removed("no line left", f"{dropped:,} lines that others have")
        return replace(document, text=text)

    return decide


def _stays(line: str, min_chars: int) -> bool:
    """Whether a line stays however often it is there: an empty or a short one."""
    return line.isspace() or len(line.removesuffix("\n")) < min_chars


def _encoded(store: Store) -> Iterator[bytes]:
    return (document.text.encode("utf-8", "surrogatepass") for document in store)
