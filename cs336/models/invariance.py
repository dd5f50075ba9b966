"""Which models give each sequence the bits that it has alone, inside cs336.invariant()."""

from cs336.models.config import TransformerConfig
from cs336.nn import AttentionConfig, MoEConfig


def check_invariant(config: TransformerConfig) -> None:
    """Raises ValueError for blocks whose sums depend on the batch, or on where a prompt is cut."""
    for i, block in enumerate(config.blocks):
        odd = None
        if not isinstance(block.mixer, AttentionConfig):
            odd = f"a {block.mixer.kind} mixer, whose sums depend on where a prompt is cut"
        elif isinstance(block.mlp, MoEConfig):
            odd = "a mixture of experts, whose sums depend on who else asks an expert"
        elif block.positions.kind == "alibi":
            odd = "alibi, which the pages do not have"
        if odd:
            raise ValueError(
                f"inside cs336.invariant() a model has attention and dense MLPs alone: layer {i} has {odd}"
            )
