"""Every kind of block as a tiny model: what benchmarks compare, and tests train and decode."""

from typing import Any

from cs336.models import BlockConfig, TransformerConfig
from cs336.nn import (
    AlibiConfig,
    AttentionConfig,
    GELUConfig,
    HyenaConfig,
    LatentAttentionConfig,
    LayerNormConfig,
    LinearAttentionConfig,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Mamba2Config,
    MLPConfig,
    MoEConfig,
    NoMLPConfig,
    NoPositionsConfig,
    NtkScaling,
    RMSNormConfig,
    RopeConfig,
    YarnScaling,
)

ATTENTION, NONE = AttentionConfig(4), NoPositionsConfig()
SHAPE: dict[str, Any] = {"vocab_size": 64, "context_length": 32, "num_layers": 2, "d_model": 32, "init_std": 0.1}


def model(*layers: BlockConfig, **options: Any) -> TransformerConfig:
    return TransformerConfig(**SHAPE | options, layers=layers)


def block(mixer: Any = ATTENTION, **options: Any) -> TransformerConfig:
    return model(BlockConfig(mixer, **options))


MLPS = {
    "ReLU": block(mlp=MLPConfig("relu")),
    "ReLU^2": block(mlp=MLPConfig("relu2")),
    "GELU": block(mlp=GELUConfig()),
    "SiLU": block(mlp=MLPConfig("silu")),
    "GLU": block(mlp=MLPConfig("sigmoid", gated=True)),
    "GLU of ReLU^2": block(mlp=MLPConfig("relu2", gated=True)),
    "ReGLU": block(mlp=MLPConfig("relu", gated=True)),
    "GEGLU": block(mlp=MLPConfig("gelu", gated=True)),
    "GEGLU (tanh), biases": block(mlp=MLPConfig("gelu_tanh", gated=True, d_ff=40, bias=True)),
    "SwiGLU": block(),
    "no MLP": block(mlp=NoMLPConfig()),
}
NORMS = {
    "LayerNorm": block(norm=LayerNormConfig()),
    "RMSNorm without weight": block(norm=RMSNormConfig(weight=False)),
    "LayerNorm without parameters": block(norm=LayerNormConfig(weight=False, bias=False)),
    "post-norm": block(norm=LayerNormConfig(), placement="post"),
    "sandwich": block(placement="sandwich"),
    "reordered": block(AttentionConfig(4, 2, qk_norm="all"), placement="reordered"),
    "placements mixed": model(*(BlockConfig(ATTENTION, placement=place) for place in ("post", "reordered"))),
    "parallel": block(parallel=True, norm=LayerNormConfig(bias=False)),
}
POSITIONS = {
    "no positions": block(positions=NONE),
    "learned": model(BlockConfig(ATTENTION, positions=NONE), position_embedding="learned"),
    "sinusoidal": model(BlockConfig(ATTENTION, positions=NONE), position_embedding="sinusoidal", embedding_scale=5.5),
    "RoPE, linear": block(positions=RopeConfig(scaling=LinearScaling(4.0))),
    "RoPE, NTK": block(positions=RopeConfig(scaling=NtkScaling(4.0))),
    "RoPE, YaRN": block(positions=RopeConfig(scaling=YarnScaling(4.0, 8))),
    "RoPE, Llama 3": block(positions=RopeConfig(scaling=Llama3Scaling(8.0, 16))),
    "RoPE, LongRoPE": block(positions=RopeConfig(scaling=LongRopeScaling((1.0,) * 4, (1.0, 1.5, 2.5, 4.0), 8, 4.0))),
    "RoPE of half a head": block(positions=RopeConfig(fraction=0.5)),
    "ALiBi": block(AttentionConfig(6, 3, head_dim=8), positions=AlibiConfig()),
}
BOUNDS = {
    "soft-caps": model(BlockConfig(AttentionConfig(4, softcap=1.5)), logit_softcap=3.0),
    "sinks": block(AttentionConfig(4, 2, sinks=True)),
    "QK-norm": block(AttentionConfig(4, 2, qk_norm=True)),
    "biases and scale": block(AttentionConfig(4, 1, qkv_bias=True, out_bias=True, scale=0.2)),
    "scaled residuals": model(BlockConfig(ATTENTION, residual_scale=0.4), embedding_scale=2.0, tie_embeddings=True),
}
DROPOUT = model(BlockConfig(AttentionConfig(4, dropout=0.1), dropout=0.1, stochastic_depth=0.1), embedding_dropout=0.1)
EXPERTS = {
    "MoE": block(mlp=MoEConfig(4, 2, d_ff=40)),
    "MoE, z-loss": block(mlp=MoEConfig(8, 2, d_ff=24, z_loss=0.001, normalize=False)),
    "MoE, shared and fine": block(mlp=MoEConfig(12, 3, d_ff=16, num_shared=2, router="sigmoid", scale=1.5)),
    "MoE, bias balance": block(mlp=MoEConfig(6, 2, d_ff=24, router="sigmoid", balance="bias", gated=False)),
    "MoE among others": model(BlockConfig(ATTENTION), BlockConfig(ATTENTION, MoEConfig(4, 1, 40), parallel=True)),
}
VARIANTS = MLPS | NORMS | POSITIONS | BOUNDS | EXPERTS | {"dropout": DROPOUT}

MIXERS = {
    "sliding window": block(AttentionConfig(4, 2, window=8)),
    "multi-query": block(AttentionConfig(4, 1)),
    "latent attention": block(LatentAttentionConfig(4, 12, 8, 4)),
    "linear attention": block(LinearAttentionConfig(4, decay="none", conv_size=0)),
    "retention": block(LinearAttentionConfig(4, decay="head")),
    "gated linear attention": block(LinearAttentionConfig(4)),
    "delta rule": block(LinearAttentionConfig(4, decay="none", delta=True)),
    "gated delta rule": block(LinearAttentionConfig(4, delta=True)),
    "Mamba-2": block(Mamba2Config(8, 16)),
    "Hyena": block(HyenaConfig(32, 16)),
}
