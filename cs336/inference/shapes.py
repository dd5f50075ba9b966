"""Sizes of the steps that are captured."""

from typing import NamedTuple

from cs336.models import TransformerConfig

# Tokens of prompts in a captured step, and the chunks that they may be of.
PROMPTS = {128: 4, 512: 8, 2048: 16, 4096: 32, 8192: 32}
HOST = 1e-3  # seconds a layer in which the host launches a step's kernels: 0.9 to 1.6 were measured beside an H200
RATE = 6e14  # FLOPs a second of an H200's products


class Shape(NamedTuple):
    """Of a captured step: what it does not use is filled up."""

    rows: int
    """That decode, or verify drafts."""
    width: int = 1
    """Tokens of each: the newest and its drafts."""
    spare: int = 0
    """Multiprocessors that attention leaves alone, in a step by halves; 0: no such step."""
    chunks: int = 0
    """Of prompts."""
    tokens: int = 0
    """Of these."""

    @property
    def num_rows(self) -> int:
        """Of which a token is drawn. Behind those that decode each chunk has one, and so have tokens that fill up."""
        return self.rows + self.chunks + 1 if self.chunks else self.rows

    @property
    def numbers(self) -> int:
        """That the host gives: slots, lengths and offsets of rows, and behind these what their kind of step wants."""
        if self.chunks:
            return 3 * self.num_rows + 2 * self.chunks + 3 + 3 * self.tokens
        return self.rows * (3 if self.width == 1 else 4 + self.width)


def graph_sizes(max_seqs: int) -> tuple[int, ...]:
    """Batches to capture: all that are computed without an empty row in seven of eight where they are large."""
    sizes = {1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, max_seqs + 32, 32)}
    return tuple(sorted({size for size in sizes if size < max_seqs} | {max_seqs}))


def most_captured(config: TransformerConfig, max_step_tokens: int) -> int:
    """Tokens of prompts in the largest step that is captured. What fills it up is computed too: so it takes the device
    no longer than the host would take to launch it."""
    flops = sum(block.flops(config.d_model, 0) for block in config.blocks)  # of a token
    most = min(max_step_tokens, HOST * config.num_layers * RATE / flops)
    return max((tokens for tokens in PROMPTS if tokens <= most), default=0)


def prompt_shapes(max_seqs: int, max_step_tokens: int, most: int) -> tuple[Shape, ...]:
    """Of steps with up to `most` tokens of prompts, the cheapest first: beside a quarter of the sequences, or all."""
    beside = max_seqs if max_seqs > 1 else 0  # the one that begins
    rows = sorted({max_seqs // 4, beside} if max_seqs >= 64 else {beside})
    return tuple(
        Shape(n, chunks=min(chunks, max_seqs), tokens=tokens)
        for tokens, chunks in PROMPTS.items()
        for n in rows
        if tokens <= most and beside + tokens <= max_step_tokens
    )
