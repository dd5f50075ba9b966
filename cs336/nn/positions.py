import torch
from torch import Tensor, nn

from cs336 import ops


class RotaryEmbedding(nn.Module):
    """Rotary position embedding, Su et al. 2021, arXiv:2104.09864: pair i turns by position * theta^(-2i / head_dim).

    Pairs are (x[i], x[i + head_dim / 2]), or neighbours when interleaved. The tables cos and sin
    (max_seq_len, head_dim / 2) are float32 whatever the model's dtype, and no part of its state.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        head_dim: int,
        max_seq_len: int,
        theta: float = 10000.0,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if head_dim % 2 != 0:
            raise ValueError(f"head_dim must be even to rotate pairs, got {head_dim}")
        self.head_dim, self.max_seq_len, self.theta, self.interleaved = head_dim, max_seq_len, theta, interleaved
        for name in ("cos", "sin"):
            table = torch.empty(max_seq_len, head_dim // 2, device=device, dtype=torch.float32)
            self.register_buffer(name, table, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device="cpu")
        positions = torch.arange(self.max_seq_len, dtype=torch.float64, device="cpu")
        angles = torch.outer(
            positions, self.theta ** (-pairs / self.head_dim)
        )  # in fp32 they are off by 1e-7 * position
        self.cos, self.sin = (table.to(self.cos.device, torch.float32) for table in (angles.cos(), angles.sin()))

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.cos.dtype != torch.float32:  # model.bfloat16() must not round the tables
            self.reset_parameters()
        return self

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Rotate x by the positions of its rows.

        x: (..., S, head_dim).
        positions: (..., S) integers in [0, max_seq_len), 0 to S - 1 if None; its leading dims are x's first ones, so
            that (B, S) fits x (B, S, D) and x (B, H, S, D).

        Returns a tensor like x.
        Raises ValueError for shapes or dtypes that do not fit.
        """
        if positions is None:
            if x.shape[-2] > self.max_seq_len:
                raise ValueError(
                    f"x has {x.shape[-2]} positions, the tables have {self.max_seq_len}: raise max_seq_len"
                )
            cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
        else:
            if positions.is_floating_point() or positions.shape[-1:] != x.shape[-2:-1] or positions.dim() >= x.dim():
                raise ValueError(
                    f"positions must be integers (..., {x.shape[-2]}) to fit x {tuple(x.shape)}, "
                    f"got {tuple(positions.shape)} {positions.dtype}"
                )
            lead = positions.shape[:-1]
            spread = positions.view(*lead, *[1] * (x.dim() - 2 - len(lead) if lead else 0), positions.shape[-1])
            cos, sin = self.cos[spread], self.sin[spread]
        return ops.rope(x, cos, sin, interleaved=self.interleaved)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, {self.max_seq_len}, theta={self.theta}, interleaved={self.interleaved}"
