"""Instructions that rules can check a response against: kinds and arguments as IFEval names them (arXiv:2311.07911),
and two of tone.

    check("length_constraints:number_words", response, num_words=100, relation="at least")

Words are runs of letters, digits and _ with ' and - within; sentences end at . ! or ? before a space or the end.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cs336.verifiers.answers import Verdict

_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_SENTENCE_END = re.compile(r"(?<![.!?])[.!?]++[\"')\]]*+(?=\s|$)")
_BULLET = re.compile(r"^[ \t]*[*+-][ \t]+\S", re.MULTILINE)
_HIGHLIGHT = re.compile(r"\*\*([^\n*]+)\*\*|\*([^\n*]+)\*")
_CONTRACTION = re.compile(r"\w['’](?:s|t|re|ve|ll|d|m)\b", re.IGNORECASE)
_SLANG = re.compile(
    r"\b(?:gonna|wanna|gotta|yeah|yep|nope|kinda|sorta|cool|awesome|hey|lol|guys|stuff)\b", re.IGNORECASE
)
_POLITE = re.compile(
    r"\b(?:please|thank(?:s| you)|you['’]?re welcome|happy to|glad to|my pleasure|kindly|would you)\b", re.IGNORECASE
)
_OPTIONS = ("my answer is yes.", "my answer is no.", "my answer is maybe.")
Check = Callable[..., bool]


def words(text: str) -> list[str]:
    return _WORD.findall(text)


def sentences(text: str) -> list[str]:
    """What lies between ends of sentences, and the rest."""
    return [part for part in (s.strip() for s in _SENTENCE_END.split(text)) if part]


def _related(count: int, relation: str, wanted: int) -> bool:
    if relation == "at least":
        return count >= wanted
    if relation in ("less than", "at most"):
        return count < wanted if relation == "less than" else count <= wanted
    if relation in ("exactly", "equal to"):
        return count == wanted
    raise ValueError(f"a relation is at least, less than, at most or exactly, got {relation!r}")


def _count(text: str, word: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def _existence(text: str, keywords: Sequence[str]) -> bool:
    return all(_count(text, word) for word in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: str = "at least") -> bool:
    return _related(_count(text, keyword), relation, frequency)


def _forbidden(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(_count(text, word) for word in forbidden_words)


def _letters(text: str, letter: str, let_frequency: int, let_relation: str = "at least") -> bool:
    return _related(text.lower().count(letter.lower()), let_relation, let_frequency)


def _language(text: str, language: str) -> bool:
    from cs336.data import identify_language

    return identify_language(text)[0] == language.lower().partition("-")[0]


def _number_words(text: str, num_words: int, relation: str = "at least") -> bool:
    return _related(len(words(text)), relation, num_words)


def _number_sentences(text: str, num_sentences: int, relation: str = "at least") -> bool:
    return _related(len(sentences(text)), relation, num_sentences)


def _inner(parts: list[str]) -> list[str]:
    """Parts between dividers, without an empty first or last one: a divider may open a text, or close it."""
    parts = parts[not parts[0] :]
    return parts[: len(parts) - (bool(parts) and not parts[-1])]


def _number_paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = _inner([part.strip() for part in re.split(r"\s?\*\*\*\s?", text)])
    return len(parts) == num_paragraphs and all(parts)


def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = [part.strip() for part in re.split(r"\n[ \t]*\n", text) if part.strip()]
    if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    found = words(parts[nth_paragraph - 1])
    return bool(found) and found[0].lower() == first_word.lower()


def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]\n]+\]", text)) >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    marker = "[ \t]*".join(re.escape(c) for c in postscript_marker if not c.isspace())
    return re.search(rf"^[ \t]*{marker}.*\S", text, re.IGNORECASE | re.MULTILINE) is not None


def _bullets(text: str, num_bullets: int) -> bool:
    return len(_BULLET.findall(text)) == num_bullets


def _constrained(text: str) -> bool:
    return any(option in text.lower() for option in _OPTIONS)


def _highlights(text: str, num_highlights: int) -> bool:
    return sum(bool((a or b).strip()) for a, b in _HIGHLIGHT.findall(text)) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{re.escape(section_spliter)}\s?\d+\s?", text)) >= num_sections


def _json(text: str) -> bool:
    text = text.strip()
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*?)\n?```", text, re.DOTALL | re.IGNORECASE)
    try:
        json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    return any(inner.strip() for inner in re.findall(r"<<([^<>\n]+)>>", text))


def _two(text: str) -> bool:
    parts = _inner([part.strip() for part in text.split("******")])
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _repeat(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _capital_words(text: str, capital_frequency: int, capital_relation: str = "at least") -> bool:
    return _related(sum(word.isupper() for word in words(text)), capital_relation, capital_frequency)


def _upper(text: str) -> bool:
    return text.isupper()


def _lower(text: str) -> bool:
    return text.islower()


def _no_comma(text: str) -> bool:
    return not re.search("[,，、]", text)


def _formal(text: str) -> bool:
    """No contractions, exclamations or slang: a floor, not a taste."""
    return not ("!" in text or _CONTRACTION.search(text) or _SLANG.search(text))


def _polite(text: str) -> bool:
    return _POLITE.search(text) is not None


CHECKS: dict[str, Check] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "language:response_language": _language,
    "length_constraints:number_words": _number_words,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two,
    "combination:repeat_prompt": _repeat,
    "startend:end_checker": _end,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _upper,
    "change_case:english_lowercase": _lower,
    "punctuation:no_comma": _no_comma,
    "tone:formal": _formal,
    "tone:polite": _polite,
}


def check(kind: str, response: str, **arguments: Any) -> bool:
    """Whether a response follows one instruction; an empty one follows none. Arguments that are None are not given.

    Raises ValueError for a kind that is not in CHECKS and for arguments that it does not take.
    """
    if kind not in CHECKS:
        raise ValueError(f"there is no instruction {kind!r}: expected one of {', '.join(CHECKS)}")
    given = {name: value for name, value in arguments.items() if value is not None}
    try:
        return bool(response.strip()) and CHECKS[kind](response, **given)
    except TypeError as error:
        raise ValueError(f"{kind}: {error}") from None


def verify_constraints(response: str, kinds: Sequence[str], arguments: Sequence[Mapping[str, Any]]) -> Verdict:
    """The share of instructions that a response follows, and those that it does not. Raises what `check` does."""
    if len(kinds) != len(arguments) or not kinds:
        raise ValueError(f"there are {len(kinds)} instructions and {len(arguments)} sets of arguments: give one each")
    failed = [kind for kind, given in zip(kinds, arguments, strict=True) if not check(kind, response, **given)]
    reason = f"not followed: {', '.join(failed)}" if failed else "all instructions are followed"
    return Verdict(1 - len(failed) / len(kinds), reason)


def loosened(response: str) -> list[str]:
    """A response and what remains of it without its first line, its last, both, and each without asterisks: IFEval's
    loose measure takes the best."""
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [variant for text in cut for variant in (text, text.replace("*", ""))]
