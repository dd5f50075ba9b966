"""States of a bounded size: entries of the newest tokens, and what a recurrence has come to after each of them.

Both are rings that a row's length points into, so that a shorter length is all it takes to go back.
B = batch, S = new tokens, C = slots of a ring, R = rollback.
"""

from typing import Self

import torch
from torch import Tensor

from cs336.nn.state import Context, Entries


class Recent(Entries):
    """An entry for each of the newest tokens: tensors (B, C, ...), token t's in slot t mod C. C = size + rollback, so
    that the last `size` entries are there whichever of the last `rollback` tokens is the last."""

    def __init__(self, *entries_BC: Tensor, rollback: int, empty: bool = True):
        super().__init__(*entries_BC, empty=empty)
        self.rollback = rollback

    @classmethod
    def allocate(cls, batch_size: int, size: int, *shapes: tuple[int, ...], rollback: int, device, dtype) -> Self:
        shapes = tuple((batch_size, size + rollback, *shape) for shape in shapes)
        return cls(*(torch.zeros(shape, device=device, dtype=dtype) for shape in shapes), rollback=rollback)

    def held(self, lengths_B: Tensor) -> Tensor:
        """(B, C): the token whose entry each slot holds in a row of that length; negative where there is none."""
        C = self.entries[0].shape[1]
        last_B1 = lengths_B[:, None] - 1
        return last_B1 - (last_B1 - torch.arange(C, device=lengths_B.device)) % C

    def last(self, num: int, lengths_B: Tensor) -> list[Tensor]:
        """The last `num` entries of rows of that length, oldest first: (B, num, ...), zeros before the first token."""
        C = self.entries[0].shape[1]
        token_BN = lengths_B[:, None] + torch.arange(-num, 0, device=lengths_B.device)
        row_B1 = torch.arange(len(lengths_B), device=lengths_B.device)[:, None]
        taken = [entry[row_B1, token_BN % C] for entry in self.entries]
        return [t.masked_fill(_like(token_BN < 0, t), 0) for t in taken]

    def write(self, entries_BS: tuple[Tensor, ...], context: Context) -> None:
        """Put the entries (B, S, ...) of the new tokens behind those so far, without gradients; not of padding."""
        C, S, lengths_B = self.entries[0].shape[1], entries_BS[0].shape[1], context.lengths
        assert lengths_B is not None
        self.empty = False
        row_B1 = torch.arange(len(lengths_B), device=lengths_B.device)[:, None]
        if S > C:
            new_BC = self.held(lengths_B + context.counts(S)) - lengths_B[:, None]
            for kept, new in zip(self.entries, entries_BS, strict=True):
                taken = new.detach()[row_B1, new_BC.clamp(min=0)].to(kept.dtype)
                kept.copy_(torch.where(_like(new_BC >= 0, kept), taken, kept))
            return
        slots_BS, real_BS = context.slots(S) % C, context.real(S)
        for kept, new in zip(self.entries, entries_BS, strict=True):
            new = new.detach().to(kept.dtype)
            if real_BS is not None:
                new = torch.where(_like(real_BS, new), new, kept[row_B1, slots_BS])
            kept.index_put_((row_B1, slots_BS), new)

    def select(self, rows: Tensor) -> Self:
        return type(self)(*(entry[rows] for entry in self.entries), rollback=self.rollback, empty=self.empty)


class Snapshots:
    """What a recurrence has come to: (B, R + 1, ...), after n tokens in slot n mod (R + 1). It begins with zeros."""

    def __init__(self, states_BR: Tensor):
        self.states = states_BR

    @classmethod
    def allocate(cls, batch_size: int, *shape: int, rollback: int, device, dtype) -> Self:
        """In float32 at least: a recurrence adds up what it rounds."""
        dtype = torch.promote_types(dtype, torch.float32)
        return cls(torch.zeros(batch_size, rollback + 1, *shape, device=device, dtype=dtype))

    @property
    def rollback(self) -> int:
        return self.states.shape[1] - 1

    @property
    def nbytes(self) -> int:
        return self.states.nbytes

    def read(self, lengths_B: Tensor) -> Tensor:
        """(B, ...) of rows of that length."""
        row_B = torch.arange(len(lengths_B), device=lengths_B.device)
        state = self.states[row_B, lengths_B % self.states.shape[1]]
        return state.masked_fill(_like(lengths_B == 0, state), 0)

    def write(self, state_B: Tensor, lengths_B: Tensor) -> None:
        """Keep (B, ...) as that of rows of that length, without its gradient."""
        row_B = torch.arange(len(lengths_B), device=lengths_B.device)
        self.states.index_put_((row_B, lengths_B % self.states.shape[1]), state_B.detach().to(self.states.dtype))

    def select(self, rows: Tensor) -> Self:
        return type(self)(self.states[rows])

    def put(self, rows: Tensor, state: Self) -> None:
        self.states.index_copy_(0, rows, state.states)


def _like(mask: Tensor, x: Tensor) -> Tensor:
    """A mask of x's leading dims, broadcastable to x."""
    return mask.view(*mask.shape, *[1] * (x.dim() - mask.dim()))
