"""Preferences of a model's own answers, labelled by verifiers or by a model that judges.

    report = make_pairs(llm, prompts, "pairs.jsonl", VerifierLabels([MathReward()]))

A judge sees both orders of the two answers, for models prefer a place: a label is kept where it chose the same answer
both times, and is a tie where it did not. How often that is, is told.
"""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from cs336.alignment.examples import Prompt, Turn, render
from cs336.alignment.pairs import PreferenceExample, write_preferences
from cs336.alignment.rewards import Rewards
from cs336.inference import LLM, SamplingParams

Choice = Literal["a", "b", "tie"]
Judge = Callable[[Sequence[Turn], str, str], Choice]
"""(history, answer a, answer b) -> the better one."""
RUBRIC = "The better answer is correct, helps with what was asked, and says no more than that."


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
        self.judge = judge
        self._asked = self._agreed = self._first = self._chosen = 0

    def __call__(self, prompt: Prompt, a: str, b: str) -> tuple[Choice, float]:
        history = (Turn("user", prompt.prompt),) if isinstance(prompt.prompt, str) else prompt.prompt
        straight, swapped = self.judge(history, a, b), self.judge(history, b, a)
        back: Choice = {"a": "b", "b": "a", "tie": "tie"}[swapped]  # type: ignore[assignment]
        self._asked += 1
        self._agreed += straight == back
        self._first += (straight == "a") + (swapped == "a")
        self._chosen += (straight != "tie") + (swapped != "tie")
        return (straight if straight == back else "tie"), 0.0

    def statistics(self) -> dict[str, float]:
        return {
            "agreement": self._agreed / max(1, self._asked),
            "first_place": self._first / max(1, self._chosen),
        }


class LLMJudge:
    """A model of ours as a judge: it is asked for a letter, and the likelier one counts.

    Raises ValueError for a model without a tokenizer.
    """

    def __init__(self, llm: LLM, rubric: str = RUBRIC):
        if llm.tokenizer is None:
            raise ValueError("a judge reads texts: give its LLM a tokenizer")
        self.llm, self.rubric = llm, rubric

    def __call__(self, history: Sequence[Turn], a: str, b: str) -> Choice:
        said = "\n\n".join(f"{turn.role}: {turn.content}" for turn in history)
        question = (
            f"{self.rubric}\n\n# Conversation\n{said}\n\n# Answer A\n{a}\n\n# Answer B\n{b}\n\n"
            "Which answer is better? Reply with A or B alone."
        )
        prompt = self.llm.chat_template.render([{"role": "user", "content": question}])
        first, second = self.llm.score([prompt, prompt], ["A", "B"])
        of_a, of_b = (sum(token.logprob for token in tokens) for tokens in (first, second))
        return "tie" if of_a == of_b else "a" if of_a > of_b else "b"


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
    from the seed. Raises ValueError without prompts, and for an odd number of answers or a temperature of 0.
    """
    if not prompts or num_generations < 2 or num_generations % 2 or not temperature > 0:
        raise ValueError(
            f"pairs take prompts, an even num_generations and a temperature above 0, got {len(prompts)} prompts, "
            f"{num_generations} and {temperature}"
        )
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
