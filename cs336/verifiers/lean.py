"""Whether a proof is one, by Lean 4 where it is on PATH.

    verify_lean("by simp", "theorem zero_add' (n : Nat) : 0 + n = n")

What a model writes is a term or a tactic block and nothing more: a word that begins another command, or that lets a
proof pass unproved, is refused before Lean sees it. Lean is then asked for the axioms that the theorem rests on.
"""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import tempfile

from cs336.verifiers.answers import Verdict

LONGEST = 1 << 16  # characters of a proof
AXIOMS = {"propext", "Classical.choice", "Quot.sound"}
_REFUSED = re.compile(
    r"(?<![\w'.])(?:sorry|sorryAx|admit|axiom|native_decide|unsafe|opaque|partial|extern|implemented_by|theorem|lemma|def|"
    r"abbrev|instance|structure|inductive|class|namespace|section|end|open|import|export|macro|macro_rules|syntax|notation|"
    r"infix[lr]?|prefix|postfix|elab|elab_rules|set_option|attribute|initialize|builtin_initialize|run_cmd|run_tac|run_meta|"
    r"run_elab|eval|example|mutual|universe|variable|deriving|private|protected|public|meta|decide_by_eval)(?![\w'])|#\w|@\[|%"
)
_NAME = re.compile(r"\s*(?:theorem|lemma)\s+([\w.'«»]+)")


def verify_lean(response: str, theorem: str, *, imports: str = "", seconds: float = 60.0) -> Verdict:
    """Score 1 where the proof in a response, its last ```lean block or all of it, proves a theorem.

    Args:
        theorem: its header, `theorem name binders : statement`.
        imports: lines before it, import Mathlib for one.

    Raises FileNotFoundError where there is no `lean` on PATH, ValueError for a header that is none.
    """
    lean = shutil.which("lean")
    if lean is None:
        raise FileNotFoundError("proofs are verified by Lean 4, and there is no `lean` on PATH: install it with elan")
    named = _NAME.match(theorem)
    if named is None or ":=" in theorem:
        raise ValueError(f"expected `theorem name binders : statement`, got {theorem!r:.100}")
    blocks = re.findall(r"```lean4?[^\n]*\n(.*?)```", response, re.DOTALL)
    proof = (blocks[-1] if blocks else response).strip().removeprefix(":=").strip()
    if not proof or len(proof) > LONGEST:
        return Verdict(0.0, f"there is no proof of 1 to {LONGEST} characters")
    if (found := _REFUSED.search(proof)) is not None:
        return Verdict(0.0, f"a proof may not hold {found.group()!r}")
    indented = proof.replace("\n", "\n  ")
    source = f"{imports}\n{theorem} :=\n  {indented}\n\n#print axioms {named[1]}\n"
    with tempfile.TemporaryDirectory() as place:
        file = pathlib.Path(place) / "Proof.lean"
        file.write_text(source, encoding="utf-8")
        done = _run([lean, str(file)], place, seconds)
    if done is None:
        return Verdict(0.0, f"Lean did not end in {seconds:g} s")
    code, said = done
    if code or re.search(r"\b(error|declaration uses)\b", said):
        return Verdict(0.0, f"Lean: {' '.join(said.split())[:400] or f'exit code {code}'}")
    axioms = rf"'{re.escape(named[1])}' (?:does not depend on any axioms|depends on axioms: \[([^\]]*)\])"
    rests = re.findall(axioms, said)
    if not rests:
        return Verdict(0.0, f"Lean did not say what the proof rests on: {said[:200]!r}")
    # The last is Lean's: before it a proof can have Lean print whatever it likes (trace).
    others = {axiom.strip() for axiom in rests[-1].split(",")} - AXIOMS - {""}
    return (
        Verdict(0.0, f"it rests on {', '.join(sorted(others))}") if others else Verdict(1.0, "Lean accepts the proof")
    )


def _run(command: list[str], place: str, seconds: float) -> tuple[int, str] | None:
    """(exit code, what it said); None if it was stopped, with all that it started."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "ELAN_HOME", "LEAN_PATH") if name in os.environ}
    process = subprocess.Popen(
        command,
        cwd=place,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=seconds)
        return process.returncode, said.decode(errors="replace")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None
