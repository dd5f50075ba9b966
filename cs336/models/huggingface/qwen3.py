"""Qwen3: Llama with each head of the queries and keys normalised, and with windows in some layers."""

from cs336.models.config import TransformerConfig
from cs336.models.huggingface import decoder, qwen2
from cs336.models.huggingface.family import Family
from cs336.models.huggingface.fields import Fields
from cs336.nn import AttentionConfig


def attention(fields: Fields, num_kv_heads: int, head_dim: int | None) -> AttentionConfig:
    bias = fields.flag("attention_bias")
    heads = decoder.heads(fields, num_kv_heads, head_dim)
    return AttentionConfig(**heads, qkv_bias=bias, out_bias=bias, qk_norm=True)


def read(fields: Fields) -> TransformerConfig:
    return qwen2.windowed(fields, attention(fields, 32, 128))


QWEN3 = Family("qwen3", "Qwen3ForCausalLM", read, qwen2.written, decoder.rules)
