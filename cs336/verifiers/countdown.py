"""Countdown: whether an expression makes a target of given numbers, each used once. Exact; nothing is run."""

import ast
import operator
import re
from collections.abc import Sequence
from fractions import Fraction

from cs336.verifiers.answers import Verdict

LONGEST = 200  # characters of an expression
_WRITTEN = re.compile(r"[0-9+\-*/() ]+")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def verify_countdown(response: str, numbers: Sequence[int], target: int) -> Verdict:
    """1 where the response is an expression of +, -, *, / and parentheses that takes each number once and is `target`.

    The expression is what the last <answer> holds, the whole response where there is none; what follows "=" is no part
    of it. Numbers are positive integers.
    """
    tagged = _TAGGED.findall(response)
    text = (tagged[-1] if tagged else response).partition("=")[0].strip()
    if len(text) > LONGEST or not _WRITTEN.fullmatch(text):
        return Verdict(0.0, f"{text[:60]!r} is no expression of numbers, + - * / and parentheses")
    try:
        tree = ast.parse(text, mode="eval").body
        taken = list[int]()
        value = _value(tree, taken)
    except (SyntaxError, ValueError, ZeroDivisionError) as error:
        return Verdict(0.0, f"{text!r} has no value: {error}")
    if sorted(taken) != sorted(numbers):
        return Verdict(0.0, f"{text} takes {sorted(taken)}, expected each of {sorted(numbers)} once")
    return Verdict(float(value == target), f"{text} = {value}, expected {target}")


def _value(node: ast.expr, taken: list[int]) -> Fraction:
    """Raises ValueError for other than an expression of the four operations, ZeroDivisionError for a division by 0."""
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, taken), _value(node.right, taken))
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        taken.append(node.value)
        return Fraction(node.value)
    raise ValueError("expected numbers joined by + - * /")
