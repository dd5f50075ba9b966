"""Each family of transformers, tiny and random: equal greedy tokens and distributions, both ways."""

import contextlib
import copy
import json
import math
import pathlib

import pytest
import torch
from inference.block_kinds import MIXERS
from safetensors.torch import save_file
from test_transformer import make

from benchmarks.end_to_end.variants import VARIANTS
from cs336.inference import SamplingParams
from cs336.inference.generate import generate_ids
from cs336.inference.load import load_model
from cs336.models import BlockConfig, Transformer, TransformerConfig, from_pretrained, save_pretrained
from cs336.models.gguf.architectures import ARCHITECTURES
from cs336.models.huggingface.directory import FAMILIES
from cs336.models.huggingface.family import resolved
from cs336.nn import (
    AttentionConfig,
    LayerNormConfig,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    MLPConfig,
    NoPositionsConfig,
    RMSNormConfig,
    RopeConfig,
    SwiGLUConfig,
    YarnScaling,
)
from cs336.training import save_checkpoint

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 96}
SIZES |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "eos_token_id": None}
GPT2 |= {"bos_token_id": None}
NARROW = {"n_inner": 24, "activation_function": "relu", "tie_word_embeddings": False}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 24}
MSCALE = {"mscale": 0.7, "mscale_all_dim": 0.5, "beta_fast": 16, "truncate": False}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
DEEPSEEK = {"num_key_value_heads": 4, "kv_lora_rank": 10, "q_lora_rank": 14, "qk_rope_head_dim": 8, "v_head_dim": 12}
DEEPSEEK |= {"qk_nope_head_dim": 6, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
DEEPSEEK |= {"first_k_dense_replace": 1, "routed_scaling_factor": 1.5, "num_hidden_layers": 3}
GROUPED, UNGROUPED = {"n_group": 4, "topk_group": 2}, {"n_group": 1, "topk_group": 1}
LATENT_YARN = {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.5}, "q_lora_rank": None}
MAMBA2 = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "head_dim": 16, "num_heads": 4}
MAMBA2 |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GEMMA3 = {"head_dim": 12, "sliding_window": 7, "query_pre_attn_scalar": 20, "num_hidden_layers": 3}
GEMMA3 |= {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GEMMA = {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": False, "hidden_act": "relu"}
PHI3 = {"num_key_value_heads": 1, "sliding_window": 5, "resid_pdrop": 0.1, "tie_word_embeddings": True}
PHI3 |= {
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.75},
    "rms_norm_eps": 1e-3,
}
LONG_FACTORS = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0, 1.1, 1.3]}
LONG_FACTORS |= {"long_factor": [1.0, 2.0, 4.0]}
LONGROPE = {"rope_parameters": LONG_FACTORS, "partial_rotary_factor": 0.75, "tie_word_embeddings": True}
OTHER_LONGROPE = LONG_FACTORS | {"factor": 4.0, "attention_factor": 1.2, "original_max_position_embeddings": 8}
GLM = {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.75}, "head_dim": 16}
SMOLLM3 = {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 0, 1], "attention_bias": True, "mlp_bias": True}
MULTIPLIERS = {"embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7}
GRANITE = MULTIPLIERS | {"logits_scaling": 1.3, "attention_bias": True, "tie_word_embeddings": True}
OLMOE = {"num_experts": 4, "num_experts_per_tok": 3, "norm_topk_prob": True, "attention_bias": True}
SHARED = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
SHARED |= {"shared_expert_intermediate_size": 36}
COHERE2 = {
    "logit_scale": 2.0,
    "sliding_window": 5,
    "layer_types": ["full_attention", "sliding_attention"],
    "tie_word_embeddings": False,
}
GPT_OSS = {"head_dim": 8, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 7}
PLAIN = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
    "attention_bias": False,
    "num_hidden_layers": 3,
}
PLAIN |= {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}
TWO_ROPES = {"sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}
TWO_ROPES |= {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}
OLMO3 = {"sliding_window": 7, "num_hidden_layers": 5}  # full is the fourth
QWEN_WINDOWS = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "num_hidden_layers": 3}
OTHER_TURNS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
CAPLESS = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
THEIRS = {
    "gpt2": ("GPT2", GPT2),
    "gpt2 narrow, untied": (
        "GPT2",
        GPT2 | {"n_inner": 24, "activation_function": "relu", "tie_word_embeddings": False},
    ),
    "llama": ("Llama", SIZES),
    "llama with biases": ("Llama", SIZES | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama 3": ("Llama", SIZES | {"rope_parameters": LLAMA3, "head_dim": 12}),
    "llama, linear": ("Llama", SIZES | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "llama of gelu": ("Llama", SIZES | {"hidden_act": "gelu"}),
    "mistral": ("Mistral", SIZES | {"sliding_window": None}),
    "qwen2": ("Qwen2", SIZES),
    "qwen2, yarn": ("Qwen2", SIZES | {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen2, yarn's mscale": ("Qwen2", SIZES | {"rope_parameters": YARN | MSCALE}),
    "qwen3": ("Qwen3", SIZES | {"head_dim": 12}),
    "qwen2 with windows": ("Qwen2", SIZES | QWEN_WINDOWS),
    "qwen3 with windows": ("Qwen3", SIZES | QWEN_WINDOWS | {"head_dim": 8} | OTHER_TURNS),
    "qwen3 with biases": ("Qwen3", SIZES | {"head_dim": 8, "attention_bias": True}),
    "olmo2": ("Olmo2", SIZES | {"num_key_value_heads": 4}),
    "olmo2 grouped": ("Olmo2", SIZES | {"rms_norm_eps": 1e-3}),
    "olmo3": ("Olmo3", SIZES | OLMO3 | {"rope_parameters": TWO_ROPES}),
    "olmo3, yarn": ("Olmo3", SIZES | OLMO3 | {"rope_parameters": {"full_attention": YARN}, "attention_bias": True}),
    "mistral with a window": ("Mistral", SIZES | {"sliding_window": 5}),
    "mixtral": ("Mixtral", SIZES | {"num_local_experts": 3, "sliding_window": None}),
    "mixtral with a window": ("Mixtral", SIZES | {"num_local_experts": 4, "sliding_window": 5}),
    "qwen3_moe": ("Qwen3Moe", SIZES | EXPERTS | {"norm_topk_prob": False}),
    "qwen3_moe normalised": ("Qwen3Moe", SIZES | EXPERTS | {"norm_topk_prob": True}),
    "gemma2": ("Gemma2", SIZES | {"head_dim": 12, "sliding_window": 7, "query_pre_attn_scalar": 20}),
    "gemma3": ("Gemma3Text", SIZES | GEMMA3 | {"rope_parameters": TWO_ROPES}),
    "gemma3, untied": ("Gemma3Text", SIZES | GEMMA3 | {"final_logit_softcapping": 9.0, "tie_word_embeddings": False}),
    "deepseek_v2": ("DeepseekV2", SIZES | DEEPSEEK | {"n_shared_experts": 2}),
    "deepseek_v2, groups, yarn": (
        "DeepseekV2",
        SIZES | DEEPSEEK | GROUPED | LATENT_YARN | {"topk_method": "group_limited_greedy", "n_shared_experts": 1},
    ),
    "deepseek_v3": ("DeepseekV3", SIZES | DEEPSEEK | GROUPED),
    "deepseek_v3, one group, yarn": (
        "DeepseekV3",
        SIZES | DEEPSEEK | LATENT_YARN | UNGROUPED | {"norm_topk_prob": False, "rope_interleave": False},
    ),
    "mamba2": ("Mamba2", MAMBA2 | {"n_groups": 2}),
    "mamba2, one group, tied": ("Mamba2", MAMBA2 | {"n_groups": 1, "conv_kernel": 3, "tie_word_embeddings": True}),
    "gemma2 without caps": ("Gemma2", SIZES | {"head_dim": 8, "sliding_window": 7} | CAPLESS),
    "gemma": ("Gemma", SIZES | {"head_dim": 12}),
    "gemma, untied, with biases": ("Gemma", SIZES | GEMMA),
    "phi3": ("Phi3", SIZES | {"sliding_window": None}),
    "phi3, partial": ("Phi3", SIZES | PHI3),
    "phi3, longrope": ("Phi3", SIZES | LONGROPE | {"original_max_position_embeddings": 8}),
    "llama, longrope": ("Llama", SIZES | {"rope_parameters": OTHER_LONGROPE, "head_dim": 6}),
    "smollm3": ("SmolLM3", SIZES | {"num_hidden_layers": 4, "rope_parameters": YARN}),
    "smollm3, said": ("SmolLM3", SIZES | SMOLLM3 | {"tie_word_embeddings": False}),
    "granite": ("Granite", SIZES | GRANITE),
    "olmoe": ("Olmoe", SIZES | {"num_experts": 5, "num_experts_per_tok": 2}),
    "olmoe, normalised": ("Olmoe", SIZES | OLMOE),
    "qwen2_moe": ("Qwen2Moe", SIZES | SHARED),
    "qwen2_moe, normalised": ("Qwen2Moe", SIZES | SHARED | {"norm_topk_prob": True, "qkv_bias": False}),
    "cohere": ("Cohere", SIZES | {"logit_scale": 1.5}),
    "cohere, with biases": ("Cohere", SIZES | {"attention_bias": True, "logit_scale": 0.7, "layer_norm_eps": 1e-3}),
    "cohere2": ("Cohere2", SIZES | {"sliding_window": 7, "logit_scale": 1.5, "num_hidden_layers": 4}),
    "cohere2, untied": ("Cohere2", SIZES | COHERE2),
    "gpt_oss": ("GptOss", SIZES | GPT_OSS),
    "gpt_oss, plain rope": ("GptOss", SIZES | GPT_OSS | PLAIN),
    "glm": ("Glm", SIZES | {"head_dim": 8}),
    "glm, said": ("Glm", SIZES | GLM),
    "glm4": ("Glm4", SIZES | {"head_dim": 8}),
    "glm4, tied": ("Glm4", SIZES | GLM | {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "granite, plain logits": ("Granite", SIZES | MULTIPLIERS | {"mlp_bias": True}),
}


def made(name):
    """A model of transformers whose every weight counts."""
    family, options = THEIRS[name]
    config = getattr(transformers, f"{family}Config")(**copy.deepcopy(options))  # which it changes
    head = "GPT2LMHeadModel" if family == "GPT2" else f"{family.removesuffix('Text')}ForCausalLM"
    return randomised(getattr(transformers, head)(config))


def randomised(model):
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.3, 0.3)
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.rand_like(p) - 0.5)  # 1 of norms, 0 of biases
            else:
                p.normal_(std=0.25)
    return model.eval()


@torch.no_grad()
def assert_same_greedy(ours, theirs):
    """64 tokens, and at every one of them the distributions."""
    prompt = torch.randint(97, (2, 9))
    how = transformers.GenerationConfig(max_new_tokens=64, do_sample=False, pad_token_id=0, eos_token_id=None)
    want = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=how)
    got = generate_ids(ours, prompt, SamplingParams(temperature=0, max_tokens=64), end_id=())
    for mine, row in zip(got, want, strict=True):
        if differ := [i for i, (a, b) in enumerate(zip(mine, row[9:].tolist(), strict=True)) if a != b]:
            at = differ[0]  # rounding may choose between two that are as likely
            log_p = theirs(row[None, : 9 + at]).logits[0, -1].log_softmax(-1)
            assert log_p[row[9 + at]] - log_p[mine[at]] < 1e-4
    assert_same(ours, theirs, want)


@torch.no_grad()
def assert_same(ours, theirs, ids=None):
    ids = torch.randint(97, (2, 90)) if ids is None else ids
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (theirs(ids).logits, ours(ids)))
    assert log_p.std(1).mean() > 0.3  # tokens that all give one distribution would prove little
    assert (log_p.exp() * (log_p - log_q)).sum(-1).max() < 1e-6


@pytest.mark.parametrize("name", THEIRS)
def test_there_and_back(tmp_path, name):
    theirs = made(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs")
    assert_same_greedy(ours, theirs)
    save_pretrained(ours, tmp_path / "ours")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert_same_greedy(ours, again)
    expected = "llama" if name in ("mistral", "phi3") else theirs.config.model_type  # which these are, being plain
    assert again.config.model_type == expected
    assert resolved(from_pretrained(tmp_path / "ours").config) == resolved(ours.config)


def test_longrope_is_chosen_by_the_longest_text(tmp_path):
    """transformers takes the factors by the length of a text, and so reads it anew where that passes the original one;
    here a model for longer texts has the long ones from the first token on."""
    torch.manual_seed(0)
    options = SIZES | copy.deepcopy(LONGROPE) | {"original_max_position_embeddings": 90, "max_position_embeddings": 192}
    theirs = randomised(transformers.Phi3ForCausalLM(transformers.Phi3Config(**options)))
    theirs.save_pretrained(tmp_path)
    short, long = from_pretrained(tmp_path, max_len=90), from_pretrained(tmp_path, max_len=91)
    assert (short.config.context_length, long.config.context_length) == (90, 192)
    assert_same_greedy(short, theirs)
    ids = torch.randint(97, (2, 110))
    assert_same(long, theirs, ids)
    assert_same(short, theirs, ids[:, :90])
    assert (long(ids[:, :90]) - short(ids[:, :90])).abs().max() > 0.1
    save_pretrained(short, tmp_path / "short")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "short")
    assert_same_greedy(short, again)
    assert again.config.max_position_embeddings == 192
    assert_same(from_pretrained(tmp_path / "short"), theirs, ids)  # it is saved as what it was
    save_checkpoint(short, None, 0, tmp_path / "checkpoint")
    read = load_model(tmp_path / "checkpoint"), load_model(tmp_path / "checkpoint", max_len=90)
    assert_same(read[0], theirs, ids)
    assert_same(read[1], theirs, ids[:, :90])


NEWER = ("gemma", "phi3", "smollm3", "granite", "olmoe", "qwen2_moe", "cohere", "cohere2", "gpt_oss")
NEWER += ("glm", "glm4")
COHERE = {"norm": LayerNormConfig(bias=False), "positions": RopeConfig(interleaved=True), "parallel": True}
HALF = RopeConfig(50.0, interleaved=True, fraction=0.5)
ROPE, SCALES = RopeConfig(50.0), ("embedding_scale", "logit_scale")
OURS = {
    "llama 3": ("llama", {"positions": RopeConfig(scaling=Llama3Scaling(4.0, 24, 1.0, 3.0))}),
    "linear, interleaved": ("llama", {"positions": RopeConfig(scaling=LinearScaling(2.0), interleaved=True)}),
    "yarn": ("llama", {"positions": RopeConfig(scaling=YarnScaling(4.0, 24, truncate=False, attention_factor=1.2))}),
    "longrope": (
        "llama",
        {"positions": RopeConfig(scaling=LongRopeScaling((1.0,) * 4, (1.0, 1.5, 2.0, 4.0), 24, 4.0))},
    ),
    "phi3, longrope, interleaved": (
        "phi3",
        {
            "positions": RopeConfig(
                interleaved=True, fraction=0.5, scaling=LongRopeScaling((1.0, 1.2), (1.5, 2.0), 24, 4.0, 1.3)
            )
        },
    ),
    "geglu with biases": ("llama", {"mlp": MLPConfig("gelu_tanh", gated=True, d_ff=40, bias=True)}),
    "attention biases": ("llama", {"mixer": AttentionConfig(4, 2, qkv_bias=True, out_bias=True)}),
    "dropped out": ("llama", {"mixer": AttentionConfig(4, dropout=0.1), "dropout": 0.1}),
    "qwen2": ("qwen2", {"mixer": AttentionConfig(4, 1, qkv_bias=True), "mlp": SwiGLUConfig(24)}),
    "qwen3": ("qwen3", {"mixer": AttentionConfig(4, 1, 12, qk_norm=True), "norm": RMSNormConfig(1e-3)}),
    "olmo2": ("olmo2", {"mixer": AttentionConfig(4, 2, qk_norm="all"), "placement": "reordered"}),
    "olmo2, interleaved": (
        "olmo2",
        {
            "mixer": AttentionConfig(4, qk_norm="all"),
            "placement": "reordered",
            "positions": RopeConfig(interleaved=True),
        },
    ),
    "gemma": (
        "gemma",
        {"mixer": AttentionConfig(4, 1, 12), "mlp": MLPConfig("gelu_tanh", gated=True), "embedding_scale": 32**0.5},
    ),
    "phi3, interleaved": ("phi3", {"positions": RopeConfig(50.0, interleaved=True, fraction=0.5)}),
    "phi3, dropped out": ("phi3", {"positions": RopeConfig(fraction=0.75), "dropout": 0.1}),
    "granite": ("granite", {"residual_scale": 0.7, "embedding_scale": 2.0, "logit_scale": 0.3}),
    "glm": ("glm", {"mixer": AttentionConfig(4, 2, qkv_bias=True), "positions": HALF}),
    "glm4": ("glm4", {"mixer": AttentionConfig(4, 2, qkv_bias=True), "positions": HALF, "placement": "sandwich"}),
    "cohere": ("cohere", COHERE | {"logit_scale": 0.3}),
    "cohere, logits as they are": ("cohere", COHERE),
    "granite, scaled scores": ("granite", {"mixer": AttentionConfig(4, 1, scale=0.2)}),
    "gpt2": (
        "gpt2",
        {
            "mixer": AttentionConfig(4, qkv_bias=True, out_bias=True),
            "mlp": MLPConfig("gelu", bias=True),
            "norm": LayerNormConfig(),
            "positions": NoPositionsConfig(),
        },
    ),
}


def our_config(parts, **options):
    """parts: of the block; scales, which are of the model, beside them."""
    options |= {name: value for name, value in parts.items() if name in SCALES}
    parts = {name: value for name, value in parts.items() if name not in SCALES}
    block = BlockConfig(**{"mixer": AttentionConfig(4), "positions": ROPE} | parts)
    position = {"position_embedding": "learned"} if block.positions.kind == "none" else {}
    return TransformerConfig(97, 96, 2, 32, layers=(block,), **position, **options)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", OURS)
def test_ours_is_theirs(tmp_path, name, tied):
    family, parts = OURS[name]
    ours = randomised(Transformer(our_config(parts, tie_embeddings=tied)))
    save_pretrained(ours, tmp_path, max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.config.model_type == family
    assert_same(ours, theirs)
    again = from_pretrained(tmp_path)
    torch.testing.assert_close(again(torch.arange(9)[None]), ours(torch.arange(9)[None]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_saved_whole(tmp_path, name):
    """In a family's form or our own: what is read back is the same model."""
    ours = make(VARIANTS[name]).eval()
    save_pretrained(ours, tmp_path)
    again, x = from_pretrained(tmp_path), torch.randint(64, (2, 20))
    torch.testing.assert_close(again(x), ours(x), atol=1e-5, rtol=1e-5)
    if json.loads((tmp_path / "config.json").read_text())["model_type"] == "cs336":
        assert again.config == VARIANTS[name]


@pytest.mark.parametrize("name", MIXERS)
def test_a_model_of_one_mixer_is_saved_whole(tmp_path, name):
    """No family's form is tried where its layers could not be ours."""
    config = TransformerConfig(97, 96, 2, 32, layers=(MIXERS[name],))
    ours = randomised(Transformer(config))
    save_pretrained(ours, tmp_path)
    again, x = from_pretrained(tmp_path), torch.randint(97, (2, 20))
    torch.testing.assert_close(again(x), ours(x), atol=1e-5, rtol=1e-5)


def test_rows_are_reordered_in_those_layers_that_turn_them(tmp_path):
    turned = BlockConfig(AttentionConfig(4, 2), positions=RopeConfig(50.0, interleaved=True))
    straight = BlockConfig(AttentionConfig(4, 2), positions=NoPositionsConfig())
    ours = randomised(Transformer(TransformerConfig(97, 96, 4, 32, layers=(straight, turned))))
    save_pretrained(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.no_rope_layers == [0, 1, 0, 1]
    assert_same(ours, theirs)


def test_a_smollm3_may_have_no_positions_at_all(tmp_path):
    block = BlockConfig(AttentionConfig(4, 2), positions=NoPositionsConfig())
    ours = randomised(Transformer(TransformerConfig(97, 96, 2, 32, layers=(block,))))
    save_pretrained(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.no_rope_layers == [0, 0]
    assert_same(ours, theirs)


def test_shards_take_the_place_of_a_whole_file(tmp_path):
    first, second = (make(our_config({})) for _ in range(2))
    save_pretrained(first, tmp_path)
    save_pretrained(second, tmp_path, max_shard_bytes=20_000)
    assert torch.equal(from_pretrained(tmp_path).embedding.weight, second.embedding.weight)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in second.parameters())
    save_pretrained(first, tmp_path)
    assert torch.equal(from_pretrained(tmp_path).embedding.weight, first.embedding.weight)


@pytest.mark.parametrize("where", ["file", "tokenizer_config"])
def test_chat_templates_go_round(tmp_path, where):
    save_pretrained(make(our_config({})), tmp_path)
    template = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}ü{% endfor %}"
    if where == "file":
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    else:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    model = from_pretrained(tmp_path)
    save_pretrained(model, tmp_path / "again")
    assert (tmp_path / "again" / "chat_template.jinja").read_text(encoding="utf-8") == template
    assert from_pretrained(tmp_path / "again").chat_template == template


def test_of_several_chat_templates_the_default_is_read(tmp_path):
    save_pretrained(make(our_config({})), tmp_path)
    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    with pytest.warns(UserWarning, match="several chat templates: the default is read, and not tool_use"):
        assert from_pretrained(tmp_path).chat_template == "A"
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 3}')
    with pytest.raises(ValueError, match="chat_template = 3: expected a text"):
        from_pretrained(tmp_path)


def test_every_family_is_on_the_page():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    named = [row for row in rows if len(row) == 4 and row[1].startswith("`") and row[1].strip("`") in FAMILIES]
    assert {row[1].strip("`") for row in named} == set(FAMILIES)
    assert {row[3].strip("`") for row in named if row[3]} == set(ARCHITECTURES)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_field_is_ignored(family):
    """Their own configuration is read whole; every field that is not known is refused by its name."""
    config = transformers.AutoConfig.for_model(family).to_dict()
    config |= {"sliding_window": None} | ({"num_experts_per_tok": 2} if family == "deepseek_v2" else {})
    FAMILIES[family].config(config | {"loss_type": "ForCausalLM"})  # which a trained model was saved with
    for name in {"attention_multiplier", "num_experts", "rope_local_theta", "quantization_config"} - config.keys():
        with pytest.raises(ValueError, match=f"config.json has {name} = 7, which cs336"):
            FAMILIES[family].config(config | {name: 7})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_of_any_value_is_read_or_refused(family):
    config = transformers.AutoConfig.for_model(family).to_dict() | {"sliding_window": None}
    for name in config:
        for value in (-1, 0, 1.5, math.inf, 10**12, 10**30, "x", True, [], [None], {}, {"a": 1}):
            with contextlib.suppress(ValueError):
                FAMILIES[family].config(config | {name: value})


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "deepseek_v2", "deepseek_v3", "mamba2", *NEWER])
def test_a_field_that_is_left_out_is_what_it_is_to_transformers(family):
    config = transformers.AutoConfig.for_model(family).to_dict()
    config |= {"num_experts_per_tok": 2} if "deepseek" in family else {}
    whole, same = FAMILIES[family].config(config), 0
    for name in config:
        try:
            less = FAMILIES[family].config({key: value for key, value in config.items() if key != name})
        except ValueError:
            continue  # or it must be there
        assert less == whole, name
        same += 1
    assert same > len(config) // 2


def test_an_old_mamba2_says_that_it_has_a_norm():
    config = transformers.AutoConfig.for_model("mamba2").to_dict()
    assert FAMILIES["mamba2"].config(config | {"rms_norm": True}) == FAMILIES["mamba2"].config(config)
    with pytest.raises(ValueError, match="rms_norm = False"):
        FAMILIES["mamba2"].config(config | {"rms_norm": False})


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3"])
def test_an_old_qwen_says_where_its_windows_begin(kind):
    config = getattr(transformers, f"{kind}Config")(**(SIZES | QWEN_WINDOWS)).to_dict()
    family = FAMILIES[config["model_type"]]
    want = family.config(config)
    assert [block.mixer.window for block in want.blocks] == [None, 7, 7]
    del config["layer_types"]
    assert family.config(config) == want
    config["max_window_layers"] = 0
    assert {block.mixer.window for block in family.config(config).blocks} == {7}
    for full in ({"max_window_layers": 3}, {"use_sliding_window": False}):
        assert family.config(config | full) == family.config(config | {"use_sliding_window": False})
    with pytest.raises(ValueError, match="use_sliding_window = True"):
        family.config(config | {"sliding_window": None})
    with pytest.raises(ValueError, match="layer_types = "):
        family.config(config | {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 3})


def test_an_old_gemma3_says_its_pattern_and_bases_by_themselves():
    config = transformers.Gemma3TextConfig(**SIZES | {"num_hidden_layers": 4, "layer_types": None}).to_dict()
    for name in ("layer_types", "rope_parameters", "_sliding_window_pattern"):
        config.pop(name, None)
    config |= {"sliding_window_pattern": 2, "rope_theta": 500.0, "rope_local_base_freq": 50.0}
    config["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    blocks = FAMILIES["gemma3_text"].config(config).blocks
    assert [block.mixer.window for block in blocks] == [4096, None, 4096, None]
    assert blocks[0].positions == RopeConfig(50.0)
    assert blocks[1].positions == RopeConfig(500.0, scaling=LinearScaling(8.0))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("gemma3_text", {"rope_parameters": {"chunked_attention": {}}}, "rope_parameters = "),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05"),
        ("deepseek_v3", {"n_group": 7}, "num_groups 7 must divide num_experts 256, of 2 or more"),
        ("deepseek_v3", {"topk_group": 9}, "groups_per_token 9 of num_groups 8"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob = True"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc'"),
        ("gemma", {"hidden_activation": "relu"}, "hidden_activation = 'relu'"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("phi3", {"rope_parameters": {"type": "su", "short_factor": [1.0]}}, r"lacks rope_parameters\.long_factor"),
        ("phi3", {"rope_parameters": LONG_FACTORS, "max_position_embeddings": None}, "lacks max_position_embeddings"),
        ("phi3", {"rope_parameters": LONG_FACTORS}, "short_factors must have 48 numbers, one a rotated pair, got 3"),
        (
            "phi3",
            {"rope_parameters": LONG_FACTORS | {"short_factor": 1.0}},
            "short_factor = 1.0: expected a list of num",
        ),
        ("phi3", {"rope_parameters": LONG_FACTORS | {"short_mscale": 1.1}}, r"rope_parameters\.short_mscale = 1\.1"),
        ("phi3", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, r"rope_scaling\.rope_type = 'yarn'"),
        ("smollm3", {"no_rope_layers": [1, 2] * 18}, "no_rope_layers = "),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers = "),
        ("smollm3", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 5000}, "shared_expert_intermediate_size = 5000"),
        ("qwen2_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm = True"),
        ("cohere", {"head_dim": 64}, "head_dim = 64"),
        ("cohere2", {"layer_types": ["chunked_attention"] * 40}, "layer_types = "),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit = 5.0"),
        ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("granite", {"logits_scaling": 0}, "logits_scaling = 0"),
        ("granite", {"residual_multiplier": -1.0}, "residual_scale must be"),
        ("mamba2", {"time_step_limit": [0.0, 0.1]}, r"time_step_limit = \[0.0, 0.1\]"),
        ("mamba2", {"use_bias": True}, "use_bias = True"),
        ("mamba2", {"num_heads": 64}, "num_heads = 64"),
    ],
)
def test_what_a_family_cannot_be_is_named(family, changes, message):
    config = transformers.AutoConfig.for_model(family).to_dict() | {"num_experts_per_tok": 2}
    with pytest.raises(ValueError, match=message):
        FAMILIES[family].config(config | changes)


def test_what_balances_experts_keeps_its_dtype(tmp_path):
    theirs = made("deepseek_v3")
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path, dtype=torch.bfloat16)
    bias = dict(ours.named_buffers())["layers.1.mlp.balance_bias"]
    assert ours.embedding.weight.dtype == torch.bfloat16
    assert torch.equal(bias, theirs.model.layers[1].mlp.gate.e_score_correction_bias)


def test_a_file_without_a_head_is_a_models(tmp_path):
    """As OpenAI's GPT-2 lies on the hub: names without `transformer.`"""
    theirs = made("gpt2")
    theirs.transformer.save_pretrained(tmp_path)
    assert_same(from_pretrained(tmp_path), theirs)


def test_a_fused_matrix_of_another_shape(tmp_path):
    made("gpt2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_embd": 16}))
    with pytest.raises(ValueError, match=r"has shape \(97, 32\), config\.json means \(97, 16\)"):
        from_pretrained(tmp_path)


def test_mxfp4_is_read_as_transformers_unpacks_it(tmp_path):
    """A file of blocks and scales, and the model that transformers' own numbers make of it."""
    convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    config = transformers.GptOssConfig(**SIZES | GPT_OSS | {"intermediate_size": 64})
    theirs, packed = randomised(transformers.GptOssForCausalLM(config)), {}
    for name, t in theirs.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):  # (E, in, out): rows of 32 inputs
            E, into, out = t.shape
            blocks, scales = torch.randint(256, (E, out, into // 32, 16)), torch.randint(122, 126, (E, out, into // 32))
            packed |= {f"{name}_blocks": blocks.byte(), f"{name}_scales": scales.byte()}
            with torch.no_grad():
                t.copy_(convert(blocks.byte(), scales.byte(), dtype=torch.float32))
        else:
            packed[name] = t
    theirs.save_pretrained(tmp_path)
    save_file(packed, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    assert_same(from_pretrained(tmp_path), theirs)
    del packed["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(packed, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1\.mlp\.experts\.down_proj_blocks has no _scales beside it"):
        from_pretrained(tmp_path)
    packed["model.layers.1.mlp.experts.down_proj_scales"] = torch.zeros(5, 32, 1, dtype=torch.uint8)
    save_file(packed, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"blocks and scales of \(5, 32, 2, 16\) torch.uint8 and \(5, 32, 1\)"):
        from_pretrained(tmp_path)
    packed["model.layers.1.mlp.experts.down_proj_scales"] = torch.full((5, 32, 2), 255, dtype=torch.uint8)
    save_file(packed, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"down_proj has a scale of 255: above 252 no number is finite"):
        from_pretrained(tmp_path)
