"""The files of a model in the Hugging Face layout, written whole and read with every field and weight accounted for."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cs336.models.config import TransformerConfig
from cs336.models.huggingface.adapter import add_adapter, base_of, is_adapter, write_adapter
from cs336.models.huggingface.cohere import COHERE, COHERE2
from cs336.models.huggingface.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from cs336.models.huggingface.family import Family, Rule
from cs336.models.huggingface.fields import read_json
from cs336.models.huggingface.gemma import GEMMA
from cs336.models.huggingface.gemma2 import GEMMA2
from cs336.models.huggingface.gemma3 import GEMMA3
from cs336.models.huggingface.glm import GLM, GLM4
from cs336.models.huggingface.gpt2 import GPT2
from cs336.models.huggingface.gpt_oss import GPT_OSS, without_mxfp4
from cs336.models.huggingface.granite import GRANITE
from cs336.models.huggingface.llama import LLAMA
from cs336.models.huggingface.mamba2 import MAMBA2
from cs336.models.huggingface.mistral import MISTRAL
from cs336.models.huggingface.mixtral import MIXTRAL
from cs336.models.huggingface.olmo2 import OLMO2
from cs336.models.huggingface.olmo3 import OLMO3
from cs336.models.huggingface.olmoe import OLMOE
from cs336.models.huggingface.phi3 import PHI3
from cs336.models.huggingface.quantized import read_quantized, write_quantized
from cs336.models.huggingface.qwen2 import QWEN2
from cs336.models.huggingface.qwen2_moe import QWEN2_MOE
from cs336.models.huggingface.qwen3 import QWEN3
from cs336.models.huggingface.qwen3_moe import QWEN3_MOE
from cs336.models.huggingface.smollm3 import SMOLLM3
from cs336.models.transformer import Transformer
from cs336.nn import QuantMethod, RopeConfig, is_quantized, replace_linears
from cs336.utils.config import parse, to_table
from cs336.utils.files import is_name, read_text, replacing, write_text
from cs336.utils.special_tokens import END_OF_TEXT
from cs336.utils.tensor_file import save_tensors

FAMILIES = {
    family.model_type: family
    for family in (
        *(LLAMA, QWEN2, QWEN3, MISTRAL, OLMO2, OLMO3, GPT2, MIXTRAL, QWEN3_MOE, GEMMA2, GEMMA3),  # the first that fits
        *(DEEPSEEK_V2, DEEPSEEK_V3, MAMBA2, GEMMA, PHI3, SMOLLM3, GRANITE, OLMOE, QWEN2_MOE, COHERE, COHERE2, GPT_OSS),
        *(GLM, GLM4),
    )
}
OURS = "cs336"  # model_type of what no family of theirs has; "config" beside it is a TransformerConfig
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # each an id or (of ends) a list of ids
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
QUANTIZATION = "quantization_config"
MUP = "mup_base_width"  # ours in a family's config.json: changes no logit, but how the model is trained further
CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


def save_pretrained(
    model: Transformer,
    directory: str | os.PathLike,
    tokenizer=None,
    *,
    step: int | None = None,
    max_shard_bytes: int = 50 * 10**9,
    quantized_as: str = OURS,
) -> None:
    """Write the model, and the tokenizer if given, so that transformers and `from_pretrained` load equal logits.

    Each file replaces its predecessor once all are written; other weights that an earlier save left there are removed
    then. The family is the first that has such a model; one with interleaved rotary positions is written with its query
    and key rows reordered for the half-split ones of this layout, and dropout is written where the family has a field
    for it. What no family has (a soft-cap on a Llama; qk_norm with the biases of Qwen2; blocks of several kinds) is
    written as our own kind of model, with our configuration and names, for `from_pretrained` alone. Special ids,
    generation_config.json and the chat template are those that the model was read with; without any ids, the
    tokenizer's <|endoftext|> begins and ends a text.

    step: of training; `read_step` finds it.
    max_shard_bytes: of a file of weights; more than it holds are written as shards with an index.
    quantized_as: how quantised layers are written: "cs336", as our own kind of model, or for a model of a family
        "compressed-tensors", "gptq" or "awq".
    Raises ValueError for a tokenizer that exceeds the model, and for layers that the format does not hold.
    """
    if not isinstance(model, Transformer):
        raise TypeError(f"model must be a cs336.models.Transformer, got {type(model).__name__}")
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}")
    end = None if tokenizer is None else tokenizer.special_tokens.get(END_OF_TEXT)
    special_ids = model.special_ids or {"bos_token_id": end, "eos_token_id": end}
    config, weights = _in_layout(model, quantized_as)
    config |= special_ids | {"torch_dtype": str(model.embedding.weight.dtype).removeprefix("torch.")}
    config |= {} if step is None else {"training_step": step}
    config |= {} if model.config.mup_base_width is None else {MUP: model.config.mup_base_width}
    files: dict[str, Any] = {CONFIG: config, GENERATION: model.generation_config or special_ids}
    if tokenizer is not None:
        files[TOKENIZER] = _tokenizer_config(model.saved_config, special_ids, tokenizer.special_tokens)
    shards = _shards(weights, max_shard_bytes)
    if len(shards) > 1:
        total = sum(t.nbytes for t in weights.values())
        places = {name: file for file, part in shards.items() for name in part}
        files[INDEX] = {"metadata": {"total_size": total}, "weight_map": places}
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as renames:
        for name, content in files.items():
            renames.enter_context(replacing(directory / name)).write(json.dumps(content, indent=2) + "\n")
        if model.chat_template is not None:
            renames.enter_context(replacing(directory / TEMPLATE)).write(model.chat_template)
        if tokenizer is not None:
            tokenizer.save(renames.enter_context(replacing(directory / "tokenizer.json")).name)
        for name, part in shards.items():
            file = renames.enter_context(replacing(directory / name, "wb"))
            save_tensors(part, file.name, {"format": "pt"})
    for name in os.listdir(directory):  # what an earlier save left, which some readers would take for this one's
        if (name in (WEIGHTS, INDEX) or SHARD.fullmatch(name)) and name not in shards and name not in files:
            (directory / name).unlink()


def check_quantized_as(
    config: TransformerConfig, form: str, method: QuantMethod, group: int | None, *, order: bool = False
) -> None:
    """Raises ValueError where a model, quantised so, could not be written in this format: before it is quantised."""
    with torch.device("meta"):
        model = Transformer(config)
        replace_linears(model.layers, method, group, order=order)
    _in_layout(model, form)


def save_adapter(
    model: Transformer,
    layers: Mapping[str, tuple[Tensor, Tensor]],
    directory: str | os.PathLike,
    *,
    base: str | os.PathLike,
    alpha: float,
) -> None:
    """Write a LoRA as PEFT and `from_pretrained` read it: A (r, in) and B (out, r) by the names of the model's layers,
    and the model's generation_config and chat template.

    base: the directory of the model that they adapt, whose family names the layers. alpha: the products' weight is
    alpha / r. Raises FileNotFoundError where there is no base, ValueError for a layer that its family lays out together
    with others, as GPT-2 and Phi-3 do queries, keys and values.
    """
    base = pathlib.Path(base)
    config, (_, family) = model.saved_config, _our_config(read_json(base / CONFIG), base)
    shapes = {f"{name}.weight": torch.Size((b.shape[0], a.shape[1])) for name, (a, b) in layers.items()}
    shapes = {name: t.shape for name, t in Transformer(config, device="meta").state_dict().items()} | shapes
    rules = [Rule((name,), (name,)) for name in shapes] if family is None else family.rules(shapes)
    theirs = {rule.ours[0]: rule.theirs[0] for rule in rules if rule.renames}
    named = {}
    for name, (a, b) in layers.items():
        if (full := theirs.get(f"{name}.weight")) is None:
            kind = OURS if family is None else family.model_type
            raise ValueError(f"{name} is no linear layer of its own in files of {kind}: an adapter cannot name it")
        rows = b if family is None else _half_split(f"{name}.weight", b, config, family)
        named[full.removesuffix(".weight")] = a, rows
    write_adapter(named, directory, base=base, alpha=alpha)
    if model.generation_config:
        write_text(pathlib.Path(directory) / GENERATION, json.dumps(model.generation_config, indent=2) + "\n")
    if model.chat_template is not None:
        write_text(pathlib.Path(directory) / TEMPLATE, model.chat_template)


def from_pretrained(
    directory: str | os.PathLike,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    max_len: int | None = None,
) -> Transformer:
    """Read a model of ours, or of one of the FAMILIES, from a directory in the Hugging Face layout; or of a LoRA in
    PEFT's layout the base model that it names, with the adapter merged into its weights.

    dtype: of the weights; as they are stored if None. The model is in eval mode, as one of transformers.
    max_len: tokens of the longest text, see TransformerConfig.within.
    Raises FileNotFoundError where a file is missing, ValueError for a model of another kind, naming the field of
    config.json that says so, and for damaged files.
    """
    given = pathlib.Path(directory)
    directory = base_of(given)
    theirs = read_json(directory / CONFIG)
    config, family = _our_config(theirs, directory)
    model = Transformer.within(config, max_len, "meta").eval()
    found: dict[str, Tensor] = {}
    for path in _weight_files(directory):
        try:
            with safe_open(path, framework="pt", device=str(device or "cpu")) as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    if is_adapter(given):
        add_adapter(given, found, transposed=family is GPT2)
    said = theirs.get(QUANTIZATION)
    if family is GPT_OSS and isinstance(said, dict) and said.get("quant_method") == "mxfp4":
        found, said = without_mxfp4(found), None
    quantized = set() if said is None else read_quantized(model, said, found, family)
    state = model.state_dict()
    shapes = {name: t.shape for name, t in state.items() if name not in quantized}
    weights = _our_weights(directory, found, shapes, family)
    dtype = weights["embedding.weight"].dtype if dtype is None else dtype
    dtypes = model.dtypes(dtype)
    dtypes |= {name: buffer.dtype for name, buffer in model.named_buffers()}  # no weights: what balances experts
    read = {n: state[n] if n in quantized else weights[n].to(dtypes.get(n, dtype)) for n in state}
    model.load_state_dict(read, assign=True)
    model.special_ids = {name: theirs[name] for name in SPECIAL_IDS if theirs.get(name) is not None}
    if place := next((place for place in (given, directory) if (place / GENERATION).exists()), None):
        generation = read_json(place / GENERATION)
        model.generation_config = {k: v for k, v in generation.items() if v is not None or k not in SPECIAL_IDS}
    model.chat_template = _chat_template(given) or _chat_template(directory)
    _check_ends(directory, model)
    return model


def read_config(directory: str | os.PathLike) -> TransformerConfig:
    """The configuration of the model in a directory, without its weights. Errors: as from_pretrained's."""
    base = base_of(directory)
    return _our_config(read_json(base / CONFIG), base)[0]


def read_step(directory: str | os.PathLike) -> int | None:
    """The step of training at which the model in a directory was written; None where it does not say."""
    return read_json(base_of(directory) / CONFIG).get("training_step")


def read_kind(directory: str | os.PathLike) -> str | None:
    """The model_type in a directory's config.json: OURS, or a family of transformers."""
    return read_json(base_of(directory) / CONFIG).get("model_type")


def _in_layout(model: Transformer, quantized_as: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json without its special ids, and the weights by the names it implies."""
    config, weights = model.saved_config, model.state_dict()
    tables = ((family, family.table(config)) for family in FAMILIES.values())
    family, table = next(((family, table) for family, table in tables if table is not None), (None, None))
    if is_quantized(model) and quantized_as == OURS:
        family = table = None
    rows = _as_it_is if family is None else functools.partial(_half_split, config=config, family=family)
    said, quantized, buffers = write_quantized(model, quantized_as, family, rows)
    weights = {name: t for name, t in weights.items() if name not in buffers}
    if family is not None and table is not None:
        return table | said, dict(_their_weights(weights, config, family)) | quantized
    ours = {"model_type": OURS, "architectures": ["Transformer"], "config": to_table(config)} | said
    return ours, {name: t.contiguous() for name, t in weights.items()} | quantized


def _their_weights(
    weights: dict[str, Tensor], config: TransformerConfig, family: Family
) -> Iterator[tuple[str, Tensor]]:
    for rule in family.rules({name: t.shape for name, t in weights.items()}):
        written = rule.write([_half_split(name, weights[name], config, family) for name in rule.ours])
        if config.float32_norms:  # ours alone: files have one dtype
            written = [t.to(weights["embedding.weight"].dtype) for t in written]
        yield from zip(rule.theirs, (t.contiguous() for t in written), strict=True)


def _shards(weights: dict[str, Tensor], most: int) -> dict[str, dict[str, Tensor]]:
    """File names, and what is in each: at most so many bytes, but for a weight that is larger alone."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, t in weights.items():
        if parts[-1] and size + t.nbytes > most:
            parts.append({})
            size = 0
        parts[-1][name] = t
        size += t.nbytes
    if len(parts) == 1:
        return {WEIGHTS: parts[0]}
    return {f"model-{i:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts, 1)}


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


def _our_config(theirs: dict[str, Any], directory: pathlib.Path) -> tuple[TransformerConfig, Family | None]:
    """And the family that its weights are laid out as; None for ours."""
    kind = theirs.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    try:
        if kind == OURS:
            return parse(TransformerConfig, theirs.get("config", {})), None
        if family is None:
            raise ValueError(f"model_type must be one of {', '.join((*FAMILIES, OURS))}, got {kind!r}")
        plain = {name: value for name, value in theirs.items() if name not in (QUANTIZATION, MUP)}
        return dataclasses.replace(family.config(plain), mup_base_width=theirs.get(MUP)), family
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from None


def _our_weights(
    directory: pathlib.Path, found: dict[str, Tensor], shapes: dict[str, torch.Size], family: Family | None
) -> dict[str, Tensor]:
    rules = [Rule((name,), (name,)) for name in shapes] if family is None else family.rules(shapes)
    if family is not None and not any(name.startswith(family.prefix) for name in found):
        found = {family.prefix + name: t for name, t in found.items()}  # of a file without a head
    expected = {name for rule in rules for name in rule.theirs}
    if missing := expected - found.keys():
        raise ValueError(f"{directory} lacks weights: {', '.join(sorted(missing))}")
    # A tied head may be written twice, and old files hold tables.
    ignored = ("lm_head.weight", *(() if family is None else family.ignored))
    if unknown := [name for name in found if name not in expected and not name.endswith(ignored)]:
        raise ValueError(f"{directory} has unknown weights: {', '.join(sorted(unknown))}")
    if odd := [name for name in sorted(expected) if not found[name].is_floating_point()]:
        kind = found[odd[0]].dtype
        raise ValueError(
            f"{odd[0]} is {kind}, config.json means floating point: quantised weights need their {QUANTIZATION}"
        )
    weights: dict[str, Tensor] = {}
    for rule in rules:
        try:
            read = rule.read([found[name] for name in rule.theirs])
        except RuntimeError as error:
            raise ValueError(f"{', '.join(rule.theirs)} cannot be laid out as ours: {error}") from None
        for name, t in zip(rule.ours, read, strict=True):
            if t.shape != shapes[name]:
                shown = rule.theirs[0] if len(rule.ours) == len(rule.theirs) == 1 else name
                raise ValueError(f"{shown} has shape {tuple(t.shape)}, config.json means {tuple(shapes[name])}")
            weights[name] = t.contiguous()
    return weights


def _as_it_is(name: str, t: Tensor) -> Tensor:
    return t


def _half_split(name: str, t: Tensor, config: TransformerConfig, family: Family) -> Tensor:
    """Rows of a query or key weight from interleaved rotary pairs to half-split ones: the same attention scores."""
    place = re.match(r"layers\.(\d+)\.attention\.[qk]_(proj|norm)\.", name)
    if family.keeps_pairs or place is None:
        return t
    block = config.blocks[int(place[1])]
    if not (isinstance(block.positions, RopeConfig) and block.positions.interleaved):
        return t
    D = block.mixer.rope_dim(config.d_model)
    turned, rest = t.unflatten(0, (-1, D)).tensor_split([block.positions.rotary_dim(D)], 1)
    pairs = turned.unflatten(1, (-1, 2))
    return torch.cat((pairs.transpose(1, 2).flatten(1, 2), rest), 1).flatten(0, 1)


def _chat_template(directory: pathlib.Path) -> str | None:
    """In a file of its own, or in tokenizer_config.json; of several there the default, and a warning."""
    if (directory / TEMPLATE).exists():
        return read_text(directory / TEMPLATE)
    if not (directory / TOKENIZER).exists():
        return None
    template = read_json(directory / TOKENIZER).get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        others = ", ".join(str(name) for name in named if name != "default")
        warnings.warn(f"{directory} has several chat templates: the default is read, and not {others}", stacklevel=3)
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{directory / TOKENIZER} has chat_template = {template!r}: expected a text")
    return template


def has_weights(directory: str | os.PathLike) -> bool:
    """Whether all files of a model's weights are there."""
    try:
        return bool(_weight_files(pathlib.Path(directory)))
    except (OSError, ValueError):
        return False


def _weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    index = directory / INDEX
    names = [WEIGHTS]
    if index.exists() and not (directory / names[0]).exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise ValueError(f"{index} must have a weight_map, a table of weights and names of files")
        names = sorted(set(places.values()))
        if bad := [name for name in names if not is_name(name)]:
            raise ValueError(f"{index} names files outside its directory: {', '.join(map(repr, bad))}")
    if missing := [name for name in names if not (directory / name).exists()]:
        raise FileNotFoundError(f"{directory} lacks {', '.join(missing)}; only safetensors are read, never pickles")
    return [directory / name for name in names]
