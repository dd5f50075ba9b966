"""Where the tokens of a forward pass stand, and what mixers keep of the tokens before them while decoding.

A row's state holds as many tokens as `context.lengths` says: a tensor, so that a step neither waits for the device nor
changes a shape, and can be captured in a CUDA graph. To go back a row gets a smaller length, and nothing is moved: what
a mixer keeps of its last `rollback` tokens is still there. nn/recent.py has the states of a bounded size.
B = batch, H = key-value heads, S = new tokens, T = tokens that a state has room for, D = features of a head.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor

from cs336.ops import registry
from cs336.ops.attention_varlen import cu_seqlens

if TYPE_CHECKING:
    from cs336.nn.paged import PagedTokens


@dataclass(frozen=True)
class Context:
    """What the S tokens of a forward pass share in every layer."""

    positions: Tensor | None = None
    """(S,) or (..., S) integers for rotary positions. None: 0 to S - 1, or behind the state's tokens."""
    mask: Tensor | None = None
    """As in ops.attention, broadcastable to (..., H, S, S): what attention may see, causality apart."""
    segments: Tensor | None = None
    """(B, S) integers: tokens with different ones are strangers, and equal ones stand together. A mixer without a mask
    keeps them apart by these. With a state a row is one document, and negative ones are padding on the right."""
    lengths: Tensor | None = None
    """(B,) int64: the tokens that the state holds before these. None without a state."""
    cu_seqlens: Tensor | None = None
    """(N + 1,) int32: where documents start among the B * S tokens, and where the last ends. It keeps
    them apart in attention, in place of a mask."""
    rows: Tensor | None = None
    """(B,) integers: which rows of a recurrence's state these are, where a step leaves it in place. None: its first."""
    reach: int | None = None
    """How many of a state's slots hold all tokens, these included, where that is known: no others are read."""
    paged: "PagedTokens | None" = None
    """Whose tokens these are, and the pages of theirs, where the state is paged."""

    @staticmethod
    def packed(segments_BS: Tensor, positions: Tensor | None = None) -> "Context":
        """Documents packed in a row: each is a run of equal ids, sees no other, and counts its positions from 0.

        On a GPU, and inside cs336.invariant(), attention gets their ends, for which the host waits once; elsewhere,
        compiled or captured, a mask.
        """
        begins_BS = segments_BS.diff(prepend=segments_BS[:, :1]) != 0
        if positions is None:
            column_S = torch.arange(segments_BS.shape[1], device=segments_BS.device)
            positions = column_S - torch.where(begins_BS, column_S, 0).cummax(-1).values
        run_BS = begins_BS.cumsum(-1, dtype=torch.int32)  # an id may come again
        captured = segments_BS.is_cuda and torch.cuda.is_current_stream_capturing()
        packing = segments_BS.is_cuda or registry.is_invariant()
        if packing and not torch.compiler.is_compiling() and not captured:
            return Context(positions, segments=run_BS, cu_seqlens=cu_seqlens(segments_BS))
        return Context(positions, (run_BS[:, :, None] == run_BS[:, None, :])[:, None], run_BS)

    def slots(self, S: int) -> Tensor:
        """(B, S): where the new tokens go among those of their row."""
        if self.lengths is None:
            raise ValueError("a mixer with a state needs context.lengths, the tokens that each row's state holds")
        return self.lengths[:, None] + torch.arange(S, device=self.lengths.device)

    def real(self, S: int) -> Tensor | None:
        """(B, S): which of the new tokens are no padding; None: all of them."""
        return None if self.segments is None else self.segments >= 0

    def counts(self, S: int) -> Tensor | int:
        """(B,): how many of the new tokens are no padding."""
        return S if self.segments is None else (self.segments >= 0).sum(-1)


def place_of(weight: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> dict[str, Any]:
    """Where a state is, and of what: the weight's device and dtype if None."""
    return {"device": device or weight.device, "dtype": dtype or weight.dtype}


class MixerState(Protocol):
    """What one mixer keeps of the tokens before, for B rows. Its memory is taken once; its shapes do not change.

    What it says of a row is a matter of context.lengths alone: a row of n tokens that is continued as one of m < n goes
    on after its first m, as if the others had never been, provided n - m is within `rollback`.
    """

    @property
    def rollback(self) -> int | None:
        """How many tokens a row may go back; None: all."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""

    def select(self, rows: Tensor) -> Self:
        """A new state with copies of these rows, int64 (N,), in this order."""

    def put(self, rows: Tensor, state: Self) -> None:
        """These rows, int64 (N,), become copies of those of `state`, in this order."""


class Entries:
    """Tensors (B, ...), a row of each a row of the batch."""

    def __init__(self, *entries_B: Tensor, empty: bool = True):
        self.entries = entries_B
        self.empty = empty  # nothing was ever written: attention then needs no mask

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    def put(self, rows: Tensor, state: Self) -> None:
        self.empty = self.empty and state.empty
        for entry, new in zip(self.entries, state.entries, strict=True):
            entry.index_copy_(0, rows, new)


class Slots(Entries):
    """An entry a token: tensors (B, T, ...). What is past a row's length is never looked at, and is written over."""

    rollback = None
    names = "entries"

    def write(self, entries_BS: tuple[Tensor, ...], context: Context) -> None:
        """Put entries (B, S, ...) behind the tokens so far, without their gradients.

        Raises ValueError past the room there is (on a GPU the index is checked by the device), and for a shape or dtype
        that is not the state's.
        """
        (B, T), S = self.entries[0].shape[:2], entries_BS[0].shape[1]
        for new, kept in zip(entries_BS, self.entries, strict=True):
            if new.shape != (B, S, *kept.shape[2:]):
                want = ", ".join(map(str, (B, "S", *kept.shape[2:])))
                got = " and ".join(str(tuple(entry.shape)) for entry in entries_BS)
                raise ValueError(f"{self.names} must be ({want}) to fit the state, got {got}")
            if new.dtype != kept.dtype:
                first = self.names.partition(" ")[0]
                raise ValueError(f"{first} is {new.dtype}, the state {kept.dtype}: make it where the model runs")
        row_B1 = torch.arange(B, device=self.entries[0].device)[:, None]
        slots_BS = context.slots(S)
        try:
            for new, kept in zip(entries_BS, self.entries, strict=True):
                kept.index_put_((row_B1, slots_BS), new.detach())
        except IndexError:
            raise ValueError(
                f"the state has room for {T} tokens a row, {int(slots_BS.max()) + 1} were to be kept: make a longer one"
            ) from None
        self.empty = False

    def visible(self, S: int, context: Context) -> Tensor:
        """What the S newest tokens see of the slots within reach: all before them, and themselves; boolean
        (B, 1, S, T)."""
        slots_T = torch.arange(self.entries[0][:, : context.reach].shape[1], device=self.entries[0].device)
        return (slots_T <= context.slots(S)[:, :, None])[:, None]

    def select(self, rows: Tensor) -> Self:
        return type(self)(*(entry[rows] for entry in self.entries), empty=self.empty)


class KeyValues(Slots):
    """Attention's state: keys and values (B, T, H, D)."""

    names = "k and v"

    @staticmethod
    def allocate(batch_size: int, max_len: int, num_kv_heads: int, head_dim: int, *, device, dtype) -> "KeyValues":
        shape = (batch_size, max_len, num_kv_heads, head_dim)
        # Zeros, for attention gives the slots that are not yet filled a weight of zero, and zero times NaN is NaN.
        return KeyValues(*(torch.zeros(shape, device=device, dtype=dtype) for _ in range(2)))

    @property
    def keys(self) -> Tensor:
        return self.entries[0]

    @property
    def values(self) -> Tensor:
        return self.entries[1]

    def append(self, k_BSHD: Tensor, v_BSHD: Tensor, context: Context) -> None:
        """Write k and v behind the tokens so far: see `write`."""
        self.write((k_BSHD, v_BSHD), context)

    def read(self, S: int, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (B, H, T, D) of the slots within reach, and what the S newest tokens see of them: boolean
        (B, 1, S, T)."""
        k_BHTD, v_BHTD = (t[:, : context.reach].transpose(1, 2) for t in self.entries)
        return k_BHTD, v_BHTD, self.visible(S, context)
