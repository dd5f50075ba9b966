"""Every mixer and some mixtures, small, for the tests that ask the same of each."""

import torch

from cs336.models import BlockConfig, Transformer, TransformerConfig
from cs336.nn import (
    AttentionConfig,
    HyenaConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    Mamba2Config,
    NoPositionsConfig,
    SwiGLUConfig,
)

MIXERS = {
    "attention": AttentionConfig(4, 2),
    "window": AttentionConfig(4, 2, window=5),
    "window, normed": AttentionConfig(2, qk_norm=True, qkv_bias=True, window=1),
    "latent": LatentAttentionConfig(4, 12, 8, 4),
    "latent, all options": LatentAttentionConfig(2, 10, 6, 8, value_dim=12, q_rank=14),
    "linear": LinearAttentionConfig(4, decay="none", conv_size=0),
    "retention": LinearAttentionConfig(4, decay="head"),
    "gated linear": LinearAttentionConfig(2, 6, 10),
    "delta": LinearAttentionConfig(4, decay="none", delta=True, conv_size=3),
    "gated delta": LinearAttentionConfig(4, 8, 6, delta=True),
    "mamba2": Mamba2Config(8, 16, num_groups=2),
    "hyena": HyenaConfig(48, 16),
    "hyena, short": HyenaConfig(6, 8),
}
MIXTURES = {
    "window and full": ("attention", "window"),
    "mamba2, latent, hyena": ("mamba2", "latent", "hyena, short"),
    "delta, window without positions": ("gated delta", "window"),
}
NAMES = [*MIXERS, *MIXTURES]


def config(name, **changes):
    """Two layers of a mixer, or a layer of each of a mixture."""
    mixers = [MIXERS[part] for part in MIXTURES.get(name, (name, name))]
    blocks = [BlockConfig(mixer, SwiGLUConfig(48)) for mixer in mixers]
    if "without positions" in name:
        blocks = [BlockConfig(mixer, SwiGLUConfig(48), positions=NoPositionsConfig()) for mixer in mixers]
    settings = {"num_layers": len(blocks), "d_model": 32, "init_std": 0.15, "layers": tuple(blocks)} | changes
    return TransformerConfig(97, settings.pop("context_length", 48), **settings)


def make(name, **options):
    """A model whose norms, biases and decays are none that it could do without."""
    changes = {key: options.pop(key) for key in ("context_length", "d_model") if key in options}
    model = Transformer(config(name, **changes), **options)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if p.dim() == 1 and not parameter_name.endswith(("A_log", "dt_bias", "frequency")):
                p.uniform_(0.5, 1.5)
    return model


def ids(B=2, S=24):
    return torch.randint(0, 97, (B, S))


def tensors(state):
    """All tensors of a decoding state's layers."""
    found = []

    def walk(part):
        if isinstance(part, torch.Tensor):
            found.append(part)
        elif isinstance(part, (list, tuple)):
            for item in part:
                walk(item)
        elif hasattr(part, "__dict__"):
            for item in vars(part).values():
                walk(item)

    walk(state.layers)
    return found
