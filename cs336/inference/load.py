"""A trained model from where training left it: an export, a run directory, or one checkpoint; and its tokenizer."""

import os
import pathlib

import torch

from cs336.models import Transformer, TransformerConfig, from_pretrained
from cs336.tokenizer import Tokenizer, convert
from cs336.training import TrainConfig, load_checkpoint
from cs336.training.checkpoint import STATE, read_model_config
from cs336.training.weights import find_model as find_model
from cs336.utils.device import pick


def load_model(path: str | os.PathLike, device: str = "auto", dtype: torch.dtype | None = None) -> Transformer:
    """The model at `path`, an export or a checkpoint, for inference.

    device: "auto" is a GPU if there is one. dtype: of the weights; as they are stored if None.
    Raises FileNotFoundError where a file is missing, ValueError for damaged files.
    """
    path = pathlib.Path(path)
    if not ((path / STATE).exists() or path.is_file()):
        return from_pretrained(path, pick(device), dtype).eval()
    config = read_model_config(path, TransformerConfig)
    if config is None:  # the first release left it to the run directory
        described = path.resolve().parent.parent / "config.toml"
        if not described.exists():
            raise FileNotFoundError(
                f"{path} is a checkpoint outside its run directory: {described}, which describes it, is not there"
            )
        config = TrainConfig.from_toml(described).model
    model = Transformer(config, device=pick(device))
    load_checkpoint(path, model)
    return model.to(dtype).eval()


def find_tokenizer(path: str | os.PathLike) -> pathlib.Path:
    """The tokenizer.json that belongs to the model at `path`: beside it, or in its run directory or that one's export.

    Raises FileNotFoundError where there is none.
    """
    path = pathlib.Path(path).resolve()
    run = path.parent.parent if (path / STATE).exists() else path.parent
    for place in (path, run, run / "export"):
        if (place / "tokenizer.json").exists():
            return place / "tokenizer.json"
    raise FileNotFoundError(f"no tokenizer.json beside {path} or in its run directory: name one with --tokenizer")


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of the model at `path`, written by us or by Hugging Face.

    Raises FileNotFoundError where there is none, ValueError for one that does what a Tokenizer does not.
    """
    return convert.load(find_tokenizer(path))
