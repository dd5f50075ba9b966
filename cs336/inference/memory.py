"""What an engine takes of a device's memory, settled before anything is allocated, or refused with a reason."""

from dataclasses import dataclass

import torch

from cs336.models import TransformerConfig

GPU_SHARE = 0.9  # of what is free, where nothing else is said; the rest is for graphs and libraries
CPU_SHARE = 0.25
LOGITS_COPIES = 3  # of the rows that are sampled, in float32: as the head gives them, and what sampling makes of them


@dataclass(frozen=True)
class EngineMemory:
    """Bytes, by what they are for."""

    weights: int
    activations: int
    """Of the largest step, while it runs, and of the largest that is captured."""
    pages: int
    num_pages: int
    page_size: int
    max_len: int
    """Tokens of a sequence, at most: those asked for, or what the pages hold."""
    slots: int = 0
    """What is kept of a sequence outside of pages, of all that can run."""

    @property
    def tokens(self) -> int:
        """That the pages hold."""
        return self.num_pages * self.page_size

    def __str__(self) -> str:
        parts = {"weights": self.weights, "largest step": self.activations, "pages": self.pages}
        if self.slots:
            parts["slots"] = self.slots
        sizes = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in parts.items())
        total = sum(parts.values()) / 2**20
        pages = f"{self.num_pages} pages of {self.page_size} tokens, {self.tokens} in all"
        return f"{total:,.1f} MiB ({sizes}): {pages}, {self.max_len} a sequence"


def plan_memory(
    config: TransformerConfig,
    *,
    width: int,
    page_bytes: int,
    page_size: int,
    max_seqs: int,
    max_step_tokens: int,
    max_len: int,
    shorten: bool = False,
    free: int,
    num_pages: int | None = None,
    slot_bytes: int = 0,
) -> EngineMemory:
    """Weights, the largest step and slots first, then as many pages as are of use: at most max_seqs sequences of
    max_len.

    Args:
        width: bytes of a weight and of an activation.
        page_bytes: of page_size tokens, in all layers.
        free: bytes that may be used, beside the weights.
        shorten: where no sequence of max_len tokens fits, plan for shorter ones.
        num_pages: that there shall be, whatever is of use.
        slot_bytes: of a sequence, outside of pages.

    Raises ValueError where not even one sequence of max_len tokens fits, or with `shorten` not even a page.
    """
    weights = width * config.num_parameters()
    block = max(config.blocks, key=lambda block: block.activation_bytes(config.d_model, width))
    token = block.activation_bytes(config.d_model, width) + 4 * width * config.d_model
    activations = max_step_tokens * token + max_seqs * config.vocab_size * 4 * LOGITS_COPIES
    one = -(-max_len // page_size)
    slots = (max_seqs + 1) * slot_bytes
    left = free - activations - slots
    fits = max(0, left) // page_bytes if page_bytes else (left >= 0) * max(max_seqs * one, num_pages or 0)
    if shorten and num_pages is None and 0 < fits < one:
        one, max_len = fits, fits * page_size
    wanted = max_seqs * one if num_pages is None else num_pages
    count, MiB = min(fits, wanted), 2**20
    if count < one or (num_pages is not None and fits < num_pages):
        what = f"{num_pages} pages" if num_pages is not None and num_pages >= one else f"a sequence of {max_len} tokens"
        size = max(one, num_pages or 0) * page_bytes / MiB
        raise ValueError(
            f"{what} takes {size:,.1f} MiB in pages of {page_size} tokens, and {count} pages, "
            f"{count * page_bytes / MiB:,.1f} MiB, may be used: {free / MiB:,.1f} MiB are free beside the weights' "
            f"{weights / MiB:,.1f}, of which the largest step takes {activations / MiB:,.1f} and slots "
            f"{slots / MiB:,.1f}. Lower max_len, max_step_tokens or max_seqs, or raise memory_share"
        )
    return EngineMemory(weights, activations, count * page_bytes, count, page_size, max_len, slots)


def free_memory(device: torch.device, share: float | None) -> int:
    """Bytes of a device that may be used: a share of what is free now, by default GPU_SHARE or CPU_SHARE of it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * (GPU_SHARE if share is None else share))
    return int(_available_on_cpu() * (CPU_SHARE if share is None else share))


def _available_on_cpu() -> int:
    """As the kernel estimates it, without swapping; 4 GiB where it does not say."""
    try:
        with open("/proc/meminfo") as file:
            rows = dict(line.split(":", 1) for line in file)
    except OSError:
        return 4 << 30
    return int(rows["MemAvailable"].split()[0]) * 1024
