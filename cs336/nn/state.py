"""Where the tokens of a forward pass stand, and what mixers keep of the tokens before them while decoding.

A row's state holds as many tokens as `context.lengths` says: a tensor, so that a step neither waits for the device nor
changes a shape, and can be captured in a CUDA graph. B = batch, H = key-value heads, S = new tokens, T = tokens that a
state has room for, D = features of a head.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

import torch
from torch import Tensor

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
    """(B, S) integers: tokens with different ones are strangers. A mixer without a mask keeps them apart by these."""
    lengths: Tensor | None = None
    """(B,) int64: the tokens that the state holds before these. None without a state."""
    cu_seqlens: Tensor | None = None
    """(N + 1,) int32: where documents start among the B * S tokens, and where the last ends. It keeps
    them apart in attention, in place of a mask."""
    reach: int | None = None
    """How many of a state's slots hold all tokens, these included, where that is known: no others are read."""
    paged: "PagedTokens | None" = None
    """Whose tokens these are, and the pages of theirs, where the state is paged."""

    @staticmethod
    def packed(segments_BS: Tensor, positions: Tensor | None = None) -> "Context":
        """Documents packed in a row: each is a run of equal ids, sees no other, and counts its positions from 0.

        On a GPU attention gets their ends, for which the host waits once; elsewhere, compiled or captured, a mask.
        """
        begins_BS = segments_BS.diff(prepend=segments_BS[:, :1]) != 0
        if positions is None:
            column_S = torch.arange(segments_BS.shape[1], device=segments_BS.device)
            positions = column_S - torch.where(begins_BS, column_S, 0).cummax(-1).values
        on_gpu = segments_BS.is_cuda and not torch.compiler.is_compiling()
        if on_gpu and not torch.cuda.is_current_stream_capturing():
            return Context(positions, segments=segments_BS, cu_seqlens=cu_seqlens(segments_BS))
        run_BS = begins_BS.cumsum(-1)  # an id may come again
        return Context(positions, (run_BS[:, :, None] == run_BS[:, None, :])[:, None], segments_BS)

    def slots(self, S: int) -> Tensor:
        """(B, S): where the new tokens go among those of their row."""
        if self.lengths is None:
            raise ValueError("a mixer with a state needs context.lengths, the tokens that each row's state holds")
        return self.lengths[:, None] + torch.arange(S, device=self.lengths.device)


class MixerState(Protocol):
    """What one mixer keeps of the tokens before, for B rows. Its memory is taken once; its shapes do not change."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""

    def select(self, rows: Tensor) -> Self:
        """A new state with copies of these rows, int64 (N,), in this order."""

    def truncate(self, lengths: Tensor) -> None:
        """Go back to the first lengths (B,) tokens of each row, never more than it holds."""


class KeyValues:
    """Attention's state: keys and values (B, T, H, D). What is past a row's length is never attended to."""

    def __init__(self, keys_BTHD: Tensor, values_BTHD: Tensor, *, empty: bool = True):
        self.keys, self.values = keys_BTHD, values_BTHD
        self.empty = empty  # nothing was ever written: attention then needs no mask

    @staticmethod
    def allocate(batch_size: int, max_len: int, num_kv_heads: int, head_dim: int, *, device, dtype) -> "KeyValues":
        shape = (batch_size, max_len, num_kv_heads, head_dim)
        # Zeros, for attention gives the slots that are not yet filled a weight of zero, and zero times NaN is NaN.
        return KeyValues(*(torch.zeros(shape, device=device, dtype=dtype) for _ in range(2)))

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def append(self, k_BSHD: Tensor, v_BSHD: Tensor, context: Context) -> None:
        """Write k and v behind the tokens so far, without their gradients.

        Raises ValueError past the room there is (on a GPU the index is checked by the device), and for a shape or dtype
        that is not the state's.
        """
        B, T, H, D = self.keys.shape
        if k_BSHD.shape != (B, k_BSHD.shape[1], H, D) or v_BSHD.shape != k_BSHD.shape:
            raise ValueError(
                f"k and v must be ({B}, S, {H}, {D}) to fit the state, "
                f"got {tuple(k_BSHD.shape)} and {tuple(v_BSHD.shape)}"
            )
        if k_BSHD.dtype != self.keys.dtype:
            raise ValueError(f"k is {k_BSHD.dtype}, the state {self.keys.dtype}: make it where the model runs")
        row_B1 = torch.arange(B, device=self.keys.device)[:, None]
        slots_BS = context.slots(k_BSHD.shape[1])
        try:
            self.keys.index_put_((row_B1, slots_BS), k_BSHD.detach())
            self.values.index_put_((row_B1, slots_BS), v_BSHD.detach())
        except IndexError:
            raise ValueError(
                f"the state has room for {T} tokens a row, {int(slots_BS.max()) + 1} were to be kept: make a longer one"
            ) from None
        self.empty = False

    def read(self, S: int, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (B, H, T, D) of the slots within reach, and what the S newest tokens see of them: all before
        them, and themselves; boolean (B, 1, S, T)."""
        k_BHTD, v_BHTD = (t[:, : context.reach].transpose(1, 2) for t in (self.keys, self.values))
        slots_T = torch.arange(k_BHTD.shape[2], device=self.keys.device)
        return k_BHTD, v_BHTD, (slots_T <= context.slots(S)[:, :, None])[:, None]

    def select(self, rows: Tensor) -> "KeyValues":
        return KeyValues(self.keys[rows], self.values[rows], empty=self.empty)

    def truncate(self, lengths: Tensor) -> None:
        """What is past the lengths is not seen, and is written over."""
