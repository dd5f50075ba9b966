"""Whether a program that a model wrote is right: by what it prints, or by tests of its functions.

    verify_code("```python\\ndef double(x):\\n    return 2 * x\\n```", "assert double(2) == 4")
    verify_code("print(int(input()) * 2)", [("2", "4"), ("5", "10")])

It runs in `cs336.verifiers.sandbox`, and it is never asked whether it passed. What it prints is compared here; tests
run behind walls of their own, and call the program's functions by messages of plain data (sandbox/remote.py).
"""

import functools
import pathlib
import re
from collections.abc import Sequence

from cs336.verifiers import sandbox
from cs336.verifiers.answers import Verdict
from cs336.verifiers.sandbox import Limits

# A line that opens a block, or an item of a list that does; words, then a fence that names Python.
_OPENING = re.compile(r"([ \t]*+)((?:[-*+]|\d++[.)])[ \t]++)?(`{3,}+)[ \t]*+([\w+-]*+)(?!.*```).*")
_BEHIND = re.compile(r"(?:[^`]++|`(?!``))*+(```)[ \t]*+(python3?|py)\s*+", re.IGNORECASE)
_CLOSING = re.compile(r"([ \t]*+)(`{3,})")
LIMITS = Limits()
_PYTHON = ("python", "python3", "py", "")


def extract_code(response: str) -> str:
    """The last fenced block of Python in a response, else the last block without a language; the whole response if it
    has no block, and the rest of it if the last block is Python's and not closed. A fence begins its line or an item of
    a list, or names Python behind words; of a block in a list the indent is cut."""
    blocks = list[tuple[str, str]]()
    language, indent, marks, code = "", "", "", list[str]()
    for line in response.split("\n"):
        if not marks:
            if opened := _OPENING.fullmatch(line):
                indent, marks, language = "" if opened[2] else opened[1], opened[3], opened[4].lower()
                code = []
            elif behind := _BEHIND.fullmatch(line):
                indent, marks, language, code = "", behind[1], behind[2].lower(), []
        elif (closing := _CLOSING.match(line)) and len(closing[2]) >= len(marks):
            blocks.append((language, "".join(f"{inside.removeprefix(indent or closing[1])}\n" for inside in code)))
            marks = ""
        else:
            code.append(line)
    blocks = [block for block in blocks if block[0] in _PYTHON]
    if blocks:
        return next((code for language, code in reversed(blocks) if language), blocks[-1][1])
    if marks and language and language in _PYTHON:
        return "\n".join(line.removeprefix(indent) for line in code).partition("```")[0]
    return response


def verify_code(
    response: str,
    expected: str | Sequence[tuple[str, str]],
    *,
    names: Sequence[str] = (),
    limits: Limits = LIMITS,
    weak: bool = False,
) -> Verdict:
    """Score 1 where the program in a response passes everything, 0 where it does not, with the first failure.

    Args:
        expected: Python that asserts, calling the program's functions by name; or pairs of standard input and expected
            output, compared without spaces at the ends of lines and blank lines at the end.
        names: of functions that are the program's although Python has them, such as sum.
        limits: of each run. Tests have as long as the program, and 10 seconds more.
        weak: be content with a weaker sandbox, see sandbox.run.

    Raises ValueError for tests that are none or no Python, sandbox.NotIsolated where programs cannot be kept in.
    """
    program = extract_code(response)
    if isinstance(expected, str):
        return _by_tests(program, expected, names, limits, weak)
    if not expected:
        raise ValueError("there is nothing to verify a program by: expected pairs of input and output")
    for number, (given, wanted) in enumerate(expected, 1):
        outcome = sandbox.run(program, given, limits, weak=weak)
        if reason := _failure(outcome):
            return Verdict(0.0, f"case {number}: {reason}")
        if _lines(outcome.stdout) != _lines(wanted):
            return Verdict(0.0, f"case {number}: printed {outcome.stdout!r:.80}, not {wanted!r:.80}")
    return Verdict(1.0, f"{len(expected)} outputs are right")


def _by_tests(program: str, tests: str, names: Sequence[str], limits: Limits, weak: bool) -> Verdict:
    try:
        compile(tests, "tests", "exec")
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"the tests are no Python: {error}") from None
    if not tests.strip():
        raise ValueError("there is nothing to verify a program by: expected tests")
    patient = Limits(limits.seconds + 10, limits.memory, limits.output, limits.disk, limits.processes)
    served, judged = sandbox.converse(
        (f"{_remote()}\nserve({program!r})\n", f"{_remote()}\njudge({tests!r}, {list(names)!r})\n"),
        (limits, patient),
        weak=weak,
    )
    if judged.ok:
        return Verdict(1.0, "the tests pass")
    if served.ending != "exit":
        return Verdict(0.0, _failure(served))
    said = judged.stderr.strip().rpartition("\n")[2]
    return Verdict(0.0, f"{said or _failure(judged):.500}")


def _failure(outcome: sandbox.Outcome) -> str:
    """How a program failed; "" if it did not."""
    if outcome.ending != "exit":
        return f"the program was stopped at its limit of {outcome.ending}"
    if outcome.exit_code < 0:
        return f"signal {-outcome.exit_code} ended the program"
    said = outcome.stderr.strip().rpartition("\n")[2]
    return "" if outcome.exit_code == 0 else f"exit code {outcome.exit_code}{f': {said:.200}' if said else ''}"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


@functools.cache
def _remote() -> str:
    return pathlib.Path(sandbox.__file__).with_name("remote.py").read_text(encoding="utf-8")
