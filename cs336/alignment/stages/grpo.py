"""`cs336 grpo`: a model draws answers on its own engine, verifiers score them, and the better ones become likelier."""

import copy
import dataclasses
import time
from dataclasses import dataclass, field

from cs336.alignment.grpo import GRPOConfig, collect, learn
from cs336.alignment.rewards import Rewards
from cs336.alignment.stage import Policy
from cs336.alignment.stages.answering import AnsweringConfig, AnsweringStage
from cs336.models.memory import decoding_memory, training_memory
from cs336.training import Budget
from cs336.utils.config import ELSEWHERE
from cs336.utils.duration import duration

GIB = 2**30
OUTSIDE = {"seed": "seed", "micro_batch_size": "micro_batch_size", "max_grad_norm": "optimizer.max_grad_norm"}
"""Of GRPOConfig: the key of the run that it takes them from."""


@dataclass(frozen=True, kw_only=True)
class GRPOStageConfig(AnsweringConfig):
    """Everything that decides what `cs336 grpo` computes, and where it is written."""

    grpo: GRPOConfig = field(default_factory=GRPOConfig, metadata={ELSEWHERE: tuple(OUTSIDE)})
    invariant: bool = False
    """Run engine and training inside cs336.invariant(): their log-probabilities are then the same bits. Slower."""

    def __post_init__(self):
        super().__post_init__()
        Rewards(self.rewards)
        for name, outside in OUTSIDE.items():
            if (given := getattr(self.grpo, name)) != getattr(GRPOConfig, name):
                raise ValueError(f"grpo.{name} stands outside [grpo] in a run: give {outside} = {given} instead")


class GRPOStage(AnsweringStage):
    verb = "grpo"
    config: GRPOStageConfig

    def __init__(self, config: GRPOStageConfig):
        policy = Policy(config)
        policy.model.eval()
        self.grpo = dataclasses.replace(
            config.grpo, seed=config.seed, micro_batch_size=config.micro_batch_size,
            max_grad_norm=config.optimizer.max_grad_norm,
        )  # fmt: skip
        super().__init__(config, policy, policy.module, Rewards(config.rewards), self.grpo)
        self.reference = copy.deepcopy(policy.model).requires_grad_(False) if self.grpo.beta else None

    def begin(self) -> None:
        self.llm = self._engine(self.config.invariant)

    def describe(self) -> str:
        g = self.grpo
        return (
            f"{len(self.order.items):,} prompts, {g.prompts_per_step} x {g.num_generations} responses a step of up to "
            f"{g.max_tokens} tokens, loss {g.loss_type}"
        )

    def update(self, step: int) -> dict[str, float]:
        with self.policy.autocast():
            collected = collect(self.llm, self.order.take, self.rewards, self.grpo, self._seed())
            values = learn(self.llm, self.optimizer, collected, self.grpo, reference=self.reference)
        tokens = collected.rollouts.mask_BT.sum().item()
        return collected.metrics | self.rewards.means() | values | {"tokens": tokens}

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
