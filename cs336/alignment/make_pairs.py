"""Preferences of a model's own answers, labelled by verifiers or by a model that judges.

    report = make_pairs(llm, prompts, "pairs.jsonl", VerifierLabels([MathReward()]))

A judge sees both orders of the two answers, for models prefer a place: a label is kept where it chose the same answer
both times, and is a tie where it did not. How often that is, is told.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from cs336.alignment.examples import Prompt, Turn, render
from cs336.alignment.pairs import PreferenceExample, write_preferences
from cs336.alignment.rewards import Rewards
from cs336.inference import LLM, SamplingParams
from cs336.verifiers.judge import Judge, Preference, consistency, first_place

Choice = Literal["a", "b", "tie"]


@dataclass(frozen=True)
class PairsReport:
    """What came of the prompts."""

    prompts: int
    pairs: int
    """That were written, ties too."""
    ties: int
    equal: int
    """Prompts all answers to which were the same text: no pair is made of them."""
    chose_a: float
    """Share of the pairs without ties whose better answer stands first: about a half, where its place says nothing."""
    agreement: float | None = None
    """Of a judge: share of the pairs of which it said the same with the answers swapped."""
    first_place: float | None = None
    """Of a judge: share of its choices, of either order, that fell on the answer that stood first."""
    unclear: float | None = None
    """Of a judge: share of the pairs to which it gave no verdict, in one of the orders at least."""


class Labels(Protocol):
    def __call__(self, prompt: Prompt, a: str, b: str) -> tuple[Choice, float]:
        """Which is better, and by how much."""

    def statistics(self) -> dict[str, float]: ...


class VerifierLabels:
    """The answer of the higher score is the better one, the difference the margin."""

    def __init__(self, rewards: Sequence[Any]):
        self.rewards = Rewards(rewards)

    def __call__(self, prompt: Prompt, a: str, b: str) -> tuple[Choice, float]:
        difference = self.rewards(a, prompt.answer) - self.rewards(b, prompt.answer)
        return ("tie" if difference == 0 else "a" if difference > 0 else "b"), abs(difference)

    def statistics(self) -> dict[str, float]:
        return {}


class JudgeLabels:
    """The answer that a judge chooses whichever way they stand; a tie where it does not."""

    def __init__(self, judge: Judge):
        self.judge, self.preferences = judge, list[Preference]()

    def __call__(self, prompt: Prompt, a: str, b: str) -> tuple[Choice, float]:
        said = prompt.prompt
        if not isinstance(said, str):
            said = said[0].content if len(said) == 1 else "\n\n".join(f"{turn.role}: {turn.content}" for turn in said)
        found = self.judge.compare(said, a, b)
        self.preferences.append(found)
        return ("tie" if found.score == 0.5 else "a" if found.score == 1 else "b"), 0.0

    def statistics(self) -> dict[str, float]:
        if not self.preferences:
            return {}
        unclear = sum("unclear" in p.winners for p in self.preferences) / len(self.preferences)
        return {
            "agreement": consistency(self.preferences).raw,
            "first_place": first_place(self.preferences),
            "unclear": unclear,
        }


def make_pairs(
    llm: LLM,
    prompts: Sequence[Prompt],
    path: str | os.PathLike,
    labels: Labels,
    *,
    num_generations: int = 2,
    temperature: float = 1.0,
    max_tokens: int = 256,
    seed: int = 0,
) -> PairsReport:
    """Draw num_generations answers to each prompt, label pairs of those that differ, and write them as JSON lines.

    Of an even number of answers the first is paired with the second, and so on; which of the two stands first is drawn
    from the seed. Raises ValueError without prompts, for an odd number of answers, a temperature of 0 and another seed
    than 0..2**31 - 1.
    """
    if not prompts or num_generations < 2 or num_generations % 2 or not temperature > 0:
        raise ValueError(
            f"pairs take prompts, an even num_generations and a temperature above 0, got {len(prompts)} prompts, "
            f"{num_generations} and {temperature}"
        )
    if not 0 <= seed < 1 << 31:
        raise ValueError(f"seed must be in 0..2**31 - 1, got {seed}")
    params = [
        SamplingParams(temperature, max_tokens=max_tokens, n=num_generations, seed=(seed << 32) + i * num_generations)
        for i in range(len(prompts))
    ]
    outputs = llm.generate([render(p.prompt, llm.chat_template) for p in prompts], params)
    rng, examples, equal = random.Random(seed), list[PreferenceExample](), 0
    for prompt, output in zip(prompts, outputs, strict=True):
        texts = [o.text for o in output.outputs]
        equal += len(set(texts)) < 2
        history = [Turn("user", prompt.prompt)] if isinstance(prompt.prompt, str) else list(prompt.prompt)
        for pair in zip(texts[::2], texts[1::2], strict=True):
            if pair[0] == pair[1] or not all(text.strip() for text in pair):
                continue
            a, b = rng.sample(pair, 2)
            chosen, margin = labels(prompt, a, b)
            examples.append(PreferenceExample(history, a, b, chosen, margin))
    write_preferences(path, examples)
    decided = [example.chosen for example in examples if example.chosen != "tie"]
    return PairsReport(
        len(prompts), len(examples), len(examples) - len(decided), equal, decided.count("a") / max(1, len(decided)),
        **labels.statistics(),
    )  # fmt: skip
