"""Policy gradients: what a response was worth, and the loss that makes the better ones likelier. Pure functions.

B = responses, T = predictions of a row, G = responses a prompt. Names of losses are those of TRL.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cs336.alignment.functions import check_shapes, kl, masked_mean, masked_normalize

LossType = Literal["reinforce", "grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo", "rloo", "expert_iteration"]


class _Kind(NamedTuple):
    ratio: Literal["none", "token", "sequence_mean", "sequence_sum"]
    clip: Literal["none", "ppo", "weight"]
    mean: Literal["sequence", "token", "constant", "sum"]
    """Of what the loss is a mean: of sequences' means over tokens; of tokens; of sums over max_length; of sums."""


KINDS: Mapping[str, _Kind] = {
    "reinforce": _Kind("none", "none", "sum"),  # Williams 1992
    "grpo": _Kind("token", "ppo", "sequence"),  # arXiv:2402.03300
    "bnpo": _Kind("token", "ppo", "token"),
    "dr_grpo": _Kind("token", "ppo", "constant"),  # arXiv:2503.20783
    "dapo": _Kind("token", "ppo", "token"),  # arXiv:2503.14476
    "cispo": _Kind("token", "weight", "token"),  # arXiv:2506.13585
    "gspo": _Kind("sequence_mean", "ppo", "sequence"),  # arXiv:2507.18071
    "rloo": _Kind("sequence_sum", "ppo", "sequence"),  # arXiv:2402.14740; all tokens of a sequence have its loss
    "expert_iteration": _Kind(
        "none", "none", "token"
    ),  # arXiv:1705.08439; advantages of 1 for what is imitated, else 0
}


def group_advantages(
    rewards_B: Tensor,
    group_size: int,
    *,
    baseline: Literal["mean", "leave_one_out"] = "mean",
    normalize_std: bool = True,
    eps: float = 1e-4,
) -> Tensor:
    """How much better each response is than those to the same prompt: (B,) float32.

    mean: r - mean(group), GRPO's (arXiv:2402.03300); leave_one_out: r - mean(others of the group), RLOO's
    (arXiv:2402.14740). normalize_std divides by the group's standard deviation (of G - 1) + eps; Dr. GRPO and RLOO do
    not. A group whose rewards are equal gets exactly 0.

    rewards_B: (B,), the groups one after the other.
    Raises ValueError for a group of one, a batch that is no whole number of groups, and rewards that are not finite.
    """
    if group_size < 2:
        raise ValueError(f"group_size must be 2 or more, for a response is compared with others, got {group_size}")
    if rewards_B.dim() != 1 or rewards_B.shape[0] % group_size:
        raise ValueError(f"rewards must be (a multiple of {group_size},), got shape {tuple(rewards_B.shape)}")
    if not rewards_B.isfinite().all():
        raise ValueError("rewards must be finite")
    if baseline not in ("mean", "leave_one_out"):
        raise ValueError(f"baseline must be mean or leave_one_out, got {baseline!r}")
    rewards_PG = from_first(rewards_B, group_size)
    advantages_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    if baseline == "leave_one_out":
        advantages_PG = advantages_PG * (group_size / (group_size - 1))
    if normalize_std:
        advantages_PG = advantages_PG / (rewards_PG.std(1, keepdim=True) + eps)
    return advantages_PG.flatten().float()


def from_first(rewards_B: Tensor, group_size: int) -> Tensor:
    """Rewards less that of their group's first, (P, G) float64: equal ones are exactly 0, and so is their deviation."""
    rewards_PG = rewards_B.double().view(-1, group_size)
    return rewards_PG - rewards_PG[:, :1]


def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    last_value_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv:1506.02438): advantages and returns, (B, T) each.

        delta_t = r_t + gamma v_{t+1} - v_t,    A_t = delta_t + gamma lam A_{t+1},    return_t = A_t + v_t

    Steps are the places where mask is true; the others are passed over, and are 0 in what is returned.
    last_value_B: (B,), worth of what comes after the last step, of a response that was cut; None: 0, it has ended.
    Raises ValueError for shapes that differ, and gamma or lam outside 0..1.
    """
    check_shapes(rewards_BT, values=values_BT, mask=mask_BT)
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma and lam must be in 0..1, got {gamma} and {lam}")
    next_value_B = values_BT.new_zeros(len(values_BT)) if last_value_B is None else last_value_B
    next_advantage_B = torch.zeros_like(next_value_B)
    mask_BT = mask_BT.bool()
    advantages_BT = torch.zeros_like(values_BT)
    for t in reversed(range(values_BT.shape[1])):
        here_B = mask_BT[:, t]
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        next_advantage_B = torch.where(here_B, delta_B + gamma * lam * next_advantage_B, next_advantage_B)
        next_value_B = torch.where(here_B, values_BT[:, t], next_value_B)
        advantages_BT[:, t] = torch.where(here_B, next_advantage_B, 0)
    return advantages_BT, torch.where(mask_BT, advantages_BT + values_BT, 0)


def policy_gradient_loss(
    log_probs_BT: Tensor, old_log_probs_BT: Tensor | None, advantages: Tensor, mask_BT: Tensor, **options
) -> Tensor:
    """The mean of policy_gradient_terms, a scalar: sum / count. Arguments and errors are its."""
    total, count, _ = policy_gradient_terms(log_probs_BT, old_log_probs_BT, advantages, mask_BT, **options)
    return total / count.clamp(min=1)


def policy_gradient_terms(
    log_probs_BT: Tensor,
    old_log_probs_BT: Tensor | None,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    loss_type: LossType = "grpo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    max_length: int | None = None,
    reference_log_probs_BT: Tensor | None = None,
    beta: float = 0.0,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the losses, their count, and sums of metrics over the same count: parts of a batch add up.

        ratio = exp(log_probs - old_log_probs)
        clipped: -min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A)          (arXiv:1707.06347)
        weighted: -min(ratio, 1 + epsilon_high) A log_probs, where the weight has no gradient

    loss_type | ratio of                        | loss          | mean over
    reinforce | (none)                          | -log_probs A  | sequences, of sums over tokens
    grpo      | a token                         | clipped       | sequences, of means over tokens
    bnpo,dapo | a token                         | clipped       | tokens of the batch
    dr_grpo   | a token                         | clipped       | sequences, of sums over tokens / max_length
    cispo     | a token                         | weighted      | tokens of the batch
    gspo      | a sequence: exp of a mean       | clipped       | sequences
    rloo      | a sequence: exp of a sum        | clipped       | sequences
    expert_iteration | (none)                   | -log_probs A  | tokens of the batch

    Args:
        log_probs_BT: (B, T), of the policy that learns. old_log_probs_BT: (B, T), of the one that drew the tokens; they
            get no gradient. None only for reinforce and expert_iteration.
        advantages: (B,), or (B, T) for losses of tokens.
        mask_BT: (B, T), true where a token counts. A sequence without such a token counts as one whose loss is 0.
        epsilon_high: epsilon if None.
        max_length: of dr_grpo.
        reference_log_probs_BT, beta: beta times the k3 estimate of KL is added to the loss of each token.

    Metrics are "clip_ratio/low_mean", "clip_ratio/high_mean" and "clip_ratio/region_mean", shares of tokens whose ratio
    is clipped, and with a reference "kl".
    Raises ValueError for shapes that differ, another loss_type, and what a loss_type does not take or lacks.
    """
    if loss_type not in KINDS:
        raise ValueError(f"loss_type must be one of {', '.join(KINDS)}, got {loss_type!r}")
    kind = KINDS[loss_type]
    high = epsilon if epsilon_high is None else epsilon_high
    if not (0 <= epsilon < 1 and 0 <= high < math.inf):
        raise ValueError(f"epsilon must be in 0..1 and epsilon_high 0 or more, got {epsilon} and {high}")
    if (kind.mean == "constant") != (max_length is not None) or (max_length is not None and max_length < 1):
        raise ValueError(f"max_length is for dr_grpo, which divides by it, and 1 or more: got {max_length}")
    if beta and reference_log_probs_BT is None:
        raise ValueError("beta takes reference_log_probs, of what the policy should stay near to")
    check_shapes(log_probs_BT, mask=mask_BT)
    mask_BT = mask_BT.bool()
    if advantages.dim() == 1 and advantages.shape == log_probs_BT.shape[:1]:
        advantages = advantages[:, None].expand_as(log_probs_BT)
    elif kind.ratio.startswith("sequence"):
        raise ValueError(f"{loss_type} takes an advantage a sequence, ({log_probs_BT.shape[0]},)")
    check_shapes(log_probs_BT, advantages=advantages)
    advantages_BT = advantages.detach().to(log_probs_BT.dtype)
    log_probs_BT = torch.where(mask_BT, log_probs_BT, 0)

    loss_BT, metrics_BT = -advantages_BT * log_probs_BT, dict[str, Tensor]()
    if kind.ratio != "none":
        if old_log_probs_BT is None:
            raise ValueError(f"{loss_type} takes old_log_probs, of the policy that drew the tokens")
        check_shapes(log_probs_BT, old_log_probs=old_log_probs_BT)
        log_ratio_BT = log_probs_BT - torch.where(mask_BT, old_log_probs_BT.detach(), 0)
        if kind.ratio == "sequence_mean":
            log_ratio_BT = masked_mean(log_ratio_BT, mask_BT, dim=1)[:, None].expand_as(mask_BT)
        elif kind.ratio == "sequence_sum":
            log_ratio_BT = log_ratio_BT.sum(1, keepdim=True).expand_as(mask_BT)
        ratio_BT = log_ratio_BT.exp()
        if kind.clip == "weight":
            loss_BT = loss_BT * ratio_BT.detach().clamp(max=1 + high)
        else:
            clipped_BT = ratio_BT.clamp(1 - epsilon, 1 + high)
            loss_BT = -torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
        too_low_BT = (ratio_BT < 1 - epsilon) & (advantages_BT < 0) & (kind.clip == "ppo")
        too_high_BT = (ratio_BT > 1 + high) & (advantages_BT > 0)
        metrics_BT["clip_ratio/low_mean"], metrics_BT["clip_ratio/high_mean"] = too_low_BT, too_high_BT
        metrics_BT["clip_ratio/region_mean"] = too_low_BT | too_high_BT
    if reference_log_probs_BT is not None:
        check_shapes(log_probs_BT, reference_log_probs=reference_log_probs_BT)
        metrics_BT["kl"] = kl(log_probs_BT, torch.where(mask_BT, reference_log_probs_BT.detach(), 0))
        if beta:
            loss_BT = loss_BT + beta * metrics_BT["kl"]

    count = mask_BT.sum() if kind.mean == "token" else torch.tensor(len(mask_BT), device=mask_BT.device)
    if kind.mean == "sequence":
        total = masked_mean(loss_BT, mask_BT, dim=1).sum()
    else:
        total = masked_normalize(loss_BT, mask_BT, 1 if max_length is None else max_length)
    metrics = {name: count * masked_mean(x_BT.detach().float(), mask_BT) for name, x_BT in metrics_BT.items()}
    return total, count, metrics
