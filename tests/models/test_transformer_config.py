import dataclasses
import tomllib

import pydantic
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cs336 import ops
from cs336.models import BlockConfig, Transformer, TransformerConfig
from cs336.nn import (
    AttentionConfig,
    GELUConfig,
    LayerNormConfig,
    NoPositionsConfig,
    RMSNormConfig,
    RopeConfig,
    SwiGLUConfig,
)
from cs336.ops import registry

GPT2 = TransformerConfig(50304, 1024, num_layers=12, d_model=768, num_heads=12, tie_embeddings=True)
SMALL = TransformerConfig(97, 16, num_layers=2, d_model=32, num_heads=4)
VARIANTS = [
    {},
    {"tie_embeddings": True},
    {"num_kv_heads": 2, "d_ff": 40},
    {"num_kv_heads": 1, "head_dim": 6, "qk_norm": True, "qkv_bias": True},
    {"num_heads": None, "layers": (BlockConfig(AttentionConfig(2), GELUConfig(), LayerNormConfig()),)},
    {
        "num_heads": None,
        "layers": (BlockConfig(AttentionConfig(8)), BlockConfig(AttentionConfig(4, 2), SwiGLUConfig(40))),
        "num_layers": 4,
    },
]
READ = pydantic.TypeAdapter(TransformerConfig).validate_python
LAYERS = """
vocab_size = 97
context_length = 16
num_layers = 4
d_model = 32

[[layers]]
mixer = {kind = "attention", num_heads = 8, num_kv_heads = 2}
mlp = {kind = "gelu"}
norm = {kind = "layer_norm", bias = false}
positions = {kind = "none"}

[[layers]]
mixer = {kind = "attention", num_heads = 4}
"""


def test_what_follows_from_the_rest():
    assert (GPT2.kv_heads, GPT2.head_size, GPT2.ff_size) == (12, 64, 2048)
    wider = dataclasses.replace(GPT2, d_model=1536)
    assert (wider.head_size, wider.ff_size) == (128, 4096)
    given = dataclasses.replace(GPT2, num_kv_heads=4, head_dim=32, d_ff=100)
    assert (given.kv_heads, given.head_size, given.ff_size) == (4, 32, 100)


def test_parameters_by_hand():
    matrices = 12 * (4 * 768 * 768 + 3 * 768 * 2048)
    norms = 12 * 2 * 768 + 768
    assert GPT2.num_parameters(embeddings=False) == matrices + norms
    assert GPT2.num_parameters() == matrices + norms + 50304 * 768
    assert dataclasses.replace(GPT2, tie_embeddings=False).num_parameters() == matrices + norms + 2 * 50304 * 768


def test_flops_by_hand():
    matrices = 12 * (4 * 768 * 768 + 3 * 768 * 2048) + 50304 * 768
    scores_and_values = 2 * (2 * 12 * 64 * 1024)  # two matmuls, 2 FLOPs a product, every head and key
    assert GPT2.flops_per_token() == 3 * (2 * matrices + 12 * scores_and_values)
    assert GPT2.flops_per_token(512) == 3 * (2 * matrices + 12 * scores_and_values // 2)


@pytest.mark.parametrize("change", VARIANTS)
def test_counts_of_the_model_itself(change):
    config = dataclasses.replace(SMALL, **change)
    model = Transformer(config, device="meta")
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters()
    ids = torch.zeros(3, 11, dtype=torch.long, device="meta")
    with registry.use("ref"), FlopCounterMode(display=False) as counter:
        ops.cross_entropy(model(ids), ids).backward()
    assert counter.get_total_flops() == 3 * 11 * config.flops_per_token(11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"num_layers": None}, "num_layers must be a positive integer, got None"),
        ({"d_model": 32.0}, "d_model must be a positive integer"),
        ({"num_heads": True}, "num_heads must be a positive integer"),
        ({"num_kv_heads": 0}, "num_kv_heads must be a positive integer"),
        ({"num_heads": 5}, "d_model 32 is not a multiple of num_heads 5: change one or set head_dim"),
        ({"num_heads": 32}, "head_dim must be even for rotary positions, got 1"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"rope_theta": 0.0}, "rope_theta must be a positive, finite number"),
        ({"norm_eps": float("nan")}, "norm_eps must be a positive, finite number"),
        ({"logit_softcap": -5.0}, "logit_softcap must be a positive, finite number"),
        ({"init_std": None}, "init_std must be a positive, finite number"),
        ({"rope_theta": "10000"}, "rope_theta must be a positive, finite number"),
    ],
)
def test_bad_values(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_layers_from_toml():
    config = READ(tomllib.loads(LAYERS))
    first = BlockConfig(AttentionConfig(8, 2), GELUConfig(), LayerNormConfig(bias=False), NoPositionsConfig())
    second = BlockConfig(AttentionConfig(4), SwiGLUConfig(), RMSNormConfig(), RopeConfig())
    assert config.blocks == (first, second, first, second)
    assert READ(dataclasses.asdict(config)) == config
    assert READ(dataclasses.asdict(GPT2)) == GPT2
    model = Transformer(config, device="meta")
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"gelu"', '"relu"', r"layers\.0\.mlp\s.*'relu'.*'swiglu', 'gelu'"),
        ('"attention", num_heads = 4', '"mamba"', r"layers\.1\.mixer"),
        ("num_heads = 4", "num_heads = 5", "d_model 32 is not a multiple of num_heads 5"),
        ("num_layers = 4", "num_layers = 5", "num_layers 5 is not a multiple of the 2 layers that repeat"),
        ("num_layers = 4", "num_layers = 4\nd_ff = 10", "layers describe the blocks whole: say d_ff there"),
    ],
)
def test_layers_that_do_not_fit(old, new, message):
    with pytest.raises(ValueError, match=message):
        READ(tomllib.loads(LAYERS.replace(old, new)))


def test_no_layers():
    with pytest.raises(ValueError, match="not a multiple of the 0 layers"):
        dataclasses.replace(SMALL, num_heads=None, layers=())
    with pytest.raises(ValueError, match="num_heads must be a positive integer, got None"):
        dataclasses.replace(SMALL, num_heads=None)
