"""What grpo and ppo share: prompts that the model answers on its own engine, and what scores its answers."""

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from cs336.alignment.examples import read_prompts, render
from cs336.alignment.rewards import MathReward, RewardConfig, Rewards
from cs336.alignment.rollouts import Order, Sampled
from cs336.alignment.stage import Policy, Stage, StageConfig
from cs336.inference import LLM, SamplingParams
from cs336.training.evaluators import Finding

SAMPLES = 6


@dataclass(frozen=True)
class PromptData:
    train: pathlib.Path
    """JSON lines of {"prompt": a text or messages, "answer": ...}."""
    val: pathlib.Path | None = None
    """The same, for evaluation and samples; without it there is neither."""


@dataclass(frozen=True, kw_only=True)
class AnsweringConfig(StageConfig):
    """Of stages that draw answers on the engine and learn from what they are worth: grpo, ppo."""

    data: PromptData
    rewards: tuple[RewardConfig, ...] = (MathReward(),)
    """Summed by their weights. One of weight 0 is measured alone, as a verifier that was not learned from. As options:
    --rewards '{kind = "exact"}' '{kind = "math", weight = 0.0}'."""
    eval_prompts: int = 256
    """Of the validation's, answered greedily at each evaluation."""
    max_seqs: int = 256
    """Responses that the engine draws at once."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("eval_prompts", "max_seqs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class AnsweringStage(Stage):
    """Raises ValueError for prompts that are none, or leave no room for an answer."""

    config: AnsweringConfig

    def __init__(self, config: AnsweringConfig, policy: Policy, module: nn.Module, rewards: Rewards, sampled: Sampled):
        super().__init__(config, policy, module, config.data.train)
        self.order = Order(read_pairs_of_prompts(config.data.train, policy), config.seed)
        val = config.data.val
        self.val = [] if val is None else read_pairs_of_prompts(val, policy)[: config.eval_prompts]
        self.rewards, self.sampled = rewards, sampled

    def begin(self) -> None:
        self.llm = self._engine()

    def evaluate(self) -> Finding:
        """The rewards of the likeliest answers to held-out prompts, and the first answers as samples."""
        if not self.val:
            return Finding()
        params = SamplingParams(temperature=0, max_tokens=self.sampled.max_tokens)
        with self.policy.autocast():
            outputs = self.llm.generate([prompt for prompt, _ in self.val], params)
            scores = [self.rewards(o.text, answer) for o, (_, answer) in zip(outputs, self.val, strict=True)]
        found = {"eval/reward": sum(scores) / len(scores)}
        found |= {f"eval/{name}": mean for name, mean in self.rewards.means().items()}
        found["eval/completions/mean_length"] = sum(len(o.token_ids) for o in outputs) / len(outputs)
        samples = [
            {"prompt": prompt, "text": o.text, "reward": score, "answer": answer}
            for (prompt, answer), o, score in list(zip(self.val, outputs, scores, strict=True))[:SAMPLES]
        ]
        return Finding(found, samples, f"reward {found['eval/reward']:.3f} on {len(scores)} held-out prompts")

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.order.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.position = state["position"]

    def _seed(self) -> int:
        """Of the next step's first response; those after it have the numbers after it."""
        return (self.config.seed << 40) + self.order.position * self.sampled.num_generations

    def _engine(self, invariant: bool = False) -> LLM:
        """With room for the longest prompt and its answer: a context_length that no text fills takes no memory."""
        policy, sampled = self.policy, self.sampled
        responses = sampled.prompts_per_step * sampled.num_generations
        longest = longest_prompt([*self.order.items, *self.val], policy) + sampled.max_tokens
        with policy.autocast():
            return LLM(
                policy.model, policy.tokenizer, quiet=True,
                max_len=min(policy.model.config.context_length, longest),
                max_seqs=min(self.config.max_seqs, responses), invariant=invariant,
            )  # fmt: skip


def read_pairs_of_prompts(path: pathlib.Path, policy: Policy) -> list[tuple[str, Any]]:
    """Prompts as the texts that the model continues, with their answers.

    Raises ValueError for prompts that are none, or leave no room for an answer.
    """
    pairs, room = list[tuple[str, Any]](), policy.model.config.context_length
    for number, prompt in enumerate(read_prompts(path), 1):
        try:
            pairs.append((render(prompt.prompt, policy.template), prompt.answer))
            length = longest_prompt(pairs[-1:], policy)
        except ValueError as error:
            raise ValueError(f"{path}, prompt {number}: {error}") from None
        if length >= room:
            raise ValueError(
                f"{path}, prompt {number}: it has {length} tokens, and the model's context_length is {room}"
            )
    return pairs


def longest_prompt(pairs: Sequence[tuple[str, Any]], policy: Policy) -> int:
    """In tokens."""
    return max(len(policy.tokenizer.encode_prompt(prompt)) for prompt, _ in pairs)
