"""`cs336 sft`: supervised fine-tuning on conversations, packed or in buckets of length."""

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from cs336.alignment.batches import Batches, pad_examples
from cs336.alignment.examples import read_examples, read_rows, render, turns_of
from cs336.alignment.sft import SFT, Example, fill_rows, pack
from cs336.alignment.stage import Policy, Stage, StageConfig
from cs336.inference.generate import generate
from cs336.inference.sampling import SamplingParams
from cs336.training.evaluators import Finding
from cs336.training.objectives import Batch, Terms
from cs336.utils.counted import counted

SAMPLES = 4


@dataclass(frozen=True)
class SFTData:
    train: pathlib.Path
    """JSON lines of {"messages"} or {"prompt", "completion"}."""
    val: pathlib.Path | None = None
    """The same, for validation and samples; without it there is neither."""


@dataclass(frozen=True, kw_only=True)
class SFTConfig(StageConfig):
    """Everything that decides what `cs336 sft` computes, and where it is written."""

    data: SFTData
    batch_size: int = 8
    """Rows an optimizer step."""
    batching: Literal["packed", "bucketed"] = "packed"
    """packed: whole examples side by side in rows of context_length, none of which sees another. bucketed: an example a
    row, those of a batch of similar length."""
    context_length: int | None = None
    """Tokens of a row, and at most of an example. None: the model's."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """What becomes of examples longer than that. Cut ones would lose their end."""
    last_only: bool = False
    """Learn the last answer of a conversation alone."""
    sample_tokens: int = 64
    """Of a sample."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("batch_size", "sample_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.context_length is not None and self.context_length < 2:
            raise ValueError(f"context_length must be at least 2, got {self.context_length}")


class SFTStage(Stage):
    """Raises ValueError for examples that cannot be learned: see read_examples."""

    verb = "sft"
    config: SFTConfig

    def __init__(self, config: SFTConfig):
        policy = Policy(config)
        policy.model.train()
        super().__init__(config, policy, policy.module, config.data.train)
        limit = policy.model.config.context_length
        self.length = config.context_length or limit
        if self.length > limit:
            raise ValueError(f"context_length {self.length} is more than the model's, {limit}")
        examples, self.dropped = self._read(config.data.train)
        self.num_examples = len(examples)
        packed = config.batching == "packed"
        self.rows: list[list[Example]] = pack(examples, self.length) if packed else [[example] for example in examples]
        lengths = [sum(len(example.token_ids) for example in row) for row in self.rows]
        self.num_tokens = sum(lengths)
        self.batches = Batches(lengths, config.batch_size, seed=config.seed, bucketed=not packed)
        self.val = None if config.data.val is None else self._read(config.data.val)[0]
        self.prompts = [] if config.data.val is None else self._prompts(config.data.val)

    def describe(self) -> str:
        epochs = f"{counted(self.batches.per_epoch, 'step')} an epoch"
        dropped = f" ({self.dropped} longer ones are dropped)" if self.dropped else ""
        return (
            f"{self.num_examples:,} examples{dropped} of {self.num_tokens:,} tokens in {len(self.rows):,} "
            f"{self.config.batching} rows, {epochs}"
        )

    def update(self, step: int) -> dict[str, float]:
        rows = [self.rows[i] for i in self.batches.batch(step - 1)]
        tokens = sum(len(example.token_ids) for row in rows for example in row)
        return self._learn(self._terms, self._batch(rows)) | {"tokens": tokens}

    def evaluate(self) -> Finding:
        if self.val is None:
            return Finding()
        total = count = 0.0
        order = sorted(self.val, key=lambda example: len(example.token_ids))
        with self.policy.judging():
            for start in range(0, len(order), self.config.batch_size):
                part = self._padded(order[start : start + self.config.batch_size])
                loss, counted, metrics = SFT()(self.policy.model, part)
                loss = metrics.get("cross_entropy", loss)  # without what routers add
                total, count = total + loss.item(), count + counted.item()
            answers = self._answers()
        mean = total / count
        return Finding({"val/loss": mean}, answers, f"validation loss {mean:.4f}")

    def _terms(self, batch: Batch) -> Terms:
        with self.policy.autocast():
            return SFT()(self.policy.model, batch)

    def _batch(self, rows: Sequence[Sequence[Example]]) -> tuple[Tensor, ...]:
        if self.config.batching == "bucketed":
            return self._padded([example for row in rows for example in row])
        return tuple(x.to(self.policy.device) for x in fill_rows(rows, self.length))

    def _padded(self, examples: Sequence[Example]) -> tuple[Tensor, ...]:
        return tuple(x.to(self.policy.device) for x in pad_examples(examples))

    def _read(self, path: pathlib.Path) -> tuple[list[Example], int]:
        """Examples that fit, and how many do not."""
        policy = self.policy
        examples = read_examples(
            path, policy.tokenizer, policy.template, policy.end_ids, last_only=self.config.last_only
        )
        kept = [example for example in examples if len(example.token_ids) <= self.length]
        dropped = len(examples) - len(kept)
        if dropped and self.config.too_long == "refuse":
            longest = max(len(example.token_ids) for example in examples)
            raise ValueError(
                f"{path}: {dropped} of {len(examples)} examples are longer than {self.length} tokens, the longest has "
                f'{longest}: give a longer context_length, or too_long = "drop"'
            )
        if not kept:
            raise ValueError(f"{path}: no example is of {self.length} tokens or fewer")
        return kept, dropped

    def _prompts(self, path: pathlib.Path) -> list[str]:
        prompts = []
        for where, row in read_rows(path):
            if "messages" in row:
                turns = turns_of(row["messages"], where)
                last = max(i for i, turn in enumerate(turns) if turn.role == "assistant")
                prompts.append(render(turns[:last], self.policy.template))
            else:
                prompts.append(row["prompt"])
            if len(prompts) == SAMPLES:
                break
        return prompts

    def _answers(self) -> list[dict[str, Any]]:
        """Greedy ones to the first validation prompts that leave room."""
        policy, most = self.policy, self.config.sample_tokens
        room = policy.model.config.context_length
        fitting = [p for p in self.prompts if len(policy.tokenizer.encode_prompt(p)) < room]
        if not fitting:
            return []
        params = SamplingParams(temperature=0, max_tokens=most)
        return [{"prompt": c.prompt, "text": c.text} for c in generate(policy.model, policy.tokenizer, fitting, params)]
