"""What the device knows of sequences that run. R = slots, B = rows of a step."""

import torch
from torch import Tensor


class Slots:
    """What the device knows of the sequences that run: a row each, and an empty one at the end."""

    def __init__(self, num: int, most_pages: int, device: torch.device):
        self.empty = num
        self.table = torch.zeros(num + 1, most_pages, dtype=torch.int32, device=device)
        self.newest = torch.zeros(num + 1, dtype=torch.int64, device=device)
        self.seeds = torch.zeros(num + 1, dtype=torch.int64, device=device)
        self.top_k = torch.zeros(num + 1, dtype=torch.int32, device=device)
        self.floats = torch.zeros(3, num + 1, dtype=torch.float32, device=device)  # temperature, top_p, min_p

    def settings(self, slot_B: Tensor, offset_B: Tensor) -> tuple[Tensor, ...]:
        """How these rows are sampled, in the order of ops.sample."""
        temperature_B, top_p_B, min_p_B = self.floats.index_select(1, slot_B)
        top_k_B, seed_B = self.top_k.index_select(0, slot_B), self.seeds.index_select(0, slot_B)
        return temperature_B, top_k_B, top_p_B, min_p_B, seed_B, offset_B.long()
