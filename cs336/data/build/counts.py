"""What went in, what was removed and why: counted a unit of work, added up for a build. JSON values throughout."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

Tally = dict[str, list[int]]  # reason -> [documents, bytes]


@dataclass
class Passed:
    """One stage's documents, as they came, and those that it removed."""

    name: str
    documents: int = 0
    bytes: int = 0
    """UTF-8 bytes of the texts that came."""
    removed: Tally = field(default_factory=dict)

    def remove(self, reason: str, size: int) -> None:
        tally = self.removed.setdefault(reason, [0, 0])
        tally[0] += 1
        tally[1] += size

    def add(self, other: "Passed") -> None:
        self.documents += other.documents
        self.bytes += other.bytes
        for reason, (documents, size) in other.removed.items():
            tally = self.removed.setdefault(reason, [0, 0])
            tally[0] += documents
            tally[1] += size


@dataclass
class Counts:
    records: int = 0
    record_bytes: int = 0
    """Of the contents of records: pages with their markup."""
    source_bytes: int = 0
    """Of the files that were read, packed as they are."""
    unread: dict[str, int] = field(default_factory=dict)
    """What was no record, by reason; damaged ones, too."""
    stages: list[Passed] = field(default_factory=list)
    """Extraction, then the steps."""
    documents: int = 0
    """That are left."""
    bytes: int = 0
    languages: dict[str, int] = field(default_factory=dict)
    """Of the documents that came to the step that names languages."""
    lengths_in: dict[str, int] = field(default_factory=dict)
    """Of the extracted documents, by the power of two that their characters reach."""
    lengths_out: dict[str, int] = field(default_factory=dict)
    masked: int = 0
    """Pieces of personal data."""

    def add(self, other: "Counts") -> None:
        for name in ("records", "record_bytes", "source_bytes", "documents", "bytes", "masked"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("unread", "languages", "lengths_in", "lengths_out"):
            setattr(self, name, dict(Counter(getattr(self, name)) + Counter(getattr(other, name))))
        if not self.stages:
            self.stages = [Passed(stage.name) for stage in other.stages]
        for mine, its in zip(self.stages, other.stages, strict=True):
            mine.add(its)

    def to_json(self) -> dict[str, Any]:
        """With sorted keys where order could differ."""
        table = asdict(self)
        for name in ("unread", "languages", "lengths_in", "lengths_out"):
            table[name] = dict(sorted(table[name].items()))
        for stage in table["stages"]:
            stage["removed"] = dict(sorted(stage["removed"].items()))
        return table

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> "Counts":
        return cls(**{**table, "stages": [Passed(**stage) for stage in table["stages"]]})


def total(counts: Iterable[Counts]) -> Counts:
    found = Counts()
    for one in counts:
        found.add(one)
    return found


def text_bytes(text: str) -> int:
    """Of its UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def power(chars: int) -> str:
    """The largest power of two that is not above: "1024" of 1500."""
    return str(1 << (chars.bit_length() - 1)) if chars else "0"
