"""A model in a GGUF file as a Transformer."""

import os

import torch
from torch import Tensor

from cs336.models.config import TransformerConfig
from cs336.models.gguf.architectures import ARCHITECTURES, Architecture, sizes
from cs336.models.gguf.reader import GGUF
from cs336.models.huggingface.fields import Fields
from cs336.models.transformer import Transformer


def from_gguf(
    path: str | os.PathLike, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Transformer:
    """The model in a GGUF file, its weights dequantized: float32 if dtype is None. In eval mode.

    Raises FileNotFoundError where there is no file, ValueError for one that is damaged, and for a model of
    another architecture, or one that does what a Transformer does not, naming the key of its metadata.
    """
    file = GGUF(path)
    config, architecture = _config(file)
    model = Transformer(config, device="meta").eval()
    model.load_state_dict(_weights(file, model, architecture, device, dtype), assign=True)
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (i := file.get(f"tokenizer.ggml.{theirs}_token_id", int)) is not None:
            model.special_ids[f"{ours}_token_id"] = i
    model.chat_template = file.get("tokenizer.chat_template", str)
    return model


def config_of_gguf(path: str | os.PathLike) -> TransformerConfig:
    """The configuration alone. Errors: as from_gguf's."""
    return _config(GGUF(path))[0]


def _weights(
    file: GGUF,
    model: Transformer,
    architecture: Architecture,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    rules = architecture.rules(shapes)
    expected = {name for rule in rules for name in rule.theirs}
    if missing := expected - file.tensors.keys():
        raise ValueError(f"{file.path} lacks weights: {', '.join(sorted(missing))}")
    if unknown := file.tensors.keys() - expected:
        raise ValueError(f"{file.path} has unknown weights: {', '.join(sorted(unknown))}")
    for rule in rules:
        found = [file.tensors[name].shape for name in rule.theirs]
        means = [tuple(t.shape) for t in rule.write([torch.empty(shapes[name], device="meta") for name in rule.ours])]
        for name, has, mean in zip(rule.theirs, found, means, strict=True):
            if has != mean:
                raise ValueError(f"{file.path}: {name} has shape {has}, the metadata mean {mean}")
    weights: dict[str, Tensor] = {}
    for rule in rules:
        read = rule.read([file.tensor(name).to(device, dtype) for name in rule.theirs])
        weights |= zip(rule.ours, read, strict=True)
    return weights


def _config(file: GGUF) -> tuple[TransformerConfig, Architecture]:
    name = file.get("general.architecture", str)
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{file.path} has general.architecture {name!r}: read are {known}")
    if "token_embd.weight" not in file.tensors or len(file.tensors["token_embd.weight"].shape) != 2:
        raise ValueError(f"{file.path} lacks weights: token_embd.weight, of two dims")
    table = {k.removeprefix(f"{name}."): v for k, v in file.metadata.items() if k.startswith(f"{name}.")}
    fields = Fields(table, above=f"{name}.", source=str(file.path))
    rows = file.tensors["token_embd.weight"].shape[0]
    config = ARCHITECTURES[name].read(fields, sizes(fields, rows, "output.weight" not in file.tensors))
    fields.finish()
    return config.short_form() or config, ARCHITECTURES[name]
