"""What each layer of a model takes: weights, FLOPs, activation and state bytes, and the least time on a device."""

from collections.abc import Iterator
from dataclasses import dataclass

from cs336.models.config import TransformerConfig


@dataclass(frozen=True)
class Part:
    """A layer, what stands around the layers, or all of it."""

    name: str
    parameters: int
    flops: int
    """Of the forward pass, a token, over the whole context."""
    activation_bytes: int
    """Kept for the backward, a token."""
    state_bytes: int
    """Of one sequence of the whole context while decoding."""
    moved_bytes: int
    """Of the forward pass of `tokens` tokens, at least: its weights once, its input and its output."""

    def seconds(self, tokens: int, peak_flops: float | None, bandwidth: float | None) -> float | None:
        """The roofline: the forward pass of so many tokens takes at least as long as its FLOPs and its bytes."""
        if not peak_flops or not bandwidth:
            return None
        return max(self.flops * tokens / peak_flops, self.moved_bytes / bandwidth)


def parts(config: TransformerConfig, *, width: int, tokens: int) -> Iterator[Part]:
    """The embedding, each layer, the head with the norm before it, and the total.

    width: bytes of a weight, an activation and an element of a state; tokens: of the forward pass.
    """
    d_model, T, V = config.d_model, config.context_length, config.vocab_size
    stream = tokens * d_model * width
    rows = V + (T if config.position_embedding == "learned" else 0)
    dropped = width * d_model if config.embedding_dropout else 0
    found = [Part("embedding", rows * d_model, 0, dropped, 0, 2 * stream)]
    for i, block in enumerate(config.blocks):
        weights = block.num_parameters(d_model)
        activations, state = block.activation_bytes(d_model, width), block.state_bytes(d_model, T, width)
        moved = weights * width + 2 * stream
        label = f"layer {i} ({block.mixer.kind}, {block.mlp.kind})"
        found.append(Part(label, weights, block.flops(d_model, T), activations, state, moved))
    norm = config.final_norm.num_parameters(d_model) if config.final_norm else 0
    kept = width * d_model + (config.final_norm.activation_bytes(d_model, width) if config.final_norm else 0)
    moved = (V * d_model + norm) * width + stream + tokens * V * width
    head = 0 if config.tie_embeddings else V * d_model
    found.append(Part("norm and head", norm + head, 2 * V * d_model, kept, 0, moved))
    yield from found
    yield Part("total", *(sum(getattr(part, name) for part in found) for name in FIELDS))


FIELDS = ("parameters", "flops", "activation_bytes", "state_bytes", "moved_bytes")


def table(
    config: TransformerConfig,
    *,
    width: int = 2,
    batch_size: int = 1,
    peak_flops: float | None = None,
    bandwidth: float | None = None,
) -> str:
    """A line a part. Layers that are alike and follow each other share one, whose numbers are of each."""
    tokens = batch_size * config.context_length
    lines = [("", "parameters", "MFLOP/token", "act. bytes/token", "state bytes/seq", "roofline ms")]
    *rest, total = parts(config, width=width, tokens=tokens)
    seconds = [part.seconds(tokens, peak_flops, bandwidth) for part in rest]
    runs: list[tuple[Part, Part, float | None]] = []
    for part, time in zip(rest, seconds, strict=True):
        if runs and _like(runs[-1][1], part):
            runs[-1] = (runs[-1][0], part, time)
        else:
            runs.append((part, part, time))
    whole = None if None in seconds else sum(filter(None, seconds))
    for first, last, time in [*runs, (total, total, whole)]:
        name = first.name if first is last else f"layers {first.name.split()[1]}-{last.name.partition(' ')[2]}, each"
        lines.append(
            (
                name,
                f"{last.parameters:,}",
                f"{last.flops / 1e6:,.3f}",
                f"{last.activation_bytes:,}",
                f"{last.state_bytes:,}",
                "" if time is None else f"{time * 1e3:,.3f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    name_width, *others = widths
    rows = []
    for name, *cells in lines:
        rows.append("  ".join([name.ljust(name_width), *(c.rjust(w) for c, w in zip(cells, others, strict=True))]))
    return "\n".join(rows)


def _like(a: Part, b: Part) -> bool:
    same = all(getattr(a, name) == getattr(b, name) for name in FIELDS)
    return same and a.name.startswith("layer") and a.name.split(" ", 2)[2] == b.name.split(" ", 2)[2]
