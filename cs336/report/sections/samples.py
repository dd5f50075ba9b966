"""What the model wrote, early and late."""

from typing import Any

from cs336.report.run import Run, number
from cs336.report.section import section


@section("Samples, early and late", order=30)
def samples(run: Run) -> dict[str, Any]:
    generated = [(str(row.get("prompt", "")), str(row.get("text", ""))) for row in run.generated]
    return {"samples": by_prompt(run), "generated": generated}


def by_prompt(run: Run) -> list[dict[str, Any]]:
    """For each prompt its earliest and latest text, and all the steps between."""
    prompts: dict[str, list[tuple[int, str]]] = {}
    for sample in run.samples:
        step, prompt, text = number(sample.get("step")), str(sample.get("prompt", "")), str(sample.get("text", ""))
        if step is not None:
            prompts.setdefault(prompt, []).append((int(step), text.removeprefix(prompt)))
    return [
        {"prompt": prompt, "first": sorted(texts)[0], "last": sorted(texts)[-1], "between": sorted(texts)[1:-1]}
        for prompt, texts in prompts.items()
    ]
