"""What the vocabulary looks like."""

from typing import Any

from cs336.report.chart import bar_chart
from cs336.report.run import Run, listing, mapping, number, shown
from cs336.report.section import section

VISIBLE = {ord("\n"): "⏎", ord("\t"): "⇥", ord("\r"): "␍"}
LONGEST_BAR = 24  # bytes; longer tokens are in the last bar


@section("Tokenizer", order=40)
def tokenizer(run: Run) -> dict[str, Any]:
    stats = run.tokenizer
    histogram = {int(k): v for k, v in mapping(stats.get("length_histogram")).items() if str(k).isdecimal()}
    lengths = range(1, min(max(histogram, default=0), LONGEST_BAR) + 1)
    counts = [float(number(histogram.get(n)) or 0) for n in lengths]
    labels = [str(n) for n in lengths]
    if histogram and max(histogram) > LONGEST_BAR:  # everything longer in the last bar
        counts[-1] += sum(number(v) or 0 for n, v in histogram.items() if n > LONGEST_BAR)
        labels[-1] = f"{LONGEST_BAR}+"
    facts = {
        "facts": [(k.replace("_", " "), shown(v)) for k, v in stats.items() if isinstance(v, str | int | float)],
        "longest": [str(t).translate(VISIBLE) for t in listing(stats.get("longest_tokens"))],
        "svg": bar_chart(labels, counts, title="Tokens by length in bytes", x_label="bytes in a token"),
    }
    return {"tokenizer": facts}
