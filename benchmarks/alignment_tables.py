"""The tables of benchmarks/report.py that say what alignment reaches."""

from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]


def align_ladder(rows: list[Row]) -> Iterator[str]:
    """A row for each rung, with a value a seed."""
    heads = ("rung", "by", "start", "end", "optimum", "steps", "CPU seconds of reinforcement", "of SFT before")
    yield "| " + " | ".join([*heads, "both, by the clock", "seeds"]) + " |"
    yield "| --- | --- | " + "---: | " * 7 + "--- |"
    for name in dict.fromkeys(row["rung"] for row in rows):
        found = [row for row in rows if row["rung"] == name]
        start, end = (", ".join(f"{row[key]:.3f}" for row in found) for key in ("start", "end"))
        took, before = (", ".join(f"{row[key]:.0f}" for row in found) for key in ("cpu_seconds", "sft_cpu_seconds"))
        clock = ", ".join(f"{row['seconds'] + row['sft_seconds']:.0f}" for row in found)
        seeds, first = ", ".join(str(row["seed"]) for row in found), found[0]
        cells = (name, first["algorithm"], start, end, f"{first['optimum']:g}", first["steps"], took, before, clock)
        yield "| " + " | ".join(map(str, (*cells, seeds))) + " |"


def sft(rows: list[Row]) -> Iterator[str]:
    """A row for each way to make the same pass."""
    (ours,) = (row["tokens_per_second"] for row in rows if row["way"] == "cs336 sft")
    yield f"{rows[0]['examples']} examples of {rows[0]['tokens']:,} tokens"
    yield ""
    yield "| | steps | tokens a second | cs336 is as fast, times |"
    yield "| --- | ---: | ---: | ---: |"
    for row in rows:
        speed = row["tokens_per_second"]
        yield f"| {row['way']} | {row['steps']} | {speed:,} | {ours / speed:.2f} |"


def gsm8k(rows: list[Row]) -> Iterator[str]:
    """A row a seed, and the gain with the 95 % interval of Student's t."""
    seeds = [row for row in rows if "seed" in row]
    heads = ("seed", "SFT", "and GRPO", "right only after", "only before", f"SFT, drawn at {seeds[0]['temperature']}")
    yield "| " + " | ".join([*heads, "and GRPO", "steps of SFT", "of GRPO"]) + " |"
    yield "|" + " ---: |" * 9
    for row in seeds:
        share = {key: f"{100 * row[key]:.2f} %" for key in ("sft_greedy", "grpo_greedy", "sft_drawn", "grpo_drawn")}
        cells = [share["sft_greedy"], share["grpo_greedy"], row["gained"], row["lost"]]
        cells += [share["sft_drawn"], share["grpo_drawn"], row["sft_steps"], row["grpo_steps"]]
        yield f"| {row['seed']} | " + " | ".join(map(str, cells)) + " |"
    yield ""
    for row in (row for row in rows if "gain" in row):
        spread = "" if row["half_width"] is None else f" ± {100 * row['half_width']:.2f}"
        yield f"Gain, {row['gain']}: {100 * row['mean']:+.2f}{spread} points of {seeds[0]['tested']:,} questions."


def grpo_step(rows: list[Row]) -> Iterator[str]:
    """The fastest of the steps that were timed, and what invariant mode says of the log-probabilities."""
    best = min((row for row in rows if row["mode"] == "fast"), key=lambda row: row["seconds"])
    length = best["tokens"] // best["responses"]
    yield f"{best['responses']} responses of {length:,} tokens to prompts of {best['prompt']}"
    yield ""
    yield "| a step | of it drawing | tokens a second drawn | learning | most memory |"
    yield "| ---: | ---: | ---: | ---: | ---: |"
    seconds = [f"{best[name]:.1f} s" for name in ("seconds", "rollout_seconds", "learn_seconds")]
    cells = [
        seconds[0],
        seconds[1],
        f"{best['rollout_tokens_per_second']:,.0f}",
        seconds[2],
        f"{best['peak_gib']:.0f} GiB",
    ]
    yield "| " + " | ".join(cells) + " |"
    yield ""
    said = ", ".join(f"{row['difference_max']:.3g} in {row['mode']} mode" for row in rows if row in (best, rows[-1]))
    yield f"Largest difference of a token's log-probability between drawing and learning: {said}."
