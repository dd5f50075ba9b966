"""Any mixer's state among sequences that come and go: a row a slot, beside the pages of attention (nn/paged.py).

A pass has T tokens of R sequences, one after the other. Those of the first, which decode, go through the mixer as rows
of one token each, and the chunks behind them as rows padded on the right; each row with the state of its slot, which is
copied out and back, but for a recurrence's step, which is taken in place. R = rows, S = tokens of the longest chunk,
M = d_model.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cs336.nn.paged import PagedTokens
from cs336.nn.recurrence import is_step
from cs336.nn.state import Context, MixerState


class Slotted:
    """The states of one mixer, a row a slot. new_state: makes an empty one, of the mixer's weights as they are then."""

    def __init__(self, new_state: Callable[[], MixerState]):
        self._new_state = new_state
        self.state = new_state()

    @property
    def nbytes(self) -> int:
        return self.state.nbytes

    def renew(self) -> None:
        """All rows begin anew: the weights, which a state may hold something of, have changed."""
        self.state = self._new_state()

    def mix(self, mixer: nn.Module, x_1TM: Tensor, context: Context) -> Tensor:
        """What the mixer makes of the tokens (1, T, M) of a pass, whose states are then those after them."""
        tokens = context.paged
        assert tokens is not None
        assert context.positions is not None
        x_TM, position_T, n, outs = x_1TM[0], context.positions[0], tokens.num_decodes, []
        if n and is_step(x_TM[:n, None], Context(), self.state):
            context = Context(position_T[:n, None], lengths=tokens.before, rows=tokens.slots[:n])
            outs.append(mixer(x_TM[:n, None], context, self.state)[:, 0])
        elif n:
            y_R1M = self._rows(mixer, x_TM[:n, None], position_T[:n, None], tokens, slice(0, n), 1, None)
            outs.append(y_R1M[:, 0])
        if tokens.continued is not None:
            row_T, ends = tokens.sequence[n:].long() - n, tokens.continued.ends
            column_T = torch.arange(len(row_T), device=row_T.device) - ends[:-1].long()[row_T]
            shape = len(ends) - 1, tokens.continued.longest
            x_RSM, position_RS = x_TM.new_zeros(*shape, x_TM.shape[1]), position_T.new_zeros(shape)
            x_RSM[row_T, column_T], position_RS[row_T, column_T] = x_TM[n:], position_T[n:]
            count_R = ends.diff()
            segments_RS = -(torch.arange(shape[1], device=row_T.device) >= count_R[:, None]).long()  # -1: padding
            rows = slice(n, n + shape[0])
            y_RSM = self._rows(mixer, x_RSM, position_RS, tokens, rows, count_R, segments_RS)
            outs.append(y_RSM[row_T, column_T])
        return (outs[0] if len(outs) == 1 else torch.cat(outs))[None]

    def _rows(self, mixer, x_RSM, position_RS, tokens: PagedTokens, rows: slice, counts, segments_RS) -> Tensor:
        slot_R = tokens.slots[rows].long()
        state = self.state.select(slot_R)
        lengths_R = (tokens.lengths[rows] - counts).clamp(min=0).long()  # before these; a row without a sequence: 0
        y_RSM = mixer(x_RSM, Context(position_RS, segments=segments_RS, lengths=lengths_R), state)
        self.state.put(slot_R, state)
        return y_RSM
