"""What the model wrote, early and late."""

import difflib
import math
from typing import Any

from cs336.report.run import Run, number
from cs336.report.section import section


@section("Samples, early and late", order=30)
def samples(run: Run) -> dict[str, Any]:
    generated = [(str(row.get("prompt", "")), str(row.get("text", ""))) for row in run.generated]
    return {"samples": by_prompt(run), "generated": generated}


def changes(texts: list[tuple[int, str]], before: str) -> list[tuple[int, list[tuple[str, str]]]]:
    """Each text as pieces, ("same" | "new", text), against the one before it."""
    out = []
    for step, text in texts:
        pieces = []
        for tag, _, _, start, stop in difflib.SequenceMatcher(None, before, text, autojunk=False).get_opcodes():
            if stop > start:
                pieces.append(("same" if tag == "equal" else "new", text[start:stop]))
        out.append((step, pieces))
        before = text
    return out


def by_prompt(run: Run) -> list[dict[str, Any]]:
    """For each prompt its earliest and latest text, and what is new at all the steps between."""
    prompts: dict[str, list[tuple[int, str]]] = {}
    for sample in run.samples:
        step, prompt, text = number(sample.get("step")), str(sample.get("prompt", "")), str(sample.get("text", ""))
        if step is not None and math.isfinite(step):
            prompts.setdefault(prompt, []).append((int(step), text.removeprefix(prompt)))
    return [
        {
            "prompt": prompt,
            "first": sorted(texts)[0],
            "last": sorted(texts)[-1],
            "between": changes(sorted(texts)[1:-1], sorted(texts)[0][1]),
        }
        for prompt, texts in prompts.items()
    ]
