"""How much of a page's gold text an extractor finds: F1 over shingles of four words, every page alike.

The measure of the Scrapinghub article benchmark: precision and recall are means over pages, F1 is of the two means.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

WORD = re.compile(r"\w+")
SHINGLE = 4


def shingles(text: str) -> Counter:
    """Shingles of a text, of all its words where it has fewer than four."""
    words = WORD.findall(text)
    return Counter(tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1)) if words)


@dataclass
class Score:
    precisions: list[float] = field(default_factory=list)
    recalls: list[float] = field(default_factory=list)

    def add(self, gold: str, found: str) -> None:
        gold_shingles, found_shingles = shingles(gold), shingles(found)
        common = sum((gold_shingles & found_shingles).values())
        if found_shingles:
            self.precisions.append(common / found_shingles.total())
        if gold_shingles:
            self.recalls.append(common / gold_shingles.total())

    @property
    def precision(self) -> float:
        return sum(self.precisions) / max(len(self.precisions), 1)

    @property
    def recall(self) -> float:
        return sum(self.recalls) / max(len(self.recalls), 1)

    @property
    def f1(self) -> float:
        return 2 * self.precision * self.recall / max(self.precision + self.recall, 1e-9)
