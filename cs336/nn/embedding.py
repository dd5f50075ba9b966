import torch
from torch import Tensor, nn

from cs336.ops.ref.embedding import look_up


class Embedding(nn.Embedding):
    """torch.nn.Embedding, rows of a table.  ids (...) int64 or int32 -> (..., embedding_dim).

    weight (num_embeddings, embedding_dim) starts as a unit normal cut at 3. Errors: see look_up.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, a=-3, b=3)

    def forward(self, ids: Tensor) -> Tensor:
        return look_up(self.weight, ids, "ids")
