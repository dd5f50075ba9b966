"""Preferences as tensors: the better and the worse answer of each, and which tokens are theirs.

N = pairs, B = pairs of a batch, S = tokens of a row, T = S - 1 predictions; 2 is (chosen, rejected).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cs336.alignment.pairs import PreferenceExample
from cs336.alignment.sft import Example, encode_chat
from cs336.inference.chat import ChatTemplate
from cs336.tokenizer import Tokenizer


@dataclass(frozen=True)
class EncodedPair:
    chosen: Example
    rejected: Example
    margin: float

    @property
    def length(self) -> int:
        return max(len(self.chosen.token_ids), len(self.rejected.token_ids))

    @property
    def num_tokens(self) -> int:
        """Of both, with those of the prompt."""
        return len(self.chosen.token_ids) + len(self.rejected.token_ids)


def encode_pairs(
    examples: Sequence[PreferenceExample],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    end_ids: Collection[int],
    context_length: int,
) -> tuple[list[EncodedPair], int]:
    """Pairs of at most context_length tokens, and how many are longer; ties are left out.

    Raises ValueError, naming the preference by its number from 1, for a template that does not fit (see encode_chat),
    and where no pair is left.
    """
    pairs, longer = [], 0
    for number, example in enumerate(examples, 1):
        if example.chosen == "tie":
            continue
        history = [turn.message for turn in example.history]
        both = [[*history, {"role": "assistant", "content": answer}] for answer in (example.better, example.worse)]
        try:
            chosen, rejected = (encode_chat(m, tokenizer, template, end_ids, last_only=True) for m in both)
        except ValueError as error:
            raise ValueError(f"preference {number}: {error}") from None
        pair = EncodedPair(chosen, rejected, example.margin)
        if pair.length > context_length:
            longer += 1
        else:
            pairs.append(pair)
    if not pairs:
        ties = sum(example.chosen == "tie" for example in examples)
        raise ValueError(
            f"of {len(examples)} preferences none is left: {ties} are ties, {longer} are longer than {context_length} "
            "tokens"
        )
    return pairs, longer


def collate(pairs: Sequence[EncodedPair]) -> tuple[Tensor, Tensor]:
    """(token_ids (B, 2, S) int64 padded with 0, mask (B, 2, T) bool of the predictions of answers)."""
    S = max(pair.length for pair in pairs)
    token_ids_B2S = torch.zeros(len(pairs), 2, S, dtype=torch.int64)
    mask_B2T = torch.zeros(len(pairs), 2, S - 1, dtype=torch.bool)
    for b, pair in enumerate(pairs):
        for side, example in enumerate((pair.chosen, pair.rejected)):
            length = len(example.token_ids)
            token_ids_B2S[b, side, :length] = torch.tensor(example.token_ids)
            mask_B2T[b, side, : length - 1] = torch.tensor(example.mask[1:])
    return token_ids_B2S, mask_B2T
