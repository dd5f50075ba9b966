"""What config.json of released models says is read, and means as many weights as they have."""

import pytest

from cs336.models.huggingface.directory import FAMILIES, QUANTIZATION

HEADS, LAYERS, WIDTHS = "num_attention_heads", "num_hidden_layers", ("hidden_size", "intermediate_size", "vocab_size")
OF_ALL = {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16"}
OF_ALL |= {
    "rope_scaling": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "transformers_version": "4.46.0",
}


def sizes(hidden, inner, vocabulary, layers, heads, kv_heads, length):
    found = dict(zip(WIDTHS, (hidden, inner, vocabulary), strict=True)) | {LAYERS: layers, HEADS: heads}
    return OF_ALL | found | {"num_key_value_heads": kv_heads, "max_position_embeddings": length}


PHI = {"attention_bias": False, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "hidden_act": "silu", "rms_norm_eps": 1e-5}
PHI |= {"tie_word_embeddings": False, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}}
COHERE = {"attention_bias": False, "hidden_act": "silu", "layer_norm_eps": 1e-5}
SAID = {"layer_switch": 4, "order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj"}
SAID |= {"rotary_pct": 1.0, "use_embedding_sharing": True, "use_gated_activation": True, "use_parallel_block": True}
SAID |= {"use_parallel_embedding": False, "use_qk_norm": False, "cache_implementation": "hybrid", "head_dim": 128}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
YARN |= {"original_max_position_embeddings": 4096}
FACTORS = {"long_factor": [1.0 + i / 2 for i in range(48)], "short_factor": [1 + i / 100 for i in range(48)]}
LONG = {"original_max_position_embeddings": 4096, "rope_theta": 10000.0}
RELEASED = {
    "Gemma 2B": ("gemma", 2.506, sizes(2048, 16384, 256000, 18, 8, 1, 8192) | {
        "head_dim": 256, "hidden_act": "gelu", "hidden_activation": None, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "attention_bias": False,
    }),
    "Phi-3 mini 4k": ("phi3", 3.821, sizes(3072, 8192, 32064, 32, 32, 32, 4096) | PHI | {
        "original_max_position_embeddings": 4096, "rope_theta": 10000.0, "sliding_window": 2047,
    }),
    "Phi-4": ("phi3", 14.660, sizes(5120, 17920, 100352, 40, 40, 10, 16384) | PHI | {
        "original_max_position_embeddings": 16384, "rope_theta": 250000, "sliding_window": None,
    }),
    "Phi-3 mini 128k": ("phi3", 3.821, sizes(3072, 8192, 32064, 32, 32, 32, 131072) | PHI | LONG | {
        "rope_scaling": {"type": "su"} | FACTORS, "sliding_window": 262144,
    }),
    "Phi-3.5 mini": ("phi3", 3.821, sizes(3072, 8192, 32064, 32, 32, 32, 131072) | PHI | LONG | {
        "rope_scaling": {"type": "longrope"} | FACTORS, "sliding_window": 262144,
    }),
    "Phi-4 mini": ("phi3", 3.836, sizes(3072, 8192, 200064, 32, 24, 8, 131072) | PHI | LONG | {
        "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False,
        "partial_rotary_factor": 0.75, "rope_scaling": {"type": "longrope"} | FACTORS, "sliding_window": 262144,
        "tie_word_embeddings": True,
    }),
    "GLM-4 9B 0414": ("glm4", 9.400, sizes(4096, 13696, 151552, 40, 32, 2, 32768) | {
        "attention_bias": True, "eos_token_id": [151329, 151336, 151338], "head_dim": 128, "hidden_act": "silu",
        "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "pad_token_id": 151329,
    }),
    "SmolLM3 3B": ("smollm3", 3.075, sizes(2048, 11008, 128256, 36, 16, 4, 65536) | {
        "attention_bias": False, "hidden_act": "silu", "layer_types": ["full_attention"] * 36, "mlp_bias": False,
        "max_window_layers": 28, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "pretraining_tp": 2,
        "rms_norm_eps": 1e-6, "rope_theta": 5e6, "sliding_window": None, "use_sliding_window": False,
    }),
    "Granite 3.0 2B": ("granite", 2.534, sizes(2048, 8192, 49155, 40, 32, 8, 4096) | {
        "attention_bias": False, "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "hidden_act": "silu",
        "logits_scaling": 8.0, "mlp_bias": False, "residual_multiplier": 0.22, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": True,
    }),
    "OLMoE 7B": ("olmoe", 6.919, sizes(2048, 1024, 50304, 16, 16, 16, 4096) | {
        "attention_bias": False, "clip_qkv": None, "hidden_act": "silu", "norm_topk_prob": False, "num_experts": 64,
        "num_experts_per_tok": 8, "output_router_logits": False, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.01, "tie_word_embeddings": False,
    }),
    "Qwen1.5-MoE": ("qwen2_moe", 14.316, sizes(2048, 5632, 151936, 24, 16, 16, 8192) | {
        "decoder_sparse_step": 1, "hidden_act": "silu", "max_window_layers": 21, "moe_intermediate_size": 1408,
        "norm_topk_prob": False, "num_experts": 60, "num_experts_per_tok": 4, "output_router_logits": False,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "router_aux_loss_coef": 0.001, "sliding_window": 32768,
        "shared_expert_intermediate_size": 5632, "tie_word_embeddings": False, "use_sliding_window": False,
    }),
    "Command R": ("cohere", 34.981, sizes(8192, 22528, 256000, 40, 64, 64, 8192) | COHERE | {
        "logit_scale": 0.0625, "model_max_length": 131072, "pretraining_tp": 1, "rope_theta": 8000000.0,
    }),
    "Command R7B": ("cohere2", 8.028, sizes(4096, 14336, 256000, 32, 32, 8, 8192) | COHERE | SAID | {
        "logit_scale": 0.25, "rope_theta": 50000, "sliding_window": 4096, "sliding_window_pattern": 4,
    }),
    "gpt-oss 20B": ("gpt_oss", 20.915, sizes(2880, 2880, 201088, 24, 64, 8, 131072) | {
        "attention_bias": True, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", QUANTIZATION: MXFP4,
        "initial_context_length": 4096, "layer_types": ["sliding_attention", "full_attention"] * 12,
        "num_experts_per_tok": 4, "num_local_experts": 32, "output_router_logits": False, "rms_norm_eps": 1e-5,
        "rope_scaling": YARN, "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128,
        "swiglu_limit": 7.0, "tie_word_embeddings": False,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_it_is_read_and_is_as_large_as_it_is(name):
    family, billions, table = RELEASED[name]
    config = FAMILIES[family].config({key: value for key, value in table.items() if key != QUANTIZATION})
    assert config.num_parameters() / 1e9 == pytest.approx(billions, abs=0.0006)


@pytest.mark.parametrize("name", RELEASED)
def test_what_is_written_is_read_as_the_same(name):
    family, _, table = RELEASED[name]
    config = FAMILIES[family].config({key: value for key, value in table.items() if key != QUANTIZATION})
    assert FAMILIES[family].table(config) is not None


@pytest.mark.parametrize("name", ["Phi-3 mini 128k", "Phi-3.5 mini", "Phi-4 mini"])
def test_longrope_of_phi(name):
    """Whose attention factor goes with 128k tokens of 4k, whichever of the factors are taken."""
    config = FAMILIES["phi3"].config(RELEASED[name][2])
    (block,) = set(config.blocks)
    scaling, rotary = block.positions.scaling, block.positions.rotary_dim(block.mixer.head_size(config.d_model))
    assert (rotary, scaling.original_context_length, scaling.factor) == (96, 4096, 32.0)
    assert scaling.frequencies(rotary, 1e4, 131072)[1] == scaling.frequencies(rotary, 1e4, 4096)[1]
    assert scaling.frequencies(rotary, 1e4, 4096)[1] == pytest.approx(1.19024, abs=1e-5)
