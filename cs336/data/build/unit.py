"""One unit of work: its records read, extracted, filtered, and written to files that are whole or absent.

documents/00012.jsonl   what is left
removed/00012.jsonl     what was removed, with stage, reason and detail
unread/00012.jsonl      records that are damaged, too large, or cost a worker its life
counts/00012.json       written last: with it the unit is done
"""

import contextlib
import itertools
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from cs336.data.build.counts import Counts, Passed, power, text_bytes
from cs336.data.extract.record import document_of
from cs336.data.recipe import Recipe
from cs336.data.sources.record import Record, Unread
from cs336.data.sources.unit import Unit
from cs336.data.step import Apply, Removed
from cs336.utils.documents import Document
from cs336.utils.files import replacing, write_json

FOLDERS = ("documents", "removed", "unread", "counts")
SAMPLES, SAMPLE_CHARS = 3, 2000  # of each reason in a unit, where removed documents are not kept
MOST_FAILED = 20  # documents that a step raises for before it is asked whether it raises for most


@dataclass(frozen=True)
class Work:
    """A unit, and where it goes."""

    number: int
    source: int
    """Index of the recipe's source."""
    unit: Unit
    directory: str
    key: str
    """Of the settings and contents that it is made from."""
    lost: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Records that are passed over, for (reason, detail): those that a worker died of."""
    end: int | None = None
    """Nothing is read from this record on: reading it is what a worker died of."""
    most: int | None = None
    """Records of a sample."""

    def path(self, folder: str) -> pathlib.Path:
        lines = folder in ("documents", "removed", "unread")
        return pathlib.Path(self.directory) / folder / f"{self.number:05d}.json{'l' * lines}"

    @property
    def done(self) -> bool:
        """Whether the outputs are there and made from the same."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return (
                all(self.path(folder).exists() for folder in FOLDERS)
                and json.loads(self.path("counts").read_text(encoding="utf-8")).get("key") == self.key
            )
        return False

    def counts(self) -> Counts:
        table = json.loads(self.path("counts").read_text(encoding="utf-8"))
        return Counts.from_json({name: value for name, value in table.items() if name not in ("key", "unit")})


class StepFails(RuntimeError):
    """A step raises for most documents: a fault of the step, not of theirs."""


class Line:
    """The stages that a record passes: extraction and the recipe's steps, built once a process."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.stages: list[tuple[str, Callable[[Any], Document | Removed]]] = [
            ("extract", lambda record: document_of(record, recipe.extract)),
            *((step.kind, _whole(step.build())) for step in recipe.steps),
        ]

    def run(self, work: Work, beat: Callable[[int], None]) -> Counts:
        """Make the unit's files. beat: told of each record's number before it is read."""
        for folder in FOLDERS:
            (pathlib.Path(work.directory) / folder).mkdir(parents=True, exist_ok=True)
        work.path("counts").unlink(missing_ok=True)
        with (
            replacing(work.path("documents"), "wb") as documents,
            replacing(work.path("removed"), "wb") as removed,
            replacing(work.path("unread"), "wb") as unread,
        ):
            counts = _Pass(self, documents, removed, unread).run(work, beat)
        write_json(work.path("counts"), {"key": work.key, "unit": work.unit.name, **counts.to_json()})
        return counts

    def records(self, work: Work) -> Iterator[Record | Unread]:
        return self.recipe.sources[work.source].read(work.unit, self.recipe.limits)


class _Pass:
    """One pass of a unit through the stages."""

    def __init__(self, line: Line, documents: IO[bytes], removed: IO[bytes], unread: IO[bytes]):
        self.line, self.documents, self.removed, self.unread = line, documents, removed, unread
        self.counts = Counts(stages=[Passed(name) for name, _ in line.stages])
        self.samples: Counter[tuple[str, str]] = Counter()
        self.failed = 0

    def run(self, work: Work, beat: Callable[[int], None]) -> Counts:
        beat(0)
        position = 0
        records = self.line.records(work) if work.end != 0 else iter(())
        for record in itertools.islice(records, work.most):
            position = record.position
            lost = work.lost.get(record.number)
            if lost is not None:
                self._lose(record, *lost)
            elif isinstance(record, Unread):
                self.counts.unread[record.reason] = self.counts.unread.get(record.reason, 0) + 1
                if record.damaged:
                    self._list(record, record.reason, record.detail)
            else:
                self._record(record)
            beat(record.number + 1)
            if work.end == record.number + 1:
                break
        if work.end is not None:
            reason, detail = work.lost[work.end]
            place = Unread(work.end, f"{work.unit.name}, from record {work.end} on", work.unit.files[-1], reason)
            self._lose(place, reason, f"{detail}, as it was read: what follows it in its unit is not read")
        self.counts.source_bytes = work.unit.size if work.most is None else min(work.unit.size, position)
        return self.counts

    def _record(self, record: Record) -> None:
        counts = self.counts
        counts.records += 1
        counts.record_bytes += len(record.content)
        passing: Any = record
        size, masked = len(record.content), 0
        for (name, apply), passed in zip(self.line.stages, counts.stages, strict=True):
            passed.documents += 1
            passed.bytes += size
            found = self._apply(apply, passing)
            if isinstance(found, Removed):
                passed.remove(found.reason, size)
                self._remove(name, found, passing)
                if name == "language" and found.reason != "language uncertain":
                    code = found.reason.removeprefix("language ")
                    counts.languages[code] = counts.languages.get(code, 0) + 1
                return
            size = text_bytes(found.text)
            if name == "extract":
                _count(counts.lengths_in, power(len(found.text)))
            elif name == "language":
                _count(counts.languages, str(found.metadata["language"]))
            elif name == "mask_pii" and found is not passing:  # else "masked" is a field of the source's own
                masked += found.metadata["masked"]
            passing = found
        counts.documents += 1
        counts.bytes += size
        counts.masked += masked
        _count(counts.lengths_out, power(len(passing.text)))
        self.documents.write(line_of(passing))

    def _apply(self, apply: Callable[[Any], Document | Removed], passing: Any) -> Document | Removed:
        try:
            return apply(passing)
        except MemoryError:
            return Removed("out of memory")
        except Exception as error:  # whatever a step makes of a stranger's text costs that document alone
            self.failed += 1
            if self.failed > MOST_FAILED and 2 * self.failed > self.counts.records:
                raise StepFails(f"a step fails for most documents: {type(error).__name__}: {error}") from error
            return Removed("failed", f"{type(error).__name__}: {error}"[:500])

    def _remove(self, stage: str, why: Removed, passing: Document | Record) -> None:
        if why.reason in ("failed", "out of memory", "unreadable"):
            self._list(passing, why.reason, why.detail)
        self.samples[stage, why.reason] += 1
        kept = self.line.recipe.keep_removed
        if not kept and self.samples[stage, why.reason] > SAMPLES:
            return
        self.removed.write(removed_line(stage, why, passing, whole=kept))

    def _lose(self, record: Record | Unread, reason: str, detail: str) -> None:
        self.counts.unread[reason] = self.counts.unread.get(reason, 0) + 1
        self._list(record, reason, detail)

    def _list(self, record: Any, reason: str, detail: str) -> None:
        row = {"id": record.id, "source": record.source, "reason": reason, "detail": detail}
        self.unread.write(_json_line(row))


def line_of(document: Document) -> bytes:
    row = {"id": document.id, "source": document.source, "text": document.text, "metadata": document.metadata}
    return _json_line(row)


def removed_line(stage: str, why: Removed, passing: Document | Record, *, whole: bool) -> bytes:
    text = passing.text if isinstance(passing, Document) else ""
    row = {"stage": stage, "reason": why.reason, "detail": why.detail, "id": passing.id, "source": passing.source}
    return _json_line(row | {"text": text if whole else text[:SAMPLE_CHARS], "metadata": dict(passing.metadata)})


def _json_line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n"


def _whole(apply: Apply) -> Apply:
    """A step that leaves no visible character removes the document."""

    def step(document: Document) -> Document | Removed:
        found = apply(document)
        empty = isinstance(found, Document) and (not found.text or found.text.isspace())
        return Removed("nothing left") if empty else found

    return step


def _count(table: dict[str, int], name: str) -> None:
    table[name] = table.get(name, 0) + 1
