"""Proximal policy optimization (arXiv:1707.06347) of answers: a critic, GAE, and a divergence that is paid for.

    r_t = -kl_coef (log p_t - log p_ref_t), and the score of the answer at its last token
    A, R = gae(r, V);  A is whitened
    policy: -min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon) A)
    critic: max((V - R)^2, (clip(V, V_old - cliprange_value, V_old + cliprange_value) - R)^2) / 2

B = responses of a step, S = tokens of a row, T = S - 1 predictions. The value at prediction t is that of the text up to
token t.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cs336.alignment.functions import check_shapes, kl, masked_mean, masked_normalize, sequence_log_probs
from cs336.alignment.policy import gae, policy_gradient_terms
from cs336.alignment.reward_model import RewardModel
from cs336.alignment.rollouts import Rollouts, by_length
from cs336.alignment.stage import step_on
from cs336.models import Transformer


@dataclass(frozen=True)
class PPOConfig:
    """How to learn from responses. Raises ValueError for values out of range."""

    prompts_per_step: int = 64
    num_generations: int = 1
    """Responses to each prompt."""
    max_tokens: int = 64
    """Of a response."""
    temperature: float = 1.0
    num_ppo_epochs: int = 4
    """Passes over each batch of responses."""
    num_mini_batches: int = 1
    """Optimizer steps a pass."""
    epsilon: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    """Weight of the critic's loss."""
    gamma: float = 1.0
    lam: float = 0.95
    kl_coef: float = 0.05
    """What a nat of divergence from the reference costs."""
    target_kl: float | None = None
    """Nats a response, which kl_coef is then steered to (arXiv:1909.08593). None: it stays."""
    whiten_advantages: bool = True
    missing_end_penalty: float = 0.0
    """Taken off the score of a response that max_tokens cut."""

    def __post_init__(self):
        for name in ("prompts_per_step", "num_generations", "max_tokens", "num_ppo_epochs", "num_mini_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("cliprange_value", "vf_coef", "kl_coef", "missing_end_penalty"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more and finite, got {getattr(self, name)}")
        if not 0 < self.temperature < math.inf or not 0 <= self.epsilon < 1:
            raise ValueError(f"temperature must be above 0, epsilon in 0..1, got {self.temperature}, {self.epsilon}")
        if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1):
            raise ValueError(f"gamma and lam must be in 0..1, got {self.gamma} and {self.lam}")
        if self.target_kl is not None and not self.target_kl > 0:
            raise ValueError(f"target_kl must be above 0, got {self.target_kl}")
        if self.num_mini_batches > self.prompts_per_step * self.num_generations:
            raise ValueError(f"num_mini_batches {self.num_mini_batches} are more than there are responses")


class ActorCritic(nn.Module):
    """The policy and its critic, which learn together and are saved together."""

    def __init__(self, policy: nn.Module, critic: RewardModel):
        super().__init__()
        self.policy, self.critic = policy, critic


def shaped_rewards(
    scores_B: Tensor, log_probs_BT: Tensor, reference_log_probs_BT: Tensor, mask_BT: Tensor, kl_coef: float
) -> Tensor:
    """(B, T): -kl_coef (log p - log p_ref) at each prediction of the response, and the score at the last.

    scores_B: (B,); the others (B, T), mask true for the response's predictions. Raises ValueError for other shapes.
    """
    check_shapes(log_probs_BT, reference_log_probs=reference_log_probs_BT, mask=mask_BT)
    rewards_BT = -kl_coef * (log_probs_BT - reference_log_probs_BT).masked_fill(~mask_BT.bool(), 0)
    places_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B = torch.where(mask_BT.bool(), places_T, -1).amax(1)
    here_BT = (places_T == last_B[:, None]) & mask_BT.bool()
    return rewards_BT + here_BT * scores_B[:, None]


def value_loss_terms(
    values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, cliprange: float
) -> tuple[Tensor, Tensor]:
    """Sums over the mask of the critic's loss, max((V - R)^2, (clipped V - R)^2) / 2, and of where clipping counts.

    All (B, T); old values and returns get no gradient. Raises ValueError for shapes that differ.
    """
    check_shapes(values_BT, old_values=old_values_BT, returns=returns_BT, mask=mask_BT)
    old_BT, returns_BT = old_values_BT.detach(), returns_BT.detach()
    clipped_BT = old_BT + (values_BT - old_BT).clamp(-cliprange, cliprange)
    plain_BT, other_BT = (values_BT - returns_BT).square(), (clipped_BT - returns_BT).square()
    loss_BT = torch.maximum(plain_BT, other_BT) / 2
    return masked_normalize(loss_BT, mask_BT), masked_normalize((other_BT > plain_BT).float(), mask_BT)


def whiten(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Less its mean, over its standard deviation, of the places where mask is true; 0 elsewhere."""
    mean = masked_mean(x_BT, mask_BT)
    deviation_BT = torch.where(mask_BT.bool(), x_BT - mean, 0)
    return deviation_BT * (masked_mean(deviation_BT.square(), mask_BT) + 1e-8).rsqrt()


class KLControl:
    """The price of divergence. With a target it goes up where there is more, and down where there is less:
    coef *= 1 + 0.1 clip(kl / target - 1, -0.2, 0.2) (arXiv:1909.08593)."""

    def __init__(self, coef: float, target: float | None):
        self.coef, self.target = coef, target

    def update(self, kl_per_response: float) -> None:
        if self.target is not None:
            self.coef *= 1 + 0.1 * min(0.2, max(-0.2, kl_per_response / self.target - 1))


class _Batch(NamedTuple):
    token_ids_BS: Tensor
    mask_BT: Tensor
    old_log_probs_BT: Tensor
    old_values_BT: Tensor
    advantages_BT: Tensor
    returns_BT: Tensor


def ppo_step(
    policy: Transformer,
    critic: RewardModel,
    reference: Transformer,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    scores_B: Tensor,
    config: PPOConfig,
    *,
    kl_coef: float,
    seed: int = 0,
    micro_batch_size: int | None = None,
    max_grad_norm: float = 1.0,
) -> dict[str, float]:
    """num_ppo_epochs passes over responses, num_mini_batches steps each, policy and critic together.

    Args:
        module: what learns of policy and critic, whose parameters `optimizer` steps.
        scores_B: (B,) float32, what each response is worth.
        seed: of the order in the passes.

    Returns metrics with TRL's names: "loss", "loss/policy_avg", "loss/value_avg", "objective/kl" (nats a response),
    "objective/non_score_reward", "entropy", "clip_ratio/...", "val/clipfrac_avg", "explained_variance", "grad_norm".
    Raises FloatingPointError for a loss or gradient that is not finite.
    """
    mask_BT, ids_BS = rollouts.mask_BT, rollouts.token_ids_BS
    size = micro_batch_size or len(ids_BS)
    scores_B = scores_B.to(ids_BS.device) - config.missing_end_penalty * rollouts.truncated_B
    old_BT, entropy_BT, reference_BT, values_BT = torch.zeros(4, *mask_BT.shape, device=mask_BT.device)
    with torch.no_grad():
        for rows_b, T in by_length(mask_BT, size):
            part_bS = ids_BS[rows_b, : T + 1]
            old_BT[rows_b, :T], entropy_BT[rows_b, :T] = sequence_log_probs(
                policy, part_bS, temperature=config.temperature, return_entropy=True
            )
            reference_BT[rows_b, :T] = sequence_log_probs(reference, part_bS, temperature=config.temperature)
            values_BT[rows_b, :T] = critic(part_bS)[:, :-1]
        values_BT = values_BT.masked_fill(~mask_BT, 0)
        rewards_BT = shaped_rewards(scores_B, old_BT, reference_BT, mask_BT, kl_coef)
        advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=config.gamma, lam=config.lam)
        left = (returns_BT - values_BT)[mask_BT].var(correction=0) / returns_BT[mask_BT].var(correction=0).clamp(
            min=1e-8
        )
        divergence_B = masked_normalize(kl(old_BT, reference_BT, "k1"), mask_BT, dim=1)
        if config.whiten_advantages:
            advantages_BT = whiten(advantages_BT, mask_BT)
    values = {
        "entropy": masked_mean(entropy_BT, mask_BT).item(),
        "objective/kl": divergence_B.mean().item(),
        "objective/non_score_reward": -kl_coef * divergence_B.mean().item(),
        "explained_variance": 1 - left.item(),
    }
    batch = _Batch(ids_BS, mask_BT, old_BT, values_BT, advantages_BT, returns_BT)
    generator = torch.Generator().manual_seed(seed)
    steps = list[dict[str, float]]()
    for _ in range(config.num_ppo_epochs):
        order = torch.randperm(len(ids_BS), generator=generator).to(ids_BS.device)
        for places in order.tensor_split(min(config.num_mini_batches, len(order))):
            part = _Batch(*(x[places] for x in batch))
            steps.append(_update(policy, critic, module, optimizer, part, config, size, max_grad_norm))
    return values | {name: sum(s[name] for s in steps) / len(steps) for name in steps[0]}


def _update(
    policy: Transformer,
    critic: RewardModel,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: _Batch,
    config: PPOConfig,
    size: int,
    max_grad_norm: float,
) -> dict[str, float]:
    """One optimizer step, a part at a time: the mean over the batch's tokens."""
    totals = []
    for rows_b, T in by_length(batch.mask_BT, size):
        part = _Batch(batch.token_ids_BS[rows_b, : T + 1], *(x[rows_b, :T] for x in batch[1:]))
        loss, count, metrics = policy_gradient_terms(
            sequence_log_probs(policy, part.token_ids_BS, temperature=config.temperature),
            part.old_log_probs_BT, part.advantages_BT, part.mask_BT, loss_type="dapo", epsilon=config.epsilon,
        )  # fmt: skip
        values_BT = critic(part.token_ids_BS)[:, :-1]
        value_loss, clipped = value_loss_terms(
            values_BT, part.old_values_BT, part.returns_BT, part.mask_BT, config.cliprange_value
        )
        metrics |= {"loss/policy_avg": loss, "loss/value_avg": value_loss, "val/clipfrac_avg": clipped}
        loss = loss + config.vf_coef * value_loss
        loss.backward()
        totals.append(torch.stack([x.detach().float() for x in (count, loss, *metrics.values())]))
    return step_on(optimizer, module, torch.stack(totals).sum(0), ("loss", *metrics), max_grad_norm)
