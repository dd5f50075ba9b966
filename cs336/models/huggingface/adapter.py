"""Low-rank adapters (arXiv:2106.09685) in PEFT's layout: adapter_config.json and adapter_model.safetensors.

A directory of one stands for its base model with W + scale B A in the place of W, A (r, in) and B (out, r); scale is
lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora (arXiv:2312.03732).
"""

import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cs336.models.huggingface.fields import read_json
from cs336.utils.files import replacing
from cs336.utils.tensor_file import save_tensors

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in an adapter's file
USED = {"peft_type", "base_model_name_or_path", "r", "lora_alpha", "alpha_pattern", "use_rslora"}
USED |= {"init_lora_weights"}
BEGINS_AT_BASE = (None, True, False, "gaussian", "orthogonal", "eva")  # others take what A and B begin as from the base
# What says how an adapter is trained or was initialised, or which layers it has, which its weights say too.
HARMLESS = {"auto_mapping", "corda_config", "eva_config", "exclude_modules", "fan_in_fan_out"}
HARMLESS |= {
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
}
HARMLESS |= {"modules_to_save", "peft_version", "qalora_group_size", "rank_pattern", "revision", "runtime_config"}
HARMLESS |= {"target_modules", "task_type", "ensure_weight_tying"}
NAMES = re.compile(r"(?P<first>\^|\^?\.\*)?(?P<name>(?:[\w-]|\\?\.)+)\$?")
PARTS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_embedding_A": "a", "lora_embedding_B": "b"}


def is_adapter(directory: str | os.PathLike) -> bool:
    return (pathlib.Path(directory) / ADAPTER).exists()


def base_of(directory: str | os.PathLike) -> pathlib.Path:
    """The directory of the model that an adapter adapts; the directory itself where it holds no adapter.

    Raises FileNotFoundError where the base is not on this machine.
    """
    directory = pathlib.Path(directory)
    if not is_adapter(directory):
        return directory
    said = read_json(directory / ADAPTER).get("base_model_name_or_path")
    for place in (directory / str(said), pathlib.Path(str(said))):
        if said and (place / "config.json").exists():
            return place
    raise FileNotFoundError(
        f"{directory / ADAPTER} adapts {said!r}, which is no directory of a model here: set base_model_name_or_path to "
        "one"
    )


def add_adapter(directory: pathlib.Path, weights: dict[str, Tensor], *, transposed: bool = False) -> None:
    """Put the adapted weights in the place of a base's, named as in its files; sums are taken in float32.

    transposed: weights lie (in, out), but for a head's, as GPT-2's do: PEFT too goes by that, not by fan_in_fan_out.
    Raises ValueError for what is no LoRA, a field that would change what it computes otherwise, and weights that do not
    fit the base's.
    """
    config = read_json(directory / ADAPTER)
    _check(directory, config)
    path = directory / ADAPTER_WEIGHTS
    if not path.exists():
        raise FileNotFoundError(f"{directory} lacks {ADAPTER_WEIGHTS}; only safetensors are read, never pickles")
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in found.items():
        part = next((part for part in PARTS if name.endswith(f".{part}")), None)
        if part is None:  # of modules_to_save: learned whole
            target = _target(path, name.removeprefix(PREFIX), weights)
            weights[target] = _fitting(path, name, tensor, weights[target])
            continue
        pairs.setdefault(name.removesuffix(f".{part}"), {})[PARTS[part]] = tensor.T if "embedding" in part else tensor
    for name, pair in pairs.items():
        if pair.keys() != {"a", "b"}:
            raise ValueError(f"{path} has one of the two matrices of {name}: expected lora_A and lora_B")
        embedding = f"{name}.lora_embedding_A" in found  # of (vocabulary, out), A and B transposed
        a, b = (pair["a"], pair["b"]) if not embedding else (pair["b"], pair["a"])
        layer = name.removeprefix(PREFIX)
        target = _target(path, f"{layer}.weight", weights)
        if not (a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1] > 0):
            raise ValueError(f"{path}: {name} has an A of {tuple(a.shape)} and a B of {tuple(b.shape)}: no product")
        product = b.float() @ a.float()
        if transposed and not embedding and not layer.endswith("lm_head"):
            product = product.T
        scale = _scale(config, layer, a.shape[0])
        weight = weights[target]
        change = _fitting(path, name, product, weight).to(weight.device)
        weights[target] = (weight.float() + scale * change).to(weight.dtype)


def write_adapter(
    layers: Mapping[str, tuple[Tensor, Tensor]], directory: str | os.PathLike, *, base: str | os.PathLike, alpha: float
) -> None:
    """Write A (r, in) and B (out, r) of layers, by the names that the base's files give them, as PEFT reads them.

    base: the directory of the base model. alpha: the products' weight is alpha / r, and r the same of all.
    """
    directory = pathlib.Path(directory)
    (rank,) = {a.shape[0] for a, _ in layers.values()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(pathlib.Path(base).resolve()),
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {}
    for name, (a, b) in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.detach().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.detach().contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / ADAPTER) as file, replacing(directory / ADAPTER_WEIGHTS, "wb") as whole:
        file.write(json.dumps(config, indent=2) + "\n")
        save_tensors(tensors, whole.name, {"format": "pt"})


def _check(directory: pathlib.Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{directory / ADAPTER} has peft_type {config.get('peft_type')!r}: only LORA is read")
    other = {name: value for name, value in config.items() if name not in USED | HARMLESS}
    if changed := [
        f"{name} = {value!r}" for name, value in other.items() if value not in (None, False, "none", [], {})
    ]:
        raise ValueError(f"{directory / ADAPTER} has {', '.join(changed)}, which is not read")
    if (begin := config.get("init_lora_weights")) not in BEGINS_AT_BASE:
        raise ValueError(
            f"{directory / ADAPTER} has init_lora_weights = {begin!r}, whose base is not the model's own: save it "
            "converted to a plain LoRA (path_initial_model_for_weight_conversion of PEFT)"
        )


def _scale(config: dict[str, Any], layer: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{ADAPTER} has alpha_pattern = {patterns!r}: expected a table")
    own = [alpha for pattern, alpha in patterns.items() if _names(pattern, layer)]
    alpha = own[0] if own else config.get("lora_alpha", 8)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e30:
        raise ValueError(f"{ADAPTER} has lora_alpha = {alpha!r} for {layer}: expected a finite number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _names(pattern: str, layer: str) -> bool:
    """Whether PEFT's pattern, a regular expression of the end of a name, is of a layer.

    Those of names alone are read, after ^ or .* and before $: a file's own expression could be made to take for ever.
    """
    parts = NAMES.fullmatch(pattern)
    if parts is None:
        raise ValueError(
            f"{ADAPTER} has an alpha_pattern {pattern[:80]!r}: expected the end of a layer's name, perhaps after ^ or "
            ".*: spell out the layers that the expression means"
        )
    first, end = parts["first"], parts["name"].replace("\\.", ".")
    if first == "^":
        return layer == end
    return layer.endswith(end) if first else f".{layer}".endswith(f".{end}")


def _target(path: pathlib.Path, name: str, weights: dict[str, Tensor]) -> str:
    """The base's weight of this name, whose file may leave out what stands before all of them."""
    found = [own for own in weights if own == name or name.endswith(f".{own}")]
    if not found:
        raise ValueError(f"{path} adapts {name}, which the base model's files do not have")
    return max(found, key=len)


def _fitting(path: pathlib.Path, name: str, tensor: Tensor, weight: Tensor) -> Tensor:
    if tensor.shape != weight.shape:
        raise ValueError(
            f"{path}: {name} makes {tuple(tensor.shape)}, the base model's weight is {tuple(weight.shape)}"
        )
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{path}: {name} has values that are not finite")
    return tensor.to(weight.dtype) if not tensor.is_floating_point() else tensor
