"""DeepSeek-V2 and V3: latent attention, and behind the first, dense layers fine-grained and shared experts.

V2's router takes softmax scores as they are; V3's sigmoid ones, chosen with a bias, and of the best groups. Where YaRN
stretches the positions, both multiply the scores by m^2, m = 0.1 mscale_all_dim ln(factor) + 1.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch

from cs336.models.block import MLP, BlockConfig
from cs336.models.config import MOST_LAYERS, TransformerConfig
from cs336.models.huggingface import decoder, experts
from cs336.models.huggingface.family import Family, Rule
from cs336.models.huggingface.fields import Fields
from cs336.models.huggingface.rotary import read_rope, write_rope
from cs336.nn import LatentAttentionConfig, MoEConfig, RMSNormConfig, RopeConfig, YarnScaling

Q_RANK = 1536  # where it is left out; null is none
EPS = 1e-6  # of the latents' norms, whatever the others have
NAMES = {
    ".attention.q_a_norm.": "model.layers.{layer}.self_attn.q_a_layernorm.",
    ".attention.kv_a_norm.": "model.layers.{layer}.self_attn.kv_a_layernorm.",
    ".attention.kv_a_proj.": "model.layers.{layer}.self_attn.kv_a_proj_with_mqa.",
    ".mlp.shared.": "model.layers.{layer}.mlp.shared_experts.",
    ".mlp.balance_bias": "model.layers.{layer}.mlp.gate.e_score_correction_bias",
}
OF_TRAINING = ("aux_loss_alpha", "seq_aux", "ep_size", "router_aux_loss_coef")


def read_v2(fields: Fields) -> TransformerConfig:
    fields.only("scoring_func", "softmax")
    fields.only("norm_topk_prob", False)
    fields.only("mlp_bias", False)
    groups: dict[str, Any] = {}
    method, count, most = (fields.take(name) for name in ("topk_method", "n_group", "topk_group"))
    if method == "group_limited_greedy":
        fields.require("n_group", "topk_group")
        groups = {"num_groups": count, "groups_per_token": most}
    elif method not in ("greedy", None):
        fields.refuse("topk_method")
    mlp = _experts(fields, 2, 1.0, router="softmax", normalize=False, balance="none", **groups)
    return _read(fields, True, 0, mlp)


def read_v3(fields: Fields) -> TransformerConfig:
    fields.only("scoring_func", "sigmoid")
    fields.only("topk_method", "noaux_tc")
    for name in ("num_nextn_predict_layers", "num_mtp_layers"):
        fields.take(name)  # further layers, which propose tokens and change no logit
    groups = {"num_groups": fields.take("n_group", 8), "groups_per_token": fields.take("topk_group", 4)}
    normalize = fields.flag("norm_topk_prob", True)
    mlp = _experts(fields, 1, 2.5, router="sigmoid", normalize=normalize, balance="bias", **groups)
    return _read(fields, fields.flag("rope_interleave", True), 3, mlp)


def _experts(fields: Fields, shared: int, scale: float, **options: Any) -> MoEConfig:
    """shared, scale: where they are left out."""
    fields.require("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
    fields.only("moe_layer_freq", 1)
    for name in OF_TRAINING:
        fields.take(name)
    return MoEConfig(
        fields.take("n_routed_experts"),
        fields.take("num_experts_per_tok"),
        fields.take("moe_intermediate_size"),
        num_shared=fields.count("n_shared_experts", shared),
        activation=decoder.activation(fields),
        scale=fields.number("routed_scaling_factor", scale),
        **options,
    )


def _read(fields: Fields, interleaved: bool, dense: int, mlp: MoEConfig) -> TransformerConfig:
    """dense: how many layers have no experts, where it is left out."""
    fields.require("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_attention_heads")
    fields.only("attention_bias", False)
    fields.only("attention_dropout", 0.0)
    fields.only("rms_norm_eps", EPS)
    heads, rotary = fields.count("num_attention_heads"), fields.count("qk_rope_head_dim")
    plain = fields.count("qk_nope_head_dim")
    for name, value in (("num_key_value_heads", heads), ("head_dim", rotary), ("qk_head_dim", plain + rotary)):
        fields.only(name, value)
    mscale = _mscale(fields)
    rope = read_rope(fields)
    mixer = LatentAttentionConfig(
        heads,
        fields.take("kv_lora_rank"),
        plain,
        rotary,
        fields.take("v_head_dim"),
        fields.take("q_lora_rank", None if "q_lora_rank" in fields.given else Q_RANK),
        scale=_scale(plain + rotary, rope, mscale),
    )
    sizes, first = decoder.sizes(fields), fields.take("first_k_dense_replace", dense)
    if type(first) is not int or first < 0:
        fields.refuse("first_k_dense_replace")
    if sizes["num_layers"] > MOST_LAYERS:
        fields.refuse("num_hidden_layers")
    first = min(first, sizes["num_layers"])
    rope = RopeConfig(rope.theta, interleaved, scaling=rope.scaling)
    mlps: list[MLP] = [decoder.gated_mlp(fields)] * first + [mlp] * (sizes["num_layers"] - first)
    norm = RMSNormConfig(EPS)
    return TransformerConfig(**sizes, layers=tuple(BlockConfig(mixer, mlp, norm, rope) for mlp in mlps))


def _mscale(fields: Fields) -> float:
    both = [fields.table.get(name, {}) for name in ("rope_scaling", "rope_parameters")]
    found = [table["mscale_all_dim"] for table in both if isinstance(table, dict) and table.get("mscale_all_dim")]
    return found[-1] if found else 0.0  # read_rope refuses what is no number


def _scale(features: int, rope: RopeConfig, mscale: float) -> float | None:
    """None for the plain one."""
    if not isinstance(rope.scaling, YarnScaling) or not mscale:
        return None
    m = 0.1 * mscale * math.log(rope.scaling.factor) + 1
    return features**-0.5 * m * m


def write_v2(config: TransformerConfig) -> dict[str, Any] | None:
    fields = _written(config, "softmax")
    if fields is None or not fields.pop("rope_interleave"):
        return None
    limited = fields["n_group"] > 1
    if not limited:
        del fields["n_group"], fields["topk_group"]
    return fields | {"topk_method": "group_limited_greedy" if limited else "greedy"}


def write_v3(config: TransformerConfig) -> dict[str, Any] | None:
    fields = _written(config, "sigmoid")
    return None if fields is None else fields | {"num_nextn_predict_layers": 0}


def _written(config: TransformerConfig, router: Literal["softmax", "sigmoid"]) -> dict[str, Any] | None:
    first, last = config.blocks[0], config.blocks[-1]
    mixer, mlp, positions = last.mixer, last.mlp, last.positions
    if not (isinstance(mixer, LatentAttentionConfig) and isinstance(mlp, MoEConfig) and mlp.router == router):
        return None
    if not isinstance(positions, RopeConfig) or (rope := write_rope(positions)) is None:
        return None
    if mixer.scale is not None and isinstance(positions.scaling, YarnScaling) and positions.scaling.factor > 1:
        m = (mixer.scale * (mixer.head_dim + mixer.rope_head_dim) ** 0.5) ** 0.5
        rope["rope_scaling"]["mscale_all_dim"] = round(10 * (m - 1) / math.log(positions.scaling.factor), 9)
    dense = [block.mlp for block in config.blocks if not isinstance(block.mlp, MoEConfig)]
    return rope | {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_heads,
        "kv_lora_rank": mixer.kv_rank,
        "q_lora_rank": mixer.q_rank,
        "qk_nope_head_dim": mixer.head_dim,
        "qk_rope_head_dim": mixer.rope_head_dim,
        "v_head_dim": mixer.value_size,
        "rms_norm_eps": last.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "hidden_act": decoder.THEIR_ACTIVATIONS.get(mlp.activation),
        "intermediate_size": first.mlp.width(config.d_model),
        "first_k_dense_replace": len(dense),
        "n_routed_experts": mlp.num_experts,
        "n_shared_experts": mlp.num_shared,
        "num_experts_per_tok": mlp.top_k,
        "moe_intermediate_size": mlp.width(config.d_model),
        "norm_topk_prob": mlp.normalize,
        "routed_scaling_factor": mlp.scale,
        "n_group": mlp.num_groups,
        "topk_group": mlp.groups_per_token,
        "rope_interleave": positions.interleaved,
    }


def rules(shapes: Mapping[str, torch.Size]) -> list[Rule]:
    of_latent = any(".q_a_proj." in name for name in shapes)
    queries = {".attention.q_proj.": "model.layers.{layer}.self_attn.q_b_proj."} if of_latent else {}
    return experts.rules(shapes, "mlp", experts.NAMES, NAMES | queries)


DEEPSEEK_V2 = Family("deepseek_v2", "DeepseekV2ForCausalLM", read_v2, write_v2, rules, keeps_pairs=True)
DEEPSEEK_V3 = Family("deepseek_v3", "DeepseekV3ForCausalLM", read_v3, write_v3, rules, keeps_pairs=True)
