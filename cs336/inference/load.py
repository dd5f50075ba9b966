"""A trained model from where training left it: an export, a run directory, or one checkpoint; and its tokenizer."""

import os
import pathlib

import torch

from cs336.models import Transformer, TransformerConfig, from_gguf, from_pretrained, tokenizer_from_gguf
from cs336.models.gguf.model import config_of_gguf
from cs336.models.huggingface import base_of
from cs336.tokenizer import Tokenizer, convert
from cs336.training import TrainConfig, load_checkpoint
from cs336.training.checkpoint import STATE, read_model_config
from cs336.training.weights import find_model as find_model
from cs336.training.weights import model_config
from cs336.utils.config import parse, read_table
from cs336.utils.device import pick

DTYPES = ("float32", "bfloat16", "float16")


def weight_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Of its name, or "auto": None, for as the weights were saved. Raises ValueError for another."""
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        return dtype
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, or torch's own of these, got {dtype!r}")
    return None if dtype == "auto" else getattr(torch, dtype)


def load_model(
    path: str | os.PathLike, device: str = "auto", dtype: torch.dtype | None = None, max_len: int | None = None
) -> Transformer:
    """The model at `path`, an export, an adapter of one, a checkpoint or a GGUF file, for inference.

    device: "auto" is a GPU if there is one. dtype: of the weights; as they are stored if None. max_len: tokens of the
    longest text, see TransformerConfig.within.
    Raises FileNotFoundError where a file is missing, ValueError for damaged files.
    """
    path = pathlib.Path(path)
    if path.suffix == ".gguf":
        return from_gguf(path, pick(device), dtype, max_len=max_len)
    if not ((path / STATE).exists() or path.is_file()):
        return from_pretrained(path, pick(device), dtype, max_len=max_len).eval()
    config = read_model_config(path, TransformerConfig)
    if config is None:  # the first release left it to the run directory
        described = path.resolve().parent.parent / "config.toml"
        if not described.exists():
            raise FileNotFoundError(
                f"{path} is a checkpoint outside its run directory: {described}, which describes it, is not there"
            )
        config = TrainConfig.from_toml(described).model
    model = Transformer.within(config, max_len, pick(device))
    load_checkpoint(path, model)
    return model.to(dtype).eval()


def read_config(path: str | os.PathLike) -> TransformerConfig:
    """The configuration of a model, without its weights where these need not be read.

    path: a TOML file, of a run or of a model's fields alone; or what `load_model` and `find_model` take.
    Raises FileNotFoundError where there is none, ValueError for one that does not fit.
    """
    path = pathlib.Path(path)
    if path.suffix == ".toml":
        table = read_table(path)
        try:
            return parse(TransformerConfig, table.get("model", table))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    if path.suffix == ".gguf":
        return config_of_gguf(path)
    return model_config(path)


def find_tokenizer(path: str | os.PathLike) -> pathlib.Path:
    """The tokenizer.json, or else the tokenizer.model, that belongs to the model at `path`: beside it, in its run
    directory or that one's export, or with the base model of an adapter.

    Raises FileNotFoundError where there is none.
    """
    path = pathlib.Path(path).resolve()
    run = path.parent.parent if (path / STATE).exists() else path.parent
    for place in (path, run, run / "export", base_of(path)):
        for name in ("tokenizer.json", "tokenizer.model"):
            if (place / name).exists():
                return place / name
    raise FileNotFoundError(f"no tokenizer.json beside {path} or in its run directory: name one with --tokenizer")


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of the model at `path`, written by us or by Hugging Face.

    Raises FileNotFoundError where there is none, ValueError for one that does what a Tokenizer does not.
    """
    if pathlib.Path(path).suffix == ".gguf":
        return tokenizer_from_gguf(path)
    return convert.load(find_tokenizer(path))


def checked_context(path: str | os.PathLike, device: str) -> int:
    """The context length of the model at `path`, without its weights, for work that begins later.

    Raises FileNotFoundError where there is no model or no tokenizer, ValueError for a device that is not here.
    """
    pick(device)
    found = find_model(path)
    if found.suffix != ".gguf":  # which holds its own
        find_tokenizer(found)
    return read_config(found).context_length
