"""What a tokenizer does to text, to look at."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from rich.text import Text

from cs336.tokenizer.tokenizer import Tokenizer
from cs336.utils.batching import batches

BATCH = 1 << 20  # characters encoded at a time
STYLES = ("black on #b8d8f8", "black on #f8d8a8", "black on #c8e8b8", "black on #e8c8f0", "black on #f8c0c0")
SPECIAL = "bold white on #404040"
_VISIBLE = {ord("\n"): "\u21b5\n", ord("\r"): "\u240d", ord("\t"): "\u21e5\t"}


def render(tokenizer: Tokenizer, text: str | bytes) -> Text:
    """The text with each token on its colour, special tokens apart; a byte that is part of a character is \\xNN."""
    rendered = Text()
    special_ids = set(tokenizer.special_tokens.values())
    for place, i in enumerate(tokenizer.encode(text, allowed_special="all")):
        shown = tokenizer.token_bytes(i).decode("utf-8", "backslashreplace").translate(_VISIBLE)
        rendered.append(shown, SPECIAL if i in special_ids else STYLES[place % len(STYLES)])
    return rendered


@dataclass(frozen=True)
class Usage:
    """How texts use a vocabulary."""

    num_texts: int
    num_bytes: int
    num_tokens: int
    num_distinct: int  # tokens
    longest: list[bytes]  # of the tokens used
    most_frequent: list[tuple[bytes, int]]  # and how often

    @property
    def bytes_per_token(self) -> float:
        return self.num_bytes / max(1, self.num_tokens)


def usage(tokenizer: Tokenizer, texts: Iterable[str | bytes], top: int = 20) -> Usage:
    """Encode texts, special tokens as ordinary text, and count. Reads them one batch after the other."""
    counts: Counter[int] = Counter()
    num_texts = 0
    for batch in batches(texts, BATCH):
        ids, _ = tokenizer.encode_batch_numpy(batch, disallowed_special=())
        found, times = np.unique(ids, return_counts=True)
        counts.update(dict(zip(found.tolist(), times.tolist(), strict=True)))
        num_texts += len(batch)
    used = sorted((tokenizer.token_bytes(i) for i in counts), key=lambda token: (-len(token), token))
    return Usage(
        num_texts=num_texts,
        num_bytes=sum(len(tokenizer.token_bytes(i)) * times for i, times in counts.items()),
        num_tokens=counts.total(),
        num_distinct=len(counts),
        longest=used[:top],
        most_frequent=[(tokenizer.token_bytes(i), times) for i, times in counts.most_common(top)],
    )
