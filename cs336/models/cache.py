"""B = batch, H = key-value heads, T = tokens so far, S = new tokens, D = features of a head."""

from collections.abc import Sequence

import torch
from torch import Tensor


class LayerKV:
    """Keys and values of one layer: storage (B, H, max_len, D), of which `length` tokens are filled."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values, self.length = keys, values, 0

    def append(self, k_BHSD: Tensor, v_BHSD: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, H, S, D) behind the tokens so far, in place; returns views of all (B, H, T, D).

        Without their gradients: a cache is for generation.
        Raises ValueError past max_len, or for a shape or dtype that is not the storage's.
        """
        B, H, max_len, D = self.keys.shape
        end = self.length + k_BHSD.shape[2]
        if end > max_len:
            raise ValueError(f"the cache holds {max_len} tokens, {end} were to be kept: make a longer one")
        if k_BHSD.shape != (B, H, k_BHSD.shape[2], D) or v_BHSD.shape != k_BHSD.shape:
            raise ValueError(
                f"k and v must be ({B}, {H}, S, {D}) to fit the cache, "
                f"got {tuple(k_BHSD.shape)} and {tuple(v_BHSD.shape)}"
            )
        if k_BHSD.dtype != self.keys.dtype:
            raise ValueError(f"k is {k_BHSD.dtype}, the cache {self.keys.dtype}: make it where the model runs")
        self.keys[:, :, self.length : end] = k_BHSD.detach()
        self.values[:, :, self.length : end] = v_BHSD.detach()
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """Keys and values of every layer, preallocated for max_len tokens a row, and where each row starts.

    Prompts of different lengths are padded on the left: row b's first padding[b] tokens are never attended to, and its
    positions count from the token after them.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_kv_heads: int,
        max_len: int,
        head_dim: int,
        *,
        padding: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if padding is not None and (len(padding) != batch_size or min(padding, default=0) < 0):
            raise ValueError(f"padding must be {batch_size} counts of tokens, got {list(padding)}")
        shape = (batch_size, num_kv_heads, max_len, head_dim)
        self.layers = [
            LayerKV(*(torch.empty(shape, device=device, dtype=dtype) for _ in range(2))) for _ in range(num_layers)
        ]
        self.padding = list(padding) if padding is not None and any(padding) else None
        self._padding_B = None if self.padding is None else torch.tensor(self.padding, device=device)

    @property
    def length(self) -> int:
        """Tokens kept for each row, padding included."""
        return self.layers[0].length

    @property
    def longest(self) -> int:
        """Tokens of the row with the least padding."""
        return self.length - min(self.padding or (0,))

    def positions(self, S: int) -> Tensor:
        """Positions of the next S tokens: (S,), or (B, S) with padding, which itself stands at 0."""
        columns_S = torch.arange(self.length, self.length + S, device=self.layers[0].keys.device)
        return columns_S if self._padding_B is None else (columns_S - self._padding_B[:, None]).clamp(min=0)

    def mask(self, S: int) -> Tensor | None:
        """Boolean (B, 1, 1, T + S), False at padding; None without padding."""
        if self._padding_B is None:
            return None
        columns_T = torch.arange(self.length + S, device=self._padding_B.device)
        return (columns_T >= self._padding_B[:, None])[:, None, None]

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the batch, in this order."""
        index = torch.tensor(rows, device=self.layers[0].keys.device)
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[index], layer.values[index]
        if self.padding is not None:
            self.padding = [self.padding[row] for row in rows]
            self._padding_B = torch.tensor(self.padding, device=index.device)
