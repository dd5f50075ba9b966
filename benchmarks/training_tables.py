"""The tables of benchmarks/report.py that say how fast and how well models are trained."""

import itertools
from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]


def train(rows: list[Row]) -> Iterator[str]:
    yield (
        "| model | ours | plain PyTorch | ours / plain | spread of blocks | loss after the same steps, ours / plain "
        "| GiB at the peak, ours (predicted) / plain |"
    )
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for name, group in itertools.groupby(rows, lambda row: row["model"]):
        by_variant = {row["variant"]: row for row in group}
        plains = [by_variant.pop(variant) for variant in list(by_variant) if variant.startswith("plain")]
        plain = max(plains, key=lambda row: row["tokens_per_second"])
        for variant, ours in by_variant.items():
            speed = [f"{r['tokens_per_second'] / 1e3:.1f}k tokens/s{mfu(r)}" for r in (ours, plain)]
            spread = " / ".join(f"{r['spread']:.1%}" for r in (ours, plain))
            faster = ours["tokens_per_second"] / plain["tokens_per_second"]
            losses = f"{ours['loss']:.4f} / {plain['loss']:.4f}"
            model = ", ".join([name, *variant.split()[1:]])
            yield f"| {model} | {speed[0]} | {speed[1]} | {faster:.3f} | {spread} | {losses} | {peaks(ours, plain)} |"


def peaks(ours: Row, plain: Row) -> str:
    if not ours.get("bytes"):
        return "–"
    found, predicted, other = (size / 2**30 for size in (ours["bytes"], ours["predicted_bytes"], plain["bytes"]))
    return f"{found:.2f} ({predicted:.2f}) / {other:.2f}"


def ladder(rows: list[Row]) -> Iterator[str]:
    yield "| each rung has what those above it have | tokens/s | of plain PyTorch | memory at the peak | loss |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for row in rows:
        faster = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        memory = f"{row['bytes'] / 2**30:.1f} GiB" if row["bytes"] else ""
        speed = f"{row['tokens_per_second'] / 1e3:.1f}k{mfu(row)}"
        yield f"| {row['variant']} | {speed} | {faster:.3f}x | {memory} | {row['loss']:.4f} |"


def optimizers(rows: list[Row]) -> Iterator[str]:
    """A row for each optimizer: the learning rate that the sweep chose, and where it leads, over the seeds."""
    yield "| optimizer | a step, AdamW's is 1 | steps | learning rate, of those swept | loss, by seed | mean |"
    yield "| --- | ---: | ---: | --- | --- | ---: |"
    for name, group in itertools.groupby(rows, lambda row: row["optimizer"]):
        found = list(group)
        swept = [row for row in found if row["seed"] == found[0]["seed"]]
        best = min(swept, key=lambda row: row["val_loss"])["lr"]
        losses = [row["val_loss"] for row in found if row["lr"] == best]
        rates = ", ".join(f"{row['lr']:g}" for row in swept)
        each = ", ".join(f"{loss:.3f}" for loss in losses)
        mean = sum(losses) / len(losses)
        yield f"| {name} | {found[0]['cost']:.2f} | {found[0]['steps']} | {best:g} of {rates} | {each} | {mean:.3f} |"


def recipes(rows: list[Row]) -> Iterator[str]:
    """A row a recipe: the learning rate that the sweep chose, and where it leads in the time that all have."""
    swept, last = ([row for row in rows if row["stage"] == stage] for stage in ("sweep", "run"))
    if not last:  # of the sweep alone
        names = dict.fromkeys(row["recipe"] for row in swept)
        last = [min((r for r in swept if r["recipe"] == name), key=lambda r: r["val_loss"]) for name in names]
    heads = ("recipe", "parameters", "learning rate, of those swept", "of the GPU", "seconds", "tokens", "tokens/s")
    yield "| " + " | ".join((*heads, "loss", "ahead")) + " |"
    yield "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for row in last:
        rates = ", ".join(f"{r['lr']:g}" for r in swept if r["recipe"] == row["recipe"])
        rate = f"{row['lr']:g} of {rates}" if rates else f"{row['lr']:g}"
        ahead = max(other["val_loss"] for other in last) - row["val_loss"]
        cells = (row["recipe"], f"{row['parameters'] / 1e6:.1f}M", rate, row["share_of_gpu"], f"{row['seconds']:.0f}")
        cells += (f"{row['tokens'] / 1e6:.1f}M", f"{row['tokens_per_second'] / 1e3:.0f}k{mfu(row)}")
        yield "| " + " | ".join((*cells, f"{row['val_loss']:.3f}", f"{ahead:.3f}")) + " |"
    yield from curves(last)
    if not swept:
        return
    yield ""
    yield (
        "Swept: "
        + "; ".join(
            f"{name} " + ", ".join(f"{r['lr']:g}: {r['val_loss']:.3f}" for r in swept if r["recipe"] == name)
            for name in dict.fromkeys(row["recipe"] for row in swept)
        )
        + f" ({swept[0]['seconds']:.0f} s each, {swept[0]['share_of_gpu']} of the GPU)."
    )


def curves(rows: list[Row]) -> Iterator[str]:
    """Validation losses on the way, and when the others had come to where the worst one ended."""
    ends = [row["curve"][-1][0] for row in rows if row.get("curve")]
    if len(ends) < max(2, len(rows)):
        return
    marks = [max(ends) * eighth / 8 for eighth in range(1, 9)]
    yield ""
    yield "| validation loss after | " + " | ".join(f"{mark:.0f} s" for mark in marks) + " |"
    yield "| --- |" + " ---: |" * len(marks)
    for row in rows:
        reached = [[loss for seconds, loss in row["curve"] if seconds <= mark] for mark in marks]
        cells = (f"{losses[-1]:.3f}" if losses else "" for losses in reached)
        yield f"| {row['recipe']} | " + " | ".join(cells) + " |"
    worst = max(rows, key=lambda row: row["curve"][-1][1])
    for row in rows:
        when = next((seconds for seconds, loss in row["curve"] if loss <= worst["curve"][-1][1]), None)
        if row is not worst and when is not None:
            yield ""
            yield f"{row['recipe']} had come to {worst['recipe']}'s last loss after {when:.0f} s."


def overhead(rows: list[Row]) -> Iterator[str]:
    """What a run does beside its steps."""
    heads = ("model", "a step", "data and rows", "validations: the first, the next", "checkpoints: the first, the next")
    heads += ("until the last is written", "all of them, of 8 minutes", "together", "the GPU waits")
    yield "| " + " | ".join(heads) + " |"
    yield "| --- |" + " ---: |" * (len(heads) - 1)
    for row in rows:
        pauses = row["validations"] + row["checkpoints"]
        cells = (
            row["model"],
            f"{1e3 * row['step_seconds']:.1f} ms",
            f"{round(row['data_and_logging'], 3) + 0.0:.1%}",  # no -0.0
            *("{:.2f} s, {:.2f} s".format(*row[f"{name}_seconds"]) for name in ("validation", "checkpoint")),
            f"{row['written_seconds']:.2f} s",
            f"{pauses:.1%}",
            f"{pauses + row['data_and_logging']:.1%}",
            "–" if row["idle"] is None else f"{row['idle']:.1%}",
        )
        yield "| " + " | ".join(cells) + " |"


def mfu(row: Row) -> str:
    return f", {row['mfu']:.1f} % MFU" if row["mfu"] else ""
