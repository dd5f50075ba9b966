"""What changes the logits of single requests: penalties, biases, grammars, ends that may not come yet. Most steps have
none.

B = rows of a step, V = vocabulary.
"""

from collections.abc import Sequence as Rows
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cs336 import ops
from cs336.inference.scheduler import Sequence


class Controls:
    """unused: ids that are no token. Counts of tokens, which penalties need, are kept a slot, from the first on that
    wants them: num_slots * vocab_size int32."""

    def __init__(self, num_slots: int, vocab_size: int, unused: tuple[int, ...], device: torch.device):
        self._shape, self._device = (num_slots, vocab_size), device
        self._counts: Tensor | None = None
        self._base: Tensor | None = None
        self._places = torch.arange(8, dtype=torch.uint8, device=device)
        if unused:
            self._base = torch.zeros(1, vocab_size, device=device)
            self._base[0, list(unused)] = -torch.inf

    def wanted(self, sequences: Rows[Sequence]) -> bool:
        """Whether the logits of one of these are changed."""
        return any(s.sampled <= s.controlled for s in sequences)

    def common(self, num_rows: int) -> dict[str, Any]:
        """Options of ops.sample for rows that nothing else changes."""
        return {} if self._base is None else {"bias": self._base.expand(num_rows, -1)}

    def options(self, sequences: Rows[Sequence], slot_B: Tensor) -> dict[str, Any]:
        """Options of ops.sample for the rows of these sequences."""
        options = self.common(len(sequences))
        changes: list[tuple[int, int, float]] = []
        for row, s in enumerate(sequences):
            changes += ((row, token, value) for token, value in s.params.biases)
            if s.sampled <= s.params.min_tokens:  # the one that is drawn now is counted
                changes += ((row, token, -torch.inf) for token in s.ends)
        guided = {row: s.guide.allowed for row, s in enumerate(sequences) if s.guide is not None}
        if changes or guided:
            bias_BV = options["bias"] = torch.zeros(len(sequences), self._shape[1], device=self._device)
            if self._base is not None:
                bias_BV += self._base
        if changes:
            rows, tokens, values = (self._sent(torch.tensor(x)) for x in zip(*changes, strict=True))
            bias_BV.index_put_((rows, tokens), values.float(), accumulate=True)
        if guided:
            bias_BV[self._sent(torch.tensor(list(guided)))] += self._masks(list(guided.values()))
        if any(s.params.penalised for s in sequences):
            assert self._counts is not None
            options["counts"] = self._counts.index_select(0, slot_B)
            for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
                values_B = torch.tensor([getattr(s.params, name) for s in sequences], dtype=torch.float32)
                options[name] = self._sent(values_B)
        return options

    def _masks(self, allowed: list[np.ndarray]) -> Tensor:
        """0 for the tokens of these sets, -inf for the others: (rows, V)."""
        bits_RN8 = self._sent(torch.from_numpy(np.stack(allowed)))[:, :, None] >> self._places & 1
        mask_RV = bits_RN8.flatten(1)[:, : self._shape[1]]
        return torch.where(mask_RV > 0, 0.0, -torch.inf)

    def _sent(self, values: Tensor) -> Tensor:
        """On the device. From pageable memory the host would wait for all that is queued there."""
        if self._device.type != "cuda":
            return values
        return values.pin_memory().to(self._device, non_blocking=True)

    def begin(self, sequence: Sequence) -> None:
        """The sequence has a slot: count its tokens."""
        if not sequence.params.penalised:
            return
        if self._counts is None:
            self._counts = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
        V = self._shape[1]
        prompt, output = (
            torch.tensor(ids, dtype=torch.int64).bincount(minlength=V)
            for ids in (sequence.token_ids[: sequence.num_prompt], sequence.token_ids[sequence.num_prompt :])
        )
        self._counts[sequence.slot] = (output + ops.IN_PROMPT * (prompt > 0)).int().to(self._device)

    def drawn(self, slot_B: Tensor, token_B: Tensor) -> None:
        """Count what was drawn."""
        if self._counts is not None:
            ones = torch.ones_like(token_B, dtype=torch.int32)
            self._counts.index_put_((slot_B.long(), token_B), ones, accumulate=True)
