"""`cs336 dpo`: direct preference optimization and its family. B = pairs, S = tokens of a row, T = S - 1 predictions;
2 is (chosen, rejected), of kto (the answer, an answer to another prompt).

The reference is the model as it was; its log-probabilities of each answer are taken once, and kept in
RUN/reference.safetensors. Metrics have TRL's names.
"""

import hashlib
import json
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cs336.alignment.batches import Batches
from cs336.alignment.encoded_pairs import EncodedPair, collate, encode_pairs
from cs336.alignment.functions import masked_mean, masked_normalize, sequence_log_probs
from cs336.alignment.outcomes import read_outcomes, with_unrelated
from cs336.alignment.pairs import read_preferences
from cs336.alignment.preferences import NO_REFERENCE, DPOLoss, dpo_loss, kto_loss, kto_reference_point
from cs336.alignment.stage import Policy, Stage, StageConfig
from cs336.models import Transformer
from cs336.training.evaluators import Finding
from cs336.training.objectives import Batch, Terms
from cs336.utils.counted import counted
from cs336.utils.files import replacing
from cs336.utils.tensor_file import save_tensors

MEANS = ("ipo", "simpo", "orpo")  # losses of means over an answer's tokens, as in TRL; the others take sums


@dataclass(frozen=True)
class PairData:
    train: pathlib.Path
    """JSON lines of preferences: see cs336.alignment.pairs; of outcome, of prompt, completion and label; of kto,
    either."""
    val: pathlib.Path | None = None
    """The same, for validation."""


@dataclass(frozen=True, kw_only=True)
class DPOConfig(StageConfig):
    """Everything that decides what `cs336 dpo` computes, and where it is written."""

    data: PairData
    batch_size: int = 8
    """Pairs, or answers, an optimizer step."""
    loss_type: Literal[DPOLoss, "kto"] = "sigmoid"
    """kto learns from answers that were good or not, each by itself (arXiv:2402.01306), of pairs too; the others from
    pairs."""
    beta: float = 0.1
    """How far the model may go from the reference: the larger, the less. Of orpo the weight of the odds ratio."""
    label_smoothing: float = 0.0
    """Share of the preferences that are taken to be wrong, of sigmoid and robust."""
    margin: float = 0.0
    """Of simpo."""
    desirable_weight: float = 1.0
    """Of kto's answers with the label true."""
    undesirable_weight: float = 1.0
    """Of kto's answers with the label false. Where labels are uneven, weights may even out weight times count."""

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        zero_B, weights = torch.zeros(1), (self.desirable_weight, self.undesirable_weight)
        # Raised is what these options are refused for.
        if self.loss_type == "kto":
            if self.label_smoothing or self.margin:
                raise ValueError("label_smoothing and margin are of pairs: leave them out of loss_type kto")
            kto_loss(zero_B, zero_B, zero_B, zero_B.bool(), **self.options())
            return
        if weights != (1, 1):
            raise ValueError(f"desirable_weight and undesirable_weight are kto's, not {self.loss_type}'s")
        reference = () if self.loss_type in NO_REFERENCE else (zero_B, zero_B)
        dpo_loss(zero_B, zero_B, *reference, **self.options())

    def options(self) -> dict[str, Any]:
        """Of kto_loss or dpo_loss."""
        of_pairs = ("loss_type", "beta", "label_smoothing", "margin")
        names = ("beta", "desirable_weight", "undesirable_weight") if self.loss_type == "kto" else of_pairs
        return {name: getattr(self, name) for name in names}


def dpo_stage(config: DPOConfig) -> "DPOStage":
    """The stage of its loss."""
    return KTOStage(config) if config.loss_type == "kto" else DPOStage(config)


class DPOStage(Stage):
    """Raises ValueError for preferences that cannot be learned: see encode_pairs."""

    verb, items = "dpo", "pairs"
    config: DPOConfig

    def __init__(self, config: DPOConfig):
        policy = Policy(config)
        policy.model.eval()  # as the reference: without dropout
        super().__init__(config, policy, policy.module, config.data.train)
        self.pairs, self.longer = self._read(config.data.train)
        self.batches = Batches([p.length for p in self.pairs], config.batch_size, seed=config.seed, bucketed=True)
        self.val = [] if config.data.val is None else self._read(config.data.val)[0]
        self.reference_N2 = None if config.loss_type in NO_REFERENCE else self._reference([*self.pairs, *self.val])

    def describe(self) -> str:
        longer = f" ({self.longer} longer ones are dropped)" if self.longer else ""
        epoch = counted(self.batches.per_epoch, "step")
        return f"{len(self.pairs):,} {self.items}{longer}, {epoch} an epoch, loss {self.config.loss_type}"

    def update(self, step: int) -> dict[str, float]:
        places = self.batches.batch(step - 1)
        tokens = sum(item.num_tokens for item in self._items(places))
        return self._means(self._learn(self._terms, self._batch(places))) | {"tokens": tokens}

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
        found = {f"val/{name}": value for name, value in self._means({k: v / N for k, v in totals.items()}).items()}
        text = f"validation loss {found['val/loss']:.4f}, accuracy {found['val/rewards/accuracies']:.1%}"
        return Finding(found, text=text)

    def _read(self, path: pathlib.Path) -> tuple[list[Any], int]:
        return read_pairs(path, self.policy)

    def _means(self, values: dict[str, float]) -> dict[str, float]:
        """What is told of means over all that a batch, or the validation, holds."""
        return values

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
        reference = () if self.reference_N2 is None else (self.reference_N2[places],)
        return tuple(x.to(self.policy.device) for x in (*collate(self._items(places)), *reference))

    def _items(self, places: Sequence[int]) -> list[Any]:
        train = len(self.pairs)
        return [self.pairs[i] if i < train else self.val[i - train] for i in places]

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


class KTOStage(DPOStage):
    """The same of answers that were good or not, each by itself. How far the model went from the reference is measured,
    a step, by the answers to other prompts that stand beside those of the batch.

    Raises ValueError for answers that cannot be learned: see read_outcomes and with_unrelated.
    """

    items = "answers"

    def _read(self, path: pathlib.Path) -> tuple[list[Any], int]:
        policy = self.policy
        length = policy.model.config.context_length
        outcomes, longer = read_outcomes(path, policy.tokenizer, policy.template, policy.end_ids, length, pairs=True)
        try:
            return with_unrelated(outcomes, length), longer
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def _batch(self, places: Sequence[int]) -> tuple[Tensor, ...]:
        """Of answers by their number: token_ids and mask of the answers alone, (B, 1, ...), their reference (B,), the
        reference point of all of them (B,), and which are desirable (B,)."""
        token_ids_B2S, mask_B2T, reference_B2 = super()._batch(places)
        size, unrelated = self.config.micro_batch_size or len(places), list[Tensor]()
        with self.policy.judging():
            for start in range(0, len(places), size):
                part = token_ids_B2S[start : start + size, 1:], mask_B2T[start : start + size, 1:]
                unrelated.append(answer_log_probs(self.policy.model, *part, mean=False)[:, 0])
        kl = kto_reference_point(torch.cat(unrelated), reference_B2[:, 1])
        right_B = torch.tensor([item.right for item in self._items(places)], device=kl.device)
        return token_ids_B2S[:, :1], mask_B2T[:, :1], reference_B2[:, 0], kl.expand(len(places)), right_B

    def _terms(self, batch: Batch) -> Terms:
        token_ids_B1S, mask_B1T, reference_B, kl_B, right_B = batch
        with self.policy.autocast():
            logps_B = answer_log_probs(self.policy.model, token_ids_B1S, mask_B1T, mean=False)[:, 0]
        losses_B = kto_loss(logps_B, reference_B, kl_B, right_B, **self.config.options())
        rewards_B = self.config.beta * (logps_B.detach() - reference_B)
        metrics = {
            "share/chosen": right_B.float().sum(),
            "rewards/accuracies": ((rewards_B > self.config.beta * kl_B) == right_B).float().sum(),
            "kl": kl_B.sum(),
        }
        for kind, values_B in (("rewards", rewards_B), ("logps", logps_B.detach())):
            metrics[f"{kind}/chosen"] = torch.where(right_B, values_B, 0).sum()
            metrics[f"{kind}/rejected"] = torch.where(right_B, 0, values_B).sum()
        return losses_B.sum(), torch.tensor(len(losses_B), device=losses_B.device), metrics

    def _means(self, values: dict[str, float]) -> dict[str, float]:
        """Over the answers of each label, where there are any."""
        share = values.pop("share/chosen")
        for side, size in (("chosen", share), ("rejected", 1 - share)):
            for kind in ("rewards", "logps"):
                value = values.pop(f"{kind}/{side}")
                values |= {f"{kind}/{side}": value / size} if size > 0 else {}
        if 0 < share < 1:
            values["rewards/margins"] = values["rewards/chosen"] - values["rewards/rejected"]
        return values


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
    """(B, 2) float32: the sum, or the mean, of the log-probabilities of each answer's tokens; 2 may be 1."""
    log_probs_RT = sequence_log_probs(model, token_ids_B2S.flatten(0, 1))
    reduce = masked_mean if mean else masked_normalize
    return reduce(log_probs_RT, mask_B2T.flatten(0, 1), dim=1).view(token_ids_B2S.shape[:2])


def _read_kept(path: pathlib.Path, key: str) -> Tensor | None:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("log_probs") if (file.metadata() or {}).get("key") == key else None
    except (FileNotFoundError, SafetensorError):
        return None
