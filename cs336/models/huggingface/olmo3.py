"""OLMo 3: OLMo 2 with windows in three layers of four, whose rotary positions are not scaled when the others' are."""

import dataclasses
from typing import Any

from cs336.models.block import BlockConfig
from cs336.models.config import TransformerConfig
from cs336.models.huggingface import decoder, gemma2, olmo2
from cs336.models.huggingface.family import Family
from cs336.models.huggingface.fields import Fields
from cs336.models.huggingface.rotary import FULL, WINDOW, read_ropes, ropes_of, write_ropes
from cs336.nn import AttentionConfig, RMSNormConfig

THETA, EVERY = 500000.0, 4


def read(fields: Fields) -> TransformerConfig:
    bias, theta = fields.flag("attention_bias"), fields.number("rope_theta", THETA)
    local, everywhere = read_ropes(fields, theta, theta)
    mixer = AttentionConfig(**decoder.heads(fields), qkv_bias=bias, out_bias=bias, qk_norm="all")
    norm = RMSNormConfig(fields.number("rms_norm_eps", 1e-5))
    full = BlockConfig(mixer, decoder.gated_mlp(fields), norm, everywhere, placement="reordered")
    windowed = dataclasses.replace(mixer, window=gemma2.given_or(fields, "sliding_window", 4096))
    sliding = dataclasses.replace(full, mixer=windowed, positions=local)
    sizes = decoder.sizes(fields)
    return TransformerConfig(**sizes, layers=gemma2.in_turns(fields, sizes["num_layers"], sliding, full, EVERY))


def write(config: TransformerConfig) -> dict[str, Any] | None:
    block, mixers = config.blocks[0], [block.mixer for block in config.blocks]
    windows = {mixer.window for mixer in mixers if isinstance(mixer, AttentionConfig)} - {None}
    if not isinstance(block.mixer, AttentionConfig) or len(windows) != 1:
        return None
    local, full = ropes_of(config, THETA, THETA)
    plain = dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, window=None), positions=full)
    fields = decoder.written(dataclasses.replace(config, layers=(plain,), pattern=None))
    ropes = write_ropes(local, full)
    if fields is None or ropes is None:
        return None
    kinds = [FULL if getattr(mixer, "window", None) is None else WINDOW for mixer in mixers]
    return fields | ropes | {"sliding_window": next(iter(windows)), "layer_types": kinds}


OLMO3 = Family("olmo3", "Olmo3ForCausalLM", read, write, olmo2.rules)
