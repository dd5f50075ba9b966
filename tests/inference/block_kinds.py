"""A block of each kind of mixer, and with a mixture of experts."""

from cs336.models import BlockConfig
from cs336.nn import (
    AttentionConfig,
    HyenaConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    Mamba2Config,
    MoEConfig,
)

MIXERS = {
    "attention": BlockConfig(AttentionConfig(4, 2, qkv_bias=True)),
    "latent": BlockConfig(LatentAttentionConfig(2, 16, 16, rope_head_dim=8)),
    "linear": BlockConfig(LinearAttentionConfig(2)),
    "delta": BlockConfig(LinearAttentionConfig(2, delta=True)),
    "mamba2": BlockConfig(Mamba2Config(head_dim=16, state_dim=8)),
    "hyena": BlockConfig(HyenaConfig(32)),
    "experts": BlockConfig(AttentionConfig(4), MoEConfig(4, 2, num_shared=1, shared_gate=True)),
    "parallel": BlockConfig(AttentionConfig(4), parallel=True),
}
