"""Answers that were right or wrong, each by itself: what an outcome reward model (arXiv:2110.14168) and KTO learn from.

{"prompt": a text or messages, "completion": a text, "label": true or false}            TRL's unpaired preferences
preferences in the forms of cs336.alignment.pairs, each of which is two answers         KTO alone
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cs336.alignment.encoded_pairs import EncodedPair
from cs336.alignment.examples import Turn, encode_completion, read_rows, text_at, turns_of
from cs336.alignment.pairs import parse_preference
from cs336.alignment.sft import Example, encode_chat
from cs336.inference.chat import ChatTemplate
from cs336.tokenizer import Tokenizer
from cs336.utils.counted import counted


@dataclass(frozen=True)
class Outcome:
    example: Example
    right: bool

    @property
    def length(self) -> int:
        return len(self.example.token_ids)

    @property
    def num_tokens(self) -> int:
        """With those of the prompt."""
        return self.length


def read_outcomes(
    path: str | os.PathLike,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    end_ids: Collection[int],
    context_length: int,
    *,
    pairs: bool = False,
) -> tuple[list[Outcome], int]:
    """Answers of at most context_length tokens, and how many are longer. A prompt that is a text is read as it is,
    messages are written by the template. With pairs, a line may be a preference: its better answer is right, the other
    wrong, both written as encode_pairs writes them; ties are left out.

    Raises ValueError, naming the line, for one of another form and what encode_chat and encode_completion refuse, and
    where no answer is left.
    """
    outcomes, longer, ties = list[Outcome](), 0, 0
    for where, row in read_rows(path):
        try:
            answers = _of_pair(row, where) if pairs and _is_pair(row) else [_of_row(row, where)]
            ties += not answers
            for prompt, answer, right in answers:
                if isinstance(prompt, str):
                    example = encode_completion(prompt, answer, tokenizer, end_ids)
                else:
                    messages = [turn.message for turn in (*prompt, Turn("assistant", answer))]
                    example = encode_chat(messages, tokenizer, template, end_ids, last_only=True)
                if len(example.token_ids) > context_length:
                    longer += 1
                else:
                    outcomes.append(Outcome(example, right))
        except ValueError as error:
            raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
    if not outcomes:
        raise ValueError(
            f"{path}: no answer is left, {longer} are longer than {context_length} tokens"
            + (f", {counted(ties, 'line')} a tie" if ties else "")
        )
    return outcomes, longer


_Answer = tuple[str | tuple[Turn, ...], str, bool]  # the prompt, the answer, whether it is right


def _is_pair(row: Mapping[str, Any]) -> bool:
    return "completion" not in row and ("rejected" in row or "response_a" in row)


def _of_pair(row: Mapping[str, Any], where: str) -> list[_Answer]:
    """None of a tie."""
    found = parse_preference(row, where)
    history = tuple(found.history)
    return [] if found.chosen == "tie" else [(history, found.better, True), (history, found.worse, False)]


def _of_row(row: Mapping[str, Any], where: str) -> _Answer:
    prompt, answer, right = row.get("prompt"), text_at(row, "completion", where), row.get("label")
    if not isinstance(right, bool):
        raise ValueError(f'{where}: "label" must be true or false, got {right!r:.40}')
    return prompt if isinstance(prompt, str) else turns_of(prompt, where), answer, right


@dataclass(frozen=True)
class UnpairedAnswer(EncodedPair):
    """An answer as `chosen`, and beside it, as `rejected`, an answer that was given to another prompt."""

    right: bool

    @property
    def num_tokens(self) -> int:
        """The other answer's do not count: it is measured, not learned from."""
        return len(self.chosen.token_ids)


def with_unrelated(outcomes: Sequence[Outcome], context_length: int) -> list[UnpairedAnswer]:
    """Each answer with one to the next prompt, cut where the row ends: the n-th of a prompt with the n-th of the next.

    Raises ValueError where all answers are to one prompt.
    """
    by_prompt = dict[tuple[int, ...], list[int]]()
    for i, outcome in enumerate(outcomes):
        by_prompt.setdefault(tuple(_split(outcome.example)[0]), []).append(i)
    if len(by_prompt) < 2:
        raise ValueError(
            f"all {len(outcomes)} answers are to one prompt: kto measures how far the model went by answers to other "
            "prompts, and needs two prompts or more"
        )
    prompts = list(by_prompt)
    found = dict[int, UnpairedAnswer]()
    for prompt, following in zip(prompts, [*prompts[1:], prompts[0]], strict=True):
        others = by_prompt[following]
        for n, i in enumerate(by_prompt[prompt]):
            answer = _split(outcomes[others[n % len(others)]].example)[1][: context_length - len(prompt)]
            unrelated = Example([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))
            found[i] = UnpairedAnswer(outcomes[i].example, unrelated, 0.0, outcomes[i].right)
    return [found[i] for i in range(len(outcomes))]


def _split(example: Example) -> tuple[list[int], list[int]]:
    """The tokens of the prompt, and those that are learned."""
    start = example.mask.index(True)
    return example.token_ids[:start], [t for t, learned in zip(example.token_ids, example.mask, strict=True) if learned]
