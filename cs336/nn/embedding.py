import torch
import torch.nn.functional as F
from torch import Tensor, nn


def look_up(table: Tensor, ids: Tensor, name: str) -> Tensor:
    """Rows of table (N, D) at ids (...), int64 or int32 in [0, N): (..., D). Errors call the ids `name`.

    Raises ValueError for another dtype, IndexError for ids out of range; on a GPU those end the process's CUDA context.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be int64 or int32, got {ids.dtype}")
    try:
        return F.embedding(ids, table)
    except IndexError:
        raise IndexError(
            f"{name} must be 0 to {len(table) - 1}, got some from {ids.min().item()} to {ids.max().item()}"
        ) from None


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
