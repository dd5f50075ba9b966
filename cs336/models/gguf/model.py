"""A Llama in a GGUF file as a Transformer. llama.cpp rotates neighbouring features, so its query and key rows are in
that order."""

import os
from typing import Any

import torch

from cs336.models.config import TransformerConfig
from cs336.models.gguf.reader import GGUF
from cs336.models.huggingface.family import renamed
from cs336.models.huggingface.fields import Fields
from cs336.models.transformer import Transformer

NAMES = {
    ".attention_norm.": "blk.{layer}.attn_norm.",
    ".attention.q_proj.": "blk.{layer}.attn_q.",
    ".attention.k_proj.": "blk.{layer}.attn_k.",
    ".attention.v_proj.": "blk.{layer}.attn_v.",
    ".attention.o_proj.": "blk.{layer}.attn_output.",
    ".mlp_norm.": "blk.{layer}.ffn_norm.",
    ".mlp.gate_proj.": "blk.{layer}.ffn_gate.",
    ".mlp.up_proj.": "blk.{layer}.ffn_up.",
    ".mlp.down_proj.": "blk.{layer}.ffn_down.",
    "embedding.": "token_embd.",
    "norm.": "output_norm.",
    "head.": "output.",
}


def from_gguf(
    path: str | os.PathLike, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Transformer:
    """The model in a GGUF file, its weights dequantized: float32 if dtype is None. In eval mode.

    Raises FileNotFoundError where there is no file, ValueError for one that is damaged, and for a model that is no
    Llama or does what a Transformer does not, naming the key of its metadata.
    """
    file = GGUF(path)
    config = _config(file)
    model = Transformer(config, device="meta").eval()
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    place = {rule.ours[0]: rule.theirs[0] for rule in renamed(shapes, NAMES)}
    if missing := set(place.values()) - file.tensors.keys():
        raise ValueError(f"{path} lacks weights: {', '.join(sorted(missing))}")
    if unknown := file.tensors.keys() - set(place.values()):
        raise ValueError(f"{path} has unknown weights: {', '.join(sorted(unknown))}")
    for name, theirs in place.items():
        if file.tensors[theirs].shape != shapes[name]:
            found, expected = file.tensors[theirs].shape, tuple(shapes[name])
            raise ValueError(f"{path}: {theirs} has shape {found}, the metadata mean {expected}")
    weights = {name: file.tensor(theirs).to(device, dtype) for name, theirs in place.items()}
    model.load_state_dict(weights, assign=True)
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (i := file.get(f"tokenizer.ggml.{theirs}_token_id", int)) is not None:
            model.special_ids[f"{ours}_token_id"] = i
    model.chat_template = file.get("tokenizer.chat_template", str)
    return model


def config_of_gguf(path: str | os.PathLike) -> TransformerConfig:
    """The configuration alone. Errors: as from_gguf's."""
    return _config(GGUF(path))


def _config(file: GGUF) -> TransformerConfig:
    architecture = file.get("general.architecture", str)
    if architecture != "llama":
        raise ValueError(f"{file.path} has general.architecture {architecture!r}: only 'llama' is read")
    table = {k.removeprefix("llama."): v for k, v in file.metadata.items() if k.startswith("llama.")}
    fields = Fields(table, above="llama.", source=str(file.path))
    sizes = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
    fields.require(*sizes, "attention.layer_norm_rms_epsilon")
    if "token_embd.weight" not in file.tensors or len(file.tensors["token_embd.weight"].shape) != 2:
        raise ValueError(f"{file.path} lacks weights: token_embd.weight, of two dims")
    rows = file.tensors["token_embd.weight"].shape[0]
    fields.only("vocab_size", rows)
    layers, length, d_model, d_ff, heads = (fields.take(name) for name in sizes)
    options: dict[str, Any] = {"head_dim": fields.take("attention.key_length")}
    fields.only("attention.value_length", options["head_dim"])
    fields.only("rope.scaling.type", "none")
    config = TransformerConfig(
        vocab_size=rows,
        context_length=length,
        num_layers=layers,
        d_model=d_model,
        num_heads=heads,
        num_kv_heads=fields.take("attention.head_count_kv", heads),
        d_ff=d_ff,
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        rope_theta=fields.number("rope.freq_base", 10000.0),
        rope_interleaved=True,
        tie_embeddings="output.weight" not in file.tensors,
        **options,
    )
    fields.only("rope.dimension_count", config.blocks[0].mixer.rope_dim(d_model))
    fields.finish()
    return config
