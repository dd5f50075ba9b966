"""Answers that are equal by algebra."""

import time

import pytest

from cs336.verifiers import symbolic, verify_math_symbolic

pytest.importorskip("math_verify")


@pytest.mark.parametrize(
    ("response", "expected", "score"),
    [
        (r"\boxed{1 + x}", "x + 1", 1), (r"\boxed{x + 2}", "x + 1", 0), (r"\boxed{\frac{\sqrt{8}}{2}}", r"\sqrt{2}", 1),
        (r"\boxed{(x-1)(x+1)}", "x^2 - 1", 1), (r"\boxed{\{2, 1\}}", r"\{1, 2\}", 1), (r"\boxed{(2, 1)}", "(1, 2)", 0),
        (r"\boxed{0.5}", r"so \boxed{\frac12}", 1), (r"\boxed{2\pi}", r"the area\n#### \pi + \pi", 1),
        ("no idea", "x", 0), (r"\boxed{}", "x", 0), (r"\boxed{" + "x + " * 2000 + "1}", "x", 0),
        (r"\boxed{__import__('os').system('true')}", "x", 0), (r"\boxed{\x{\}", "x", 0),
    ],
)  # fmt: skip
def test_equality_by_algebra(response, expected, score):
    assert verify_math_symbolic(response, expected, seconds=30).score == score


def test_what_takes_forever_is_ended():
    assert verify_math_symbolic(r"\boxed{x+1}", "1+x", seconds=30).score == 1
    start = time.monotonic()
    verdict = verify_math_symbolic(r"\boxed{10^{10^{10^{10}}} + 1}", r"9^{9^{9^{9^{9}}}}", seconds=0.5)
    assert verdict.score == 0
    assert time.monotonic() - start < 30
    assert verify_math_symbolic(r"\boxed{1+y}", "y+1", seconds=30).score == 1  # by another process


def test_a_process_that_dies_is_replaced():
    assert verify_math_symbolic(r"\boxed{x+1}", "1+x", seconds=30).score == 1
    symbolic._WORKER._process.kill()
    symbolic._WORKER._process.wait()
    assert verify_math_symbolic(r"\boxed{x+1}", "1+x", seconds=30).score == 1


def test_without_math_verify(monkeypatch, tmp_path):
    symbolic._WORKER.end()
    (tmp_path / "math_verify.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ImportError, match="takes math-verify"):
        verify_math_symbolic(r"\boxed{x+1}", "1+x")
