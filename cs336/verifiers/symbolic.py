"""Equality of mathematical answers by algebra, where they are not the same text or number: x + 1 is 1 + x.

By math-verify (the extra `align`). That can take forever, so it runs in a process of its own, ended at a time limit.

    verify_math_symbolic(r"so \\boxed{1 + x}", "x + 1")
"""

import atexit
import json
import pathlib
import select
import subprocess
import sys
import threading

from cs336.verifiers.answers import Verdict, extract_answer, verify_math

LONGEST = 2000  # characters of an answer that algebra is tried on
START = 60.0  # seconds that the process may take to import what it needs


def verify_math_symbolic(response: str, expected: str, seconds: float = 5.0) -> Verdict:
    """`verify_math`, and where that says no, whether the two answers are equal by algebra, decided within so many
    seconds; score 0 where they are not enough.

    Raises ImportError without math-verify, ValueError where `expected` is a solution without an answer.
    """
    exact = verify_math(response, expected)
    answer = extract_answer(response)
    if exact.score or answer is None:
        return exact
    if "\\boxed" in expected or "####" in expected:
        expected = extract_answer(expected) or expected
    if max(len(answer), len(expected)) > LONGEST:
        return exact
    with _LOCK:
        equal = _WORKER.ask(answer, expected, seconds)
    if equal is None:
        return Verdict(0.0, f"whether {answer:.80} is {expected:.80} was not decided in {seconds:g} s")
    return Verdict(1.0, f"{answer:.80} equals {expected:.80} by algebra") if equal else exact


class _Worker:
    """The process, started when it is first asked and again after it was ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None

    def ask(self, answer: str, expected: str, seconds: float) -> bool | None:
        """None: not decided in time, or it died of the question."""
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([answer, expected]).encode() + b"\n")
            process.stdin.flush()
            said = self._line(process, seconds)
        except BrokenPipeError:
            said = b""
        if not said:
            self.end()
            return None
        return bool(json.loads(said))

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _started(self) -> subprocess.Popen:
        if self._process is None or self._process.poll() is not None:
            self.end()
            script = str(pathlib.Path(__file__).with_name("symbolic_worker.py"))
            self._process = subprocess.Popen(
                [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            if self._line(self._process, START) != b"ready\n":
                self.end()
                raise ImportError("equality by algebra takes math-verify: pip install 'cs336[align]'")
        return self._process

    @staticmethod
    def _line(process: subprocess.Popen, seconds: float) -> bytes:
        assert process.stdout is not None
        return process.stdout.readline() if select.select([process.stdout], (), (), seconds)[0] else b""


_LOCK, _WORKER = threading.Lock(), _Worker()
atexit.register(_WORKER.end)
