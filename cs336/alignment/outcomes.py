"""Answers that were right or wrong, each by itself: what an outcome reward model learns from (arXiv:2110.14168).

{"prompt": a text or messages, "completion": a text, "label": true or false}            TRL's unpaired preferences
"""

import os
from collections.abc import Collection
from dataclasses import dataclass

from cs336.alignment.examples import Turn, encode_completion, read_rows, text_at, turns_of
from cs336.alignment.sft import Example, encode_chat
from cs336.inference.chat import ChatTemplate
from cs336.tokenizer import Tokenizer


@dataclass(frozen=True)
class Outcome:
    example: Example
    right: bool

    @property
    def length(self) -> int:
        return len(self.example.token_ids)


def read_outcomes(
    path: str | os.PathLike,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    end_ids: Collection[int],
    context_length: int,
) -> tuple[list[Outcome], int]:
    """Answers of at most context_length tokens, and how many are longer. A prompt that is a text is read as it is,
    messages are written by the template.

    Raises ValueError, naming the line, for one of another form and what encode_chat and encode_completion refuse, and
    where no answer is left.
    """
    outcomes, longer = list[Outcome](), 0
    for where, row in read_rows(path):
        prompt, answer, right = row.get("prompt"), text_at(row, "completion", where), row.get("label")
        if not isinstance(right, bool):
            raise ValueError(f'{where}: "label" must be true or false, got {right!r:.40}')
        turns = () if isinstance(prompt, str) else turns_of(prompt, where)
        try:
            if isinstance(prompt, str):
                example = encode_completion(prompt, answer, tokenizer, end_ids)
            else:
                messages = [turn.message for turn in (*turns, Turn("assistant", answer))]
                example = encode_chat(messages, tokenizer, template, end_ids, last_only=True)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if len(example.token_ids) > context_length:
            longer += 1
        else:
            outcomes.append(Outcome(example, right))
    if not outcomes:
        raise ValueError(f"{path}: no answer is left, {longer} are longer than {context_length} tokens")
    return outcomes, longer
