"""Group relative policy optimization (arXiv:2402.03300) and its relatives, from rollout to optimizer step.

    llm = LLM(model, tokenizer)
    optimizer = AdamWConfig(lr=1e-4, weight_decay=0).build(model)
    rows = train_grpo(llm, optimizer, [("2 + 2 = ", "4"), ...], verify_math, GRPOConfig(), num_steps=100)

The engine that draws responses and the optimizer share the model's tensors: nothing is copied. The model stays in eval
mode, without dropout, so that both see the same function. Metrics have TRL's names.
B = responses of a step, S = tokens of a row, T = S - 1 predictions, P = prompts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cs336.alignment.functions import masked_mean, sequence_log_probs
from cs336.alignment.policy import KINDS, LossType, from_first, group_advantages, policy_gradient_terms
from cs336.alignment.rollouts import Draw, Order, Reward, Rollouts, by_length, join, rollout, rows, scores
from cs336.alignment.stage import step_on
from cs336.inference import LLM
from cs336.models import Transformer
from cs336.ops import registry

UNSCALED = ("rloo", "dr_grpo", "reinforce")  # losses whose advantages are not divided by a standard deviation


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
    """Of ratios above 1; more than epsilon leaves unlikely tokens room to grow (clip-higher, arXiv:2503.14476)."""
    beta: float = 0.0
    """Weight of the divergence from the reference model."""
    num_iterations: int = 1
    """Optimizer steps on each batch of responses."""
    micro_batch_size: int | None = None
    """Responses a forward pass; gradients add up. None: all."""
    mask_truncated_completions: bool = False
    """Learn nothing from responses that max_tokens cut."""
    dynamic_sampling: int = 0
    """Draw further prompts, at most so many times, in place of those whose responses are all worth the same: they teach
    nothing (arXiv:2503.14476)."""
    importance_cap: float | None = None
    """Weight what is learned by how likely the training forward finds it, over how likely the engine did, at most so
    much: it corrects what their numerics differ by (truncated importance sampling). At temperature 1."""
    expert_threshold: float = 0.0
    """Of expert_iteration: responses that are worth more are imitated."""
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self):
        least = {"num_generations": 2, "prompts_per_step": 1, "max_tokens": 1, "num_iterations": 1}
        for name, lowest in (least | {"dynamic_sampling": 0}).items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be {lowest} or more, got {getattr(self, name)}")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be 1 or more, got {self.micro_batch_size}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be above 0, for equal responses teach nothing, got {self.temperature}")
        if not 0 <= self.seed < 1 << 20:
            raise ValueError(f"seed must be in 0..2**20 - 1, got {self.seed}")
        if self.loss_type not in KINDS:
            raise ValueError(f"loss_type must be one of {', '.join(KINDS)}, got {self.loss_type!r}")
        if not 0 <= self.beta < math.inf or not self.max_grad_norm > 0:
            raise ValueError(f"beta must be 0 or more and max_grad_norm above 0, got {self.beta}, {self.max_grad_norm}")
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if not (0 <= self.epsilon < 1 and 0 <= high < math.inf):
            raise ValueError(f"epsilon must be in 0..1 and epsilon_high 0 or more, got {self.epsilon} and {high}")
        if math.isnan(self.expert_threshold):
            raise ValueError("expert_threshold must be a number, got nan: no reward is more")
        if self.importance_cap is not None and not (self.importance_cap > 0 and self.temperature == 1):
            raise ValueError(
                "importance_cap must be above 0, and temperature 1, for the engine's log-probabilities are before it, "
                f"got {self.importance_cap} and {self.temperature}"
            )


class Collected(NamedTuple):
    """Responses to learn from, P x num_generations of them."""

    rollouts: Rollouts
    rewards_B: Tensor
    metrics: dict[str, float]
    """Of all that were drawn, those that were left out too."""


def collect(llm: LLM, draw: Draw, reward: Reward, config: GRPOConfig, seed: int) -> Collected:
    """Draw responses to prompts_per_step prompts and score them.

    With dynamic_sampling, prompts whose responses are all worth the same are left out, and others drawn in their place;
    those that are still missing in the end are done without, but for all of them.
    """
    drawn, kept = list[tuple[Rollouts, Tensor]](), list[tuple[Rollouts, Tensor]]()
    n, num_drawn, missing = config.num_generations, 0, config.prompts_per_step
    for _ in range(1 + config.dynamic_sampling):
        pairs = draw(missing)
        rollouts = rollout(llm, [prompt for prompt, _ in pairs], config, seed + num_drawn * n)
        rewards_B = scores(rollouts.texts, [answer for _, answer in pairs for _ in range(n)], reward)
        drawn.append((rollouts, rewards_B))
        num_drawn += len(pairs)
        if not config.dynamic_sampling:
            kept = drawn
            break
        differ_P = from_first(rewards_B, n).std(1) > 0
        places_B = differ_P.repeat_interleave(n).nonzero().flatten()
        if len(places_B):
            kept.append((rows(rollouts, places_B), rewards_B[places_B]))
        missing -= int(differ_P.sum())
        if not missing:
            break
    everything, rewards_B = join([r for r, _ in drawn]), torch.cat([x for _, x in drawn])
    metrics = _of_rollouts(everything, rewards_B, n)
    if not kept:
        kept = drawn[-1:]
    return Collected(join([r for r, _ in kept]), torch.cat([x for _, x in kept]), metrics)


def learn(
    llm: LLM,
    optimizer: torch.optim.Optimizer,
    collected: Collected,
    config: GRPOConfig,
    *,
    reference: Transformer | None = None,
) -> dict[str, float]:
    """num_iterations optimizer steps on responses, after which the engine goes on with the new weights: metrics.

    With an engine that was made with invariant=True training runs inside cs336.invariant() too: the log-probabilities
    of both are then the same bits. A torch.autocast around it needs cache_enabled=False: its casts of the weights would
    outlast the steps that change them.
    Raises ValueError for beta without reference, FloatingPointError for a loss or gradient that is not finite.
    """
    if config.beta and reference is None:
        raise ValueError(f"beta is {config.beta} and there is no reference: give the model to stay near to")
    with registry.invariant(llm.engine.config.invariant):
        values = _learn(llm.model, optimizer, collected, config, reference)
    llm.update_weights(llm.model)
    return values


def _learn(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    collected: Collected,
    config: GRPOConfig,
    reference: Transformer | None,
) -> dict[str, float]:
    rollouts, rewards_B = collected.rollouts, collected.rewards_B
    mask_BT = rollouts.mask_BT
    if config.mask_truncated_completions:
        mask_BT = mask_BT & ~rollouts.truncated_B[:, None]
    if config.loss_type == "expert_iteration":
        advantages = (rewards_B > config.expert_threshold).float().to(model.device)
        mask_BT = mask_BT & (advantages > 0)[:, None]
    else:
        advantages = group_advantages(
            rewards_B, config.num_generations,
            baseline="leave_one_out" if config.loss_type == "rloo" else "mean",
            normalize_std=config.scale_rewards and config.loss_type not in UNSCALED,
        ).to(model.device)  # fmt: skip
    size = config.micro_batch_size or len(mask_BT)
    old_BT, entropy_BT = _log_probs(model, rollouts.token_ids_BS, rollouts.mask_BT, size, config.temperature)
    reference_BT = None
    if config.beta and reference is not None:
        reference_BT, _ = _log_probs(reference, rollouts.token_ids_BS, rollouts.mask_BT, size, config.temperature)
    values = {"entropy": masked_mean(entropy_BT, rollouts.mask_BT).item()}
    if config.temperature == 1:
        difference_BT = (old_BT - rollouts.sampled_log_probs_BT).masked_fill(~rollouts.mask_BT, 0)
        values["sampling/sampling_logp_difference/mean"] = masked_mean(difference_BT.abs(), rollouts.mask_BT).item()
        values["sampling/sampling_logp_difference/max"] = difference_BT.abs().max().item()
        if config.importance_cap is not None:
            weights = importance_weights(difference_BT, config)
            advantages = advantages * weights if weights.dim() == 1 else advantages[:, None] * weights
            counted = weights if weights.dim() == 1 else weights[rollouts.mask_BT]
            for name in ("min", "mean", "max"):
                values[f"sampling/importance_sampling_ratio/{name}"] = getattr(counted, name)().item()
    batch = _Batch(rollouts.token_ids_BS, mask_BT, advantages, old_BT, reference_BT)
    for _ in range(config.num_iterations):
        values |= _update(model, optimizer, config, batch)
    return values


def importance_weights(difference_BT: Tensor, config: GRPOConfig) -> Tensor:
    """min(exp(difference), importance_cap), of each token (B, T), or of each response (B,) where the loss is of those.

    difference_BT: log-probabilities of the training forward less those of the engine, 0 where nothing is learned.
    """
    whole = KINDS[config.loss_type].ratio.startswith("sequence")
    log_weights = difference_BT.sum(1) if whole else difference_BT
    return log_weights.exp().clamp(max=config.importance_cap)


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
        optimizer: of cs336.optim or torch.optim.
        answers: one a prompt, given to `reward` with each response to it.
        seed: of the responses; num_generations x prompts of them from there on are used.
        reference: the model to stay near to, if config.beta > 0.

    Returns metrics: "loss", "reward", "reward_std" (mean over groups), "frac_reward_zero_std", "entropy", "grad_norm",
    "completions/mean_length", "completions/clipped_ratio", "clip_ratio/...", "kl", and
    "sampling/sampling_logp_difference/mean" and ".../max": how far the engine's log-probabilities are from those of
    the training forward before the first step (at temperature 1).
    Raises ValueError for prompts and answers that do not pair, scores that are not finite, beta without reference, and
    dynamic_sampling, which needs further prompts; FloatingPointError for a loss or gradient that is not finite.
    """
    if len(prompts) != len(answers) or not prompts:
        raise ValueError(f"there are {len(prompts)} prompts and {len(answers)} answers: give one answer a prompt")
    if config.dynamic_sampling:
        raise ValueError("dynamic_sampling draws further prompts, and a step has but its own: use train_grpo")
    if config.beta and reference is None:
        raise ValueError(f"beta is {config.beta} and there is no reference: give the model to stay near to")
    pairs = list(zip(prompts, answers, strict=True))
    collected = collect(llm, lambda _: pairs, reward, config, seed)
    return collected.metrics | learn(llm, optimizer, collected, config, reference=reference)


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
    order, found = Order(data, config.seed), list[dict[str, float]]()
    for step in range(num_steps):
        seed = (config.seed << 40) + order.position * config.num_generations
        collected = collect(llm, order.take, reward, config, seed)
        found.append(collected.metrics | learn(llm, optimizer, collected, config, reference=reference))
        if log is not None:
            log(step, found[-1])
    return found


class _Batch(NamedTuple):
    """What a step learns from; rows are responses."""

    token_ids_BS: Tensor
    mask_BT: Tensor
    advantages: Tensor
    """(B,) or (B, T)."""
    old_BT: Tensor
    reference_BT: Tensor | None

    def split(self, size: int) -> Iterator["_Batch"]:
        for rows_b, T in by_length(self.mask_BT, size):
            advantages = self.advantages[rows_b]
            yield _Batch(
                self.token_ids_BS[rows_b, : T + 1],
                self.mask_BT[rows_b, :T],
                advantages if advantages.dim() == 1 else advantages[:, :T],
                self.old_BT[rows_b, :T],
                None if self.reference_BT is None else self.reference_BT[rows_b, :T],
            )


@torch.no_grad()
def _log_probs(
    model: Transformer, token_ids_BS: Tensor, mask_BT: Tensor, size: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies, (B, T) each, `size` rows at a time; 0 behind each part's longest row."""
    log_probs_BT, entropies_BT = torch.zeros(2, *mask_BT.shape, device=mask_BT.device)
    for rows_b, T in by_length(mask_BT, size):
        log_probs_BT[rows_b, :T], entropies_BT[rows_b, :T] = sequence_log_probs(
            model, token_ids_BS[rows_b, : T + 1], temperature=temperature, return_entropy=True
        )
    return log_probs_BT, entropies_BT


def _of_rollouts(rollouts: Rollouts, rewards_B: Tensor, num_generations: int) -> dict[str, float]:
    std_P = from_first(rewards_B, num_generations).std(1)
    values = {
        "reward": rewards_B.mean(),
        "reward_std": std_P.mean(),
        "frac_reward_zero_std": (std_P == 0).float().mean(),
        "completions/mean_length": rollouts.mask_BT.sum(1).float().mean(),
        "completions/clipped_ratio": rollouts.truncated_B.float().mean(),
    }
    return {name: value.item() for name, value in values.items()}


def _update(
    model: Transformer, optimizer: torch.optim.Optimizer, config: GRPOConfig, batch: _Batch
) -> dict[str, float]:
    """One optimizer step on the whole batch, a part at a time. Metrics are means over its tokens, whatever the parts.

    Rows whose advantages are 0 have no gradient unless a divergence is paid for: they are counted and not computed.
    """
    idle_B = batch.advantages.reshape(len(batch.mask_BT), -1).eq(0).all(1)
    if config.beta or idle_B.all():
        idle_B = torch.zeros_like(idle_B)
    idle = batch.mask_BT[idle_B].sum() if KINDS[config.loss_type].mean == "token" else idle_B.sum()
    tokens = batch.mask_BT.sum().clamp(min=1)
    batch = _Batch(*(None if x is None else x[~idle_B] for x in batch))  # type: ignore[arg-type]
    totals = []
    for part in batch.split(config.micro_batch_size or len(batch.mask_BT)):
        loss, count, metrics = policy_gradient_terms(
            sequence_log_probs(model, part.token_ids_BS, temperature=config.temperature),
            part.old_BT, part.advantages, part.mask_BT,
            loss_type=config.loss_type, epsilon=config.epsilon, epsilon_high=config.epsilon_high, beta=config.beta,
            max_length=config.max_tokens if config.loss_type == "dr_grpo" else None,
            reference_log_probs_BT=part.reference_BT,
        )  # fmt: skip
        loss.backward()
        weight = part.mask_BT.sum() / count.clamp(min=1)  # tokens a row, where the loss counts rows
        totals.append(torch.stack([x.detach().float() for x in (count, loss, *(weight * m for m in metrics.values()))]))
    summed = torch.stack(totals).sum(0)
    summed[0] += idle
    summed[2:] *= summed[0] / tokens
    return step_on(optimizer, model, summed, ("loss", *metrics), config.max_grad_norm)
