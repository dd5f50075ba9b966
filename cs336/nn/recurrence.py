"""What recurrent mixers share: a short convolution and a recurrence over tokens, in training and while decoding.

B = batch, S = new tokens, C = channels, H = heads.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from cs336 import ops
from cs336.nn.recent import Recent, Snapshots
from cs336.nn.state import Context

STILL = ("k", "beta", "g")  # what a token that shall not count has zeros of


class CausalConv1d(nn.Conv1d):
    """ops.causal_conv1d with its weight (channels, 1, size) and its bias (channels,), by torch's names and start."""

    def __init__(self, channels: int, size: int, *, bias: bool = True, device=None, dtype=None):
        super().__init__(channels, channels, size, groups=channels, bias=bias, device=device, dtype=dtype)

    def new_state(self, batch_size: int, *, rollback: int, device, dtype) -> Recent:
        size = self.kernel_size[0] - 1
        return Recent.allocate(batch_size, size, (self.in_channels,), rollback=rollback, device=device, dtype=dtype)

    def forward(self, x_BSC: Tensor, context: Context, state: Recent | None = None) -> Tensor:  # type: ignore[override]
        """x (B, S, channels) -> like x."""
        weight_CK, dtype = self.weight[:, 0], x_BSC.dtype
        if state is None:
            return ops.causal_conv1d(x_BSC, weight_CK, self.bias, context.segments)
        assert context.lengths is not None
        (before_BKC,) = state.last(self.kernel_size[0] - 1, context.lengths)
        state.write((x_BSC,), context)
        both = torch.cat((before_BKC.to(dtype), x_BSC), 1)
        return ops.causal_conv1d(both, weight_CK, self.bias)[:, before_BKC.shape[1] :]

    def step(self, x_BC: Tensor, context: Context, state: Recent) -> Tensor:
        """silu of what forward makes of one token a row, (B, channels) -> like x: see `is_step`."""
        assert context.lengths is not None
        state.empty = False
        (ring_NRC,), weight_CK = state.entries, self.weight[:, 0]
        return ops.causal_conv1d_step_(
            ring_NRC, x_BC, weight_CK, context.lengths, context.rows, bias=self.bias, silu=True
        )


class RecurrentState:
    """A recurrence's memory, and what the short convolution before it, if there is one, still sees."""

    def __init__(self, memory: Snapshots, conv: Recent | None):
        self.memory, self.conv = memory, conv

    @property
    def rollback(self) -> int:
        return self.memory.rollback

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes + (0 if self.conv is None else self.conv.nbytes)

    def select(self, rows: Tensor) -> Self:
        return type(self)(self.memory.select(rows), None if self.conv is None else self.conv.select(rows))

    def put(self, rows: Tensor, state: Self) -> None:
        self.memory.put(rows, state.memory)
        if self.conv is not None and state.conv is not None:
            self.conv.put(rows, state.conv)


def is_step(x_BSM: Tensor, context: Context, state: object) -> bool:
    """Whether these are one token a row, which all count, and none wants a gradient: ops.recurrent_step_ then leaves
    states where they are."""
    return (
        isinstance(state, RecurrentState)
        and x_BSM.shape[1] == 1
        and context.segments is None
        and not torch.is_grad_enabled()
        and (torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active())
    )


def recur(op: Callable, tokens: dict[str, Tensor], context: Context, memory: Snapshots | None) -> Tensor:
    """op(**tokens), whose tensors are (B, H, S, ...): from the memory on if there is one, which then holds what came
    after each of the last `rollback` tokens too."""
    if memory is None:
        return op(**tokens, segments=context.segments)
    assert context.lengths is not None
    S, lengths_B = tokens["v"].shape[2], context.lengths
    real_BS = context.real(S)
    if real_BS is not None:
        tokens = _only(tokens, real_BS)
    state = memory.read(lengths_B)
    if memory.rollback + 1 >= S:
        outputs = []
        for i in range(S):
            token = {name: x[:, :, i : i + 1] for name, x in tokens.items()}
            o, state = op(**token, initial_state=state, return_state=True)
            lengths_B = lengths_B + (1 if real_BS is None else real_BS[:, i])
            memory.write(state, lengths_B)
            outputs.append(o)
        return torch.cat(outputs, 2) if outputs else op(**tokens)
    o, last = op(**tokens, initial_state=state, return_state=True)
    counts_B = torch.zeros_like(lengths_B) + context.counts(S)
    if memory.rollback == 0:
        memory.write(last, lengths_B + counts_B)
    else:
        _snapshots(op, tokens, state, counts_B, lengths_B, memory)
    return o


def _snapshots(op, tokens: dict[str, Tensor], state: Tensor, counts_B, lengths_B, memory: Snapshots) -> None:
    """The state before each row's last `rollback` tokens at once, then one by one."""
    S = tokens["v"].shape[2]
    first_B = (counts_B - memory.rollback).clamp(min=0)
    column_S = torch.arange(S, device=first_B.device)
    _, state = op(**_only(tokens, column_S < first_B[:, None]), initial_state=state, return_state=True)
    memory.write(state, lengths_B + first_B)
    row_B = torch.arange(len(first_B), device=first_B.device)
    for i in range(memory.rollback):
        at_B = first_B + i
        there_B = at_B < counts_B
        column_B = at_B.clamp(max=S - 1)
        token = {name: x[row_B, :, column_B][:, :, None] for name, x in tokens.items()}
        _, state = op(**_only(token, there_B[:, None]), initial_state=state, return_state=True)
        memory.write(state, lengths_B + torch.minimum(at_B + 1, counts_B))


def _only(tokens: dict[str, Tensor], counted_BS: Tensor) -> dict[str, Tensor]:
    """Tokens that are not counted leave the state as it is."""
    masked = {}
    for name, x in tokens.items():
        mask = counted_BS[:, None] if x.dim() == 3 else counted_BS[:, None, :, None]
        masked[name] = torch.where(mask, x, 0) if name in STILL else x
    return masked
