"""`cs336 ppo`: a model draws answers on its own engine, verifiers or a reward model score them, a critic foretells."""

import copy
import pathlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cs336.alignment.ppo import ActorCritic, KLControl, PPOConfig, ppo_step
from cs336.alignment.reward_model import RewardModel, load_reward_model
from cs336.alignment.rewards import Rewards
from cs336.alignment.rollouts import Rollouts, by_length, rollout, scores
from cs336.alignment.stage import Policy
from cs336.alignment.stages.answering import AnsweringConfig, AnsweringStage


@dataclass(frozen=True, kw_only=True)
class PPOStageConfig(AnsweringConfig):
    """Everything that decides what `cs336 ppo` computes, and where it is written."""

    ppo: PPOConfig = field(default_factory=PPOConfig)
    reward_model: pathlib.Path | None = None
    """The export of `cs336 reward`, whose score is added to the rewards'; their weights may then all be 0."""

    def __post_init__(self):
        super().__post_init__()
        Rewards(self.rewards, measured_alone=self.reward_model is not None)


class PPOStage(AnsweringStage):
    """The critic begins as the model, with a head of zeros."""

    verb = "ppo"
    config: PPOStageConfig

    def __init__(self, config: PPOStageConfig):
        policy = Policy(config)
        model = policy.model.eval()
        self.reference = copy.deepcopy(model).requires_grad_(False)
        self.critic = RewardModel(copy.deepcopy(self.reference).requires_grad_(True)).eval()
        rewards = Rewards(config.rewards, measured_alone=config.reward_model is not None)
        super().__init__(config, policy, ActorCritic(policy.module, self.critic), rewards, config.ppo)
        self.judge: RewardModel | None = None
        if config.reward_model is not None:
            self.judge = load_reward_model(config.reward_model, policy.device).requires_grad_(False)
            if (theirs := self.judge.model.config.vocab_size) != model.config.vocab_size:
                raise ValueError(f"the reward model reads a vocabulary of {theirs}, the policy's is another")
        self.kl = KLControl(config.ppo.kl_coef, config.ppo.target_kl)

    def describe(self) -> str:
        p = self.config.ppo
        count = p.prompts_per_step * p.num_generations
        return f"{len(self.order.items):,} prompts, {count} responses a step of up to {p.max_tokens} tokens"

    def update(self, step: int) -> dict[str, float]:
        config, ppo = self.config, self.config.ppo
        seed = self._seed()
        pairs = self.order.take(ppo.prompts_per_step)
        answers = [answer for _, answer in pairs for _ in range(ppo.num_generations)]
        with self.policy.autocast():
            rollouts = rollout(self.llm, [prompt for prompt, _ in pairs], ppo, seed)
            scores_B = scores(rollouts.texts, answers, self.rewards).to(self.policy.device) + self._judged(rollouts)
            values = ppo_step(
                self.policy.model, self.critic, self.reference, self.module, self.optimizer, rollouts, scores_B, ppo,
                kl_coef=self.kl.coef, seed=seed, micro_batch_size=config.micro_batch_size,
                max_grad_norm=config.optimizer.max_grad_norm,
            )  # fmt: skip
        self.llm.update_weights(self.policy.model)
        values |= {"reward": scores_B.mean().item(), "objective/kl_coef": self.kl.coef, "kl": values["objective/kl"]}
        self.kl.update(values["objective/kl"])
        values["completions/mean_length"] = rollouts.mask_BT.sum(1).float().mean().item()
        values["completions/clipped_ratio"] = rollouts.truncated_B.float().mean().item()
        return values | self.rewards.means() | {"tokens": rollouts.mask_BT.sum().item()}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"kl_coef": self.kl.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.kl.coef = state["kl_coef"]

    @torch.no_grad()
    def _judged(self, rollouts: Rollouts) -> Tensor:
        """(B,): the reward model's scores, 0 without one."""
        mask_BT = rollouts.mask_BT
        scores_B = torch.zeros(len(mask_BT), device=self.policy.device)
        if self.judge is None:
            return scores_B
        places_T = torch.arange(mask_BT.shape[1], device=self.policy.device)
        lengths_B = torch.where(mask_BT, places_T, -1).amax(1) + 2  # prediction t is that of token t + 1
        for rows_b, T in by_length(mask_BT, self.config.micro_batch_size or len(mask_BT)):
            scores_B[rows_b] = self.judge.score(rollouts.token_ids_BS[rows_b, : T + 1], lengths_B[rows_b])
        return scores_B
