"""Multiple choice: the letter that a response settles on."""

import time

import pytest

from cs336.verifiers import extract_choice, verify_choice


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"), ("B.", "B"), ("(C) because", "C"), ("**D.** It rains", "D"), (" A\n", "A"), ("[B]", "B"),
        ("The answer is B.", "B"), ("The answer is (c).", None), ("the correct answer is (C)", "C"), ("Answer: D", "D"),
        ("ANSWER: **A**", "A"), ("It is not B, so the answer is $C$.", "C"), ("option (D)", "D"),
        ("The answer is A. No: the answer is B", "B"), (r"so \boxed{C}", "C"), (r"\boxed{\text{(B)}}", "B"),
        (r"The answer is A, \boxed{x}", None), ("A dog barks.", None), ("The answer is A dog", None),
        ("The answer is A because it rains", "A"), ("The answer is B by symmetry", "B"), ("**Answer:** B", "B"),
        ("**Answer**: B", "B"), ("My answer: `B`", "B"), ("Answer: <B>", "B"), ("Answer：B", "B"), ("## B", "B"),
        ("The answer would be B", "B"), ("The answer should be (B)", "B"), ("Answer - B", "B"), ("Answer:\n\nB\n", "B"),
        (r"\boxed{B. Paris}", "B"), (r"\boxed{\textbf{(B) }5}", "B"), (r"\boxed{B + 1}", None), (r"\boxed{Ba}", None),
        ("Option A is wrong; it is B", None), ("I choose option D.", "D"),
        ("The correct choice is B", "B"), ("The right option is **(C)**", "C"), ("My choice is (B)", "B"),
        ("Choice: B", "B"),
        ("Option: B", "B"), ("B is the answer", "B"), ("So (C) is the correct option.", "C"),
        ("B is correct.", "B"), ("Option C is right because it rains", "C"), ("So **(D)** is correct", "D"),
        ("B is not correct.", None), ("A is correct, no: B is the answer", "B"), ("B is right about it", None),
        ("If B is correct, then 2 = 3", None),
        ("The answer, I think, is C", None),
        ("E", None), ("", None),
        ("The answer is Denmark", None), ("I think it may be C", None), ("Answer: \\text{D}", "D"),
        ("the answer is A's", None),
    ],
)  # fmt: skip
def test_extract_choice(response, letter):
    assert extract_choice(response) == letter


def test_verify_choice():
    assert verify_choice("The answer is B.", "B") == (1.0, "B is right")
    assert verify_choice("The answer is B.", "C") == (0.0, "B is not C")
    assert verify_choice("no idea", "C") == (0.0, "no choice")
    assert verify_choice("E", "E", letters="ABCDE").score == 1
    with pytest.raises(ValueError, match="one letter of ABCD"):
        verify_choice("E", "E")
    with pytest.raises(ValueError, match="one letter"):
        verify_choice("A", "AB")


@pytest.mark.parametrize(
    "hostile",
    ["answer " * 10**5, "answer" + " " * 60000 + "x", "answer is" + "*" * 60000 + "x", "*" * 60000 + "x",
     "\\boxed{" * 10**5, "\\boxed{" + "-" * 60000 + "x}", "\\boxed{" + "A" + "-" * 60000 + "x}",
     " \n" * 10**6, "answer is be is " * 4000, "E is correct" * 20000, "E is right" + "*" * 60000 + "x"],
)  # fmt: skip
def test_hostile_responses_take_little_time(hostile):
    start = time.process_time()
    assert verify_choice(hostile, "A").score == 0
    assert time.process_time() - start < 1
