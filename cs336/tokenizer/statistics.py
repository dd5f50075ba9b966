"""What a vocabulary looks like."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

from cs336.tokenizer.tokenizer import Tokenizer
from cs336.utils.files import write_json


def statistics(tokenizer: Tokenizer, longest: int = 24) -> dict[str, Any]:
    """JSON values: sizes, how many tokens have each length in bytes, and the longest tokens that hold a letter.

    Special tokens are named, and are neither counted by length nor among the longest.
    """
    specials = tokenizer.special_tokens
    special_ids = set(specials.values())
    tokens = [token for i, token in tokenizer.vocab.items() if i not in special_ids]
    lengths = Counter(map(len, tokens))
    words = [word for word in (token.decode("utf-8", "replace") for token in tokens) if any(map(str.isalpha, word))]
    return {
        "vocab_size": tokenizer.vocab_size,
        "merges": len(tokenizer.merges),
        "pattern": tokenizer.pattern,
        "special_tokens": " ".join(specials) or "none",
        "fingerprint": tokenizer.fingerprint[:16],
        "mean_token_bytes": round(sum(map(len, tokens)) / max(1, len(tokens)), 3),
        "length_histogram": {str(n): lengths[n] for n in sorted(lengths)},
        "longest_tokens": sorted(words, key=lambda word: (-len(word.encode()), word))[:longest],
    }


def keep(tokenizer: Tokenizer, directory: str | os.PathLike, **facts: float) -> None:
    """Write tokenizer.json, and tokenizer_stats.json (these facts and `statistics`) for a report, into a directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(directory / "tokenizer.json")
    write_json(directory / "tokenizer_stats.json", facts | statistics(tokenizer), indent=2)
