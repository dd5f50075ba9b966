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
        ("it is 50%.", "50%"),
        (r"it is $12.5\%$", r"12.5\%"),
        (r"so $-\frac{3}{4}$.", r"-\frac{3}{4}"),
        (r"so $1\tfrac12$", r"1\tfrac12"),
        ("x = −5, or 1 / 2", "1 / 2"),
        ("x = −5", "−5"),
        (r"\boxed {x} or \fbox{y}", "y"),
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
        (r"1\frac{1}{2}", Fraction(3, 2)), (r"-2 \frac 34", Fraction(-11, 4)), ("−5", -5), ("10{,}000", 10000),
        (r"90^\circ", 90), (r"90^{\circ}", 90), (r"1.5\frac{1}{2}", None), (r"x\frac{1}{2}", None), ("1 1/2", None),
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
        ("50%", "50", True), ("50%", "0.5", True), ("50%", "5", False), ("0%", "0", True), ("50%", r"50\%", True),
        ("50%", "5000%", False), ("x = 5", "5", True), ("x=5", "y = 5", True), ("x=5", "x=6", False),
        (r"5\text{ cm}", "5", True), (r"5 \text{ cm}^2", "5", True), ("18 dollars", "$18", True), ("5 x", "5", False),
        ("xy = 5", "5", False), ("50%", "0.005", False), ("1%", "0.0001", False), ("5 percent", "0.05", True),
        ("5 million", "5", False), ("5 dozen", "5", False), ("5 hundred", "5", False), ("5 factorial", "5", False),
        ("5 squared", "5", False), ("5 infinity", "5", False), ("2 log", "2", False), ("5 not", "5", False),
        (r"5\text{ million}", "5", False), (r"5\text{ or }", "5", False), (r"2\mathrm{e}", "2", False),
        (r"3\mathrm{i}", "3", False), (r"3\text{i}", "3", False), (r"5\text{ 6}", "5", False),
        ("5 percent", "5%", True), ("3 tenths", "3", False), ("3 quarters", "3", False), ("3 halves", "3", False),
        ("3 hundredths", "3", False), ("3 millions", "3", False), ("3 tens", "3", False), ("3 below", "3", False),
        ("3 negative", "3", False), (r"5 \mathrm{~cm}", "5", True), (r"5~\text{cm}", "5", True),
        (r"$5\text{ cm}$", "5", True),
        (r"5\text{ cm}^{-1}", "5", True),
        (r"5\text{ cm}", r"5\text{ m}", False), (r"5\text{ cm}", "6", False), (r"\text{ cm}", "5", False),
        (r"\frac12x", r"\frac{1}{2}x", True), (r"\sqrt2", r"\sqrt{2}", True), (r"\mathbf{A}", "A", True),
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
    assert verify_math(r"the answer is $\frac{3}{4}$", "4").score == 0  # the denominator alone is no answer
    assert verify_math("the chance is 50%", "1/2").score == 1
    assert verify_math("#### 18 dollars", "18").score == 1
    with pytest.raises(ValueError, match="expected must be text, got 4"):
        verify_math("4", 4)
    with pytest.raises(ValueError, match="holds no answer"):
        verify_math("7", r"\boxed{")


@pytest.mark.parametrize(
    "hostile",
    ["9" * 10**6, "1," * 10**6, r"\boxed{" * 10**5, "{" * 10**6 + "}" * 10**6, "9e" + "9" * 10**5, "1/" * 10**6,
     r"\boxed{1e" + "9" * 9 + "}", r"\boxed{" + "9" * 5000 + "}", r"\boxed{" + r"\frac{" * 9999 + "}" * 9999 + "}",
     " " * 10**6 + "x", "-+." * 10**6, r"\frac" * 10**5,
     r"\frac{1" * 10**5, "1 " * 10**6, r"\boxed" + " " * 10**6, r"\boxed{1" + " " * 60000 + "}",
     r"\boxed{" + r"1\text{" * 9000 + "}" * 9001, r"\boxed{a" + " =" * 9000 + "}",
     " " * 60000 + "x", "1" + " " * 60000 + "x", "1\\text{a}" + " " * 60000 + "x", "\x00\ud800"],
)  # fmt: skip
def test_hostile_responses_take_little_time(hostile):
    start = time.process_time()
    assert verify_math(hostile, "8").score == 0
    assert verify_format(hostile).score == 0
    assert equal_answers(hostile[-70000:], "1") == equal_answers("1", hostile[-70000:]) == False  # noqa: E712
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
