"""Proofs, by a stand-in for Lean that says what it is told, and by Lean itself where it is."""

import shutil

import pytest

from cs336.verifiers import verify_lean

THEOREM = "theorem t (n : Nat) : n + 0 = n"


@pytest.fixture
def lean(tmp_path, monkeypatch):
    """Called with what Lean shall say, its exit code, and what it shall do first."""

    def install(said, code=0, first=""):
        path = tmp_path / "lean"
        path.write_text(f'#!/bin/sh\n{first}\ncp "$1" {tmp_path}/seen\nprintf \'%s\' "{said}"\nexit {code}\n')
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return tmp_path / "seen"

    return install


def test_without_lean(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no `lean` on PATH"):
        verify_lean("by simp", THEOREM)


@pytest.mark.parametrize(
    ("said", "code", "score", "reason"),
    [
        ("'t' does not depend on any axioms", 0, 1, "Lean accepts"),
        ("'t' depends on axioms: [propext, Quot.sound]", 0, 1, "Lean accepts"),
        ("'t' depends on axioms: [propext, sorryAx]", 0, 0, "it rests on sorryAx"),
        ("'t' depends on axioms: [mine]", 0, 0, "it rests on mine"),
        ("'t' does not depend on any axioms\n't' depends on axioms: [mine]", 0, 0, "it rests on mine"),
        ("'other' does not depend on any axioms", 0, 0, "Lean did not say"),
        ("", 0, 0, "Lean did not say"),
        ("Proof.lean:2:3: error: unsolved goals", 1, 0, "Lean: Proof.lean:2:3: error: unsolved goals"),
        ("declaration uses 'sorry'", 0, 0, "Lean: declaration uses"),
        ("", 9, 0, "Lean: exit code 9"),
    ],
)
def test_what_lean_says(lean, said, code, score, reason):
    seen = lean(said, code)
    verdict = verify_lean("so:\n```lean\n:= by\n  simp\n```", THEOREM, imports="import Mathlib")
    assert verdict.score == score
    assert verdict.reason.startswith(reason)
    assert seen.read_text() == f"import Mathlib\n{THEOREM} :=\n  by\n    simp\n\n#print axioms t\n"


@pytest.mark.parametrize(
    "proof",
    [
        "by sorry", "by admit", "by native_decide", "by simp\naxiom x : False", "by simp\n#eval 1", "by\n  run_tac foo",
        "by simp\ntheorem t2 : True := trivial", "by simp\nmacro \"a\" : term => `(1)", "by simp\n@[simp] def f := 1",
        "by simp\nset_option x 1", "by simp\nend", "", "x" * 70_000,
    ],
)  # fmt: skip
def test_what_lean_is_not_asked(lean, proof):
    seen = lean("'t' does not depend on any axioms")
    assert verify_lean(proof, THEOREM).score == 0
    assert not seen.exists()


def test_time_and_headers(lean):
    lean("", first="sleep 60")
    assert verify_lean("by simp", THEOREM, seconds=0.3).reason == "Lean did not end in 0.3 s"
    for header in ("def x := 1", "theorem t : 1 = 1 := rfl", ""):
        with pytest.raises(ValueError, match="expected `theorem name"):
            verify_lean("by simp", header)


@pytest.mark.skipif(shutil.which("lean") is None, reason="there is no `lean` on PATH")
def test_lean_itself():
    assert verify_lean("by simp", THEOREM).score == 1
    assert verify_lean("by rfl", "theorem t : 1 = 2").score == 0
