"""Multiple choice: the letter that a response settles on."""

import re

from cs336.verifiers.answers import LONGEST, Verdict, in_braces, last

_BOXED = re.compile(r"\\boxed\s*\{")
_SAID = r"(?i:\b(?:answer|choice|option)(?:\s+is)?\s*[:=]?\s*(?:\\?[*_(\[{\"']|\$|\\(?:text|mathrm|textbf)\{)*)"


def extract_choice(response: str, letters: str = "ABCD") -> str | None:
    """The letter in the last \\boxed{}, else behind the last "answer is", "Answer:", "option", else the one that the
    response begins with: "B", "(B)", "**B.** because"; None if there is none of `letters`."""
    response, one = response[-LONGEST:], f"[{re.escape(letters)}]"
    if boxed := last(_BOXED, response):
        inside = re.fullmatch(rf"\W*(?:text|mathrm|textbf)?\W*({one})\W*", in_braces(response, boxed.end() - 1) or "")
        return inside[1] if inside else None
    if said := last(re.compile(rf"{_SAID}({one})(?![\w'])"), response):
        return said[1]
    begun = re.match(rf"[\s*_(\[\"']*({one})(?:[)\].:,*_]|\s*$|\s*\n)", response)
    return begun[1] if begun else None


def verify_choice(response: str, expected: str, letters: str = "ABCD") -> Verdict:
    """Score 1 where the letter that a response settles on is the expected one.

    Raises ValueError where `expected` is none of `letters`.
    """
    if len(expected) != 1 or expected not in letters:
        raise ValueError(f"expected is {expected!r}: expected one letter of {letters}")
    found = extract_choice(response, letters)
    if found is None:
        return Verdict(0.0, "no choice")
    return Verdict(float(found == expected), f"{found} {'is right' if found == expected else f'is not {expected}'}")
