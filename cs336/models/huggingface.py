"""Models on disk in the Hugging Face layout: Llama's, Qwen2's where queries, keys and values have biases, or Qwen3's
where queries and keys are normalised. Mistral's is read too.

A directory holds config.json, generation_config.json, model.safetensors (or shards with model.safetensors.index.json)
and, with a tokenizer, tokenizer.json and tokenizer_config.json. Nothing is ever unpickled.
"""

import contextlib
import json
import os
import pathlib
import re
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cs336.models.config import TransformerConfig
from cs336.models.transformer import Transformer
from cs336.utils.config import parse, to_table
from cs336.utils.files import replacing
from cs336.utils.special_tokens import END_OF_TEXT

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

OURS = "cs336"  # model_type of what no family of theirs has; "config" beside it is a TransformerConfig

# ours -> theirs, by the start of the name; layers.N stays
NAMES = {
    "embedding.": "model.embed_tokens.",
    "norm.": "model.norm.",
    "head.": "lm_head.",
    "attention_norm.": "input_layernorm.",
    "attention.": "self_attn.",
    "mlp_norm.": "post_attention_layernorm.",
    "mlp.": "mlp.",
}
# our field -> theirs
FIELDS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "num_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "d_ff": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
    "head_dim": "head_dim",
}
# what a config.json may leave out, as transformers takes it: for every kind of model, and for one
DEFAULTS = {
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "head_dim": None,
}
DEFAULTS_OF = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}
# what the model cannot do: their field -> the values that mean "not used"
UNUSED = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (),
}


# the special tokens that a config.json names, each an id or (of ends) a list of ids
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def save_pretrained(
    model: Transformer, directory: str | os.PathLike, tokenizer=None, *, step: int | None = None
) -> None:
    """Write the model, and the tokenizer if given, so that transformers and `from_pretrained` load equal logits.

    Each file replaces its predecessor once all are written. A model with interleaved rotary positions is written with
    its query and key rows reordered for the half-split ones of this layout. What no family of transformers has (a
    soft-cap; qk_norm with qkv_bias; blocks of other kinds) is written as our own kind of model, with our configuration
    and names, for `from_pretrained` alone. Special ids and generation_config.json are those that the model was read
    with; without any, the tokenizer's <|endoftext|> begins and ends a text.

    step: of training; `read_step` finds it.
    Raises ValueError for a tokenizer that exceeds the model.
    """
    if not isinstance(model, Transformer):
        raise TypeError(f"model must be a cs336.models.Transformer, got {type(model).__name__}")
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}")
    end = None if tokenizer is None else tokenizer.special_tokens.get(END_OF_TEXT)
    special_ids = model.special_ids or {"bos_token_id": end, "eos_token_id": end}
    config, weights = _in_layout(model)
    config |= special_ids | {"torch_dtype": str(model.embedding.weight.dtype).removeprefix("torch.")}
    config |= {} if step is None else {"training_step": step}
    files = {"config.json": config, "generation_config.json": model.generation_config or special_ids}
    if tokenizer is not None:
        files["tokenizer_config.json"] = _tokenizer_config(model.config, special_ids, tokenizer.special_tokens)
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as renames:
        for name, content in files.items():
            renames.enter_context(replacing(directory / name)).write(json.dumps(content, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save(renames.enter_context(replacing(directory / "tokenizer.json")).name)
        file = renames.enter_context(replacing(directory / "model.safetensors", "wb"))
        save_file(weights, file.name, metadata={"format": "pt"})


def from_pretrained(
    directory: str | os.PathLike, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Transformer:
    """Read a model of ours, or a Llama, Mistral, Qwen2 or Qwen3 from a directory in the Hugging Face layout.

    dtype: of the weights; as they are stored if None.
    Raises FileNotFoundError where a file is missing, ValueError for a model of another kind and for damaged files.
    """
    directory = pathlib.Path(directory)
    theirs = _read_json(directory / "config.json")
    config, name_of = _our_config(theirs), _our_name if theirs.get("model_type") == OURS else _theirs
    model = Transformer(config, device="meta")
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    found: dict[str, Tensor] = {}
    for path in _weight_files(directory):
        try:
            with safe_open(path, framework="pt", device=str(device or "cpu")) as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    _check_weights(directory, found, {name_of(name): shape for name, shape in shapes.items()})
    dtype = found[name_of("embedding.weight")].dtype if dtype is None else dtype
    model.load_state_dict({name: found[name_of(name)].to(dtype) for name in shapes}, assign=True)
    model.special_ids = {name: theirs[name] for name in SPECIAL_IDS if theirs.get(name) is not None}
    if (directory / "generation_config.json").exists():
        generation = _read_json(directory / "generation_config.json")
        model.generation_config = {k: v for k, v in generation.items() if v is not None or k not in SPECIAL_IDS}
    _check_ends(directory, model)
    return model


def read_step(directory: str | os.PathLike) -> int | None:
    """The step of training at which the model in a directory was written; None where it does not say."""
    return _read_json(pathlib.Path(directory) / "config.json").get("training_step")


def read_kind(directory: str | os.PathLike) -> str | None:
    """The model_type in a directory's config.json: OURS, or a family of transformers."""
    return _read_json(pathlib.Path(directory) / "config.json").get("model_type")


def _in_layout(model: Transformer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json without its special ids, and the weights by the names it implies."""
    config, weights = model.config.short_form(), model.state_dict()
    if config is None or config.logit_softcap is not None or (config.qk_norm and config.qkv_bias):
        ours = {"model_type": OURS, "architectures": ["Transformer"], "config": to_table(model.config)}
        return ours, {_our_name(name): t.contiguous() for name, t in weights.items()}
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    known = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    theirs = known | {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.ff_size,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_theta": config.rope_theta,
    }
    return theirs, {_theirs(name): _half_split(name, t, config) for name, t in weights.items()}


def _tokenizer_config(
    config: TransformerConfig, special_ids: dict[str, Any], special_tokens: dict[str, int]
) -> dict[str, Any]:
    """With the text of each special id; of several ends, the first."""
    text_of = {i: text for text, i in special_tokens.items()}
    first = {name: i[0] if isinstance(i, list) and i else i for name, i in special_ids.items()}
    texts = {name.removesuffix("_id"): text_of[i] for name, i in first.items() if i in text_of}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.context_length} | texts


def _check_ends(directory: pathlib.Path, model: Transformer) -> None:
    if bad := [i for i in model.end_ids if type(i) is not int or i < 0]:
        raise ValueError(f"{directory} has eos_token_id {bad[0]!r}: expected a token's id, or a list of them")


def _our_config(theirs: dict[str, Any]) -> TransformerConfig:
    kind = theirs.get("model_type")
    if kind == OURS:
        return parse(TransformerConfig, theirs.get("config", {}))
    if kind not in ARCHITECTURES:
        raise ValueError(f"model_type must be one of {', '.join((*ARCHITECTURES, OURS))}, got {kind!r}")
    for name, unused in UNUSED.items():
        if theirs.get(name) is not None and theirs[name] not in unused:
            raise ValueError(f"config.json has {name} = {theirs[name]!r}, which cs336.models.Transformer does not do")
    window = theirs.get("sliding_window", 4096)
    if kind == "mistral" and window is not None and window < theirs.get("max_position_embeddings", 0):
        raise ValueError(
            f"config.json lets a token see the last {window} alone, which cs336.models.Transformer does not do"
        )
    rope = {"rope_theta": theirs.get("rope_theta", 10000.0)}
    for name in ("rope_scaling", "rope_parameters"):  # the second since transformers 5
        rope |= theirs.get(name) or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(
            f"config.json scales its rotary positions ({rope}), which cs336.models.Transformer does not do"
        )
    defaults = DEFAULTS | DEFAULTS_OF[kind]
    if missing := [name for name in FIELDS.values() if name not in theirs and name not in defaults]:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    values: dict[str, Any] = {ours: theirs.get(name, defaults.get(name)) for ours, name in FIELDS.items()}
    kind_of = {"qk_norm": kind == "qwen3", "qkv_bias": kind == "qwen2"}
    return TransformerConfig(**values, **kind_of, rope_theta=rope["rope_theta"])


def _our_name(name: str) -> str:
    """As in the model: our own kind of config.json has no other reader."""
    return name


def _theirs(name: str) -> str:
    layer = re.match(r"layers\.\d+\.", name)
    rest = name[layer.end() :] if layer else name
    ours = rest[: rest.index(".") + 1]
    return (f"model.{layer[0]}" if layer else "") + NAMES[ours] + rest[len(ours) :]


def _half_split(name: str, t: Tensor, config: TransformerConfig) -> Tensor:
    """Rows of a query or key weight from interleaved rotary pairs to half-split ones: the same attention scores."""
    if config.rope_interleaved and re.search(r"\.[qk]_(proj|norm)\.", name):
        pairs = t.unflatten(0, (-1, config.head_size // 2, 2))
        t = pairs.transpose(1, 2).flatten(0, 2)
    return t.contiguous()


def _weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    index = directory / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists() and not (directory / names[0]).exists():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        if bad := [name for name in names if pathlib.PurePath(name).name != name]:
            raise ValueError(f"{index} names files outside its directory: {', '.join(bad)}")
    if missing := [name for name in names if not (directory / name).exists()]:
        raise FileNotFoundError(f"{directory} lacks {', '.join(missing)}; only safetensors are read, never pickles")
    return [directory / name for name in names]


def _check_weights(directory: pathlib.Path, found: dict[str, Tensor], expected: dict[str, torch.Size]) -> None:
    if missing := expected.keys() - found.keys():
        raise ValueError(f"{directory} lacks weights: {', '.join(sorted(missing))}")
    # A tied head may be written twice, and old files hold rotary tables.
    unknown = [
        n for n in found if n not in expected and n != "lm_head.weight" and not n.endswith("rotary_emb.inv_freq")
    ]
    if unknown:
        raise ValueError(f"{directory} has unknown weights: {', '.join(sorted(unknown))}")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise ValueError(f"{name} has shape {tuple(found[name].shape)}, config.json means {tuple(shape)}")


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no {path.name}: is it a model's directory?")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
