"""What a model keeps of the tokens before, while it decodes: a state a mixer, and how many tokens they hold.

    state = model.new_state(batch_size=2, max_len=128)
    logits = model(prompts, state=state)        prompts padded on the right
    state.truncate(prompt_lengths)              forgets the padding
    logits = model(next_ids, state=state)       each row goes on at its own position

Attention's keys and values let a row go back to any token. Windows and recurrences keep a bounded memory, in which a
row may go back by `rollback` tokens: model.new_state(..., rollback=4) for a speculation of 4. No step changes a shape
or waits for the device. B = batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cs336.nn import Context, MixerState, PagedKeyValues, PagedTokens, Slotted


class DecodingState:
    def __init__(self, layers: Sequence[MixerState], lengths_B: Tensor, max_len: int):
        self.layers = list(layers)
        self.lengths = lengths_B
        """(B,) int64: tokens of each row so far. Forward passes add to it in place."""
        self.max_len = max_len
        self.oldest = lengths_B.clone() if self.rollback is not None else None
        """(B,) int64: the least length that each row may go back to; None: 0."""

    @property
    def rollback(self) -> int | None:
        """How many tokens a row may go back, as far as all layers can; None: all."""
        limits = [layer.rollback for layer in self.layers if layer.rollback is not None]
        return min(limits, default=None)

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    def context(self, token_ids_BS: Tensor, positions: Tensor | None, segments_BS: Tensor | None) -> Context:
        """Where these tokens stand. Raises ValueError for another number of rows, and where there is no room."""
        if self.batch_size != len(token_ids_BS):
            raise ValueError(f"the state is of {self.batch_size} rows, token_ids of {len(token_ids_BS)}")
        reach = self.reach(token_ids_BS.shape[1])
        return Context(positions, segments=segments_BS, lengths=self.lengths, reach=reach)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        rows = self.lengths.nbytes if self.oldest is None else 2 * self.lengths.nbytes
        return rows + sum(layer.nbytes for layer in self.layers)

    def advance(self, counts: Tensor | int) -> None:
        """Count (B,) tokens more in each row, in place."""
        self.lengths += counts
        if self.oldest is not None:
            assert self.rollback is not None
            self.oldest.copy_(torch.maximum(self.oldest, self.lengths - self.rollback))

    def truncate(self, lengths: Tensor | Sequence[int]) -> None:
        """Go back to the first lengths (B,) tokens of each row; a row that holds fewer stays as it is.

        A row may always begin anew, at 0. Raises ValueError for another number of rows, and for a length that lies
        further back than `rollback` (on a GPU the device checks it).
        """
        lengths_B = torch.as_tensor(lengths, device=self.lengths.device)
        if lengths_B.shape != self.lengths.shape:
            raise ValueError(f"lengths must be {self.batch_size} numbers of tokens, got shape {tuple(lengths_B.shape)}")
        lengths_B = torch.minimum(self.lengths, lengths_B.clamp(min=0))
        if self.oldest is not None:
            self._check_reach(lengths_B)
            self.oldest.copy_(torch.minimum(self.oldest, lengths_B))
        self.lengths.copy_(lengths_B)

    def _check_reach(self, lengths_B: Tensor) -> None:
        assert self.oldest is not None
        lost_B = (lengths_B < self.oldest) & (lengths_B > 0)
        message = f"a row can go back {self.rollback} tokens: make the state with a larger rollback"
        if lost_B.device.type == "cpu":
            if lost_B.any():
                row = int(lost_B.nonzero()[0])
                raise ValueError(
                    f"row {row} goes back from {self.lengths[row]} to {lengths_B[row]} tokens, and {message}"
                )
        elif lost_B.is_cuda:
            torch._assert_async(~lost_B.any(), message)

    def select(self, rows: Tensor | Sequence[int]) -> "DecodingState":
        """A new state with copies of these rows, in this order; a row may be taken more than once."""
        rows_N = torch.as_tensor(rows, dtype=torch.int64, device=self.lengths.device)
        state = DecodingState([layer.select(rows_N) for layer in self.layers], self.lengths[rows_N], self.max_len)
        if self.oldest is not None:
            state.oldest = self.oldest[rows_N]
        return state

    def copy(self) -> "DecodingState":
        """A new state that goes on apart from this one."""
        return self.select(range(self.batch_size))

    def reach(self, tokens: int) -> int | None:
        """Slots that hold all tokens once `tokens` more are kept; None, which is all slots, where asking costs: on a
        GPU, whose index is checked by the device, and under torch.compile.

        Raises ValueError if they do not fit.
        """
        if self.lengths.device.type != "cpu" or torch.compiler.is_compiling() or not self.batch_size:
            return None
        if (longest := int(self.lengths.max()) + tokens) > self.max_len:
            raise ValueError(f"the state has room for {self.max_len} tokens a row, {longest} were to be kept")
        return longest


class PagedState:
    """Pools of pages, one a layer, which sequences share by one table (nn/paged.py), or a row a slot where a mixer has
    none (nn/slotted.py). `tokens` says whose those of the next pass are; these are one row (1, T) of token_ids."""

    def __init__(self, layers: Sequence[PagedKeyValues | Slotted]):
        self.layers = list(layers)
        self.tokens: PagedTokens | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def page_bytes(self) -> int:
        """Of these, the pages'."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, PagedKeyValues))

    @property
    def is_paged(self) -> bool:
        """Whether all that is kept of a sequence is in its pages, which another may then read."""
        return all(isinstance(layer, PagedKeyValues) for layer in self.layers)

    def renew(self) -> None:
        """What is not in pages begins anew, for the weights have changed."""
        for layer in self.layers:
            if isinstance(layer, Slotted):
                layer.renew()

    def copy_pages(self, source_N: Tensor, target_N: Tensor) -> None:
        """In every layer what page source_N[i] holds is in page target_N[i] too. int64."""
        for layer in self.layers:
            if isinstance(layer, PagedKeyValues):
                layer.copy_pages(source_N, target_N)

    def context(self, token_ids_BS: Tensor, positions: Tensor | None, segments_BS: Tensor | None) -> Context:
        """Where these tokens stand. Raises ValueError where `tokens` does not say it, and for positions or segments."""
        tokens = self.tokens
        if tokens is None or token_ids_BS.shape != (1, len(tokens.position)):
            raise ValueError(f"a paged state needs its tokens described for token_ids {tuple(token_ids_BS.shape)}")
        if positions is not None or segments_BS is not None:
            raise ValueError("a paged state knows the positions of its tokens: give neither positions nor segments")
        return Context(tokens.position.clamp(min=0)[None], paged=tokens)

    def advance(self, counts: Tensor | int) -> None:
        """Its sequences are as long as the next `tokens` will say."""
