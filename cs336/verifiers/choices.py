"""Multiple choice: the letter that a response settles on. Time is linear in the text."""

import re

from cs336.verifiers.answers import LONGEST, Verdict, in_braces, last

_BOXED = re.compile(r"\\boxed\s*\{")
_MARKS = r"[\s*_`\"'“”(\[<{$:=：–—-]"
_MACRO = r"\\(?:text|textbf|mathrm|mathbf)\{"
_BETWEEN = rf"(?:{_MARKS}|{_MACRO}|\\\(|(?i:is|was|would|should|must|be|option|choice|letter)\b)*+"
_SAID = (r"(?i:\b(?:answer|choose|pick|select)\b)", r"(?i:\b(?:choice|option)\b[*_`]*+ ?(?:is\b|[:：]))")
_THE = "(?:the )?(?:correct |right |best )?"
_GIVEN = rf"(?i:{_THE}(?:answer|choice|option)\b|(?:correct|right)(?=\W*+$|[.;:!)*_`\n]| because| since| as\b))"
_GOES_ON = re.compile(r" (?!(?:because|since|as|by|for|and|which|with|due)\b)[a-z]")


def extract_choice(response: str, letters: str = "ABCD") -> str | None:
    """The letter in the last \\boxed{}, else behind the last "answer is", "Answer:", "choose", else behind "choice is",
    "option:", else before "is the answer", "is correct", else the one that the response begins with: "B", "(B)",
    "**B.** because".

    None if there is none of `letters`. In "the answer is A dog" A is an article.
    """
    response = "\n".join(" ".join(line.split()) for line in response[-LONGEST:].split("\n") if line.strip())
    one = f"([{re.escape(letters)}])"
    if boxed := last(_BOXED, response):
        inside = in_braces(response, boxed.end() - 1) or ""
        found = re.match(rf"\W*+(?:(?:text|textbf|mathrm|mathbf)\b\W*+)?{one}(?:[)\].:}}]|\W*+$)", inside)
        return found[1] if found else None
    for words in _SAID:
        said = None
        for match in re.finditer(rf"{words}{_BETWEEN}{one}(?![\w'’])", response):
            if match[1] not in "AI" or not _GOES_ON.match(response, match.end()):
                said = match[1]
        if said:
            return said
    if behind := last(re.compile(rf"\b{one}\W{{0,4}} is {_GIVEN}"), response):
        return behind[1]
    begun = re.match(rf"[#*_`(\[\"' ]*+(?:(?i:option|choice) )?[*_`(\[\"']*+{one}(?:[)\].:,*_`\]]|$|\n)", response)
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
