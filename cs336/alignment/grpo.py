"""Group relative policy optimization (arXiv:2402.03300) and its relatives, from rollout to optimizer step.

    llm = LLM(model, tokenizer)
    optimizer = AdamWConfig(lr=1e-4, weight_decay=0).build(model)
    rows = train_grpo(llm, optimizer, [("2 + 2 = ", "4"), ...], verify_math, GRPOConfig(), num_steps=100)

The engine that draws responses and the optimizer share the model's tensors: nothing is copied. The model stays in eval
mode, without dropout, so that both see the same function. Metrics have TRL's names.
B = responses of a step, S = tokens of a row, T = S - 1 predictions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cs336.alignment.functions import masked_mean, response_mask, sequence_log_probs
from cs336.alignment.policy import KINDS, LossType, group_advantages, policy_gradient_terms
from cs336.alignment.verifiers import Verdict
from cs336.inference import LLM, SamplingParams
from cs336.models import Transformer
from cs336.optim import clip_scale, grad_norm
from cs336.training.objectives import gradient_scale

Reward = Callable[[str, Any], Verdict | float]
"""(response, expected answer) -> a score: a verifier, for one."""


@dataclass(frozen=True)
class GRPOConfig:
    """How to learn from responses. Raises ValueError for values out of range."""

    num_generations: int = 8
    """Responses to each prompt, which are compared with each other."""
    prompts_per_step: int = 8
    max_tokens: int = 64
    """Of a response."""
    temperature: float = 1.0
    """At which responses are drawn, and their log-probabilities taken."""
    loss_type: LossType = "grpo"
    scale_rewards: bool = True
    """Divide advantages by the group's standard deviation; not done for rloo, dr_grpo and reinforce."""
    epsilon: float = 0.2
    epsilon_high: float | None = None
    beta: float = 0.0
    """Weight of the divergence from the reference model."""
    num_iterations: int = 1
    """Optimizer steps on each batch of responses."""
    micro_batch_size: int | None = None
    """Responses a forward pass; gradients add up. None: all."""
    mask_truncated_completions: bool = False
    """Learn nothing from responses that max_tokens cut."""
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name, least in {"num_generations": 2, "prompts_per_step": 1, "max_tokens": 1, "num_iterations": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be 1 or more, got {self.micro_batch_size}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be above 0, for equal responses teach nothing, got {self.temperature}")
        if not 0 <= self.seed < 1 << 20:
            raise ValueError(f"seed must be in 0..2**20 - 1, got {self.seed}")
        if self.loss_type not in KINDS:
            raise ValueError(f"loss_type must be one of {', '.join(KINDS)}, got {self.loss_type!r}")
        if self.beta < 0 or not self.max_grad_norm > 0:
            raise ValueError(f"beta must be 0 or more and max_grad_norm above 0, got {self.beta}, {self.max_grad_norm}")


@dataclass(frozen=True)
class Rollouts:
    """Responses to prompts, those of a prompt one after the other."""

    texts: list[str]
    token_ids_BS: Tensor
    """(B, S) int64: prompt, response and the token that ended it, padded on the right with zeros."""
    mask_BT: Tensor
    """(B, T) bool: predictions of the responses' tokens."""
    sampled_log_probs_BT: Tensor
    """(B, T) float32: what the engine said of the tokens that it drew, before temperature; 0 elsewhere."""
    truncated_B: Tensor
    """(B,) bool: cut by max_tokens or the room there was."""


def rollout(llm: LLM, prompts: Sequence[str], config: GRPOConfig, seed: int) -> Rollouts:
    """num_generations responses to each prompt; equal weights and seeds draw equal responses."""
    n = config.num_generations
    params = [
        SamplingParams(config.temperature, max_tokens=config.max_tokens, n=n, logprobs=0, seed=seed + i * n)
        for i in range(len(prompts))
    ]
    texts, rows, lengths, truncated = list[str](), list[list[int]](), list[int](), list[bool]()
    logs = list[list[float]]()
    for request in llm.generate(prompts, params):
        for output in request.outputs:
            drawn = [*(output.logprobs or []), *([output.end] if output.end else [])]
            texts.append(output.text)
            rows.append(request.prompt_token_ids + [token.id for token in drawn])
            lengths.append(len(request.prompt_token_ids))
            logs.append([token.logprob for token in drawn])
            truncated.append(output.finish_reason == "length")
    S = max(map(len, rows))
    token_ids_BS, logs_BT = torch.zeros(len(rows), S, dtype=torch.int64), torch.zeros(len(rows), S - 1)
    for b, (row, start, log) in enumerate(zip(rows, lengths, logs, strict=True)):
        token_ids_BS[b, : len(row)] = torch.tensor(row)
        logs_BT[b, start - 1 : len(row) - 1] = torch.tensor(log)
    mask_BT = response_mask(torch.tensor(lengths), torch.tensor([len(row) for row in rows]), S)
    device = llm.model.device
    return Rollouts(
        texts, token_ids_BS.to(device), mask_BT.to(device), logs_BT.to(device), torch.tensor(truncated, device=device)
    )


def grpo_step(
    llm: LLM,
    optimizer: torch.optim.Optimizer,
    prompts: Sequence[str],
    answers: Sequence[Any],
    reward: Reward,
    config: GRPOConfig,
    *,
    seed: int = 0,
    reference: Transformer | None = None,
) -> dict[str, float]:
    """Draw responses, score them, and make num_iterations optimizer steps on them.

    Args:
        llm: with a tokenizer, of the model whose parameters `optimizer` steps; its engine goes on with the new weights.
        optimizer: of cs336.optim, whose step takes grad_scale.
        answers: one a prompt, given to `reward` with each response to it.
        seed: of the responses; num_generations x prompts of them from there on are used.
        reference: the model to stay near to, if config.beta > 0.

    Returns metrics: "loss", "reward", "reward_std" (mean over groups), "frac_reward_zero_std", "entropy", "grad_norm",
    "completions/mean_length", "completions/clipped_ratio", "clip_ratio/...", "kl", and
    "sampling/sampling_logp_difference/mean" and ".../max": how far the engine's log-probabilities are from those of
    the training forward before the first step (at temperature 1).
    Raises ValueError for prompts and answers that do not pair, scores that are not finite, and beta without reference.
    """
    if len(prompts) != len(answers) or not prompts:
        raise ValueError(f"there are {len(prompts)} prompts and {len(answers)} answers: give one answer a prompt")
    if config.beta and reference is None:
        raise ValueError(f"beta is {config.beta} and there is no reference: give the model to stay near to")
    model = llm.model
    rollouts = rollout(llm, prompts, config, seed)
    rewards_B = scores(rollouts.texts, [a for a in answers for _ in range(config.num_generations)], reward)
    advantages_B = group_advantages(
        rewards_B, config.num_generations,
        baseline="leave_one_out" if config.loss_type == "rloo" else "mean",
        normalize_std=config.scale_rewards and config.loss_type not in ("rloo", "dr_grpo", "reinforce"),
    ).to(model.device)  # fmt: skip
    mask_BT = rollouts.mask_BT
    if config.mask_truncated_completions:
        mask_BT = mask_BT & ~rollouts.truncated_B[:, None]
    size = config.micro_batch_size or len(mask_BT)
    old_BT, entropy_BT = _log_probs(model, rollouts.token_ids_BS, size, config.temperature)
    reference_BT = None
    if config.beta and reference is not None:
        reference_BT, _ = _log_probs(reference, rollouts.token_ids_BS, size, config.temperature)
    batch = _Batch(rollouts.token_ids_BS, mask_BT, advantages_B, old_BT, reference_BT)
    values = _of_rollouts(rollouts, rewards_B, config, old_BT, entropy_BT)
    for _ in range(config.num_iterations):
        values |= _update(model, optimizer, config, batch)
    llm.update_weights(model)
    return values


def train_grpo(
    llm: LLM,
    optimizer: torch.optim.Optimizer,
    data: Sequence[tuple[str, Any]],
    reward: Reward,
    config: GRPOConfig,
    *,
    num_steps: int,
    reference: Transformer | None = None,
    log: Callable[[int, dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """num_steps of grpo_step on prompts drawn from data, (prompt, answer) each: the metrics of each step.

    Prompts come in a random order that config.seed decides, each once before any comes again. log(step, metrics) is
    called after each step. Raises what grpo_step does, and ValueError without data.
    """
    if not data:
        raise ValueError("there are no prompts to learn from")
    generator = torch.Generator().manual_seed(config.seed)
    order, rows = list[int](), list[dict[str, float]]()
    count = config.prompts_per_step
    for step in range(num_steps):
        while len(order) < count:
            order += torch.randperm(len(data), generator=generator).tolist()
        chosen, order = [data[i] for i in order[:count]], order[count:]
        prompts, answers = [prompt for prompt, _ in chosen], [answer for _, answer in chosen]
        seed = (config.seed << 40) + step * count * config.num_generations
        rows.append(grpo_step(llm, optimizer, prompts, answers, reward, config, seed=seed, reference=reference))
        if log is not None:
            log(step, rows[-1])
    return rows


def scores(texts: Sequence[str], answers: Sequence[Any], reward: Reward) -> Tensor:
    """(B,) float32. Raises ValueError for a score that is not finite."""
    found = [reward(text, answer) for text, answer in zip(texts, answers, strict=True)]
    rewards_B = torch.tensor([float(x.score if isinstance(x, Verdict) else x) for x in found])
    if not rewards_B.isfinite().all():
        i = int((~rewards_B.isfinite()).nonzero()[0])
        raise ValueError(f"the reward of {texts[i]!r:.80} is {rewards_B[i]}: expected a finite number")
    return rewards_B


class _Batch(NamedTuple):
    """What a step learns from; rows are responses."""

    token_ids_BS: Tensor
    mask_BT: Tensor
    advantages_B: Tensor
    old_BT: Tensor
    reference_BT: Tensor | None

    def split(self, size: int) -> Iterator["_Batch"]:
        for start in range(0, len(self.mask_BT), size):
            yield _Batch(*(None if x is None else x[start : start + size] for x in self))  # type: ignore[arg-type]


@torch.no_grad()
def _log_probs(model: Transformer, token_ids_BS: Tensor, size: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies, (B, T) each, `size` rows at a time."""
    found = [
        sequence_log_probs(model, part_BS, temperature=temperature, return_entropy=True)
        for part_BS in token_ids_BS.split(size)
    ]
    return torch.cat([log_probs for log_probs, _ in found]), torch.cat([entropies for _, entropies in found])


def _of_rollouts(
    rollouts: Rollouts, rewards_B: Tensor, config: GRPOConfig, old_BT: Tensor, entropy_BT: Tensor
) -> dict[str, float]:
    std_P = rewards_B.view(-1, config.num_generations).std(1)
    mask_BT = rollouts.mask_BT
    values = {
        "reward": rewards_B.mean(),
        "reward_std": std_P.mean(),
        "frac_reward_zero_std": (std_P == 0).float().mean(),
        "entropy": masked_mean(entropy_BT, mask_BT),
        "completions/mean_length": mask_BT.sum(1).float().mean(),
        "completions/clipped_ratio": rollouts.truncated_B.float().mean(),
    }
    if config.temperature == 1:
        difference_BT = (old_BT - rollouts.sampled_log_probs_BT).abs().masked_fill(~mask_BT, 0)
        values["sampling/sampling_logp_difference/mean"] = masked_mean(difference_BT, mask_BT)
        values["sampling/sampling_logp_difference/max"] = difference_BT.max()
    return {name: value.item() for name, value in values.items()}


def _update(
    model: Transformer, optimizer: torch.optim.Optimizer, config: GRPOConfig, batch: _Batch
) -> dict[str, float]:
    """One optimizer step on the whole batch, a part at a time."""
    totals = []
    for part in batch.split(config.micro_batch_size or len(batch.mask_BT)):
        loss, count, metrics = policy_gradient_terms(
            sequence_log_probs(model, part.token_ids_BS, temperature=config.temperature),
            part.old_BT, part.advantages_B, part.mask_BT,
            loss_type=config.loss_type, epsilon=config.epsilon, epsilon_high=config.epsilon_high, beta=config.beta,
            max_length=config.max_tokens if config.loss_type == "dr_grpo" else None,
            reference_log_probs_BT=part.reference_BT,
        )  # fmt: skip
        loss.backward()
        totals.append(torch.stack([count.float(), loss.detach(), *metrics.values()]))
    count, *sums = torch.stack(totals).sum(0)
    scale = gradient_scale(count)
    norm = grad_norm(model.parameters()) * scale
    optimizer.step(grad_scale=scale * clip_scale(norm, config.max_grad_norm))  # type: ignore[call-overload]
    optimizer.zero_grad()
    means = [(total / count.clamp(min=1)).item() for total in sums]
    return dict(zip(("loss", *metrics), means, strict=True)) | {"grad_norm": norm.item()}
