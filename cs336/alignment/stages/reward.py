"""`cs336 reward`: a reward model from preferences (Bradley-Terry).

RUN/export is the model that was trained, and the head that reads it: see cs336.alignment.reward_model;
RUN/calibration.json the curve of the last evaluation.
B = pairs, S = tokens of a row; 2 is (chosen, rejected).
"""

import json
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cs336.alignment.batches import Batches
from cs336.alignment.encoded_pairs import EncodedPair, collate
from cs336.alignment.examples import digest_of
from cs336.alignment.lora import merged
from cs336.alignment.preferences import reward_model_loss
from cs336.alignment.reward_model import RewardModel, calibration_curve, calibration_error, save_reward_model
from cs336.alignment.stage import Policy, StageConfig, optimizer_step
from cs336.alignment.stages.dpo import PairData, read_pairs
from cs336.training.evaluators import Finding
from cs336.training.objectives import Batch, Terms
from cs336.utils.files import replacing


@dataclass(frozen=True, kw_only=True)
class RewardConfig(StageConfig):
    """Everything that decides what `cs336 reward` computes, and where it is written."""

    data: PairData
    batch_size: int = 8
    """Pairs an optimizer step."""
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


class RewardStage:
    """See cs336.alignment.stage.Stage. Raises ValueError for preferences that cannot be learned: see encode_pairs."""

    def __init__(self, config: RewardConfig):
        self.config, self.policy = config, Policy(config)
        self.policy.model.eval()  # without dropout
        self.reward_model = RewardModel(self.policy.model)
        self.module = learned(self.policy, self.reward_model.head, self.reward_model)
        self.optimizer = config.optimizer.build(self.module)
        self.fingerprints = self.policy.fingerprints | {"data.train": digest_of(config.data.train)}
        self.pairs, self.longer = read_pairs(config.data.train, self.policy)
        self.batches = Batches([p.length for p in self.pairs], config.batch_size, seed=config.seed, bucketed=True)
        self.val = [] if config.data.val is None else read_pairs(config.data.val, self.policy)[0]

    def begin(self) -> None:
        pass

    def describe(self) -> str:
        longer = f" ({self.longer} longer ones are dropped)" if self.longer else ""
        return f"{len(self.pairs):,} pairs{longer}, {self.batches.per_epoch} steps an epoch"

    def update(self, step: int) -> dict[str, float]:
        batch = self._batch([self.pairs[i] for i in self.batches.batch(step - 1)])
        values = optimizer_step(
            self.optimizer, self.module, self._terms, batch,
            micro_batch_size=self.config.micro_batch_size, max_grad_norm=self.config.optimizer.max_grad_norm,
        )  # fmt: skip
        return values | {"tokens": batch[0].numel()}

    def evaluate(self) -> Finding:
        """Accuracy, and how far the probability that rewards give to the choice is from how often it was made."""
        if not self.val:
            return Finding()
        size, differences = self.config.batch_size, list[float]()
        with self.policy.judging():
            for start in range(0, len(self.val), size):
                token_ids, lengths, _ = self._batch(self.val[start : start + size])
                rewards_B2 = self._rewards(token_ids, lengths)
                differences += (rewards_B2[:, 0] - rewards_B2[:, 1]).tolist()
        d_N = torch.tensor(differences, dtype=torch.float64)
        # Which answer stands first is turned around in every other pair: else "the first" would always be right.
        turned_N = torch.where(torch.arange(len(d_N)) % 2 == 1, -d_N, d_N)
        said, outcomes = turned_N.sigmoid().tolist(), [i % 2 == 0 for i in range(len(d_N))]
        with replacing(self.config.run_dir / "calibration.json") as file:  # the newest, for the report
            json.dump({"bins": [b._asdict() for b in calibration_curve(said, outcomes)]}, file)
        found = {
            "val/loss": float(nn.functional.softplus(-d_N).mean()),
            "val/accuracy": float((d_N > 0).double().mean()),
            "val/margin": float(d_N.mean()),
            "val/calibration_error": calibration_error(said, outcomes),
        }
        text = f"validation loss {found['val/loss']:.4f}, accuracy {found['val/accuracy']:.1%}"
        return Finding(found, text=text)

    def export(self, directory: pathlib.Path, step: int) -> None:
        save_reward_model(self.reward_model, merged(self.policy.model), directory, self.policy.tokenizer, step)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def _terms(self, batch: Batch) -> Terms:
        token_ids, lengths_B2, margin_B = batch
        rewards_B2 = self._rewards(token_ids, lengths_B2)
        chosen_B, rejected_B = rewards_B2.unbind(1)
        loss = reward_model_loss(chosen_B, rejected_B, margin_B if self.config.use_margin else None).sum()
        loss = loss + self.config.center * (chosen_B + rejected_B).square().sum()
        d_B = (chosen_B - rejected_B).detach()
        mean = rewards_B2.detach().mean(1).sum()
        metrics = {"accuracy": (d_B > 0).float().sum(), "margin": d_B.sum(), "mean_reward": mean}
        return loss, torch.tensor(len(d_B), device=d_B.device), metrics

    def _rewards(self, token_ids_B2S: Tensor, lengths_B2: Tensor) -> Tensor:
        """(B, 2)."""
        with self.policy.autocast():
            return self.reward_model.score(token_ids_B2S.flatten(0, 1), lengths_B2.flatten()).view(-1, 2)

    def _batch(self, pairs: Sequence[EncodedPair]) -> tuple[Tensor, Tensor, Tensor]:
        token_ids_B2S, _ = collate(pairs)
        lengths_B2 = torch.tensor([[len(p.chosen.token_ids), len(p.rejected.token_ids)] for p in pairs])
        margin_B = torch.tensor([pair.margin for pair in pairs])
        device = self.policy.device
        return token_ids_B2S.to(device), lengths_B2.to(device), margin_B.to(device)


def learned(policy: Policy, head: nn.Module, whole: nn.Module) -> nn.Module:
    """What a checkpoint holds: all of a model with its head, or its adapters and the head."""
    return whole if policy.adapters is None else nn.ModuleDict({"adapters": policy.adapters, "head": head})
