"""A model in a GGUF file as a Transformer."""

import dataclasses
import os

import torch
from torch import Tensor

from cs336.models.config import TransformerConfig
from cs336.models.gguf.architectures import ARCHITECTURES, LONG, SHORT, Architecture, sizes
from cs336.models.gguf.reader import GGUF
from cs336.models.huggingface.fields import Fields
from cs336.models.transformer import Transformer
from cs336.nn import Llama3Scaling, LongRopeScaling, RopeConfig
from cs336.ops.rope_tables import inverse_frequencies

FACTORS, LLAMA3_LENGTH = "rope_freqs.weight", 8192  # what the frequencies are divided by; Llama 3's context


def from_gguf(
    path: str | os.PathLike,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    max_len: int | None = None,
) -> Transformer:
    """The model in a GGUF file, its weights dequantized: float32 if dtype is None. In eval mode.

    max_len: tokens of the longest text, see TransformerConfig.within.
    Raises FileNotFoundError where there is no file, ValueError for one that is damaged, and for a model of
    another architecture, or one that does what a Transformer does not, naming the key of its metadata.
    """
    file = GGUF(path)
    config, architecture = _config(file)
    model = Transformer.within(config, max_len, "meta").eval()
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
    scalings = {getattr(block.positions, "scaling", None) for block in model.config.blocks}
    derived = {FACTORS} if any(isinstance(scaling, Llama3Scaling) for scaling in scalings) else set()
    derived |= {SHORT, LONG} if any(isinstance(scaling, LongRopeScaling) for scaling in scalings) else set()
    if missing := expected - file.tensors.keys():
        raise ValueError(f"{file.path} lacks weights: {', '.join(sorted(missing))}")
    if unknown := file.tensors.keys() - expected - derived:
        raise ValueError(f"{file.path} has unknown weights: {', '.join(sorted(unknown))}")
    for rule in rules:
        found = [file.tensors[name].shape for name in rule.theirs]
        means = [tuple(t.shape) for t in rule.write([torch.empty(shapes[name], device="meta") for name in rule.ours])]
        for name, has, mean in zip(rule.theirs, found, means, strict=True):
            if has != mean:
                raise ValueError(f"{file.path}: {name} has shape {has}, the metadata mean {mean}")
    weights: dict[str, Tensor] = {}
    dtypes = model.dtypes(dtype or torch.float32)
    for rule in rules:
        read = rule.read([file.tensor(name).to(device) for name in rule.theirs])
        weights |= {name: t.to(dtypes[name]) for name, t in zip(rule.ours, read, strict=True)}
    return weights


def _stretched(file: GGUF, config: TransformerConfig) -> TransformerConfig:
    """With the positions of Llama 3.1, whose files divide each pair's frequency by a factor instead of saying how."""
    (block,) = set(config.blocks)
    assert isinstance(block.positions, RopeConfig)
    said = file.tensor(FACTORS).double()
    D, theta = block.mixer.rope_dim(config.d_model), block.positions.theta
    scaling = Llama3Scaling(max(1.0, round(said.max().item(), 4)), LLAMA3_LENGTH)
    factors = inverse_frequencies(D, theta) / scaling.frequencies(D, theta, config.context_length)[0]
    if said.shape != factors.shape or not torch.allclose(said, factors, rtol=1e-4):
        raise ValueError(f"{file.path} has {FACTORS} that are not Llama 3.1's: other stretched positions are not read")
    positions = dataclasses.replace(block.positions, scaling=scaling)
    return config.with_blocks((dataclasses.replace(block, positions=positions),) * config.num_layers)


def _numbers(t: Tensor) -> tuple[float, ...]:
    """1.1 of what is 1.1 in float32, as it was meant."""
    return tuple(float(str(value)) for value in t.flatten().numpy())


def _config(file: GGUF) -> tuple[TransformerConfig, Architecture]:
    name = file.get("general.architecture", str)
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{file.path} has general.architecture {name!r}: read are {known}")
    if "token_embd.weight" not in file.tensors or len(file.tensors["token_embd.weight"].shape) != 2:
        raise ValueError(f"{file.path} lacks weights: token_embd.weight, of two dims")
    table = {k.removeprefix(f"{name}."): v for k, v in file.metadata.items() if k.startswith(f"{name}.")}
    table |= {name: _numbers(file.tensor(name)) for name in (SHORT, LONG) if name in file.tensors}
    fields = Fields(table, above=f"{name}.", source=str(file.path))
    rows = file.tensors["token_embd.weight"].shape[0]
    try:
        config = ARCHITECTURES[name].read(fields, sizes(fields, rows, "output.weight" not in file.tensors))
    except ValueError as error:  # of Fields, which name the file, or of a model that cannot be
        raise error if str(file.path) in str(error) else ValueError(f"{file.path}: {error}") from None
    fields.finish()
    if name == "llama" and FACTORS in file.tensors and getattr(config.blocks[0].positions, "scaling", None) is None:
        config = _stretched(file, config)
    return config.short_form() or config, ARCHITECTURES[name]
