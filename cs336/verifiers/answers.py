"""Whether a response is right, by rules: a score and the reason for it. What models write is never run.

A mathematical answer is the content of the last \\boxed{}, else what follows the last ####, else the last number, with
its fraction and percent sign. Two answers are equal if they are the same text, or exactly the same number: 0.5, 1/2,
\\frac{1}{2} and 50% are one, 0.333 and 1/3 are not. A unit counts only where both have one, and 50% is 50 too, for
problem sets write either. Time is linear in the text, of which the last LONGEST characters are read, and numbers are
bounded.
"""

import re
from fractions import Fraction
from typing import NamedTuple

LONGEST = 1 << 16  # characters of a response that are read, from its end
DIGITS = 100  # of a number; one of more is text
EXPONENT = 100

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_NUMBER = re.compile(
    r"(?:(?<![\w)])[-+−])?"
    r"(?:(?:\d+\s?)?\\[dt]?frac(?:\{[^{}]*\}|\s?\d){2}|(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:\s?/\s?\d+)?)"
    r"(?:\s?\\?%)?"
)
_PLAIN = re.compile(r"([-+]?)(\d*)(?:\.(\d*))?(?:[eE]([-+]?\d{1,4}))?", re.ASCII)
_GROUPED = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d*)?", re.ASCII)
_FRACTION = re.compile(r"([-+]?)(\d*)\s*\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))", re.ASCII)
_DRESSING = re.compile(r"\\(?:left|right|displaystyle|[,;:! ])|\$|\\\(|\\\)|\\\[|\\\]|\^(?:\{\\circ\}|\\circ)|°")
_PERCENT = re.compile(r"(?<=\d) percent\b")
_NAME = re.compile(r"^\s*[A-Za-z]\s*=(?!=)")
_UNIT = re.compile(r"(?: ?\\(?:text|mbox|mathrm)\{([A-Za-z/. ]*)\}(?:\^\{?-?\d\}?)?|(?<=\S) ([A-Za-z]{3,}))\.?$")
_NO_UNIT = re.compile(  # words that make another number of what stands before them
    r"\b(?:e|i|(?:one|two|three|four|five|six|seven|eight|nine|ten|hundred|thousand|million|billion|trillion|dozen|percent)s?"
    r"|(?:third|quarter|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth|millionth|billionth)s?"
    r"|hal(?:f|ves)|squared|cubed|factorial|infinity|inf|infinite|log|sin|cos|tan|sqrt|pi|mod|and|or|not|nor|over|times"
    r"|plus|minus|negative|divided|more|less|than|about|below|above)\b",
    re.IGNORECASE,
)


class Verdict(NamedTuple):
    score: float
    """1 for right, 0 for wrong."""
    reason: str


def extract_answer(response: str) -> str | None:
    """The answer that a response gives, None if it gives none; a last \\boxed{ that is never closed is none."""
    response = response[-LONGEST:]
    if opened := last(_BOXED, response):
        return in_braces(response, opened.end() - 1)
    if (start := response.rfind("####")) >= 0:
        return response[start + 4 :].strip().partition("\n")[0].strip() or None
    found = last(_NUMBER, response)
    return None if found is None else found.group().rstrip(",")


def last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The last match of those that do not overlap."""
    found = None
    for found in pattern.finditer(text):  # noqa: B007 (the last one is wanted)
        pass
    return found


def in_braces(text: str, start: int) -> str | None:
    """What lies between the brace at `start` and the one that closes it."""
    depth = 0
    for i in range(start, len(text)):
        if text[i] in "{}" and (i == 0 or text[i - 1] != "\\"):
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return text[start + 1 : i].strip() or None
    return None


def parse_number(text: str) -> Fraction | None:
    """The number that a text is, exactly: integer, decimal, fraction of the two, percentage; None if it is none.

    1,234.5   -3/4   \\frac{3}{4}   1\\frac12   2e-3   50%   $5
    """
    text = _undressed(text).strip().removesuffix(".").rstrip()
    percent = text.endswith("%")
    text = text.removesuffix("%").removesuffix("\\").strip()
    if len(text) > 4 * DIGITS:
        return None
    if match := _FRACTION.fullmatch(text):
        sign, whole, *parts = match.groups()
        top, bottom = parts[0] or parts[1] or "", parts[2] or parts[3] or ""
    else:
        sign, whole, (top, slash, bottom) = "", "", text.partition("/")
        bottom = bottom if slash else "1"
    above, below = _plain(top.strip()), _plain(bottom.strip())
    before = _plain(whole or "0")
    if above is None or before is None or not below:
        return None
    value = (before + above / below) / (100 if percent else 1)
    return -value if sign == "-" else value


def _plain(text: str) -> Fraction | None:
    """An integer or a decimal."""
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "")
    match = _PLAIN.fullmatch(text)
    if match is None:
        return None
    sign, whole, part, exponent = match[1], match[2], match[3] or "", int(match[4] or 0)
    if not whole + part or len(whole + part) > DIGITS or abs(exponent) > EXPONENT:
        return None
    value = Fraction(int(whole + part)) * Fraction(10) ** (exponent - len(part))
    return -value if sign == "-" else value


def equal_answers(answer: str, expected: str) -> bool:
    """Whether two answers are the same number, or else the same text but for spaces and LaTeX's dressing.

    x = 5 is 5; 5 \\text{ cm} and 5 apples are 5, and 5 \\text{ m} is neither; 5 million is not 5. A percentage is its
    number, too.
    """
    texts = [_NAME.sub("", _PERCENT.sub("%", text[-LONGEST:])) for text in (answer, expected)]
    a, b = map(parse_number, texts)
    if (a is None) != (b is None):
        a, b = (_without_unit(t) if x is None else x for t, x in zip(texts, (a, b), strict=True))
    if a is not None and b is not None:
        signs = ["%" in text for text in texts]
        return a == b or (signs[0] != signs[1] and (100 * a == b if signs[0] else 100 * b == a))
    return _bare(texts[0]) == _bare(texts[1]) != ""


def _without_unit(text: str) -> Fraction | None:
    """The number before a unit, or another name of what is counted."""
    text = " ".join(_undressed(text).split())
    unit = _UNIT.search(text) if len(text) <= 4 * DIGITS else None
    if unit is None or _NO_UNIT.search(unit[1] or unit[2] or ""):
        return None
    return parse_number(text[: unit.start()])


def _undressed(text: str) -> str:
    return _DRESSING.sub("", text.replace("\\$", "$").replace("−", "-").replace("{,}", ",").replace("~", " "))


def _bare(text: str) -> str:
    text = re.sub(r"\\[dt]frac", r"\\frac", _undressed(text[-LONGEST:]))
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\s", "", text).removesuffix(".")
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    return re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)


def verify_math(response: str, expected: str) -> Verdict:
    """Score 1 where the response's answer equals the expected one, 0 where it does not or there is none.

    expected: an answer, or a whole solution with a \\boxed{} or ####.
    Raises ValueError where `expected` is a solution without an answer, and for what is no text.
    """
    for name, given in (("response", response), ("expected", expected)):
        if not isinstance(given, str):
            raise ValueError(f"{name} must be text, got {given!r:.60}: a number is given as str(number)")
    if "\\boxed" in expected or "####" in expected:
        solution, found = expected, extract_answer(expected)
        if found is None:
            raise ValueError(f"the expected solution holds no answer: {solution[-80:]!r}")
        expected = found
    answer = extract_answer(response)
    if answer is None:
        return Verdict(0.0, "the last \\boxed{ is not closed or empty" if "\\boxed{" in response else "no answer")
    if equal_answers(answer, expected):
        return Verdict(1.0, f"{answer:.80} equals {expected:.80}")
    return Verdict(0.0, f"{answer:.80} is not {expected:.80}")


def verify_format(response: str, tags: tuple[str, ...] = ("think", "answer")) -> Verdict:
    """Score 1 where a response is <think>...</think> <answer>...</answer> and nothing else: each tag once, in order."""
    rest = response.strip()
    for tag in tags:
        for mark in (f"<{tag}>", f"</{tag}>"):
            if (count := response.count(mark)) != 1:
                return Verdict(0.0, f"{mark} is there {count} times instead of once")
        rest = rest.lstrip()
        if not rest.startswith(f"<{tag}>"):
            return Verdict(0.0, f"<{tag}> does not follow what is before it")
        inside, closed, rest = rest.partition(f"</{tag}>")
        if not closed or not inside.removeprefix(f"<{tag}>").strip():
            return Verdict(0.0, f"<{tag}> is empty or not closed")
    return Verdict(0.0, f"text after </{tags[-1]}>") if rest.strip() else Verdict(1.0, "the format is kept")
