"""muP: how initial weights and AdamW's learning rates change with width, so that what is best at one width is at all.

With r = mup_base_width / d_model, for AdamW (Yang et al. 2022, arXiv:2203.03466, table 3):

                         init std        learning rate
    embedding, vectors   init_std        lr
    layers' matrices     init_std r^1/2  lr r
    head                 init_std r      lr r

Heads keep their size, so that attention's 1 / sqrt(head_dim) does not change. Decoupled weight decay is per step, not
per learning rate: each group's is divided by its factor (arXiv:2309.14322).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cs336.models.config import TransformerConfig


def init_scale(config: "TransformerConfig", name: str) -> float:
    """Of a matrix's standard deviation, over what it is at the base width."""
    ratio = _ratio(config)
    return ratio if name.startswith("head.") else ratio**0.5 if name.startswith("layers.") else 1.0


def lr_scale(config: "TransformerConfig", name: str, dims: int) -> float:
    """Of a parameter's learning rate, over what it is at the base width."""
    return _ratio(config) if dims >= 2 and name.startswith(("head.", "layers.")) else 1.0


def _ratio(config: "TransformerConfig") -> float:
    return 1.0 if config.mup_base_width is None else config.mup_base_width / config.d_model
