"""What a response is worth, as a configuration says: verifiers by name, each with a weight.

A reward of weight 0 is measured and not learned from: one that the policy cannot have learned to please.
"""

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, SupportsFloat

import pydantic

from cs336.verifiers import Verdict, verify_countdown, verify_format, verify_math


def score_of(found: Any, response: str, reward: str = "the reward") -> float:
    """What a function that scores returned, a number or a Verdict's. Raises ValueError for what is no finite number."""
    score = found.score if isinstance(found, Verdict) else found
    if not isinstance(score, SupportsFloat) or not math.isfinite(float(score)):
        raise ValueError(f"{reward} of {response!r:.80} is {score!r:.80}: expected a finite number")
    return float(score)


@dataclass(frozen=True)
class MathReward:
    """1 where the response's last number or \\boxed{} equals the answer: see verify_math."""

    kind: Literal["math"] = "math"
    weight: float = 1.0

    def __call__(self, response: str, answer: Any) -> float:
        return verify_math(response, str(answer)).score


@dataclass(frozen=True)
class FormatReward:
    """1 where the response is of these tags, in order, and nothing else: see verify_format."""

    kind: Literal["format"] = "format"
    weight: float = 1.0
    tags: tuple[str, ...] = ("think", "answer")

    def __call__(self, response: str, answer: Any) -> float:
        return verify_format(response, self.tags).score


@dataclass(frozen=True)
class ExactReward:
    """1 where the response is the answer, spaces around it aside."""

    kind: Literal["exact"] = "exact"
    weight: float = 1.0

    def __call__(self, response: str, answer: Any) -> float:
        return float(response.strip() == str(answer).strip())


@dataclass(frozen=True)
class CharactersReward:
    """The share of the answer's characters that stand in their place, 0 for a response of another length."""

    kind: Literal["characters"] = "characters"
    weight: float = 1.0

    def __call__(self, response: str, answer: Any) -> float:
        response, answer = response.strip(), str(answer).strip()
        if len(response) != len(answer) or not answer:
            return 0.0
        return sum(a == b for a, b in zip(response, answer, strict=True)) / len(answer)


@dataclass(frozen=True)
class CountdownReward:
    """1 where the response makes a target of numbers; answers are {"numbers": [...], "target": n}: verify_countdown.

    Raises ValueError for another answer.
    """

    kind: Literal["countdown"] = "countdown"
    weight: float = 1.0

    def __call__(self, response: str, answer: Any) -> float:
        match answer:
            case {"numbers": [*numbers], "target": int(target)} if all(isinstance(n, int) for n in numbers):
                return verify_countdown(response, numbers, target).score
        raise ValueError(
            f'countdown takes answers of {{"numbers": [integers], "target": an integer}}, got {answer!r:.80}'
        )


@dataclass(frozen=True)
class PythonReward:
    """A function of your own, (response, answer) -> number or Verdict; its module is looked for here too."""

    function: str
    """module:function."""
    kind: Literal["python"] = "python"
    weight: float = 1.0

    def __post_init__(self):
        self.load()

    def load(self) -> Callable[[str, Any], Verdict | float]:
        """Raises ValueError where there is no such function."""
        module, _, name = self.function.partition(":")
        before = list(sys.path)
        try:
            sys.path.insert(0, "")
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"the reward {self.function!r} is no module:function: {error}") from None
        finally:
            sys.path[:] = before
        if not callable(function):
            raise ValueError(f"the reward {self.function!r} is no function")
        try:
            inspect.signature(function).bind("response", "answer")
        except TypeError as error:
            raise ValueError(
                f"the reward {self.function!r} is called with (response, answer), which it does not take: {error}"
            ) from None
        return function

    def __call__(self, response: str, answer: Any) -> float:
        return score_of(self.load()(response, answer), response, f"the reward {self.function!r}")


RewardConfig = Annotated[
    MathReward | FormatReward | ExactReward | CharactersReward | CountdownReward | PythonReward,
    pydantic.Field(discriminator="kind"),
]


class Rewards:
    """The weighted sum of rewards, which remembers the mean of each until it is asked.

    measured_alone: something else is learned from. Raises ValueError where nothing is, and for weights that are not
    finite.
    """

    def __init__(self, rewards: Sequence[Any], *, measured_alone: bool = False):
        if bad := [reward for reward in rewards if not math.isfinite(reward.weight)]:
            raise ValueError(f"the weight of a reward must be finite, {bad[0].kind} has {bad[0].weight}")
        if not measured_alone and not any(reward.weight for reward in rewards):
            raise ValueError("rewards must hold one whose weight is not 0: there would be nothing to learn from")
        self.rewards = rewards
        self._sums, self._count = [0.0] * len(rewards), 0

    def __call__(self, response: str, answer: Any) -> float:
        each = [reward(response, answer) for reward in self.rewards]
        self._sums = [total + value for total, value in zip(self._sums, each, strict=True)]
        self._count += 1
        return sum(reward.weight * value for reward, value in zip(self.rewards, each, strict=True))

    def means(self) -> dict[str, float]:
        """rewards/NAME/mean of the responses since it was last asked; two of a kind are told apart by their place."""
        kinds = [reward.kind for reward in self.rewards]
        names = [k if kinds.count(k) == 1 else f"{k}.{i}" for i, k in enumerate(kinds)]
        count = max(1, self._count)
        found = {f"rewards/{name}/mean": total / count for name, total in zip(names, self._sums, strict=True)}
        self._sums, self._count = [0.0] * len(self.rewards), 0
        return found
