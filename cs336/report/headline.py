"""The top of a report: one sentence, how the run ended, and the numbers that matter."""

import math
import statistics
from typing import Any

from cs336.report.chart import compact
from cs336.report.run import Run, mapping, number
from cs336.report.sections.evaluation import comparison
from cs336.utils.duration import duration


def banner(run: Run) -> dict[str, str]:
    """How the run stands: done, failed and why, running, or stopped."""
    last = run.last("step")
    after = f"after step {int(last):,}" if last is not None else "before the first row"
    if run.failure:
        text = str(run.failure.get("message") or run.failure.get("cause") or "no reason was recorded")
        step, when, kept = number(run.failure.get("step")), run.failure.get("time"), run.failure.get("checkpoint")
        where = f" at step {int(step):,}" if step is not None else ""
        if step is not None:
            text = text.removeprefix(f"step {int(step)}: ")
        if kept and str(kept) not in text:
            text += f" Last good checkpoint: {kept}."
        return {"state": "failed", "head": f"Failed{where}.", "text": text + (f" ({when})" if when else "")}
    if run.running:
        return {"state": "running", "head": "Running", "text": f"when this page was written, {after}."}
    if run.finished:
        return {"state": "done", "head": "Done", "text": f"{after}."}
    if not run.metrics:
        return {"state": "stopped", "head": "Not begun", "text": "no step of training has been recorded."}
    return {"state": "stopped", "head": "Stopped", "text": f"{after}; the same command goes on from its checkpoint."}


def origin(run: Run) -> dict[str, str] | None:
    """Where the run came from: commit, command, date, fingerprints."""
    data = mapping(run.facts.get("data"))
    prints = [f"{side} data {str(value)[:12]}" for side, value in data.items() if value]
    tokenizer = run.tokenizer.get("fingerprint")
    facts = [
        *([f"commit {run.facts['commit']}"] if run.facts.get("commit") else []),
        *([f"cs336 {run.facts['cs336']}"] if run.facts.get("cs336") else []),
        *([str(run.facts["started"])] if run.facts.get("started") else []),
        *prints,
        *([f"tokenizer {str(tokenizer)[:12]}"] if tokenizer else []),
    ]
    if not facts and not run.facts.get("command"):
        return None
    program, _, options = str(run.facts.get("command", "")).partition(" ")
    command = f"{'cs336' if program.endswith('__main__.py') else program.rpartition('/')[2]} {options}".strip()
    return {"state": "origin", "head": command, "text": " · ".join(facts)}


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """(label, value, note) of each headline number that the run has."""
    text = str(run.evaluation.get("text") or "")
    val_loss = number(run.evaluation.get("loss")) if run.evaluation else run.last("val/loss")
    tokens, parameters = run.last("tokens"), number(run.facts.get("parameters"))
    per_token, data_tokens = number(run.facts.get("flops_per_token")), number(run.facts.get("train_tokens"))
    rate, mfu = _median(run, "train/tok_per_sec"), _median(run, "train/mfu")
    found: list[tuple[str, float | None, Any, str]] = [
        ("Bits per byte", run.bits_per_byte, lambda v: f"{v:.3f}", f"on {text or 'held-out text'}"),
        ("Validation loss", val_loss, lambda v: f"{v:.3f}", "nats per token" + (f", on {text}" if text else "")),
        ("Parameters", parameters, compact, ""),
        ("Tokens trained", tokens, compact, _steps(run)),
        ("Epochs", _over(tokens, data_tokens), lambda v: f"{v:.3g}", "passes over the training data"),
        ("Tokens per parameter", _over(tokens, parameters), lambda v: f"{v:.3g}", ""),
        ("Total FLOPs", tokens * per_token if tokens and per_token else None, lambda v: f"{v:.2e}", "of the model"),
        ("Training time", run.last("seconds"), duration, ""),
        ("Throughput", rate, compact, "tokens per second, median"),
        ("MFU", mfu, lambda v: f"{v:.1%}", "of the device's peak FLOP/s"),
        ("Peak memory", number(run.facts.get("peak_memory_bytes")), _gigabytes, _predicted(run)),
    ]
    out = [(label, show(value), note) for label, value, show, note in found if value is not None]
    if device := run.facts.get("device"):
        out.append(("Device", str(device), ""))
    return out


def verdict(run: Run) -> str:
    """One sentence: what the training bought, against the best baseline."""
    bits, seconds, tokens = run.bits_per_byte, run.last("seconds"), run.last("tokens")
    spent = f"After {duration(seconds)} and {compact(tokens)} tokens" if seconds and tokens else "After training"
    text = str(run.evaluation.get("text") or "text it has never seen")
    baselines = [row for row in comparison(run) if not row["ours"]]
    if bits is None and (reward := run.last("eval/reward")) is not None:
        return f"{spent} the model's likeliest answers to prompts that it was not trained on are worth {reward:.3f}."
    if bits is None:
        loss = run.last("val/loss")
        if loss is not None:
            return f"{spent} the model's loss is {loss:.3f} nats per token of text it has never seen."
        return f"{spent}: not evaluated yet." if tokens else "Nothing has been trained yet."
    if not baselines:
        return f"{spent} the model needs {bits:.2f} bits for each byte of {text}."
    beaten = [f"{1 - bits / row['bits']:.0%} fewer than {_named(row)}" for row in baselines if row["bits"] > bits][:1]
    ahead = [f"more than {_named(row)}" for row in baselines if row["bits"] <= bits][-1:]
    return f"{spent} the model needs {bits:.2f} bits for each byte of {text}: {' and '.join(beaten + ahead)}."


def _named(row: dict[str, Any]) -> str:
    return f"{row['name']} ({row['bits']:.2f})"


def _steps(run: Run) -> str:
    last = run.last("step")
    return f"{int(last):,} steps" if last is not None else ""


def _over(value: float | None, by: float | None) -> float | None:
    return value / by if value is not None and by else None


def _predicted(run: Run) -> str:
    size = number(run.facts.get("predicted_memory_bytes"))
    return "" if size is None else f"{_gigabytes(size)} predicted for a step"


def _gigabytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _median(run: Run, name: str) -> float | None:
    values = [v for v in run.column(name)[1] if math.isfinite(v)]
    return statistics.median(values) if values else None
