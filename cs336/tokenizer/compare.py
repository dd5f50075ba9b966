"""Several tokenizers on the same text: how far each shortens it, and how fast."""

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cs336.tokenizer.tokenizer import Tokenizer
from cs336.utils.files import replacing

PASSES = 5  # over the text, after the first


@dataclass(frozen=True)
class Comparison:
    """One tokenizer on one text. Speeds are MB (10**6 bytes) of text in a second of CPU time, on one thread."""

    name: str
    vocab_size: int
    text_bytes: int
    tokens: int
    first: float  # speed of the first pass
    again: float  # median speed of later passes over the same text

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / max(1, self.tokens)


def compare(tokenizers: dict[str, Tokenizer], documents: Sequence[str | bytes]) -> list[Comparison]:
    """Each tokenizer on documents, special tokens read as ordinary text. Raises ValueError if there is no text."""
    if isinstance(documents, str | bytes):
        raise ValueError(f"expected a list of texts, got one text: {type(documents).__name__}")
    size = sum(len(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")) for text in documents)
    if not size:
        raise ValueError("there is no text to compare the tokenizers on")
    rows = []
    for name, tokenizer in tokenizers.items():
        speeds = []
        for _ in range(1 + PASSES):
            start = time.process_time()
            ids, _offsets = tokenizer.encode_batch_numpy(documents, num_threads=1, disallowed_special=())
            speeds.append(size / 1e6 / max(time.process_time() - start, 1e-9))
        again = statistics.median(speeds[1:])
        rows.append(Comparison(name, tokenizer.vocab_size, size, len(ids), speeds[0], again))
    return rows


def plot_format(path: str | os.PathLike) -> str:
    """Of a plot, by the name of its file. Raises ValueError for one that `plot` does not write."""
    kind = Path(path).suffix[1:].lower()
    if kind not in ("png", "svg", "pdf"):
        raise ValueError(f"{path}: a plot is a .png, .svg or .pdf file")
    return kind


def plot(rows: Sequence[Comparison], path: str | os.PathLike) -> None:
    """Bars of bytes per token and of speed, as PNG, SVG or PDF by the name of the file."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a plot needs matplotlib: pip install 'cs336[plot]'") from None

    kind = plot_format(path)
    figure = Figure(figsize=(9, 1.4 + 0.4 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    names = [f"{row.name} ({row.vocab_size:,})" for row in rows]
    for axes, values, label in (
        (left, [row.bytes_per_token for row in rows], "bytes per token"),
        (right, [row.again for row in rows], "MB per CPU second, one thread"),
    ):
        axes.bar_label(axes.barh(names, values), fmt="%.3g", padding=3)
        axes.set_xlabel(label)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    left.invert_yaxis()
    with replacing(path, "wb") as file:
        figure.savefig(file, format=kind, dpi=150)
