"""Supervised fine-tuning: conversations as tokens of which the assistant's are learned, packed into rows.

    examples = [encode_chat(messages, tokenizer, template, end_ids) for messages in conversations]
    batch = pack_examples(examples, context_length)
    loss, count, _ = SFT()(model, batch)

A prompt and an answer are encoded apart, as they are when the model is asked, so that no token lies across the border.
R = rows, S = tokens of a row.
"""

import bisect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cs336.alignment.functions import IGNORED
from cs336.inference.chat import ChatTemplate
from cs336.tokenizer import Tokenizer
from cs336.training.objectives import Batch, Terms, with_routing


@dataclass(frozen=True)
class Example:
    """A conversation: its tokens, and which of them are learned."""

    token_ids: list[int]
    mask: list[bool]

    def __post_init__(self):
        if len(self.token_ids) != len(self.mask):
            raise ValueError(f"there are {len(self.token_ids)} token_ids and {len(self.mask)} values of the mask")


def encode_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    end_ids: Collection[int],
    *,
    last_only: bool = False,
) -> Example:
    """The tokens of a conversation; learned are those of the assistant's turns, each with the token that ends it.

    Args:
        messages: {"role": ..., "content": ...}, as ChatTemplate.render takes them.
        end_ids: the tokens that end a turn where the model answers: it learns to stop by them.
        last_only: learn the last turn alone.

    Raises ValueError where there is nothing to learn, an answer is empty, no end follows it, or the template drops an
    assistant's turn, or writes it otherwise than after the prompt that a model is given.
    """
    turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if not turns:
        raise ValueError("no message is the assistant's: there is nothing to learn")
    token_ids, mask, written = list[int](), list[bool](), ""
    for i in turns[-1:] if last_only else turns:
        prompt, whole = template.render(messages[:i]), template.render(messages[: i + 1], add_generation_prompt=False)
        content = messages[i].get("content")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"message {i}, the assistant's, must have text to learn as content, got {content!r:.60}")
        if not whole.startswith(prompt) or content.strip() not in whole[len(prompt) :]:
            raise ValueError(
                f"the chat template drops or rewrites message {i}, the assistant's: expected its prompt, then "
                f"{content!r:.60}, got {whole[-160:]!r}"
            )
        if not prompt.startswith(written):
            raise ValueError(
                f"the chat template writes the turns before message {i} otherwise than when they were the last: "
                "learn the last one alone, with last_only"
            )
        said = prompt[len(written) :]
        before = tokenizer.encode(said, "all", behind=token_ids) if token_ids else tokenizer.encode_prompt(said)
        answer = tokenizer.encode(whole[len(prompt) :], "all", behind=before or token_ids)
        ends = [place for place, token in enumerate(answer) if token in end_ids]
        if not ends:
            raise ValueError(
                f"no token ends message {i}, the assistant's: expected "
                f"{' or '.join(repr(tokenizer.decode([end])) for end in sorted(end_ids))} at the end of "
                f"{tokenizer.decode(answer[-8:])!r}; a model that learns this never stops. Name special tokens that "
                "the template writes as end_tokens, or give a chat_template that writes one of these"
            )
        token_ids += before + answer
        mask += [False] * len(before) + [place <= ends[-1] for place in range(len(answer))]
        written = whole
    return Example(token_ids, mask)


def pack_examples(
    examples: Sequence[Example], context_length: int, *, pad_id: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Whole examples side by side in as few rows as best-fit decreasing finds (arXiv:2404.10830).

    Returns (token_ids, targets, segments), (R, S) int64 each with S = context_length. A target is the next token of the
    same example where it is learned, else -100; segments number the examples of a row, and -1 is padding.
    Raises ValueError for an example that is longer than a row, or of which nothing is learned.
    """
    return fill_rows(pack(examples, context_length), context_length, pad_id=pad_id)


def pack(examples: Sequence[Example], context_length: int) -> list[list[Example]]:
    """The examples of each row. Raises what pack_examples does."""
    for i, example in enumerate(examples):
        if len(example.token_ids) > context_length:
            raise ValueError(
                f"example {i} has {len(example.token_ids)} tokens, a row {context_length}: leave it out, for cut it "
                "would lose its end"
            )
        if not any(example.mask[1:]):  # the first token is not predicted
            raise ValueError(f"nothing is learned of example {i}: its mask is false throughout")
    rows, free = list[list[Example]](), list[tuple[int, int]]()  # (room, row), sorted
    for example in sorted(examples, key=lambda e: -len(e.token_ids)):
        length = len(example.token_ids)
        place = bisect.bisect_left(free, (length, 0))
        room, row = free.pop(place) if place < len(free) else (context_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
        bisect.insort(free, (room - length, row))
    return rows


def fill_rows(
    rows: Sequence[Sequence[Example]], context_length: int, *, pad_id: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors of rows whose examples fit them: what pack_examples returns."""
    token_ids_RS = torch.full((len(rows), context_length), pad_id)
    targets_RS, segments_RS = torch.full_like(token_ids_RS, IGNORED), torch.full_like(token_ids_RS, -1)
    for r, row_examples in enumerate(rows):
        start = 0
        for segment, example in enumerate(row_examples):
            ids, mask = torch.tensor(example.token_ids), torch.tensor(example.mask)
            stop = start + len(ids)
            token_ids_RS[r, start:stop], segments_RS[r, start:stop] = ids, segment
            targets_RS[r, start : stop - 1] = ids[1:].masked_fill(~mask[1:], IGNORED)
            start = stop
    return token_ids_RS, targets_RS, segments_RS


@dataclass(frozen=True)
class SFT:
    """Cross-entropy of the tokens that are learned, in nats. The batch is what pack_examples returns.

    Raises ValueError for a batch in which nothing is learned, but where it is compiled or captured.
    """

    kind: Literal["sft"] = "sft"

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        token_ids_RS, targets_RS, segments_RS = batch
        count = (targets_RS != IGNORED).sum()
        captured = targets_RS.is_cuda and torch.cuda.is_current_stream_capturing()
        if not torch.compiler.is_compiling() and not captured and count == 0:
            raise ValueError(f"nothing is learned in this batch of {len(targets_RS)} rows: every target is {IGNORED}")
        loss, routing = with_routing(
            model, token_ids_RS, segments=segments_RS, targets=targets_RS, ignore_index=IGNORED
        )  # fmt: skip
        if routing is None:
            return loss, count, {}
        metrics = {"cross_entropy": loss} | {name: count * value for name, value in routing.metrics().items()}
        return loss + count * (routing.balance + routing.z), count, metrics
