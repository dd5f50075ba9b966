"""Countdown's expressions."""

import pytest

from cs336.alignment.rewards import CountdownReward
from cs336.verifiers import verify_countdown


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("3*2+7", 1), (" 7 + 2*3 ", 1), ("(3*2)+7 = 13", 1), ("so <answer>1</answer> or <answer>7+3*2</answer>.", 1),
        ("3+2*7", 0), ("13", 0), ("3*2+7+0", 0), ("7+3+3", 0), ("2*3+7+7-7", 0), ("", 0), ("3*2+", 0), ("-7+3*2", 0),
        ("3**2+7", 0), ("3//2+7", 0), ("2,3,7", 0), ("abs(3)*2+7", 0), ("0x7+3*2", 0), ("3*2+07", 0), ("7/(3-3)*2", 0),
        ("3*2+7" * 100, 0), ("(" * 199, 0), ("3*2+7; 1", 0), ("1_3", 0), ("3*2+7.0", 0),
    ],
)  # fmt: skip
def test_what_makes_13_of_2_3_and_7(response, score):
    verdict = verify_countdown(response, [2, 3, 7], 13)
    assert verdict.score == score, verdict.reason


def test_divisions_are_exact():
    assert verify_countdown("8/(3-8/3)", [3, 3, 8, 8], 24).score == 1
    assert verify_countdown("1/3*3", [1, 3, 3], 1).score == 1
    assert verify_countdown("8/(4-4)", [4, 4, 8], 24).reason.startswith("'8/(4-4)' has no value")


def test_the_reward():
    assert CountdownReward()("3*2+7", {"numbers": [7, 3, 2], "target": 13}) == 1
    assert CountdownReward()("3*2+7", {"numbers": [7, 3, 2], "target": 14}) == 0
    for answer in (13, {"numbers": [7]}, {"numbers": 7, "target": 1}, {"numbers": ["7"], "target": 7}):
        with pytest.raises(ValueError, match="countdown takes answers of"):
            CountdownReward()("3*2+7", answer)
