"""Verdicts on programs, and programs that would rather have another one."""
# ruff: noqa: E501 (a program a line)

import shutil
import subprocess
import time

import pytest

from cs336.verifiers import Limits, extract_code, sandbox, verify_code

kept_in = pytest.mark.skipif(sandbox.isolation().level != "namespaces", reason=f"not kept in: {sandbox.isolation()}")
PATIENT = Limits(seconds=60)  # for what ends by itself, on a machine that is busy
TESTS = "assert double(2) == 4\nassert double(-3) == -6\nassert abs(double(0.5) - 1) < 1e-9"


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("x = 1", "x = 1"),
        ("so:\n```python\nx = 1\n```\nthat is it", "x = 1\n"),
        (
            "```python\nx = 1\n```\nno:\n```py\nx = 2\n```\nruns as\n```bash\npython x.py\n```\n```\noutput\n```",
            "x = 2\n",
        ),
        ("```\nx = 1\n```", "x = 1\n"),
        ("well\n```python\nx = 1\ny =", "x = 1\ny ="),
        ("  ```python\n  if x:\n      y\n\n  z\n  ```", "if x:\n    y\n\nz\n"),
        ("Here it is: ```python\nx = 1\n```\nok", "x = 1\n"),
        ("1. So: ```py\nx = 1\n```\n2. Or:\n   ```Python\n   x = 2\n   ```", "x = 2\n"),
        ("a `x` and ```y``` then\n```\nz\n```", "z\n"),
        ("I'll use ``` fences.\n```python\nx=1\n```\n", "x=1\n"),
        ("a ``` b\n```\nx=1\n```", "x=1\n"),
        ("````python\nx=1\n```\ny\n````", "x=1\n```\ny\n"),
        ('```python title="a`b"\nx=1\n```', "x=1\n"),
        ("- ```python\n  x = 1\n  ```", "x = 1\n"),
        ("1. ```\n   if x:\n       y\n   ```", "if x:\n    y\n"),
        ("```\nx = 1", "```\nx = 1"),
        ("```python\nx = 1```", "x = 1"),
        ("```python\nprint('```')\n```", "print('```')\n"),
        ("", ""),
    ],
)
def test_extract_code(response, code):
    assert extract_code(response) == code


@kept_in
def test_what_a_program_raises_keeps_its_arguments():
    program = "def f(x):\n    raise x('no', 3) if x is KeyError else x('no')"
    tests = "for kind in (ValueError, TypeError, KeyError):\n    try:\n        f(kind)\n    except kind as error:\n        said = error"
    assert verify_code(
        program,
        f"{tests}\n        assert said.args == (('no', 3) if kind is KeyError else ('no',))",
        limits=PATIENT,
    ).score
    assert verify_code(
        "def f(): raise ValueError('no')",
        "try:\n    f()\nexcept ValueError as e:\n    assert str(e) == 'no'",
        limits=PATIENT,
    ).score
    assert verify_code("def f(): raise ValueError(object())", "f()", limits=PATIENT).reason.startswith(
        "ValueError (ValueError in the program: <obj"
    )
    assert verify_code("class E(ValueError):\n    args = 1\ndef f(): raise E()", "f()", limits=PATIENT).score == 0


@kept_in
def test_what_it_prints():
    assert verify_code("print(int(input()) * 2)", [("2", "4"), ("5", "10\n\n")], limits=PATIENT) == (
        1.0,
        "2 outputs are right",
    )
    assert verify_code("print('4 ')\nprint()", [("", "4")], limits=PATIENT).score == 1
    assert verify_code("print(4)", [("2", "4"), ("5", "10")], limits=PATIENT) == (
        0.0,
        "case 2: printed '4\\n', not '10'",
    )
    assert verify_code("print(4); exit(3)", [("2", "4")], limits=PATIENT) == (0.0, "case 1: exit code 3")
    assert (
        verify_code("print(4); 1 / 0", [("2", "4")], limits=PATIENT).reason
        == "case 1: exit code 1: ZeroDivisionError: division by zero"
    )
    assert verify_code("while 1: pass", [("2", "4")], limits=Limits(seconds=0.5)).reason.endswith("its limit of time")
    assert (
        verify_code("import ctypes; ctypes.string_at(0)", [("", "")], limits=PATIENT).reason
        == "case 1: signal 11 ended the program"
    )
    with pytest.raises(ValueError, match="nothing to verify"):
        verify_code("print(4)", [])


@kept_in
@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def double(x): return 2 * x", TESTS),
        ("def f(*a, **k): return a, k", "assert f(1, {2}, x=(3, None), y=b'4') == ((1, {2}), {'x': (3, None), 'y': b'4'})"),
        ("def f(x): return x", "for v in (True, 1 << 9999, -1.5, 1j, 'é\\n', [{'a': {1: (2,)}}, frozenset('b')], bytearray(b'c')):\n"
         "    assert f(v) == v and type(f(v)) is type(v)\nassert f(float('nan')) != f(float('nan'))"),
        ("def f(x): x.sort()\ndef g(x): x['a'] = 1\ndef h(x): x.add(2)",
         "x, y, z = [3, 1], {}, {1}\nf(x); g(y); h(z)\nassert (x, y, z) == ([1, 3], {'a': 1}, {1, 2})"),
        ("def f(): yield from range(3)", "assert list(f()) == [0, 1, 2] and sum(f()) == 3"),
        ("class Stack:\n  def __init__(self): self.items = []\n  def push(self, x): self.items.append(x); return self\ndef size(s): return len(s.items)",
         "s = Stack()\ns.other = [int]\nassert s.other == [int]\ns.push(1).push(2)\nassert s.items == [1, 2] and size(s) == 2"),
        ("class Node:\n  left = None\n  kinds = {1: 'a'}\nroot = Node()\ndef depth(n): return 0 if n is None else 1 + depth(n.left)",
         "assert depth(root) == 1\nroot.left = Node()\nroot.left.left = Node()\nassert depth(root) == 3 and depth(root.left) == 2\nassert Node.kinds == {1: 'a'}"),
        ("def f(x): raise ValueError('no')", "try:\n    f(1)\nexcept ValueError as e:\n    assert 'no' in str(e)\nelse:\n    assert False"),
        ("class Odd(ValueError): pass\ndef f(x): raise x(5)\ndef g(): raise Odd\ndef h(e=UnicodeDecodeError('a', b'', 0, 1, 'b')): raise e\ndef i():\n  try: h()\n  except ValueError as e: e.args = (i,); raise",
         "def raises(kind, f, *a):\n  try: f(*a)\n  except kind: return True\nassert raises(TypeError, f, TypeError) and raises(KeyError, f, KeyError)\nassert raises(ValueError, g) and raises(UnicodeDecodeError, h) and raises(RuntimeError, i)"),
        ("def f(x):\n  print('noise', x)\n  return input", "f('\\n{')"),
        ("from collections import Counter, namedtuple\nimport enum\nclass E(enum.IntEnum): A = 2\ndef f(): return Counter('aab'), E.A, namedtuple('P', 'x')(1)",
         "assert f() == ({'a': 2, 'b': 1}, 2, (1,))"),
        ("def f(x): return x * 2", "import math\ndef check(candidate):\n    assert math.isclose(candidate(2), 4)\ncheck(f)"),
    ],
)  # fmt: skip
def test_right_programs_pass_their_tests(program, tests):
    assert verify_code(program, tests, limits=PATIENT) == (1.0, "the tests pass")


@kept_in
def test_names_that_python_has():
    assert verify_code("def sum(a, b): return 6", "assert sum(10, 15) == 6", names=["sum"], limits=PATIENT).score == 1
    assert verify_code("def sum(a, b): return 6", "assert sum(10, 15) == 6", limits=PATIENT).score == 0


@kept_in
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("def double(x): return 2 * x + (x == -3)", "AssertionError: assert double(-3) == -6"),
        ("def twice(x): return 2 * x", "NameError (NameError in the program: double is not defined)"),
        ("def double(x: return", "SyntaxError ("),
        ("def double(x): return x.y", "AttributeError (AttributeError in the program: 'int' object"),
        ("def double(x):\n  while True: pass", "the program was stopped at its limit of time"),
        ("def double(x): return double(x)", "RecursionError"),
        ("", "NameError"),
    ],
)
def test_wrong_programs_fail_with_a_reason(program, reason):
    verdict = verify_code(program, TESTS, limits=Limits(seconds=2) if "while" in program else PATIENT)
    assert verdict.score == 0
    assert verdict.reason.startswith(reason), verdict


FORGERIES = {
    "exit well": "import os\nos._exit(0)",
    "exit well when asked": "import os\ndef double(x): os._exit(0)",
    "SystemExit": "def double(x): raise SystemExit(0)",
    "SystemExit at once": "raise SystemExit(0)",
    "print the marker": "import os\nfor f in range(3): os.write(f, b'the tests pass\\n{\"passed\": true}\\n')\nos._exit(0)",
    "answer everything at once": "import os\nfor _ in range(9): os.write(1, b'{\"value\": true, \"arguments\": {\"list\": []}}\\n')\ndef double(x): return True",
    "equal to all": "class A:\n  def __eq__(s, o): return True\n  __hash__ = None\n  def __sub__(s, o): return s\n  def __lt__(s, o): return True\ndef double(x): return A()",
    "an int that is equal to all": "class A(int):\n  def __eq__(s, o): return True\ndef double(x): return A(7)",
    "true": "class A:\n  def __bool__(s): return True\ndef double(x): return A()",
    "other builtins": "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.AssertionError = ValueError\ndef abs(x): return 0\ndef double(x): return 4 if x > 0 else -6",
    "other modules": "import sys, types\nsys.modules['ast'] = types.SimpleNamespace()\nsys.exit = lambda *a: None\nsys.excepthook = print\ndef double(x): return 5",
    "look for the tests": "import gc, sys\ndef double(x):\n  f = sys._getframe()\n  while f: \n    for v in [*f.f_globals.values(), *f.f_locals.values()]:\n      if isinstance(v, str) and 'assert' + ' double' in v: return 4 if x == 2 else -6 if x < 0 else 1\n    f = f.f_back\n  return 5",
    "read the tests' process": "import os\ndef double(x):\n  for p in range(1, 99):\n    try: open(f'/proc/{p}/mem', 'r+b').write(b'x')\n    except OSError: pass\n    try: os.kill(p, 9) if p != os.getpid() else 0\n    except OSError: pass\n  return 5",
    "close the line": "import os\ndef double(x):\n  os.close(0); os.close(1)\n  return 4",
    "too deep": "def double(x):\n  import os\n  os.write(1, b'[' * 10**6 + b'\\n')",
    "no end of line": "import os\ndef double(x):\n  while True: os.write(1, b'x' * 65536)",
    "no JSON": "import os\nos.write(1, b'\\xff\\n')\ndef double(x): return 4",
    "an assertion of its own": "def double(x): raise AssertionError",
    "a child that goes on": "import os\ndef double(x):\n  if os.fork(): os._exit(0)\n  return 5",
    "not a number": "def double(x): return float('nan')",
    "serve otherwise": "import __main__\n__main__.encode = lambda *a: True\n__main__.serve = None\ndef double(x): return 5",
}  # fmt: skip


@kept_in
@pytest.mark.parametrize("name", FORGERIES)
def test_a_verdict_cannot_be_forged(name):
    verdict = verify_code(FORGERIES[name], TESTS, limits=Limits(seconds=2))
    assert verdict.score == 0, verdict
    assert verdict.reason


@kept_in
def test_a_loop_over_tests_cannot_be_ended():
    tests = "def right(x): return double(x) == 2 * x\nassert all(map(right, [1, 2]))"
    assert verify_code("def double(x): return 2 * x", tests, limits=PATIENT).score == 1
    for program in ("def double(x): raise StopIteration", "class A(StopIteration): pass\ndef double(x): raise A"):
        verdict = verify_code(program, tests, limits=PATIENT)
        assert verdict.score == 0
        assert verdict.reason.startswith("RuntimeError (StopIteration in the program"), verdict


@kept_in
def test_an_object_is_neither_true_nor_false():
    for test in ("assert f(2)", "assert not f(2)", "assert f(2) != 3", "assert f(2) in [3]", "assert len(f(2)) == 0"):
        assert verify_code("class A: pass\ndef f(x): return A()", test, limits=PATIENT).score == 0, test


@pytest.mark.skipif(shutil.which("unshare") is None, reason="there is no `unshare` to compare with")
def test_programs_are_kept_in_where_namespaces_are():
    """Else a broken sandbox would only skip the other tests."""
    namespaces = subprocess.run(["unshare", "-Urnpmi", "--fork", "true"], capture_output=True).returncode == 0
    found = sandbox.isolation()
    assert found.held or found.level == "none"
    assert (found.level == "namespaces") is namespaces, found


def test_tests_are_checked():
    with pytest.raises(ValueError, match="the tests are no Python"):
        verify_code("x = 1", "assert (")
    with pytest.raises(ValueError, match="nothing to verify"):
        verify_code("x = 1", " \n")


@pytest.mark.parametrize(
    "hostile",
    [
        " " * 10**6,
        "`" * 10**6,
        "```\n" * 10**5,
        "```python\n" * 10**4,
        "x```" * 10**5,
        "```js\nx" * 10**5,
        "`` " * 10**5,
        "- " * 10**5,
        "`" * 10**5 + "x```",
        "```" + "a" * 10**5 + "```",
    ],
)
def test_hostile_responses_take_little_time(hostile):
    start = time.process_time()
    extract_code(hostile)
    assert time.process_time() - start < 2
