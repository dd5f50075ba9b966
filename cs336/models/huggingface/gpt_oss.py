"""gpt-oss: sinks, windows in turns, and experts with biases and a clamped gate, whose matrices may be MXFP4.

Files keep gate and up in one stack, their columns in turns, and every expert's matrices transposed. In MXFP4 a row of
such a matrix is in blocks of 32 numbers of 4 bits, two a byte, the low half first, times 2^(scale - 127).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cs336.models.block import BlockConfig
from cs336.models.config import TransformerConfig
from cs336.models.huggingface import decoder, experts, gemma2
from cs336.models.huggingface.family import Family, Rule, renamed
from cs336.models.huggingface.fields import Fields
from cs336.models.huggingface.rotary import FULL, WINDOW, read_rope
from cs336.nn import AttentionConfig, MoEConfig, RMSNormConfig, YarnScaling
from cs336.nn.mlp import LIMIT

# Of a model whose file leaves them out.
THETA, YARN, WINDOW_SIZE = 150000.0, YarnScaling(32.0, 4096, truncate=False), 128
BLOCKS, SCALES = "_blocks", "_scales"
MOST_SCALE = 252  # 6 times 2^(252 - 127) is still finite
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # the sign is the highest bit


def read(fields: Fields) -> TransformerConfig:
    fields.require("intermediate_size", "num_hidden_layers")
    fields.only("swiglu_alpha", 1.702)
    fields.only("swiglu_limit", LIMIT)
    fields.only("hidden_act", "silu")
    top_k, bias = fields.count("num_experts_per_tok", 4), fields.flag("attention_bias", True)
    fields.only("experts_per_token", top_k)  # the same under another name
    fields.take("initial_context_length")  # as YaRN's
    mlp = MoEConfig(
        fields.take("num_local_experts", 128),
        top_k,
        fields.take("intermediate_size"),
        activation="clamped_gelu",
        balance_loss=experts.balance_loss(fields, top_k),
        bias=True,
    )
    heads = decoder.heads(fields, num_kv_heads=8, head_dim=64)
    mixer = AttentionConfig(**heads, qkv_bias=bias, out_bias=bias, sinks=True)
    norm, rope = RMSNormConfig(fields.number("rms_norm_eps", 1e-5)), read_rope(fields, THETA)
    if not fields.table.keys() & {"rope_scaling", "rope_parameters"}:
        rope = dataclasses.replace(rope, scaling=YARN)
    full = BlockConfig(mixer, mlp, norm, rope)
    window = fields.count("sliding_window", WINDOW_SIZE)
    sliding = dataclasses.replace(full, mixer=dataclasses.replace(mixer, window=window))
    sizes = decoder.sizes(fields)
    return TransformerConfig(**sizes, layers=gemma2.in_turns(fields, sizes["num_layers"], sliding, full, 2))


def write(config: TransformerConfig) -> dict[str, Any] | None:
    block, mixers = config.blocks[0], [block.mixer for block in config.blocks]
    windows = [getattr(mixer, "window", None) for mixer in mixers]
    mlp, mixer = block.mlp, block.mixer
    if not (isinstance(mixer, AttentionConfig) and isinstance(mlp, MoEConfig)) or len(set(windows) - {None}) > 1:
        return None
    plain = dataclasses.replace(block, mixer=dataclasses.replace(mixer, window=None))  # reading compares the rest
    fields = decoder.written(config.with_blocks((plain,) * config.num_layers))
    if fields is None:
        return None
    scaled = {"rope_scaling": {"rope_type": "default"}} | fields  # left out it is YaRN
    return scaled | {
        "intermediate_size": mlp.width(config.d_model),
        "num_local_experts": mlp.num_experts,
        "num_experts_per_tok": mlp.top_k,
        "router_aux_loss_coef": experts.coefficient(config, mlp),
        "sliding_window": next((window for window in windows if window is not None), WINDOW_SIZE),
        "layer_types": [FULL if window is None else WINDOW for window in windows],
    }


def rules(shapes: Mapping[str, torch.Size]) -> list[Rule]:
    found = renamed(
        (name for name in shapes if ".mlp.experts." not in name),
        {".mlp.router.": "model.layers.{layer}.mlp.router."} | decoder.NAMES,
    )
    for name, shape in shapes.items():
        if name.endswith(".mlp.experts.down_proj"):
            ours, layer = name.removesuffix("down_proj"), name.split(".")[1]
            theirs, num_experts = f"model.layers.{layer}.mlp.experts.", shape[0]
            both, biases = (tuple(f"{ours}{part}_{kind}" for part in ("gate", "up")) for kind in ("proj", "bias"))
            woven = functools.partial(_biases_woven, num_experts)
            found += [
                Rule(both, (f"{theirs}gate_up_proj",), _apart, _woven),
                Rule(biases, (f"{theirs}gate_up_proj_bias",), _biases_apart, woven),
                Rule((name,), (f"{theirs}down_proj",), _transposed, _transposed),
                Rule((f"{ours}down_bias",), (f"{theirs}down_proj_bias",), _flat, woven),
            ]
    return found


def _transposed(tensors: list[Tensor]) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


def _apart(tensors: list[Tensor]) -> list[Tensor]:
    """(E, M, 2 F) -> gate and up, (E, F, M)."""
    return [tensors[0][..., i::2].transpose(1, 2) for i in range(2)]


def _woven(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.stack(tensors, 2).flatten(1, 2).transpose(1, 2)]


def _biases_apart(tensors: list[Tensor]) -> list[Tensor]:
    """(E, 2 F) -> of gate and of up, (E F,)."""
    return [tensors[0][:, i::2].flatten() for i in range(2)]


def _biases_woven(num_experts: int, tensors: list[Tensor]) -> list[Tensor]:
    """One or several of (E F,) -> (E, as many F)."""
    return [torch.stack([t.view(num_experts, -1) for t in tensors], 2).flatten(1)]


def _flat(tensors: list[Tensor]) -> list[Tensor]:
    return [tensors[0].flatten()]


def without_mxfp4(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a file, those in MXFP4 (`_blocks` and `_scales`) as bfloat16, which holds each of them exactly."""
    found = {name: t for name, t in weights.items() if not name.endswith((BLOCKS, SCALES))}
    for name in weights:
        if name.endswith(BLOCKS):
            stem = name.removesuffix(BLOCKS)
            if (scales := weights.get(stem + SCALES)) is None:
                raise ValueError(f"{name} has no {SCALES} beside it: MXFP4 needs both")
            found[stem] = _mxfp4(stem, weights[name], scales)
    return found


def _mxfp4(name: str, blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks (E, rows, groups, 16), scales (E, rows, groups), uint8 -> (E, 32 groups, rows) bfloat16."""
    fits = blocks.dim() == 4 and blocks.shape[3] == 16 and scales.shape == blocks.shape[:3]
    if not fits or blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        has = f"{tuple(blocks.shape)} {blocks.dtype} and {tuple(scales.shape)} {scales.dtype}"
        raise ValueError(f"{name} has blocks and scales of {has}: MXFP4 has (E, rows, G, 16) and (E, rows, G) of uint8")
    if blocks.numel() and scales.max() > MOST_SCALE:
        raise ValueError(f"{name} has a scale of {scales.max().item()}: above {MOST_SCALE} no number is finite")
    values = torch.cat((E2M1, -E2M1)).bfloat16().to(blocks.device)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), 1)  # of each byte (256, 2)
    words = pairs.view(torch.int32)[:, 0]  # 45 MB of blocks a second on a busy core, for 23 by halves
    read = torch.empty(*blocks.shape[:2], 32 * blocks.shape[2], dtype=torch.bfloat16, device=blocks.device)
    for numbers, bytes_, exponents in zip(read, blocks, scales, strict=True):  # an expert's: the indices take room
        of_blocks = words.gather(0, bytes_.flatten().long()).view(torch.bfloat16).view(*bytes_.shape[:2], 32)
        power = torch.exp2(exponents.float() - 127).bfloat16()
        torch.mul(of_blocks, power[..., None], out=numbers.view(of_blocks.shape))
    return read.transpose(1, 2)


GPT_OSS = Family("gpt_oss", "GptOssForCausalLM", read, write, rules)
