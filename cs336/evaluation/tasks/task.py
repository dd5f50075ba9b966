"""What a task is: items, what is asked of a model for each, and the scores of its answers."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cs336.inference import RequestOutput, SamplingParams, Token

Row = Mapping[str, Any]


class Model(Protocol):
    """What tasks need of an LLM."""

    def generate(self, prompts: Any, params: Any = None) -> list[RequestOutput]: ...
    def chat(self, messages: Any, params: Any = None) -> list[RequestOutput]: ...
    def score(self, prompts: Sequence[Any], continuations: Sequence[Any], top: int = 0) -> list[list[Token]]: ...
    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...
    @property
    def tokenizer(self) -> Any: ...  # of which encode and begin_ids
    @property
    def engine(self) -> Any: ...  # of which max_len, the longest sequence
    @property
    def chat_template(self) -> Any: ...  # of which render(messages), the text that a chat is


@dataclass(frozen=True)
class Options:
    """How a model is asked. Raises ValueError for values out of range."""

    samples: int = 1
    """Answers to each prompt; pass@k is told for k up to it."""
    temperature: float | None = None
    """0 with one sample and 0.8 with several, if not given."""
    new_tokens: int | None = None
    """Of an answer at most; what the kind of task takes, if not given."""
    chat: bool = False
    """Ask as a user, by the model's chat template, and not with a text to continue."""
    seed: int = 0
    weak_sandbox: bool = False
    """Run programs where there are no namespaces, too: see cs336.verifiers.sandbox."""
    algebra: bool = False
    """Count answers of mathematics that are equal by algebra (math-verify), not only as numbers and texts."""
    judge: Callable[[str, str, str], float] | None = None
    """(prompt, answer, reference) -> how far the answer wins, 0 to 1: for tasks of pairs."""

    def __post_init__(self):
        if self.samples < 1:
            raise ValueError(f"samples must be 1 or more, got {self.samples}")
        if self.new_tokens is not None and self.new_tokens < 1:
            raise ValueError(f"new_tokens must be 1 or more, got {self.new_tokens}")

    def sampling(self, new_tokens: int, stop: Sequence[str]) -> SamplingParams:
        hot = 0.0 if self.samples == 1 else 0.8
        return SamplingParams(
            temperature=hot if self.temperature is None else self.temperature,
            max_tokens=self.new_tokens or new_tokens,
            stop=() if self.chat else tuple(stop),
            n=self.samples,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Item:
    """One question."""

    prompt: str
    target: str
    """The right answer as it follows the prompt, for examples; "" where there is none to show."""
    row: Row
    """Of the data file."""
    heading: str = ""
    """What stands before the examples."""


@dataclass
class Answered:
    """What a model said of one item, and its scores."""

    prompt: str
    answers: list[Any]
    scores: dict[str, float]
    reasons: list[str] = field(default_factory=list)
    weight: float = 1.0
    """Of every score, in the mean."""


class Kind(Protocol):
    """A kind of task: how its rows are read, and how its answers are scored."""

    name: str
    separator: str
    """Between examples, and between the last one and the question."""

    def read(self, row: Row) -> Item:
        """Raises ValueError or KeyError for a row of another kind."""

    def answer(
        self, model: Model, items: Sequence[Item], prompts: Sequence[Any], options: Options
    ) -> list[Answered]: ...


@dataclass(frozen=True)
class Metric:
    mean: float
    stderr: float | None
    """Of the mean, over items; None of fewer than two."""
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.stderr is None else f" ± {self.stderr:.4f}")


def metrics(rows: Sequence[Answered]) -> dict[str, Metric]:
    """Means of each score over the items that have it, weighted, with the standard error."""
    names = dict.fromkeys(name for row in rows for name in row.scores)
    return {name: _mean([(r.scores[name], r.weight) for r in rows if name in r.scores]) for name in names}


def _mean(values: Sequence[tuple[float, float]]) -> Metric:
    """The error is that of a ratio of sums; with equal weights sqrt(variance / n), the variance of n - 1."""
    n, total = len(values), sum(w for _, w in values)
    mean = sum(v * w for v, w in values) / total if total else math.nan
    if n < 2 or not total:
        return Metric(mean, None, n)
    spread = sum((w * (v - mean)) ** 2 for v, w in values)
    return Metric(mean, math.sqrt(spread * n / (n - 1)) / total, n)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The probability that one of k answers is right, of `samples` drawn of which `right` are: unbiased,
    1 - C(samples - right, k) / C(samples, k) (arXiv:2107.03374).

    Raises ValueError unless 0 <= right <= samples and 1 <= k <= samples.
    """
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(f"expected 0 <= right <= samples and 1 <= k <= samples, got {right}, {samples} and k = {k}")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)
