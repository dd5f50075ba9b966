"""`cs336 grpo`: a model draws answers on its own engine, verifiers score them, and the better ones become likelier."""

import copy
import dataclasses
import pathlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cs336.alignment.examples import digest_of, read_prompts, render
from cs336.alignment.grpo import GRPOConfig, collect, learn
from cs336.alignment.rewards import MathReward, RewardConfig, Rewards
from cs336.alignment.rollouts import Order, Sampled
from cs336.alignment.stage import Policy, StageConfig
from cs336.inference import LLM, SamplingParams
from cs336.models.memory import decoding_memory, training_memory
from cs336.training import Budget
from cs336.training.evaluators import Finding
from cs336.utils.duration import duration

SAMPLES = 6
GIB = 2**30


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


@dataclass(frozen=True, kw_only=True)
class GRPOStageConfig(AnsweringConfig):
    """Everything that decides what `cs336 grpo` computes, and where it is written."""

    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    invariant: bool = False
    """Run engine and training inside cs336.invariant(): their log-probabilities are then the same bits. Slower."""

    def __post_init__(self):
        super().__post_init__()
        Rewards(self.rewards)
        if self.grpo.seed or self.grpo.micro_batch_size or self.grpo.max_grad_norm != 1:
            raise ValueError("seed, micro_batch_size and optimizer.max_grad_norm stand outside [grpo] here")


class GRPOStage:
    """See cs336.alignment.stage.Stage. Raises ValueError for prompts that are none, or leave no room for an answer."""

    verb = "grpo"

    def __init__(self, config: GRPOStageConfig):
        self.config, self.policy = config, Policy(config)
        self.policy.model.eval()
        self.module, self.optimizer = self.policy.module, config.optimizer.build(self.policy.module)
        self.fingerprints = self.policy.fingerprints | {"data.train": digest_of(config.data.train)}
        self.order = Order(read_pairs_of_prompts(config.data.train, self.policy), config.seed)
        val = config.data.val
        self.val = [] if val is None else read_pairs_of_prompts(val, self.policy)[: config.eval_prompts]
        self.rewards = Rewards(config.rewards)
        self.grpo = dataclasses.replace(
            config.grpo, seed=config.seed, micro_batch_size=config.micro_batch_size,
            max_grad_norm=config.optimizer.max_grad_norm,
        )  # fmt: skip
        self.reference = copy.deepcopy(self.policy.model).requires_grad_(False) if self.grpo.beta else None

    def begin(self) -> None:
        self.llm = engine_of(self.config, self.policy, [*self.order.items, *self.val], self.grpo, self.config.invariant)

    def describe(self) -> str:
        g = self.grpo
        return (
            f"{len(self.order.items):,} prompts, {g.prompts_per_step} x {g.num_generations} responses a step of up to "
            f"{g.max_tokens} tokens, loss {g.loss_type}"
        )

    def update(self, step: int) -> dict[str, float]:
        seed = (self.config.seed << 40) + self.order.position * self.grpo.num_generations
        with self.policy.autocast():
            collected = collect(self.llm, self.order.take, self.rewards, self.grpo, seed)
            values = learn(self.llm, self.optimizer, collected, self.grpo, reference=self.reference)
        tokens = collected.rollouts.mask_BT.sum().item()
        return collected.metrics | self.rewards.means() | values | {"tokens": tokens}

    def evaluate(self) -> Finding:
        with self.policy.autocast():
            return answer_greedily(self.llm, self.val, self.rewards, self.grpo.max_tokens)

    def export(self, directory: pathlib.Path, step: int) -> None:
        self.policy.export(directory, step)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.order.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.position = state["position"]

    def plan(self) -> str:
        """What the run will take, in lines: memory as predicted, time as one step of it takes here. Writes nothing."""
        self.begin()
        self.update(1)  # allocates and compiles
        start, tokens = time.perf_counter(), self.update(2)["tokens"]
        seconds = time.perf_counter() - start
        model, g = self.policy.model.config, self.grpo
        longest = self.llm.engine.max_len
        width = 2 if self.policy.low else 4
        batch = self.config.micro_batch_size or g.prompts_per_step * g.num_generations
        learned = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        training = training_memory(
            model, batch, context_length=longest, compute_bytes=width, weight_bytes=4,
            optimizer_bytes=8 * learned / model.num_parameters(),
            gradient_checkpointing=self.config.gradient_checkpointing,
        )  # fmt: skip
        seqs = min(self.config.max_seqs, g.prompts_per_step * g.num_generations)
        cache = decoding_memory(model, seqs, longest, width=width).state
        reference = 4 * model.num_parameters() if self.reference is not None else 0
        parts = {"training": training.total, "key-value cache": cache, "reference": reference}
        budget = Budget.parse(self.config.budget)
        whole = budget.amount * (seconds if budget.kind == "steps" else 1)
        memory = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
        return (
            f"memory: about {sum(parts.values()) / GIB:.2f} GiB ({memory})\n"
            f"time: {seconds:.2f} s a step of {tokens:,.0f} tokens drawn here, {duration(whole)} for {budget.text} "
            f"({whole / 3600:.2f} hours), evaluations aside"
        )


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
    return max(len(policy.tokenizer.encode(prompt, allowed_special="all")) for prompt, _ in pairs)


def engine_of(
    config: AnsweringConfig, policy: Policy, pairs: Sequence[tuple[str, Any]], sampled: Sampled, invariant: bool = False
) -> LLM:
    """With room for the longest prompt and its answer: a context_length that no text fills takes no memory."""
    responses = sampled.prompts_per_step * sampled.num_generations
    longest = min(policy.model.config.context_length, longest_prompt(pairs, policy) + sampled.max_tokens)
    with policy.autocast():
        return LLM(
            policy.model, policy.tokenizer, quiet=True, max_len=longest, max_seqs=min(config.max_seqs, responses),
            invariant=invariant,
        )  # fmt: skip


def answer_greedily(llm: LLM, pairs: Sequence[tuple[str, Any]], rewards: Rewards, max_tokens: int) -> Finding:
    """The rewards of the likeliest answers to held-out prompts, and the first answers as samples."""
    if not pairs:
        return Finding()
    outputs = llm.generate([prompt for prompt, _ in pairs], SamplingParams(temperature=0, max_tokens=max_tokens))
    scores = [rewards(o.text, answer) for o, (_, answer) in zip(outputs, pairs, strict=True)]
    found = {"eval/reward": sum(scores) / len(scores)}
    found |= {f"eval/{name}": mean for name, mean in rewards.means().items()}
    found["eval/completions/mean_length"] = sum(len(o.token_ids) for o in outputs) / len(outputs)
    samples = [
        {"prompt": prompt, "text": o.text, "reward": score, "answer": answer}
        for (prompt, answer), o, score in list(zip(pairs, outputs, scores, strict=True))[:SAMPLES]
    ]
    return Finding(found, samples, f"reward {found['eval/reward']:.3f} on {len(scores)} held-out prompts")
