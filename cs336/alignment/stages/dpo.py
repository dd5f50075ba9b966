"""`cs336 dpo`: direct preference optimization and its family. B = pairs, S = tokens of a row, T = S - 1 predictions.

The reference is the model as it was; its log-probabilities of each answer are taken once, and kept in
RUN/reference.safetensors. Metrics have TRL's names.
"""

import hashlib
import json
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cs336.alignment.batches import Batches
from cs336.alignment.encoded_pairs import EncodedPair, collate, encode_pairs
from cs336.alignment.functions import masked_mean, masked_normalize, sequence_log_probs
from cs336.alignment.pairs import read_preferences
from cs336.alignment.preferences import DPOLoss, dpo_loss
from cs336.alignment.stage import Policy, Stage, StageConfig
from cs336.models import Transformer
from cs336.training.evaluators import Finding
from cs336.training.objectives import Batch, Terms
from cs336.utils.counted import counted
from cs336.utils.files import replacing
from cs336.utils.tensor_file import save_tensors

MEANS = ("ipo", "simpo")  # losses of means over an answer's tokens, as in TRL; the others take sums


@dataclass(frozen=True)
class PairData:
    train: pathlib.Path
    """JSON lines of preferences: see cs336.alignment.pairs."""
    val: pathlib.Path | None = None
    """The same, for validation."""


@dataclass(frozen=True, kw_only=True)
class DPOConfig(StageConfig):
    """Everything that decides what `cs336 dpo` computes, and where it is written."""

    data: PairData
    batch_size: int = 8
    """Pairs an optimizer step."""
    loss_type: DPOLoss = "sigmoid"
    beta: float = 0.1
    """How far the model may go from the reference: the larger, the less."""
    label_smoothing: float = 0.0
    """Share of the preferences that are taken to be wrong, of sigmoid and robust."""
    margin: float = 0.0
    """Of simpo."""

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        zero_B = torch.zeros(1)
        reference = () if self.loss_type == "simpo" else (zero_B, zero_B)
        dpo_loss(zero_B, zero_B, *reference, **self.options())  # raises what these options are refused for

    def options(self) -> dict[str, Any]:
        """Of dpo_loss."""
        names = ("loss_type", "beta", "label_smoothing", "margin")
        return {name: getattr(self, name) for name in names}


class DPOStage(Stage):
    """Raises ValueError for preferences that cannot be learned: see encode_pairs."""

    verb = "dpo"
    config: DPOConfig

    def __init__(self, config: DPOConfig):
        policy = Policy(config)
        policy.model.eval()  # as the reference: without dropout
        super().__init__(config, policy, policy.module, config.data.train)
        self.pairs, self.longer = read_pairs(config.data.train, self.policy)
        self.batches = Batches([p.length for p in self.pairs], config.batch_size, seed=config.seed, bucketed=True)
        self.val = [] if config.data.val is None else read_pairs(config.data.val, self.policy)[0]
        self.reference_N2 = None if config.loss_type == "simpo" else self._reference([*self.pairs, *self.val])

    def describe(self) -> str:
        longer = f" ({self.longer} longer ones are dropped)" if self.longer else ""
        epoch = counted(self.batches.per_epoch, "step")
        return f"{len(self.pairs):,} pairs{longer}, {epoch} an epoch, loss {self.config.loss_type}"

    def update(self, step: int) -> dict[str, float]:
        batch = self._batch(self.batches.batch(step - 1))
        return self._learn(self._terms, batch) | {"tokens": batch[0].numel()}

    def evaluate(self) -> Finding:
        if not self.val:
            return Finding()
        totals, size, N = dict[str, float](), self.config.batch_size, len(self.val)
        with self.policy.judging():
            for start in range(0, N, size):
                places = [len(self.pairs) + i for i in range(start, min(start + size, N))]
                loss, _, metrics = self._terms(self._batch(places))
                for name, value in {"loss": loss, **metrics}.items():
                    totals[name] = totals.get(name, 0.0) + value.item()
        found = {f"val/{name}": value / N for name, value in totals.items()}
        text = f"validation loss {found['val/loss']:.4f}, accuracy {found['val/rewards/accuracies']:.1%}"
        return Finding(found, text=text)

    def _terms(self, batch: Batch) -> Terms:
        token_ids_B2S, mask_B2T, *references = batch
        with self.policy.autocast():
            logps_B2 = answer_log_probs(self.policy.model, token_ids_B2S, mask_B2T, mean=self.config.loss_type in MEANS)
        chosen_B, rejected_B = logps_B2.unbind(1)
        reference = references[0].unbind(1) if references else ()
        losses_B = dpo_loss(chosen_B, rejected_B, *reference, **self.config.options())
        rewards_B2 = self.config.beta * (logps_B2.detach() - (references[0] if references else 0))
        better_B, worse_B = rewards_B2.unbind(1)
        metrics = {
            "rewards/chosen": better_B.sum(),
            "rewards/rejected": worse_B.sum(),
            "rewards/margins": (better_B - worse_B).sum(),
            "rewards/accuracies": (better_B > worse_B).float().sum(),
            "logps/chosen": chosen_B.detach().sum(),
            "logps/rejected": rejected_B.detach().sum(),
        }
        return losses_B.sum(), torch.tensor(len(losses_B), device=losses_B.device), metrics

    def _batch(self, places: Sequence[int]) -> tuple[Tensor, ...]:
        """Of pairs by their number, the validation's after those of training."""
        train = len(self.pairs)
        pairs = [self.pairs[i] if i < train else self.val[i - train] for i in places]
        reference = () if self.reference_N2 is None else (self.reference_N2[places],)
        return tuple(x.to(self.policy.device) for x in (*collate(pairs), *reference))

    def _reference(self, pairs: Sequence[EncodedPair]) -> Tensor:
        """(N, 2) float32, read from the run's directory if they are there and were made of the same."""
        mean = self.config.loss_type in MEANS
        ids = [[p.chosen.token_ids, p.rejected.token_ids] for p in pairs]
        made_from = [self.policy.fingerprints, ids, [[p.chosen.mask, p.rejected.mask] for p in pairs], mean]
        key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
        path = self.config.run_dir / "reference.safetensors"
        kept = _read_kept(path, key)
        if kept is not None:
            return kept
        out_N2 = torch.zeros(len(pairs), 2)
        size = self.config.micro_batch_size or self.config.batch_size
        order = sorted(range(len(pairs)), key=lambda i: pairs[i].length)
        with self.policy.judging():
            for start in range(0, len(order), size):
                places = order[start : start + size]
                batch = [x.to(self.policy.device) for x in collate([pairs[i] for i in places])]
                out_N2[places] = answer_log_probs(self.policy.model, *batch, mean=mean).cpu()
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, "wb") as file:
            save_tensors({"log_probs": out_N2}, file.name, {"key": key})
        return out_N2


def read_pairs(path: pathlib.Path, policy: Policy) -> tuple[list[EncodedPair], int]:
    """Those of a file that fit the model, and how many do not. Raises what read_preferences and encode_pairs do."""
    try:
        return encode_pairs(
            read_preferences(path),
            policy.tokenizer,
            policy.template,
            policy.end_ids,
            policy.model.config.context_length,
        )
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def answer_log_probs(model: Transformer, token_ids_B2S: Tensor, mask_B2T: Tensor, *, mean: bool) -> Tensor:
    """(B, 2) float32: the sum, or the mean, of the log-probabilities of each answer's tokens."""
    log_probs_RT = sequence_log_probs(model, token_ids_B2S.flatten(0, 1))
    reduce = masked_mean if mean else masked_normalize
    return reduce(log_probs_RT, mask_B2T.flatten(0, 1), dim=1).view(-1, 2)


def _read_kept(path: pathlib.Path, key: str) -> Tensor | None:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("log_probs") if (file.metadata() or {}).get("key") == key else None
    except (FileNotFoundError, SafetensorError):
        return None
