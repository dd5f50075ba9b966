"""`cs336 reward`: a reward model from preferences (Bradley-Terry), or from answers that were right or wrong.

RUN/export is the model that was trained, and the head that reads it: see cs336.alignment.reward_model;
RUN/calibration.json the curve of the last evaluation.
B = pairs or answers, S = tokens of a row; 2 is (chosen, rejected).
"""

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cs336.alignment.batches import Batches, pad_examples
from cs336.alignment.encoded_pairs import collate
from cs336.alignment.lora import merged
from cs336.alignment.outcomes import read_outcomes
from cs336.alignment.preferences import reward_model_loss
from cs336.alignment.reward_model import RewardModel, calibration_curve, calibration_error, save_reward_model
from cs336.alignment.stage import Policy, Stage, StageConfig
from cs336.alignment.stages.dpo import PairData, read_pairs
from cs336.training.evaluators import Finding
from cs336.training.objectives import Batch, Terms
from cs336.utils.counted import counted
from cs336.utils.files import write_json


@dataclass(frozen=True, kw_only=True)
class RewardConfig(StageConfig):
    """Everything that decides what `cs336 reward` computes, and where it is written."""

    data: PairData
    loss_type: Literal["bradley_terry", "outcome"] = "bradley_terry"
    """bradley_terry: how much better a preference's answer is than the other. outcome: how likely each answer by itself
    is right, sigmoid(reward) (arXiv:2110.14168), of JSON lines of prompt, completion and label."""
    batch_size: int = 8
    """Pairs, or answers, an optimizer step."""
    use_margin: bool = False
    """Ask that rewards differ by the preferences' margins at least (arXiv:2307.09288)."""
    center: float = 0.0
    """Weight of the square of the rewards' sum, which keeps their mean near 0 (arXiv:2312.09244)."""

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size < 1 or not 0 <= self.center < float("inf"):
            raise ValueError(
                f"batch_size must be at least 1 and center 0 or more, got {self.batch_size}, {self.center}"
            )
        if self.loss_type == "outcome" and (self.use_margin or self.center):
            raise ValueError("use_margin and center are of pairs: leave them out of loss_type outcome")


def reward_stage(config: RewardConfig) -> "RewardStage":
    """The stage of its loss."""
    return OutcomeStage(config) if config.loss_type == "outcome" else RewardStage(config)


class RewardStage(Stage):
    """Raises ValueError for preferences that cannot be learned: see encode_pairs."""

    verb, items = "reward", "pairs"
    config: RewardConfig

    def __init__(self, config: RewardConfig):
        policy = Policy(config)
        self.reward_model = RewardModel(policy.model.eval())  # without dropout
        super().__init__(config, policy, learned(policy, self.reward_model), config.data.train)
        self.pairs, self.longer = self._read(config.data.train)
        self.batches = Batches([p.length for p in self.pairs], config.batch_size, seed=config.seed, bucketed=True)
        self.val = [] if config.data.val is None else self._read(config.data.val)[0]

    def describe(self) -> str:
        longer = f" ({self.longer} longer ones are dropped)" if self.longer else ""
        return f"{len(self.pairs):,} {self.items}{longer}, {counted(self.batches.per_epoch, 'step')} an epoch"

    def update(self, step: int) -> dict[str, float]:
        items = [self.pairs[i] for i in self.batches.batch(step - 1)]
        return self._learn(self._terms, self._batch(items)) | {"tokens": sum(item.num_tokens for item in items)}

    def evaluate(self) -> Finding:
        """Accuracy, and how far the probability that rewards give to the choice is from how often it was made."""
        if not self.val:
            return Finding()
        size, differences, as_said = self.config.batch_size, list[float](), self._as_said()
        with self.policy.judging():
            for start in range(0, len(self.val), size):
                rewards_B2 = self._rewards(self._batch(self.val[start : start + size]))
                differences += (rewards_B2[:, 0] - rewards_B2[:, 1]).tolist()
        d_N = torch.tensor(differences, dtype=torch.float64)
        if not d_N.isfinite().all():
            raise ValueError("the model's rewards are not finite: its weights are damaged, or training diverged")
        said = torch.where(torch.tensor(as_said), d_N, -d_N).sigmoid().tolist()
        bins = [b._asdict() for b in calibration_curve(said, as_said)]
        write_json(self.config.run_dir / "calibration.json", {"bins": bins})  # the newest, for the report
        found = {
            "val/loss": float(nn.functional.softplus(-d_N).mean()),
            "val/accuracy": float((d_N > 0).double().mean()),
            "val/margin": float(d_N.mean()),
            "val/calibration_error": calibration_error(said, as_said),
        }
        text = f"validation loss {found['val/loss']:.4f}, accuracy {found['val/accuracy']:.1%}"
        return Finding(found, text=text)

    def export(self, directory: pathlib.Path, step: int) -> None:
        save_reward_model(self.reward_model, merged(self.policy.model), directory, self.policy.tokenizer, step)

    def _terms(self, batch: Batch) -> Terms:
        rewards_B2 = self._rewards(batch)
        chosen_B, rejected_B = rewards_B2.unbind(1)
        loss = reward_model_loss(chosen_B, rejected_B, batch[2] if self.config.use_margin else None).sum()
        loss = loss + self.config.center * (chosen_B + rejected_B).square().sum()
        d_B = (chosen_B - rejected_B).detach()
        metrics = {"accuracy": (d_B > 0).float().sum(), "margin": d_B.sum()}
        metrics["mean_reward"] = rewards_B2.detach().sum() / batch[1][0].numel()
        return loss, torch.tensor(len(d_B), device=d_B.device), metrics

    def _read(self, path: pathlib.Path) -> tuple[list[Any], int]:
        return read_pairs(path, self.policy)

    def _as_said(self) -> list[bool]:
        """Which answer stands first is turned around in every other pair: else "the first" would always be right."""
        return [i % 2 == 0 for i in range(len(self.val))]

    def _rewards(self, batch: Batch) -> Tensor:
        """(B, 2)."""
        token_ids_B2S, lengths_B2 = batch[:2]
        with self.policy.autocast():
            return self.reward_model.score(token_ids_B2S.flatten(0, 1), lengths_B2.flatten()).view(-1, 2)

    def _batch(self, items: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        token_ids_B2S, _ = collate(items)
        lengths_B2 = torch.tensor([[len(p.chosen.token_ids), len(p.rejected.token_ids)] for p in items])
        margin_B = torch.tensor([pair.margin for pair in items])
        device = self.policy.device
        return token_ids_B2S.to(device), lengths_B2.to(device), margin_B.to(device)


class OutcomeStage(RewardStage):
    """The same of answers that were right or wrong, each by itself: a pair whose other reward is 0, so that the loss is
    -log sigmoid(reward) of a right answer, and -log sigmoid(-reward) of a wrong one.

    Raises ValueError for answers that cannot be learned: see read_outcomes.
    """

    items = "answers"

    def _read(self, path: pathlib.Path) -> tuple[list[Any], int]:
        policy = self.policy
        length = policy.model.config.context_length
        return read_outcomes(path, policy.tokenizer, policy.template, policy.end_ids, length)

    def _as_said(self) -> list[bool]:
        return [outcome.right for outcome in self.val]

    def _rewards(self, batch: Batch) -> Tensor:
        token_ids_BS, lengths_B, right_B = batch
        with self.policy.autocast():
            rewards_B = self.reward_model.score(token_ids_BS, lengths_B)
        return torch.stack([torch.where(right_B, rewards_B, 0), torch.where(right_B, 0, rewards_B)], 1)

    def _batch(self, items: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        token_ids_BS, *_ = pad_examples([outcome.example for outcome in items])
        lengths_B = torch.tensor([outcome.length for outcome in items])
        right_B, device = torch.tensor([outcome.right for outcome in items]), self.policy.device
        return token_ids_BS.to(device), lengths_B.to(device), right_B.to(device)


def learned(policy: Policy, whole: RewardModel) -> nn.Module:
    """What a checkpoint holds: all of a model with its head, or its adapters and the head."""
    return whole if policy.adapters is None else nn.ModuleDict({"adapters": policy.adapters, "head": whole.head})
