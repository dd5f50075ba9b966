"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values, and with windows in some layers."""

import dataclasses
from typing import Any

from cs336.models.config import TransformerConfig
from cs336.models.huggingface import decoder, gemma2
from cs336.models.huggingface.family import Family
from cs336.models.huggingface.fields import Fields
from cs336.models.huggingface.rotary import FULL, WINDOW
from cs336.nn import AttentionConfig


def read(fields: Fields) -> TransformerConfig:
    fields.flag("attention_bias")  # which Qwen2 does not read: exports of ours said false
    mixer = AttentionConfig(**decoder.heads(fields, num_kv_heads=32), qkv_bias=True)
    return windowed(fields, mixer)


def windowed(fields: Fields, mixer: AttentionConfig) -> TransformerConfig:
    """A decoder of this mixer; with use_sliding_window, of windows where layer_types says so, or from layer
    max_window_layers on."""
    config = decoder.decoder(fields, mixer, decoder.gated_mlp(fields))
    window = gemma2.given_or(fields, "sliding_window", 4096)
    if not fields.flag("use_sliding_window") or window is None:
        decoder.no_window(fields)
        return config
    (full, *_), first = config.blocks, fields.number("max_window_layers", 28)
    sliding = dataclasses.replace(full, mixer=dataclasses.replace(mixer, window=window))
    kinds = [FULL if i < first else WINDOW for i in range(config.num_layers)]
    return config.with_blocks(gemma2.by_kinds(fields, sliding, full, kinds))


def written(config: TransformerConfig) -> dict[str, Any] | None:
    """decoder.written, for a model with windows of one size too."""
    block, mixers = config.blocks[0], [block.mixer for block in config.blocks]
    windows = {mixer.window for mixer in mixers if isinstance(mixer, AttentionConfig)} - {None}
    if not isinstance(block.mixer, AttentionConfig) or len(windows) != 1:
        return decoder.written(config)
    plain = dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, window=None))  # reading compares the rest
    fields = decoder.written(config.with_blocks((plain,) * config.num_layers))
    kinds = [FULL if getattr(mixer, "window", None) is None else WINDOW for mixer in mixers]
    said = {"use_sliding_window": True, "sliding_window": next(iter(windows)), "layer_types": kinds}
    return None if fields is None else fields | said | {"max_window_layers": kinds.index(WINDOW)}


def write(config: TransformerConfig) -> dict[str, Any] | None:
    fields = written(config)
    return None if fields is None or not fields.pop("attention_bias") else fields


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", read, write, decoder.rules)
