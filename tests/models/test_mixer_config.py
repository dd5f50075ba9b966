"""Mixers and patterns in configurations: TOML there and back, options, and what does not go together."""

import dataclasses
import tomllib
from dataclasses import dataclass

import pytest
import torch
from mixers import MIXERS, NAMES, config, ids

from cs336.models import BlockConfig, Transformer, TransformerConfig
from cs336.nn import (
    Attention,
    AttentionConfig,
    HyenaConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    Mamba2Config,
    NoPositionsConfig,
    RopeConfig,
    SwiGLUConfig,
)
from cs336.utils.config import dumps, override, parse


@dataclass(frozen=True)
class Whole:
    model: TransformerConfig


PATTERN = """
[model]
vocab_size = 97
context_length = 48
num_layers = 8
d_model = 32
pattern = "SSSM"

[[model.layers]]
name = "S"
mixer = {kind = "attention", num_heads = 4, window = 16}

[[model.layers]]
name = "M"
mixer = {kind = "mamba2", state_dim = 16, head_dim = 16}
"""


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name):
    whole = Whole(config(name))
    text = dumps(whole)
    assert parse(Whole, tomllib.loads(text)) == whole
    assert dumps(parse(Whole, tomllib.loads(text))) == text


def test_a_pattern():
    read = parse(Whole, tomllib.loads(PATTERN)).model
    sliding = BlockConfig(AttentionConfig(4, window=16))
    mamba = BlockConfig(Mamba2Config(16, 16))
    assert read.blocks == (sliding, sliding, sliding, mamba) * 2
    assert [block.name for block in read.blocks] == list("SSSM") * 2
    assert mamba.positions == NoPositionsConfig()
    assert parse(Whole, tomllib.loads(dumps(Whole(read)))).model == read
    model = Transformer(read)
    assert [type(layer.attention).__name__ for layer in model.layers] == (["Attention"] * 3 + ["Mamba2"]) * 2
    assert sum(p.numel() for p in model.parameters()) == read.num_parameters()
    assert model(ids()).shape == (2, 24, 97)
    words = PATTERN.replace('"SSSM"', '"sliding sliding mamba"').replace("= 8", "= 6")
    words = words.replace('"S"', '"sliding"').replace('"M"', '"mamba"')
    assert parse(Whole, tomllib.loads(words)).model.blocks == (sliding, sliding, mamba) * 2


def test_a_pattern_is_a_list_of_names_too():
    text = parse(Whole, tomllib.loads(PATTERN)).model
    listed = PATTERN.replace('"SSSM"', '["S", "S", "S", "M"]')
    assert parse(Whole, tomllib.loads(listed)).model == text
    assert dataclasses.replace(text, pattern=("S", "S", "S", "M")) == text
    words = listed.replace('"S"', '"local"').replace('"M"', '"M"')
    read = parse(Whole, tomllib.loads(words)).model
    assert read.pattern == "local local local M"
    assert read.blocks == text.blocks
    assert parse(Whole, tomllib.loads(dumps(Whole(read)))).model == read
    for options in (["--model.pattern", "S", "S", "S", "M"], ['--model.pattern=["S", "S", "S", "M"]']):
        assert parse(Whole, override(Whole, tomllib.loads(PATTERN), options)).model == text
    numbers = PATTERN.replace('"SSSM"', '"1112"').replace('"S"', '"1"').replace('"M"', '"2"')
    assert parse(Whole, override(Whole, tomllib.loads(numbers), ["--model.pattern", "12"])).model.pattern == "12"
    with pytest.raises(ValueError, match="orders layers by their names"):
        config("attention", layers=None, num_heads=4, pattern=["S", "S"])
    for bad in (["S", "M M"], ["S", ""], ["S", 1]):
        with pytest.raises(ValueError, match="a list for a pattern holds layers' names, each one word"):
            dataclasses.replace(text, pattern=bad)


def test_layers_may_come_as_a_list():
    text = parse(Whole, tomllib.loads(PATTERN)).model
    listed = dataclasses.replace(text, layers=list(text.layers))
    assert listed == text
    assert hash(listed) == hash(text)


def test_options_change_layers():
    table = tomllib.loads(PATTERN)
    changed = parse(
        Whole, override(Whole, table, ["--model.pattern", "MS", "--model.layers.0.mixer.window", "8"])
    ).model
    assert [block.mixer.kind for block in changed.blocks] == ["mamba2", "attention"] * 4
    assert changed.blocks[1].mixer.window == 8


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"SSSM"', '"SSXM"', "pattern 'SSXM' names the layer 'X'; there are S, M"),
        ('"SSSM"', '"SS"', "pattern 'SS' leaves out the layer M"),
        ('"SSSM"', '"SSM"', "num_layers 8 is not a multiple of the 3 layers that repeat"),
        ('"SSSM"', '""', "pattern '' leaves out the layer M, S"),
        ('name = "M"', 'name = "S"', "a pattern needs layers with names, each another and one word"),
        ('name = "M"', "", "a pattern needs layers with names"),
        ('name = "M"', 'name = "M M"', "a pattern needs layers with names"),
        ("state_dim", "state_dime", "unknown key model.layers.1.mixer.state_dime; did you mean .*state_dim?"),
        ('kind = "mamba2"', 'kind = "mamba"', "must be 'attention' or .* got 'mamba'; did you mean 'mamba2'?"),
        ("state_dim = 16", "num_heads = 16", "unknown key model.layers.1.mixer.num_heads"),
        ("window = 16", "window = 0", "window must be a positive integer, got 0"),
        ("window = 16", 'window = "16"', "window must be int, got '16'"),
        ("head_dim = 16", "head_dim = 24", r"expand \* d_model = 64 is not a multiple of head_dim 24"),
        ("head_dim = 16", "num_groups = 3, head_dim = 16", "4 heads are not a multiple of num_groups 3"),
        ("head_dim = 16", "conv_size = 1", "conv_size must be 2 or more: a convolution of 1 sees no other token"),
    ],
)
def test_what_does_not_fit(old, new, message):
    assert old in PATTERN
    with pytest.raises(ValueError, match=message):
        parse(Whole, tomllib.loads(PATTERN.replace(old, new)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearAttentionConfig(5).key_size(32), "d_model 32 is not a multiple of num_heads 5"),
        (lambda: LinearAttentionConfig(4, conv_size=1), "conv_size must be 2 or more"),
        (lambda: LinearAttentionConfig(4, decay="gated"), "decay must be 'none' or 'head' or 'token', got 'gated'"),
        (lambda: LinearAttentionConfig(4, delta=1), "delta must be true or false, got 1"),
        (lambda: LatentAttentionConfig(4, 0, 8, 4), "kv_rank must be a positive integer, got 0"),
        (lambda: LatentAttentionConfig(4, 8, 8, 4, q_rank=0), "q_rank must be a positive integer, got 0"),
        (lambda: HyenaConfig(0), "filter_length must be a positive integer, got 0"),
        (lambda: BlockConfig(LatentAttentionConfig(4, 8, 8, 3)).check(32), "head_dim must be even"),
        (lambda: BlockConfig(LinearAttentionConfig(5)).check(32), "d_model 32 is not a multiple of num_heads 5"),
        (
            lambda: BlockConfig(Mamba2Config(), positions=RopeConfig(500.0)),
            "a mamba2 mixer takes positions of kind 'none', got 'rope'",
        ),
        (lambda: BlockConfig("attention"), "mixer must be a AttentionConfig or .* got 'attention'"),
        (lambda: BlockConfig(SwiGLUConfig()), r"mixer must be a .* or HyenaConfig, got SwiGLUConfig"),
        (lambda: BlockConfig(Mamba2Config(), "swiglu"), "mlp must be a SwiGLUConfig or .* got 'swiglu'"),
        (lambda: BlockConfig(Mamba2Config(), norm=None), "norm must be a RMSNormConfig or LayerNormConfig, got None"),
        (lambda: BlockConfig(Mamba2Config(), positions="none"), "positions must be a RopeConfig or .* got 'none'"),
        (lambda: RopeConfig(scaling="yarn"), "scaling must be a LinearScaling or .* got 'yarn'"),
        (lambda: config("attention", layers=("S",)), r"layers\[0\] must be a BlockConfig, got 'S'"),
        (lambda: config("attention", layers=BlockConfig(Mamba2Config())), "layers must be a list or tuple, got Block"),
        (lambda: config("attention", pattern=3), "pattern must be a str, got 3"),
        (
            lambda: Attention(32, 4, causal=False, window=4),
            "a window counts the tokens before: it needs causal attention",
        ),
        (
            lambda: config("attention", layers=None, num_heads=4, pattern="SS"),
            "pattern 'SS' orders layers by their names",
        ),
        (lambda: config("mamba2").kv_heads, r"no layer has heads of attention: the mixers are \['mamba2'\]"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_first_attention_has_the_heads():
    both = config(
        "mamba2, latent, hyena",
        layers=(BlockConfig(MIXERS["mamba2"]), BlockConfig(AttentionConfig(4, 2))),
        num_layers=2,
    )
    assert (both.kv_heads, both.head_size) == (2, 8)


def test_other_mixers_have_no_short_form():
    short = config("attention").short_form()
    assert (short.layers, short.num_heads, short.num_kv_heads, short.d_ff) == (None, 4, 2, 48)
    assert short.blocks == config("attention").blocks
    for name in NAMES[1:]:
        assert config(name).short_form() is None


def test_layers_share_tables_of_one_size():
    latent, full = BlockConfig(MIXERS["latent"]), BlockConfig(AttentionConfig(8))
    model = Transformer(config("attention", layers=(latent, full, latent, full), num_layers=4))
    ropes = [layer.attention.rope for layer in model.layers]
    assert ropes[0] is ropes[1] is ropes[2] is ropes[3]  # of 4 features, in either kind
    assert ropes[0].cos.shape == (48, 2)


@pytest.mark.parametrize("name", NAMES)
def test_weights_onto_a_model_without_memory(name):
    model = Transformer(config(name))
    with torch.device("meta"):
        late = Transformer(config(name))
    late.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(late(ids() * 0), model(ids() * 0))
