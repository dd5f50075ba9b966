"""GPUs and networks as a planner sees them: roofs of data sheets, or measured ones in their place."""

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tier:
    """Ranks within reach of each other over links of one kind."""

    ranks: int
    bandwidth: float
    """Bytes a second that each GPU sends and receives at once."""
    latency: float = 1e-5
    """Seconds before the first byte of a collective arrives."""


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: int
    """Bytes."""
    flops: float
    """Dense bfloat16 FLOP/s."""
    bandwidth: float
    """Bytes a second of its memory."""
    tiers: tuple[Tier, ...]
    """From the nearest ranks to the farthest."""
    efficiency: float = 0.5
    """The share of `flops` that a training step of one GPU reaches: its MFU, best measured (`cs336 bench train`)."""

    def tier(self, span: int) -> int:
        """The index of the first tier that reaches `span` ranks. Raises ValueError beyond the last."""
        for i, tier in enumerate(self.tiers):
            if span <= tier.ranks:
                return i
        raise ValueError(f"the network reaches {self.tiers[-1].ranks} ranks, {span} are needed: add a tier")

    def seconds(self, sent: float, ranks: int, stride: int) -> float:
        """Of a collective in which each of `ranks` ranks, `stride` apart, sends so many bytes.

        A ring crosses a slow tier once for every group that the fast one holds, and uses all its members' links.
        """
        if ranks == 1 or sent == 0:
            return 0.0
        outer = self.tiers[i := self.tier(ranks * stride)]
        bandwidth, members = outer.bandwidth, 1
        if i:
            members = min(ranks, max(1, self.tiers[i - 1].ranks // stride))
            bandwidth = min(self.tiers[i - 1].bandwidth, members * outer.bandwidth) if members > 1 else bandwidth
        return sent / bandwidth + outer.latency * math.ceil(math.log2(ranks))


GIB, TB, GB = 2**30, 1e12, 1e9
# Dense bfloat16 and memory of the data sheets; NVLink and one 400 Gb/s (A100: 200) adapter a GPU at 80 % of their rate.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 80 * GIB, 312e12, 2.039 * TB, (Tier(8, 240 * GB), Tier(4096, 20 * GB, 3e-5))),
        Gpu("H100", 80 * GIB, 989e12, 3.35 * TB, (Tier(8, 360 * GB), Tier(16384, 40 * GB, 3e-5))),
        Gpu("H200", 140 * GIB, 989e12, 4.8 * TB, (Tier(8, 360 * GB), Tier(16384, 40 * GB, 3e-5))),
        Gpu("B200", 180 * GIB, 2250e12, 8.0 * TB, (Tier(8, 720 * GB), Tier(16384, 40 * GB, 3e-5))),
    )
}


def network(text: str) -> tuple[Tier, ...]:
    """ "8:360 4096:40" -> tiers of 8 ranks at 360 GB/s and of 4096 at 40; a third number is the latency in us.

    Raises ValueError for what is not that, or does not rise.
    """
    tiers = []
    for word in text.split():
        try:
            ranks, bandwidth, *latency = word.split(":")
            tier = Tier(int(ranks), float(bandwidth) * GB, *(float(t) * 1e-6 for t in latency))
        except (TypeError, ValueError):
            raise ValueError(f"a network is RANKS:GB/s[:us] ..., like '8:360 4096:40', got {word!r}") from None
        if tier.ranks < 1 or not 0 < tier.bandwidth < math.inf or not 0 <= tier.latency < math.inf:
            raise ValueError(f"ranks, bandwidth and latency of a network must be positive, got {word!r}")
        tiers.append(tier)
    if not tiers or any(a.ranks >= b.ranks for a, b in itertools.pairwise(tiers)):
        raise ValueError(f"tiers of a network must reach more and more ranks, got {text!r}")
    return tuple(tiers)


def find(name: str, **measured: Any) -> Gpu:
    """A GPU of the table, with what was measured, as a Gpu names it, in place of what its data sheet says.

    Raises ValueError for an unknown name.
    """
    if name not in GPUS:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {name!r}: or give a Gpu")
    return dataclasses.replace(GPUS[name], **{k: v for k, v in measured.items() if v is not None})
