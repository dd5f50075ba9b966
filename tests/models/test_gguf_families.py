"""Models of transformers, written as llama.cpp's converter writes them: read from GGUF they give the same logits."""

import copy
import math

import pytest
import torch
from test_families import CAPLESS, LONG_FACTORS, SIZES, YARN, assert_same, assert_same_greedy, randomised
from test_gguf import F32, metadata, pack, write

from cs336.models import from_gguf
from cs336.nn import LinearScaling, RopeConfig, YarnScaling

transformers = pytest.importorskip("transformers")

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SANDWICHED = NAMES | {"post_attention_layernorm": "post_attention_norm"}
NAMES |= {"post_self_attn_layernorm": "post_attention_norm", "post_mlp_layernorm": "post_ffw_norm"}  # of GLM-4
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
GEMMA3 = {"head_dim": 12, "sliding_window": 7, "query_pre_attn_scalar": 12, "num_hidden_layers": 6}
ROPES = {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
ROPES |= {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0}}
PARTIAL = {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.75}
THEIRS = {
    "qwen2": ("Qwen2", SIZES),
    "qwen2, tied": ("Qwen2", SIZES | {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 50.0}}),
    "qwen3": ("Qwen3", SIZES | {"head_dim": 12}),
    "phi3": ("Phi3", SIZES | {"sliding_window": None}),
    "phi3, partial, window": ("Phi3", SIZES | {"sliding_window": 9, "rope_parameters": PARTIAL}),
    "llama, yarn": ("Llama", SIZES | {"rope_parameters": YARN, "head_dim": 8}),
    "qwen3, yarn": ("Qwen3", SIZES | {"head_dim": 12, "rope_parameters": YARN}),
    "glm4": ("Glm4", SIZES | {"head_dim": 16}),
    "gemma": ("Gemma", SIZES | {"head_dim": 12}),
    "gemma2": ("Gemma2", SIZES | {"head_dim": 12, "sliding_window": 7, "query_pre_attn_scalar": 12}),
    "gemma3": ("Gemma3Text", SIZES | GEMMA3 | {"rope_parameters": ROPES}),
}


def made(name):
    family, options = THEIRS[name]
    config = getattr(transformers, f"{family}Config")(**copy.deepcopy(options))  # which it changes
    return randomised(getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config))


def pairs_of(config):
    """The metadata that the converter makes of a configuration."""
    arch = config.model_type.removesuffix("_text")
    head_dim = getattr(config, "head_dim", None)
    pairs = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    if head_dim is not None:
        pairs |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    ropes = config.rope_parameters
    if arch == "gemma3":
        pairs |= {"rope.scaling.type": "linear", "rope.scaling.factor": ropes["full_attention"]["factor"]}
        ropes = ropes["full_attention"]
    if not arch.startswith("gemma") or arch == "gemma3":
        pairs["rope.freq_base"] = ropes["rope_theta"]
    if arch == "phi3":
        turned = int(config.hidden_size // config.num_attention_heads * ropes["partial_rotary_factor"])
        pairs |= {"rope.dimension_count": turned, "rope.scaling.original_context_length": 4096}
        pairs["attention.sliding_window"] = config.sliding_window or 0
    if arch == "glm4":
        pairs["rope.dimension_count"] = int(head_dim * ropes["partial_rotary_factor"])
    if ropes.get("rope_type") == "yarn":
        pairs |= {"rope.scaling.type": "yarn", "rope.scaling.factor": ropes["factor"]}
        pairs["rope.scaling.original_context_length"] = ropes["original_max_position_embeddings"]
    if arch in ("gemma2", "gemma3"):
        pairs["attention.sliding_window"] = config.sliding_window
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, cap, None) is not None:
            pairs[cap] = getattr(config, cap)
    return {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in pairs.items()}


def name_of(name, sandwiched):
    stem, _, last = name.rpartition(".")
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.{last}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{(SANDWICHED if sandwiched else NAMES)[part]}.{last}"


def converted(path, theirs, changes=None, more=None):
    gemma, arch = theirs.config.model_type.startswith("gemma"), theirs.config.model_type
    tensors = dict(more or {})
    for name, t in theirs.state_dict().items():
        if name == "lm_head.weight" and theirs.config.tie_word_embeddings:
            continue
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):  # neighbouring pairs
            t = t.unflatten(0, (-1, 2, theirs.config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        t = t + 1 if gemma and name.endswith("norm.weight") else t
        tensors[name_of(name, arch in ("gemma2", "gemma3_text"))] = (tuple(t.shape), F32, pack(t, F32)[0])
    tokens = {key: value for key, value in metadata().items() if key.startswith("tokenizer.")}
    pairs = pairs_of(theirs.config) | tokens | (changes or {})
    return write(path / "tiny.gguf", {key: value for key, value in pairs.items() if value is not None}, tensors)


@pytest.mark.parametrize("name", THEIRS)
def test_logits_and_tokens_are_those_of_transformers(tmp_path, name):
    theirs = made(name)
    assert_same_greedy(from_gguf(converted(tmp_path, theirs)), theirs)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "phi3", "glm4", "gemma2", "gemma3"])
def test_names_are_those_of_the_package_gguf(name):
    gguf = pytest.importorskip("gguf")
    arch = next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    table = gguf.get_tensor_name_map(arch, 6)
    theirs = made(name)
    for weight in theirs.state_dict().keys() - ({"lm_head.weight"} if theirs.config.tie_word_embeddings else set()):
        expected = table.get_name(weight, try_suffixes=(".weight", ".bias"))
        assert name_of(weight, name in ("gemma2", "gemma3")) == expected


def test_gemma_3_has_two_ropes_and_one_layer_in_six_without_a_window(tmp_path):
    config = from_gguf(converted(tmp_path, made("gemma3"))).config
    assert [block.mixer.window for block in config.blocks] == [7] * 5 + [None]
    assert config.blocks[0].positions == RopeConfig(10000.0)
    assert config.blocks[5].positions == RopeConfig(500.0, scaling=LinearScaling(8.0))


def llama3_factors(theta, D, factor=8.0, low=1.0, high=4.0, original=8192):
    """As llama.cpp's converter makes them: of long wavelengths the factor, of short ones 1, between them in between."""
    factors = []
    for i in range(0, D, 2):
        wavelength = 2 * math.pi * theta ** (i / D)
        share = (original / wavelength - low) / (high - low)
        factors.append(1 if share > 1 else factor if share < 0 else 1 / ((1 - share) / factor + share))
    return factors


def test_the_factors_of_llama_3_are_its_scaling(tmp_path):
    scaling = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    options = SIZES | {"rope_parameters": scaling, "head_dim": 32}
    theirs = randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)))
    factors = torch.tensor(llama3_factors(500000.0, 32))
    assert 1 < factors[8] < 8  # one is between
    more = {"rope_freqs.weight": ((16,), F32, pack(factors, F32)[0])}
    assert_same_greedy(from_gguf(converted(tmp_path, theirs, more=more)), theirs)
    with pytest.raises(ValueError, match=r"unknown weights: rope_freqs\.weight"):
        from_gguf(
            converted(tmp_path, theirs, {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, more)
        )
    factors[8] = 2.0
    more = {"rope_freqs.weight": ((16,), F32, pack(factors, F32)[0])}
    with pytest.raises(ValueError, match=r"rope_freqs\.weight that are not Llama 3\.1's"):
        from_gguf(converted(tmp_path, theirs, more=more))


@pytest.mark.parametrize(("said", "windows"), [(3, [7, 7, None] * 2), ([False, True] * 3, [None, 7] * 3)])
def test_a_file_may_say_which_layers_have_a_window(tmp_path, said, windows):
    path = converted(tmp_path, made("gemma3"), {"gemma3.attention.sliding_window_pattern": said})
    assert [block.mixer.window for block in from_gguf(path).config.blocks] == windows


def test_the_largest_gemmas_scale_their_scores_otherwise(tmp_path):
    """Which their files do not say: 46 layers of Gemma 2 are the 27B."""
    options = (
        THEIRS["gemma2"][1]
        | {"num_hidden_layers": 46, "hidden_size": 8, "intermediate_size": 8, "head_dim": 4}
        | CAPLESS
    )
    theirs = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**options | {"query_pre_attn_scalar": 2}))
    config = from_gguf(converted(tmp_path, theirs)).config
    assert {block.mixer.scale for block in config.blocks} == {2**-0.5}
    assert (config.logit_softcap, config.blocks[0].mixer.softcap) == (30.0, 50.0)  # what llama.cpp takes then


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen2", {"qwen2.rope.scaling.type": "longrope"}, "qwen2.rope.scaling.type = 'longrope'"),
        ("qwen2", {"qwen2.rope.scaling.type": "yarn"}, "lacks qwen2.rope.scaling.factor"),
        ("qwen3, yarn", {"qwen3.rope.scaling.yarn_log_multiplier": 0.1}, "rope.scaling.yarn_log_multiplier = 0.1"),
        ("qwen3, yarn", {"qwen3.rope.scaling.yarn_ext_factor": 0.5}, "rope.scaling.yarn_ext_factor = 0.5"),
        ("phi3", {"phi3.rope.scaling.type": "longrope"}, r"lacks phi3\.rope_factors_short\.weight, phi3"),
        ("qwen2", {"qwen2.block_count": 10**9}, "qwen2.block_count = 1000000000"),
        ("qwen3", {"qwen3.attention.head_count": 2}, r"attn_q\.weight has .* the metadata mean \(24, 32\)"),
        ("qwen3", {"qwen3.attention.value_length": 4}, "qwen3.attention.value_length = 4"),
        ("phi3", {"phi3.rope.scaling.attn_factor": 1.2}, "phi3.rope.scaling.attn_factor = "),
        ("phi3", {"phi3.rope.dimension_count": 10}, "phi3.rope.dimension_count = 10"),
        ("phi3", {"phi3.attention.head_count_kv": 4}, r"qkv\.weight has .* the metadata mean \(96, 32\)"),
        ("phi3", {"phi3.feed_forward_length": 20}, r"ffn_down\.weight has .* the metadata mean \(32, 20\)"),
        ("gemma", {"gemma.attention.sliding_window": 7}, "gemma.attention.sliding_window = 7"),
        ("gemma3", {"gemma3.rope.scaling.factor": None}, "lacks gemma3.rope.scaling.factor"),
        ("gemma3", {"gemma3.attention.sliding_window_pattern": [True]}, r"sliding_window_pattern = \[True\]"),
        ("gemma3", {"gemma3.rope.local.freq_base": 1e4}, "gemma3.rope.local.freq_base = 10000.0"),
        ("gemma3", {"gemma3.attn_logit_softcapping": 3.0}, "gemma3.attn_logit_softcapping = 3.0"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_be_is_named(tmp_path, name, changes, message):
    path = converted(tmp_path, made(name), changes)
    with pytest.raises(ValueError, match=message):
        from_gguf(path)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_positions_may_be_stretched_as_the_file_says(tmp_path, name):
    """Linear, and YaRN with all that a file can say of it."""
    theirs = made(f"{name}, yarn" if f"{name}, yarn" in THEIRS else name)
    linear = {f"{name}.rope.scaling.{key}": None for key in ("original_context_length", "finetuned")}
    linear |= {f"{name}.rope.scaling.type": "linear", f"{name}.rope.scaling.factor": 2.0}
    assert read_positions(converted(tmp_path, theirs, linear)).scaling == LinearScaling(2.0)
    said = {"type": "yarn", "factor": 4.0, "original_context_length": 24, "attn_factor": 1.25, "finetuned": True}
    said |= {"yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0, "yarn_ext_factor": 1.0}
    scaling = read_positions(
        converted(tmp_path, theirs, {f"{name}.rope.scaling.{key}": value for key, value in said.items()})
    ).scaling
    assert scaling == YarnScaling(4.0, 24, 16.0, 2.0, attention_factor=1.25 * (0.1 * math.log(4.0) + 1))


def read_positions(path):
    (block,) = set(from_gguf(path).config.blocks)
    return block.positions


def with_longrope(path, family, **options):
    """As llama.cpp's converter writes it: an attention factor, and the factors of the pairs as weights."""
    config = getattr(transformers, f"{family}Config")(**SIZES | {"sliding_window": None} | options)
    theirs, name = randomised(getattr(transformers, f"{family}ForCausalLM")(config)), family.lower()
    ropes = config.rope_parameters
    original = ropes["original_max_position_embeddings"]
    more = {f"rope_factors_{kind}.weight": ((3,), F32, pack(torch.tensor(ropes[f"{kind}_factor"]), F32)[0])
            for kind in ("long", "short")}  # fmt: skip
    share = math.sqrt(1 + math.log(config.max_position_embeddings / original) / math.log(original))
    said = {f"{name}.rope.scaling.attn_factor": share, f"{name}.rope.scaling.original_context_length": original}
    said |= {f"{name}.rope.scaling.type": "longrope"} if family == "Llama" else {}
    return theirs, converted(path, theirs, said, more)


@pytest.mark.parametrize("family", ["Phi3", "Llama"])
def test_longrope_before_and_beyond_the_original_context(tmp_path, family):
    ropes = LONG_FACTORS | {"original_max_position_embeddings": 90}
    sizes = {"max_position_embeddings": 192, "num_hidden_layers": 2}
    sizes |= (
        {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 90} if family == "Phi3" else {"head_dim": 6}
    )
    theirs, path = with_longrope(tmp_path, family, rope_parameters=ropes, **sizes)
    assert_same_greedy(from_gguf(path, max_len=90), theirs)
    ids = torch.randint(97, (2, 110))
    assert_same(from_gguf(path), theirs, ids)
    scaling = read_positions(path).scaling
    assert (scaling.short_factors, scaling.long_factors) == ((1.0, 1.1, 1.3), (1.0, 2.0, 4.0))


def test_factors_that_an_architecture_has_not_are_refused(tmp_path):
    factors = {f"rope_factors_{kind}.weight": ((4,), F32, pack(torch.ones(4), F32)[0]) for kind in ("long", "short")}
    with pytest.raises(ValueError, match=r"qwen2\.rope_factors_short\.weight = "):
        from_gguf(converted(tmp_path, made("qwen2"), more=factors))
    with pytest.raises(ValueError, match="short_factors must have 4 numbers, one a rotated pair, got 3"):
        from_gguf(
            converted(
                tmp_path,
                made("phi3"),
                more={name: ((3,), kind, data[:12]) for name, (_, kind, data) in factors.items()},
            )
        )
