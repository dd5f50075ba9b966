"""Write content_weights.h: what tells the main content of a page, learned from pages with gold text.

    python csrc/cpu/text/make_content_weights.py SET...            # cross-validated F1 of each set, then the weights
    python csrc/cpu/text/make_content_weights.py --folds 0 SET...  # the weights alone

A SET is a directory with gold.jsonl (one {"id", "gold"} a line) and html/ID.html. Needs rapidfuzz.
"""

import argparse
import collections
import json
import pathlib
import random
import re
import sys
import textwrap
import zlib
from dataclasses import dataclass, field

import numpy as np
import torch
from rapidfuzz.distance import LCSseq

from cs336 import _text
from cs336.data.extract.encoding import decode

ROOT = pathlib.Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "benchmarks" / "end_to_end"))
from extract_score import Score  # noqa: E402

TOKEN = re.compile(r"\w+")
HIDDEN, CLIP = 16, 4.0
MIN_PAGES = 20  # in which a hint occurs
SITE = re.compile(r"[_-]?\d+$")  # pages of one site stay in one fold


@dataclass
class Example:
    """A page: B blocks with the share of their words that is gold."""

    where: str
    fold: int
    gold: str
    native: _text.ContentPage
    texts: list[str]
    hints: list[set[str]]
    label_B: np.ndarray = field(init=False)
    weight_B: np.ndarray = field(init=False)

    def __post_init__(self):
        tokens = [TOKEN.findall(t) for t in self.texts]
        owner = np.repeat(np.arange(len(tokens)), [len(t) for t in tokens])
        ids: dict[str, int] = {}
        flat, gold = (
            [ids.setdefault(t, len(ids)) for t in ts]
            for ts in ((t for b in tokens for t in b), TOKEN.findall(self.gold))
        )
        hits_B = np.zeros(len(tokens))
        for op in LCSseq.opcodes(flat, gold):
            if op.tag == "equal":
                np.add.at(hits_B, owner[op.src_start : op.src_end], 1)
        words_B = np.maximum([len(t) for t in tokens], 1)
        self.label_B = np.minimum(hits_B / words_B, 1)
        # F1 counts every page alike: a block weighs what its words are worth there, and no page's one block too much.
        self.weight_B = np.minimum(words_B / (hits_B.sum() + 20), 0.5)


def load(sets: list[pathlib.Path], most: int, folds: int) -> list[Example]:
    """A set weighs as the square root of its pages: none is drowned."""
    examples = []
    for directory in sets:
        rows = [json.loads(line) for line in (directory / "gold.jsonl").open(encoding="utf-8")]
        rows = [r for r in rows if r["gold"]]
        random.Random(0).shuffle(rows)
        for row in rows[:most]:
            html = decode((directory / "html" / f"{row['id']}.html").read_bytes()).encode("utf-8", "replace")
            page = _text.ContentPage(html)
            fold = zlib.crc32(SITE.sub("", row["id"]).encode() or row["id"].encode()) % max(folds, 1)
            texts = page.texts()
            if texts:
                hints = [set(words) for words in page.hints()]
                examples.append(Example(directory.name, fold, row["gold"], page, texts, hints))
        for example in examples:
            if example.where == directory.name:
                example.weight_B /= len(rows[:most]) ** 0.5
        print(f"{directory.name}: {min(len(rows), most)} pages", flush=True)
    return examples


def learn_hints(examples: list[Example]) -> dict[str, float]:
    """Log-odds of content in blocks below an element with a word in its class or id, each page one vote."""
    votes: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    for example in examples:
        inside: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
        for words, label, weight in zip(example.hints, example.label_B, example.weight_B, strict=True):
            for word in words:
                inside[word][0] += label * weight
                inside[word][1] += weight
        for word, (kept, all_) in inside.items():
            votes[word].append((kept / all_, 1.0))
    weights = {}
    for word, pages in votes.items():
        if len(pages) >= MIN_PAGES:
            kept = sum(p for p, _ in pages)
            weights[word] = float(np.log((kept + 1) / (len(pages) - kept + 1)))
    return {w: round(v, 2) for w, v in weights.items() if abs(v) > 0.4}


class Net(torch.nn.Module):
    """One hidden layer over standardised, clipped features."""

    def __init__(self, x_BF: torch.Tensor):
        super().__init__()
        self.mean_F, self.inverse_std_F = x_BF.mean(0), 1 / (x_BF.std(0) + 1e-3)
        self.hidden = torch.nn.Linear(x_BF.shape[1], HIDDEN)
        self.out = torch.nn.Linear(HIDDEN, 1)

    def forward(self, x_BF):
        x_BF = ((x_BF - self.mean_F) * self.inverse_std_F).clamp(-CLIP, CLIP)
        return self.out(self.hidden(x_BF).relu())[:, 0]


def fit(x_BF: torch.Tensor, label_B: torch.Tensor, weight_B: torch.Tensor, epochs: int) -> Net:
    torch.manual_seed(0)
    net = Net(x_BF)
    batch = 1024
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, epochs * (len(x_BF) // batch + 1))
    scale = 1 / weight_B.mean()
    for _ in range(epochs):
        for rows in torch.randperm(len(x_BF)).split(batch):
            loss_B = torch.nn.functional.binary_cross_entropy_with_logits(
                net(x_BF[rows]), label_B[rows], reduction="none"
            )
            optimizer.zero_grad()
            (loss_B * weight_B[rows]).mean().mul(scale).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def score_all(net: Net, features: list[np.ndarray]) -> list[np.ndarray]:
    with torch.no_grad():
        return [net(torch.tensor(x_BF)).numpy() for x_BF in features]


def with_context(examples: list[Example], features: list[np.ndarray], scores: list[np.ndarray]) -> list[np.ndarray]:
    return [np.hstack([x, e.native.context(s)]) for e, x, s in zip(examples, features, scores, strict=True)]


def learn(examples: list[Example], epochs: int) -> tuple[dict[str, float], Net, Net]:
    """The second net is trained on first scores from nets that have not seen the page."""
    hints = learn_hints(examples)
    features = [e.native.features(hints) for e in examples]
    label_B = torch.tensor(np.concatenate([e.label_B for e in examples]), dtype=torch.float32)
    weight_B = torch.tensor(np.concatenate([e.weight_B for e in examples]), dtype=torch.float32)
    sizes = [len(x) for x in features]
    half_B = torch.tensor(np.repeat([i % 2 for i in range(len(examples))], sizes))
    x_BF = torch.tensor(np.concatenate(features))
    scores: list[np.ndarray] = [np.empty(0)] * len(examples)
    for half in (0, 1):
        rows = half_B != half
        net = fit(x_BF[rows], label_B[rows], weight_B[rows], epochs)
        scores[half::2] = score_all(net, features[half::2])
    first = fit(x_BF, label_B, weight_B, epochs)
    x_BF = torch.tensor(np.concatenate(with_context(examples, features, scores)))
    return hints, first, fit(x_BF, label_B, weight_B, epochs)


def validate(examples: list[Example], folds: int, epochs: int) -> None:
    totals: dict[str, Score] = collections.defaultdict(Score)
    for fold in range(folds):
        hints, first, second = learn([e for e in examples if e.fold != fold], epochs)
        held_out = [e for e in examples if e.fold == fold]
        features = [e.native.features(hints) for e in held_out]
        scores = score_all(second, with_context(held_out, features, score_all(first, features)))
        for example, score_B in zip(held_out, scores, strict=True):
            kept = (t for t, s in zip(example.texts, score_B, strict=True) if s > 0)
            totals[example.where].add(example.gold, "\n".join(kept))
        f1 = {k: (round(v.f1, 4), round(v.precision, 3), round(v.recall, 3)) for k, v in totals.items()}
        print(f"fold {fold}: F1, precision, recall:", f1, flush=True)


def array(name: str, values: torch.Tensor) -> str:
    numbers = " ".join(f"{v:.3g}," for v in values.flatten().tolist())
    return f"inline constexpr float {name}[] = {{\n{filled(numbers)}\n}};\n"


def filled(items: str) -> str:
    return textwrap.fill(items, 150, initial_indent="    ", subsequent_indent="    ", break_long_words=False)


def net_source(name: str, net: Net) -> str:
    arrays = {
        "Mean": net.mean_F,
        "InverseStd": net.inverse_std_F,
        "Hidden": net.hidden.weight.T,
        "HiddenBias": net.hidden.bias,
        "Out": net.out.weight,
    }
    source = "".join(array(f"k{name}{part}", values.detach()) for part, values in arrays.items())
    pointers = ", ".join(f"k{name}{part}" for part in arrays)
    return f"{source}inline constexpr ContentNet k{name}Net = {{{pointers}, {net.out.bias.item():.4g}}};\n"


def write(hints: dict[str, float], first: Net, second: Net) -> None:
    lines = filled(" ".join(f'{{"{word}",{weight:g}}},' for word, weight in sorted(hints.items())))
    text = f"""\
// Generated by make_content_weights.py; do not edit.
#pragma once
#include <cstddef>
#include <string_view>
#include <utility>

namespace cs336::text {{

constexpr size_t kContentHidden = {HIDDEN};

// Of F features and H hidden units.
struct ContentNet {{
  const float* mean;         // (F)
  const float* inverse_std;  // (F)
  const float* hidden;       // (F, H)
  const float* hidden_bias;  // (H)
  const float* out;          // (H)
  float bias;
}};

// clang-format off
inline constexpr std::pair<std::string_view, float> kHintWeights[] = {{
{lines}
}};
{net_source("First", first)}{net_source("Second", second)}// clang-format on

}}  // namespace cs336::text
"""
    pathlib.Path(__file__).with_name("content_weights.h").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", type=pathlib.Path)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--pages", type=int, default=10**9, help="at most, of a set")
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    examples = load(args.sets, args.pages, args.folds)
    validate(examples, args.folds, args.epochs)
    write(*learn(examples, args.epochs))


if __name__ == "__main__":
    main()
