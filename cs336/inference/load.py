"""A trained model from where training left it: an export, a run directory, or one checkpoint; and its tokenizer."""

import os
import pathlib

import torch
from safetensors import safe_open

from cs336.models import Transformer, TransformerConfig, from_pretrained
from cs336.models.huggingface import read_step
from cs336.tokenizer import Tokenizer, convert
from cs336.training import TrainConfig, load_checkpoint
from cs336.training.checkpoint import MODEL, STATE, list_checkpoints, read_model_config
from cs336.utils.device import pick


def find_model(path: str | os.PathLike) -> pathlib.Path:
    """The export or checkpoint that `path` means: itself, or that of a run directory which was trained for most steps.

    Raises FileNotFoundError where there is none.
    """
    path = pathlib.Path(path)
    if (path / "config.json").exists() or (path / STATE).exists():
        return path
    found = {p: _step(p) for p in list_checkpoints(path / "checkpoints") if (path / "config.toml").exists()}
    if (path / "export" / "config.json").exists():
        found[path / "export"] = _export_step(path / "export", list(found))
    if not found:
        raise FileNotFoundError(f"{path} holds no model: expected an export, a run directory or a checkpoint of one")
    return max(reversed(found), key=found.__getitem__)  # the export is last: at the same step it is taken


def load_model(path: str | os.PathLike, device: str = "auto", dtype: torch.dtype | None = None) -> Transformer:
    """The model at `path`, an export or a checkpoint, for inference.

    device: "auto" is a GPU if there is one. dtype: of the weights; as they are stored if None.
    Raises FileNotFoundError where a file is missing, ValueError for damaged files.
    """
    path = pathlib.Path(path)
    if not (path / STATE).exists():
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


def _step(checkpoint: pathlib.Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _export_step(export: pathlib.Path, checkpoints: list[pathlib.Path]) -> int:
    """Of one that does not say, the step of the checkpoint with its embedding; before all of them if none has it."""
    if (step := read_step(export)) is not None:
        return step
    embedding = _embedding(export / "model.safetensors")
    return max((_step(p) for p in checkpoints if torch.equal(_embedding(p / MODEL), embedding)), default=-1)


def _embedding(path: pathlib.Path) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        (name,) = {"embedding.weight", "model.embed_tokens.weight"} & set(file.keys())
        return file.get_tensor(name)
