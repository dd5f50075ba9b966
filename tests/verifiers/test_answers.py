"""Answers of mathematics, and formats."""

import time
from fractions import Fraction

import pytest

from cs336.alignment import equal_answers, extract_answer, parse_number, verify_format, verify_math


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{4}. No: \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{ \left\{1, 2\right\} }", r"\left\{1, 2\right\}"),
        (r"\boxed{3} and \boxed{4", None),
        (r"\boxed{}", None),
        ("18 - 4\n#### 14\nwell", "14"),
        ("####", None),
        ("It costs $1,234.50.", "1,234.50"),
        ("3 apples, 4 pears, 7, all in all", "7"),
        ("x = -3/4", "-3/4"),
        ("it is 10-3", "3"),
        ("about 1.5e3 of them", "1.5e3"),
        ("none", None),
        ("", None),
    ],
)
def test_extract_answer(response, answer):
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("14", 14), ("-3", -3), ("+3", 3), ("007", 7), ("1,234,567.5", Fraction(2469135, 2)), ("12,34", None),
        (".5", Fraction(1, 2)), ("5.", 5), ("2e-3", Fraction(1, 500)), ("1e101", None), ("3/4", Fraction(3, 4)),
        ("3/0", None), ("1/2/3", None), (r"\frac{3}{4}", Fraction(3, 4)), (r"-\dfrac12", Fraction(-1, 2)),
        (r"\frac{1}{0}", None), ("50%", Fraction(1, 2)), (r"50\%", Fraction(1, 2)), ("$5", 5), (r"\$5.00", 5),
        ("1 2", None), ("x", None), ("", None), ("-", None), (".", None), ("9" * 101, None), ("__import__('os')", None),
        ("٣", None), ("1/", None), ("inf", None), ("nan", None),
    ],
)  # fmt: skip
def test_parse_number(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("0.5", r"\frac{1}{2}", True), ("0.50", "1/2", True), ("0.333", "1/3", False), ("1,000", "1000", True),
        ("10", "1", False), (r"x^2 + 1", "x^2+1", True), (r"\text{(A)}", "(A)", True), ("x", "y", False),
        (r"\dfrac{a}{b}", r"\frac{a}{b}", True), (r"\left(1, 2\right)", "(1,2)", True), ("", "", False),
        ("9" * 200, "9" * 200, True), ("0.1", "0.10000000000000000001", False), ("-0", "0", True),
    ],
)  # fmt: skip
def test_equal_answers(a, b, same):
    assert equal_answers(a, b) is same
    assert equal_answers(b, a) is same


def test_verify_math_says_why():
    assert verify_math(r"thus \boxed{0.5}", "1/2") == (1.0, "0.5 equals 1/2")
    assert verify_math("it is 7", "8") == (0.0, "7 is not 8")
    assert verify_math("it is 7", "3 + 4 = 7\n#### 7").score == 1
    assert verify_math("I do not know", "8") == (0.0, "no answer")
    assert verify_math(r"8, so \boxed{8", "8") == (0.0, r"the last \boxed{ is not closed or empty")
    with pytest.raises(ValueError, match="holds no answer"):
        verify_math("7", r"\boxed{")


@pytest.mark.parametrize(
    "hostile",
    ["9" * 10**6, "1," * 10**6, r"\boxed{" * 10**5, "{" * 10**6 + "}" * 10**6, "9e" + "9" * 10**5, "1/" * 10**6,
     r"\boxed{1e" + "9" * 9 + "}", r"\boxed{" + "9" * 5000 + "}", r"\boxed{" + r"\frac{" * 9999 + "}" * 9999 + "}",
     " " * 10**6 + "x", "-+." * 10**6, "\x00\ud800"],
)  # fmt: skip
def test_hostile_responses_take_little_time(hostile):
    start = time.process_time()
    assert verify_math(hostile, "8").score == 0
    assert verify_format(hostile).score == 0
    assert time.process_time() - start < 1


def test_verify_format():
    assert verify_format(" <think>a</think>\n<answer>b</answer>\n") == (1.0, "the format is kept")
    for response, reason in (
        ("<answer>b</answer>", "<think> is there 0 times"),
        ("<think>a</think><answer>b</answer> more", "text after </answer>"),
        ("so <think>a</think><answer>b</answer>", "<think> does not follow"),
        ("<think>a</think> so <answer>b</answer>", "<answer> does not follow"),
        ("<answer>b</answer><think>a</think>", "<think> does not follow"),
        ("<think>a<answer>b</think></answer>", "<answer> does not follow"),
        ("<think> </think><answer>b</answer>", "<think> is empty"),
        ("<think>a</think><answer>b</answer><answer>c</answer>", "<answer> is there 2 times"),
        ("", "<think> is there 0 times"),
    ):
        verdict = verify_format(response)
        assert verdict.score == 0
        assert verdict.reason.startswith(reason), response
