"""The quantised layers of a model: where a file keeps each, and what stands for it in the model."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cs336.models.huggingface.family import Family, Rule
from cs336.models.huggingface.quantized.awq import AWQ
from cs336.models.huggingface.quantized.compressed_tensors import CompressedTensors
from cs336.models.huggingface.quantized.gptq import GPTQ
from cs336.models.huggingface.quantized.own import Own
from cs336.models.huggingface.quantized.scheme import Format, scheme_of
from cs336.models.huggingface.quantized.tensors import Tensors
from cs336.models.transformer import Transformer
from cs336.nn import Linear, QuantizedLinear, QuantizedWeight
from cs336.nn.expert_list import unstack_experts

OURS = "cs336"
FORMATS: dict[str, type[Format]] = {
    OURS: Own,
    "compressed-tensors": CompressedTensors,
    "gptq": GPTQ,
    "awq": AWQ,
}


def read_quantized(model: Transformer, said: Any, found: dict[str, Tensor], family: Family | None) -> set[str]:
    """Put the quantised layers of a file in the places of a model's, which is on meta, and take their tensors out of
    `found`. Returns the names of their buffers, biases left out.

    said: the quantization_config. Raises ValueError by the name of the field or the tensor that does not fit.
    """
    kind = said.get("quant_method") if isinstance(said, dict) else said
    if not isinstance(kind, str) or kind not in FORMATS or (kind == OURS) != (family is None):
        allowed = OURS if family is None else ", ".join(name for name in FORMATS if name != OURS)
        raise ValueError(f"quantization_config is of {kind!r}: of this model_type {allowed} can be read")
    form = FORMATS[kind].of(said)
    places = _stacks(model, family)
    stems = {name.rpartition(".")[0] for name in found if name.rpartition(".")[2] == form.mark}
    for stem, parts in _woven(model, family).items():
        if stem in stems:
            raise ValueError(
                f"{stem} is quantised, and it is {len(parts)} layers here, {', '.join(parts)}: read are files that "
                "keep such matrices as they are, or the model before it was quantised"
            )
    wanted = {stem: names for stem, names in places.items() if stem in stems}
    if not wanted:
        raise ValueError(f"quantization_config is of {kind!r}, and no layer of the file has a {form.mark}")
    for mixture in {name.partition(".experts.")[0] for (name, *_) in wanted.values() if ".experts." in name}:
        if left := [
            s for s, (name, *_) in places.items() if name.startswith(f"{mixture}.experts.") and s not in wanted
        ]:
            raise ValueError(f"{left[0]}.{form.mark} is missing, and other experts of its layer are quantised")
        unstack_experts(model.get_submodule(mixture))
    buffers = set()
    for stem, names in wanted.items():
        layers = [layer for layer in map(model.get_submodule, names) if isinstance(layer, nn.Linear)]
        rows, width = [layer.out_features for layer in layers], layers[0].in_features
        whole = form.read(Tensors(found, stem, form.scheme.method), sum(rows), width)
        for name, old, weight in zip(names, layers, whole.split(rows), strict=True):
            options: dict[str, Any] = {"zeros": weight.zeros is not None, "order": weight.order is not None}
            options |= {"x_group": form.scheme.x_group}
            new = QuantizedLinear.like(old, form.scheme.method, form.scheme.group, **options)
            new.fill(weight)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new)
            buffers |= {f"{name}.{part}" for part, t in new.named_buffers() if part != "bias" and t is not None}
    return buffers


def write_quantized(
    model: Transformer, form: str, family: Family | None, rows: Any
) -> tuple[dict[str, Any], dict[str, Tensor], set[str]]:
    """The quantization_config of a model, the tensors of its quantised layers by their names in a file, and the names
    that these have in the model; all empty for a model without.

    rows: (name, tensor) -> tensor puts the rows of a layer in the file's order.
    Raises ValueError for an unknown format, and for what it cannot hold, by the name of the layer.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    if not layers:
        return {}, {}, set()
    if form not in FORMATS:
        raise ValueError(f"the format must be one of {', '.join(FORMATS)}, got {form!r}")
    if family is None and form != OURS:
        raise ValueError(f"no family of Hugging Face has this model: choose the format {OURS!r}, not {form!r}")
    writer = FORMATS[form].like(scheme_of(layers))
    places = _stacks(model, family)
    stems = {name: stem for stem, names in places.items() for name in names}
    if homeless := [name for name in layers if name not in stems]:
        raise ValueError(f"{homeless[0]} has no place in a file of {form!r}: choose the format {OURS!r}")
    weights: dict[str, Tensor] = {}
    buffers: set[str] = set()
    for stem in dict.fromkeys(stems[name] for name in layers):
        names = places[stem]
        if left := [name for name in names if name not in layers]:
            raise ValueError(
                f"{left[0]} is not quantised, and in a file of {form!r} it is one matrix with {', '.join(names)}: "
                f"quantise all of these or none, or choose the format {OURS!r}"
            )
        try:
            whole = QuantizedWeight.stack([_moved(layers[name].quantized, name, rows) for name in names])
            tensors = writer.write(whole, layers[names[0]].group)
        except ValueError as error:
            raise ValueError(f"{', '.join(names)}: {error}") from None
        weights |= {f"{stem}.{last}": t for last, t in tensors.items()}
        buffers |= {f"{n}.{part}" for n in names for part, _ in layers[n].named_buffers() if part != "bias"}
    plain = [stems.get(n, n) for n, m in model.layers.named_modules(prefix="layers") if isinstance(m, Linear)]
    return {"quantization_config": writer.config(list(dict.fromkeys(["lm_head", *plain])))}, weights, buffers


def _moved(weight: QuantizedWeight, name: str, rows: Any) -> QuantizedWeight:
    q, scales, zeros, order = weight
    zeros = None if zeros is None else rows(f"{name}.", zeros)
    return QuantizedWeight(rows(f"{name}.", q), rows(f"{name}.", scales), zeros, order)


def _stacks(model: Transformer, family: Family | None) -> dict[str, tuple[str, ...]]:
    """The name in a file of each matrix of the blocks that may be quantised there, and ours of the linear layers whose
    rows it holds, one above the other."""
    shapes = _shapes(model)
    rules = [Rule((name,), (name,)) for name in shapes] if family is None else family.rules(shapes)
    alone = {stem: (name,) for name, stem in _places(rules, shapes)}
    several = {_stem(rule.theirs[0]): tuple(map(_stem, rule.ours)) for rule in rules if rule.stacked}
    return alone | several


def _stem(name: str) -> str:
    return name.removesuffix(".weight")


def _woven(model: Transformer, family: Family | None) -> dict[str, list[str]]:
    """The names in a file of matrices that several layers of ours make up otherwise than by rows, and which."""
    rules = [] if family is None else [rule for rule in family.rules(_shapes(model)) if len(rule.ours) > 1]
    return {_stem(rule.theirs[0]): list(map(_stem, rule.ours)) for rule in rules if not rule.stacked}


def _shapes(model: Transformer) -> dict[str, torch.Size]:
    """Of the weights of the blocks, before any was quantised."""
    with torch.device("meta"):
        return {n: t.shape for n, t in Transformer(model.config).state_dict().items() if n.startswith("layers.")}


def _places(rules: list[Rule], shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, str]]:
    for rule in rules:
        if len(rule.ours) > 1:
            continue
        (name,) = rule.ours
        if ".mlp.experts." in name and len(shapes[name]) == 1:
            continue  # biases
        if ".mlp.experts." in name and len(rule.theirs) < shapes[name][0] and rule.theirs != rule.ours:
            continue  # one stack of them, as gpt-oss has it
        if ".mlp.experts." in name:
            for e in range(shapes[name][0]):
                yield (
                    f"{name}.{e}",
                    f"{name}.{e}" if rule.theirs == rule.ours else rule.theirs[e].removesuffix(".weight"),
                )
        elif name.endswith(".weight") and len(shapes[name]) == 2 and rule.read is Rule.read:
            yield name.removesuffix(".weight"), rule.theirs[0].removesuffix(".weight")
